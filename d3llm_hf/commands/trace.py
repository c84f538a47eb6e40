"""`d3llm trace`: how an answer was decided, as one HTML file."""

import argparse
from pathlib import Path
from typing import Any

from ..files import check_writable, replace_file
from ..progress import progress_bar
from .common import new_parser, tell
from .generate import add_options, canvas_length, name_and_value, prepare


# What two methods that are compared have in common; all else is the method's own.
SHARED = ("max_new_tokens", "do_sample", "temperature", "seed")


def add_parser(subparsers) -> None:
    parser = new_parser(subparsers, "trace", run, "Show how an answer was decided, in one HTML file")
    add_options(parser)
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="HTML file; replaced if there"
    )
    parser.add_argument(
        "--compare",
        metavar="METHOD[:NAME=VALUE,...]",
        help="decode the prompt with this method too and show both side by side; it shares the answer's length, the "
        "temperature and the seed",
    )


def run(args: argparse.Namespace) -> None:
    compared = None if args.compare is None else _method(args.compare)
    if not args.output.parent.is_dir() or args.output.is_dir():
        raise ValueError(
            f"`--output` must be a file in a folder that exists (got {str(args.output)!r}). Make it first."
        )
    check_writable(args.output, "--output")
    prompt, model, tokenizer, inputs, settings = prepare(args)

    from ..watch.trace_page import page

    runs = [settings]
    if compared is not None:
        runs.append({name: settings[name] for name in SHARED if name in settings} | compared)
    traces = [_traced(model, tokenizer, prompt, inputs, args.model, chosen) for chosen in runs]
    replace_file(args.output, page(traces).encode())
    for trace in traces:
        tell(
            f"{trace.settings['decoding_method']}: {trace.answer_tokens} tokens in {trace.forwards} forwards "
            f"({trace.tokens_per_forward:.2f} tokens per forward), {trace.seconds[-1]:.2f} s"
        )
    tell(f"wrote {args.output}")


def _traced(model, tokenizer, prompt: str, inputs, name: str, settings: dict[str, Any]):
    from ..watch.trace import Recording

    length = canvas_length(model, settings)
    with (
        Recording(model, tokenizer, prompt, inputs, name=name, **settings) as recording,
        progress_bar(length, "token", settings.get("decoding_method", "decided"), leave=False) as bar,
    ):
        for _ in recording:
            bar.update(recording.decided - bar.n)
        return recording.trace()


def _method(text: str) -> dict[str, Any]:
    """`METHOD[:NAME=VALUE,...]` as arguments of `generate`."""
    method, _, tail = text.partition(":")
    return {"decoding_method": method} | dict(name_and_value("--compare", pair) for pair in tail.split(",") if tail)
