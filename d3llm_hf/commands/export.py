"""`d3llm export`: a checkpoint together with its code."""

import argparse

from .common import new_parser, tell


def add_parser(subparsers) -> None:
    parser = new_parser(subparsers, "export", run, "Make a checkpoint folder that carries its own code")
    parser.add_argument("source", help="a LLaDA, Dream or d3LLM checkpoint: a folder, or an id on the Hub")
    parser.add_argument("destination", help="folder to write")
    parser.add_argument("--name", help="name in the model card (default: that of the folder)")
    parser.add_argument("--revision", help="branch, tag or commit of a source on the Hub")
    parser.add_argument("--decoding-method", help="what the folder's generate() does unless told otherwise")
    parser.add_argument(
        "--for",
        dest="engine",
        choices=("sglang",),
        help="add what a serving engine needs, as far as its public code tells (see docs/engines.md)",
    )
    parser.add_argument("--results", help="results file whose figures the model card's metadata shall hold")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint folder that is there already")


def run(args: argparse.Namespace) -> None:
    from ..hub.checkpoints import export_checkpoint

    folder = export_checkpoint(
        args.source,
        args.destination,
        name=args.name,
        revision=args.revision,
        decoding_method=args.decoding_method,
        engine=args.engine,
        results=args.results,
        overwrite=args.overwrite,
    )
    tell(f"wrote {folder}")
