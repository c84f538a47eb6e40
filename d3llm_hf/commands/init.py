"""`d3llm init`: write an embedded checkpoint."""

import argparse

from .common import new_parser, tell


def add_parser(subparsers) -> None:
    parser = new_parser(subparsers, "init", run, "Write an embedded checkpoint as a folder that AutoModel loads")
    parser.add_argument("name", help='the checkpoint, for example "d3llm-llada"')
    parser.add_argument("destination", nargs="?", help="folder to write (default: the name, in the working directory)")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint folder that is there already")


def run(args: argparse.Namespace) -> None:
    from ..hub.checkpoints import init_checkpoint

    tell(f"wrote {init_checkpoint(args.name, args.destination, overwrite=args.overwrite)}")
