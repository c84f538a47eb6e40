"""`d3llm bench serve`: requests that join those at work, beside batches in which nobody joins."""

import argparse
from pathlib import Path

from ..files import check_writable
from ..locks import only_writer
from ..settings import SETTINGS
from .bench_decoding import write_picture, write_results
from .common import new_parser
from .generate import add_settings


# Option -> type and help. What is not given is the bench's.
_OPTIONS: dict[str, tuple[type, str]] = {
    "model": (str, "a checkpoint, which answers word problems (d3llm-llada)"),
    "requests": (int, "requests of a turn (60)"),
    "slots": (int, "rows at work at most (8)"),
    "dtype": (str, "float32, bfloat16 or float16"),
    "threads": (int, "threads of a CPU"),
    "repeats": (int, "turns of each at each load"),
    "seed": (int, "of problems and arrivals"),
}
_LISTS: dict[str, tuple[type, str]] = {
    "lengths": (int, "longest answers that requests ask for (24 32 40 48 56 64)"),
    "loads": (float, "requests a second, as multiples of what batches answer when all wait at once (0.5 1 2)"),
}


def add_parser(benchmarks) -> None:
    """Adds the subcommand to those of `d3llm bench`."""
    parser = new_parser(benchmarks, "serve", run_serve, "A server whose requests join, beside batches only")
    for name, (kind, text) in _OPTIONS.items():
        parser.add_argument(f"--{name}", type=kind, metavar=kind.__name__.upper(), help=text)
    for name, (kind, text) in _LISTS.items():
        parser.add_argument(f"--{name}", type=kind, nargs="+", metavar=kind.__name__.upper(), help=text)
    parser.add_argument("--device", default="auto", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--no-picture", action="store_true", help="write no SVG beside the results")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the results as JSON, too")
    add_settings(parser, without=("seed",))


def run_serve(args: argparse.Namespace) -> None:
    import torch

    from ..bench.serving import ServeBench, draw, measure_serving

    if args.output is not None:
        check_writable(args.output, "--output")
    given = {name: getattr(args, name) for name in _OPTIONS if getattr(args, name) is not None}
    given |= {name: tuple(getattr(args, name)) for name in _LISTS if getattr(args, name) is not None}
    names = [name for name in SETTINGS if name not in _OPTIONS and getattr(args, name) is not None]
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    bench = ServeBench(**given, device=device, settings={name: getattr(args, name) for name in names})
    with only_writer(args.output, "--output"):
        results = measure_serving(bench)
        write_results(args, results)
        if args.output is not None and not args.no_picture:
            write_picture(args.output, draw, results)
