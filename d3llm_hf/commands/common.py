"""Options and output that subcommands share."""

import argparse
import sys


def new_parser(subparsers, name: str, run, description: str) -> argparse.ArgumentParser:
    """Adds the parser of a subcommand that `run(args)` carries out."""
    parser = subparsers.add_parser(name, help=description[0].lower() + description[1:], description=description + ".")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(run=run)
    return parser


def tell(message: str) -> None:
    """Writes a line to stderr: stdout is for results that another program may read."""
    sys.stderr.write(message + "\n")
