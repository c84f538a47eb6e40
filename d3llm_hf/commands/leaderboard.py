"""`d3llm leaderboard`: tables, pictures and a page of results files."""

import argparse

from .common import new_parser, tell


def add_parser(subparsers) -> None:
    parser = new_parser(subparsers, "leaderboard", run, "Make tables, pictures and a page of the results of sweeps")
    parser.add_argument("results", nargs="*", help="results files of `d3llm sweep`")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--published", action="store_true", help="show the published figures too, marked as such")
    parser.add_argument("--title", help="of the page")


def run(args: argparse.Namespace) -> None:
    from ..evaluation.leaderboard.write import TITLE, write_leaderboard

    folder = write_leaderboard(args.results, args.output, published=args.published, title=args.title or TITLE)
    tell(f"wrote {folder / 'index.html'}")
