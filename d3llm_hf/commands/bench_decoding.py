"""`d3llm bench decode`, `growth`, `blocks`, `quantised` and `all`."""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import check_writable, check_writable_folder, replace_file, without_folders
from ..locks import only_writer
from ..settings import SETTINGS
from .common import new_parser, tell


if TYPE_CHECKING:
    from ..bench.shapes import DecodingBench

# Option -> field of `DecodingBench`, type and help. What is not given is the shape's.
_SIZES: dict[str, tuple[str, type, str]] = {
    "vocab_size": ("vocab_size", int, "tokens of the vocabulary"),
    "d_model": ("d_model", int, "width of the model"),
    "layers": ("layers", int, "layers of the model"),
    "prompt_length": ("prompt_length", int, "prompt, in tokens"),
    "sure": ("sure", float, "share of the masks that the random model is sure of"),
}
_RUNS: dict[str, tuple[str, type, str]] = {
    "max_new_tokens": ("new_tokens", int, "answer canvas, in tokens"),
    "block_length": ("block_length", int, "positions of a block"),
    "batch_size": ("batch_size", int, "rows of a batch"),
    "prompts": ("prompts", int, "prompts that a turn decodes (default: a batch)"),
    "dtype": ("dtype", str, "float32, bfloat16 or float16"),
    "threads": ("threads", int, "threads of a CPU"),
    "repeats": ("repeats", int, "turns of each contestant"),
    "seed": ("seed", int, "of random weights and prompts"),
}
_SCHEDULE = {"schedule": ("schedule", int, "tokens that every forward decides, by LLaDA's quota")}
_OWN = {*_SIZES, *_RUNS}
_run = subprocess.run

# Names of results files -> the command that fills them. `bench all` runs them, each in a process of its own.
COMMITTED: dict[str, str] = {
    "bench_train": "train --shape wide-vocab --batch-size 4 --repeats 2",
    "bench_decode_8b_like": "decode --shape 8b-like --kv-cache delayed --cache-delay 1 --threads 2",
    "bench_decode_8b_like_bf16": (
        "decode --shape 8b-like --dtype bfloat16 --max-new-tokens 64 --threads 2 --repeats 1"
    ),
    "bench_decode_wide_vocab": "decode --shape wide-vocab --threads 2",
    "bench_decode_wide_vocab_bf16": (
        "decode --shape wide-vocab --dtype bfloat16 --max-new-tokens 64 --threads 2 --repeats 1"
    ),
    "bench_decode_rules": (
        "decode --shape tiny --vocab-size 1024 --batch-size 8 --prompt-length 128 --max-new-tokens 256 "
        "--block-length 32 --repeats 5"
    ),
    "bench_decode_checkpoint": (
        "decode --model d3llm-llada --max-new-tokens 64 --block-length 16 --entropy-threshold 0.3 --kv-cache dual "
        "--prompts 50"
    ),
    "bench_decode_checkpoint_batch": (
        "decode --model d3llm-llada --max-new-tokens 64 --block-length 16 --entropy-threshold 0.3 --prompts 50 "
        "--batch-size 8"
    ),
    "bench_decode_checkpoint_one_token": (
        "decode --model d3llm-llada --max-new-tokens 64 --block-length 16 --decoding-method llada --kv-cache dual "
        "--prompts 50 --batch-size 25"
    ),
    "bench_growth": (
        "growth --layers 2 --max-new-tokens 64 --prompt-lengths 128 512 2048 --answer-lengths 64 128 256 512 "
        "--batch-sizes 1 2 4 8 --repeats 1"
    ),
    "bench_blocks": "blocks --prompt-length 1024 --prompt-lengths 128 512 2048 --threads 2 --repeats 1",
    "bench_quantised": "quantised",
    "bench_serve": "serve --requests 100 --slots 16 --repeats 2 --kv-cache dual",
}


def add_parsers(benchmarks) -> None:
    """Adds the subcommands to those of `d3llm bench`."""
    decode = new_parser(benchmarks, "decode", run_decode, "Speed of decoding, beside a plain loop of the same method")
    decode.add_argument("--shape", help="8b-like (the default), wide-vocab or tiny: a model with random weights")
    decode.add_argument("--model", default="", help="a checkpoint in place of it, which answers word problems")
    _add_options(decode, _SIZES | _RUNS | _SCHEDULE)

    growth = new_parser(benchmarks, "growth", run_growth, "Cost by prompt length, answer length and batch")
    growth.add_argument("--shape", help="the shape whose axes are changed, as of decode")
    for option, text in (("prompt-lengths", "prompts"), ("answer-lengths", "answers"), ("batch-sizes", "batches")):
        growth.add_argument(f"--{option}", type=int, nargs="*", default=[], metavar="N", help=f"{text} to measure")
    growth.add_argument("--no-picture", action="store_true", help="write no SVG beside the results")
    _add_options(growth, _SIZES | _RUNS | _SCHEDULE)

    blocks = new_parser(benchmarks, "blocks", run_blocks, "What block-causal attention saves beside full one")
    blocks.add_argument("--shape", help="as of decode")
    blocks.add_argument(
        "--prompt-lengths",
        type=int,
        nargs="*",
        default=[],
        metavar="N",
        help="further prompts, with kept blocks alone",
    )
    _add_options(blocks, _SIZES | _RUNS | _SCHEDULE)

    quantised = new_parser(benchmarks, "quantised", run_quantised, "Accuracy and speed with int8 weights")
    quantised.add_argument("--model", default="d3llm-llada", help="a checkpoint (default: d3llm-llada)")
    _add_options(
        quantised, {name: option for name, option in _RUNS.items() if name not in ("dtype", "repeats", "seed")}
    )
    quantised.set_defaults(prompts=100, max_new_tokens=64)

    every = new_parser(benchmarks, "all", run_all, "Fill every results file of a device")
    every.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder of the results files")
    every.add_argument("--device", default="cuda", help="cuda (the default), whose files end in -cuda.json, or cpu")
    every.add_argument("--only", nargs="+", metavar="NAME", help=f"of {', '.join(COMMITTED)}")


