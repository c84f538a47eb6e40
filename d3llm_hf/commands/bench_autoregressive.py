"""`d3llm bench autoregressive`: causal models, plain and by drafts."""

import argparse
import sys
from pathlib import Path

from ..files import check_writable, without_folders
from ..locks import only_writer
from .common import new_parser, tell
from .sweep import method_and_settings


# Option -> field of `ARBench`, type and help. What is not given is the bench's.
_OPTIONS: dict[str, tuple[str, type, str]] = {
    "model": ("model", str, "a causal checkpoint, which answers word problems; a random Llama without one"),
    "assistant": ("assistant", str, "a causal checkpoint that drafts with ar_assistant"),
    "draft-head": ("draft_head", str, "folder or id of the head that drafts with eagle3"),
    "vocab-size": ("vocab_size", int, "tokens of the random model's vocabulary"),
    "d-model": ("d_model", int, "width of the random model"),
    "layers": ("layers", int, "layers of the random model"),
    "prompt-length": ("prompt_length", int, "random prompt, in tokens"),
    "max-new-tokens": ("new_tokens", int, "most tokens of an answer"),
    "prompts": ("prompts", int, "prompts that a turn decodes, one by one"),
    "dtype": ("dtype", str, "float32, bfloat16 or float16"),
    "threads": ("threads", int, "threads of a CPU"),
    "repeats": ("repeats", int, "turns of each method"),
    "seed": ("seed", int, "of random weights and prompts"),
}
_OF_RANDOM = ("vocab_size", "d_model", "layers", "prompt_length")


def add_parser(benchmarks) -> None:
    """Adds the subcommand to those of `d3llm bench`."""
    parser = new_parser(benchmarks, "autoregressive", run, "Speed of causal models, plain and by drafts")
    for option, (field, kind, text) in _OPTIONS.items():
        parser.add_argument(f"--{option}", dest=field, type=kind, metavar=kind.__name__.upper(), help=text)
    parser.add_argument("--device", default="auto", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help="ar_prompt_lookup (the default), ar_assistant, ..., LABEL=METHOD:NAME=VALUE,...; ar is always measured",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the results as JSON, too")


def run(args: argparse.Namespace) -> None:
    import torch

    from ..bench.autoregressive import ARBench, measure_autoregressive
    from ..evaluation.provenance import write_json
    from ..evaluation.tables.fill import table

    given = {field: getattr(args, field) for field, _, _ in _OPTIONS.values() if getattr(args, field) is not None}
    idle = [name for name in _OF_RANDOM if args.model and name in given]
    if idle:
        raise ValueError(f"`--model` has sizes of its own (got {args.model!r} with {idle}). Leave out one of them.")
    if args.methods is not None:
        given["methods"] = tuple(method_and_settings(text) for text in args.methods)
    if args.output is not None:
        check_writable(args.output, "--output")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    bench = ARBench(**given, device=device)
    with only_writer(args.output, "--output"):
        results = measure_autoregressive(bench)
        results["command"] = _command(args)
        sys.stdout.write(table(results))
        if args.output is not None:
            write_json(args.output, results)
            tell(f"wrote {args.output}")


def _command(args: argparse.Namespace) -> str:
    """The command that repeats a measurement, without folders of this machine."""
    words = ["d3llm bench autoregressive"]
    for option, (field, _, _) in _OPTIONS.items():
        value = getattr(args, field)
        if value is not None:
            words.append(f"--{option} {without_folders(str(value))}")
    words += [f"--device {args.device}"] * (args.device != "auto")
    words += [f"--methods {' '.join(args.methods)}"] if args.methods else []
    if args.output is not None:
        words.append(f"-o {without_folders(args.output)}")
    return " ".join(words)
