"""`d3llm push`: publish a checkpoint folder on the Hub."""

import argparse
import sys

from .common import new_parser, tell


def add_parser(subparsers) -> None:
    parser = new_parser(subparsers, "push", run, "Publish a checkpoint folder, with its code, on the Hugging Face Hub")
    parser.add_argument("folder", help="as `d3llm init`, `d3llm export` or a trainer writes it")
    parser.add_argument("repo", help="the repository, for example me/my-model; it is made if need be")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to commit to (default: main)")
    parser.add_argument("--message", help="of the commit")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--dry-run", action="store_true", help="check the folder and list what would be sent")


def run(args: argparse.Namespace) -> None:
    from ..hub.push import checked_files, left_out, push_folder

    files = checked_files(args.folder)
    for name in left_out(args.folder):
        tell(f"not sent: {name}")
    if args.dry_run:
        for file in files:
            sys.stdout.write(f"{file.stat().st_size:>14,}  {file.name}\n")
        tell(f"{len(files)} files are fit to be sent to {args.repo}; nothing was sent")
        return
    commit = push_folder(
        args.folder,
        args.repo,
        private=args.private or None,
        revision=args.revision,
        message=args.message,
        create_pr=args.create_pr,
    )
    tell(f"{len(files)} files in one commit")
    sys.stdout.write(f"{commit.pr_url or commit.commit_url}\n")