def _add_options(parser: argparse.ArgumentParser, options: dict[str, tuple[str, type, str]]) -> None:
    for name, (_, kind, text) in options.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=kind.__name__.upper(), help=text)
    parser.add_argument("--device", default="auto", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the results as JSON, too")
    group = parser.add_argument_group("decoding", "As of `d3llm generate`; what is not given is the method's.")
    for name, (kind, text) in SETTINGS.items():
        if name in _OWN:
            continue
        flags = [f"--{name.replace('_', '-')}", *(["--method"] if name == "decoding_method" else [])]
        if kind is bool:
            group.add_argument(*flags, action=argparse.BooleanOptionalAction, help=text)
        else:
            group.add_argument(*flags, type=kind, metavar=kind.__name__.upper(), help=text)


def _bench(args: argparse.Namespace, **more: Any) -> "DecodingBench":
    """The shape, with what the options change.

    Raises:
        ValueError: For an unknown shape, or a value outside its range.
    """
    from dataclasses import replace

    import torch

    from ..bench.shapes import SHAPES, DecodingBench

    if args.output is not None:
        check_writable(args.output, "--output")
    name = getattr(args, "shape", None)
    if name is not None and name not in SHAPES:
        raise ValueError(f"`--shape` must be one of {list(SHAPES)} (got {name!r}). Change it by other options.")
    model = getattr(args, "model", "")
    if model and (name or any(getattr(args, option, None) is not None for option in _SIZES)):
        raise ValueError(
            f"`--model` has sizes of its own (got {model!r} with a shape or sizes). Leave out one of them."
        )
    chosen = {
        option[0]: getattr(args, flag)
        for flag, option in (_SIZES | _RUNS | _SCHEDULE).items()
        if getattr(args, flag, None) is not None
    }
    settings = {key: getattr(args, key) for key in SETTINGS if key not in _OWN and getattr(args, key) is not None}
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    shape = DecodingBench() if name is None else SHAPES[name]
    return replace(shape, **chosen, **more, model=model, settings=settings, device=device)


def run_decode(args: argparse.Namespace) -> None:
    from ..bench.decoding import measure_decoding

    bench = _bench(args)
    with only_writer(args.output, "--output"):
        write_results(args, measure_decoding(bench))


def run_growth(args: argparse.Namespace) -> None:
    from ..bench.growth import draw, growth_bench, measure_growth

    axes = {
        "prompt_length": args.prompt_lengths,
        "new_tokens": args.answer_lengths,
        "batch_size": args.batch_sizes,
    }
    bench = growth_bench(_bench(args))
    with only_writer(args.output, "--output"):
        results = measure_growth(bench, axes)
        write_results(args, results)
        if args.output is not None and not args.no_picture:
            write_picture(args.output, draw, results)


def write_picture(output: Path, draw: Callable[[dict[str, Any], str], bytes], results: dict[str, Any]) -> None:
    """Writes the picture of a results file beside it, or says what it needs."""
    picture = output.with_suffix(".svg")
    try:
        replace_file(picture, draw(results, "svg"))
    except ImportError as error:
        tell(str(error))
    else:
        tell(f"wrote {picture}")


def run_blocks(args: argparse.Namespace) -> None:
    from ..bench.blocks import blocks_bench, measure_blocks

    bench = blocks_bench(_bench(args))
    with only_writer(args.output, "--output"):
        write_results(args, measure_blocks(bench, args.prompt_lengths))


def run_quantised(args: argparse.Namespace) -> None:
    from ..bench.quantised import measure_quantised

    bench = _bench(args)
    with only_writer(args.output, "--output"):
        write_results(args, measure_quantised(bench))


def write_results(args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Prints the table, and writes the results with the command that repeats them."""
    from ..evaluation.provenance import write_json
    from ..evaluation.tables.fill import table

    results["command"] = command_of(args)
    sys.stdout.write(table(results))
    if args.output is not None:
        write_json(args.output, results)
        tell(f"wrote {args.output}")


def command_of(args: argparse.Namespace) -> str:
    """The command that repeats a measurement, without folders of this machine."""
    words = ["d3llm bench", args.run.__name__.removeprefix("run_")]
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')}"
        if name in ("run", "debug", "output") or value in (None, "", []):
            continue
        if name == "no_picture":
            words += [flag] * value
        elif isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, list):
            words.append(f"{flag} {' '.join(map(str, value))}")
        elif (name, value) != ("device", "auto"):
            words.append(f"{flag} {without_folders(str(value))}")
    if args.output is not None:
        words.append(f"-o {without_folders(args.output)}")
    return " ".join(words)


def run_all(args: argparse.Namespace) -> None:
    names = args.only or list(COMMITTED)
    unknown = [name for name in names if name not in COMMITTED]
    if unknown:
        raise ValueError(f"`--only` must name some of {list(COMMITTED)} (got {unknown}). Correct the name.")
    check_writable_folder(args.output.absolute(), "--output")
    failed = []
    for name in names:
        path = args.output / f"{name}{'-cuda' if args.device == 'cuda' else ''}.json"
        words = [*shlex.split(COMMITTED[name]), "--device", args.device, "-o", str(path)]
        tell(f"d3llm bench {' '.join(words)}")
        if _run([sys.executable, "-m", "d3llm_hf", "bench", *words]).returncode:
            failed.append(name)
    if failed:
        raise ValueError(f"Some benches failed (got errors from {failed}, see above). Run them again with `--only`.")
