"""`d3llm bench`: what things cost, measured beside plain implementations in the same run."""

import argparse
import sys
from pathlib import Path

from ..files import check_writable, without_folders
from ..locks import only_writer
from . import bench_autoregressive, bench_decoding, bench_serve
from .common import new_parser, tell


# Option of `bench train` -> type and help. What is not given is the shape's.
_TRAIN: dict[str, tuple[type, str]] = {
    "vocab_size": (int, "tokens of the vocabulary"),
    "d_model": (int, "width of the model"),
    "layers": (int, "layers of the model"),
    "batch_size": (int, "samples of a batch"),
    "prompt_length": (int, "longest prompt, in tokens"),
    "response_length": (int, "answer canvas, in tokens"),
    "window": (int, "window of the answer that is learnt, in tokens"),
    "objective": (str, "trajectory, random or certainty"),
    "sft_weight": (float, "weight of the fine-tuning loss; 0 leaves its view out"),
    "dtype": (str, "float32 or bfloat16, of weights and activations"),
    "threads": (int, "threads of a CPU"),
    "steps": (int, "steps of a turn, each with a batch of its own"),
    "repeats": (int, "turns of each implementation"),
}
_SWITCHES = {
    "complementary": "learn from both views",
    "rollouts": "measure a step that learns states of a rollout, too",
}


def add_parser(subparsers) -> None:
    description = "Measure what things cost beside plain implementations"
    parser = subparsers.add_parser("bench", help=description.lower(), description=description + ".")
    benchmarks = parser.add_subparsers(title="benchmarks", metavar="BENCHMARK", required=True)
    train = new_parser(benchmarks, "train", run_train, "Time and memory of a distillation step")
    train.add_argument("--shape", default="wide-vocab", help="wide-vocab (the default) or tiny")
    for name, (kind, text) in _TRAIN.items():
        train.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=kind.__name__.upper(), help=text)
    for name, text in _SWITCHES.items():
        train.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, help=text)
    train.add_argument("--device", default="auto", help="cpu or cuda (default: cuda where there is one)")
    train.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the results as JSON, too")
    bench_decoding.add_parsers(benchmarks)
    bench_autoregressive.add_parser(benchmarks)
    bench_serve.add_parser(benchmarks)


def run_train(args: argparse.Namespace) -> None:
    from dataclasses import replace

    try:
        from trainers.bench.training import SHAPES, measure_training
    except ModuleNotFoundError as error:
        raise ImportError(
            f"`d3llm bench train` needs what the trainers need (got: {error}). Install it with "
            "`pip install 'd3llm-hf[train]'`."
        ) from error
    import torch

    from ..evaluation.provenance import write_json
    from ..evaluation.tables.fill import table

    if args.shape not in SHAPES:
        raise ValueError(f"`--shape` must be one of {list(SHAPES)} (got {args.shape!r}). Change it by other options.")
    if args.output is not None:
        check_writable(args.output, "--output")
    given = {name: getattr(args, name) for name in (*_TRAIN, *_SWITCHES) if getattr(args, name) is not None}
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    shape = replace(SHAPES[args.shape], **given, device=device)
    with only_writer(args.output, "--output"):
        results = measure_training(shape)
        results["command"] = _command(args, given)
        sys.stdout.write(table(results))
        if args.output is not None:
            write_json(args.output, results)
            tell(f"wrote {args.output}")


def _command(args: argparse.Namespace, given: dict) -> str:
    """The command that repeats a measurement, without folders of this machine."""
    words = ["d3llm bench train", f"--shape {args.shape}"]
    for name, value in given.items():
        flag = name.replace("_", "-")
        words.append(f"--{'' if value else 'no-'}{flag}" if isinstance(value, bool) else f"--{flag} {value}")
    if args.output is not None:
        words.append(f"-o {without_folders(args.output)}")
    return " ".join(words)
