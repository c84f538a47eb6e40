"""`d3llm metric`: where `evaluate.load("aup")` finds the metric."""

import argparse
import sys

from .common import new_parser, tell


def add_parser(subparsers) -> None:
    parser = new_parser(subparsers, "metric", run, 'Install the metric "aup" for evaluate.load, or say where it lies')
    parser.add_argument(
        "action",
        choices=("install", "uninstall", "path"),
        help="install: copy it to where evaluate.load finds it, which importing d3llm_hf does too; uninstall: remove "
        "the copy; path: print the folder of the metric, which evaluate.load takes as well",
    )


def run(args: argparse.Namespace) -> None:
    from ..metrics import registration

    if args.action == "install":
        tell(f"wrote {registration.install_metric()}")
    elif args.action == "uninstall":
        # Importing the package, which has just happened, may have written the copy: it is gone until the next import.
        tell(f"removed {registration.slot()}" if registration.uninstall_metric() else "nothing to remove")
        tell(f"importing d3llm_hf writes it again, unless the environment has {registration.OPT_OUT}=1")
    else:
        sys.stdout.write(registration.METRIC_FOLDER + "\n")
