"""What the benches of this folder do with what they have measured."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from d3llm_hf.evaluation.provenance import write_json
from d3llm_hf.evaluation.tables.fill import table
from d3llm_hf.files import check_writable, without_folders
from d3llm_hf.locks import only_writer


def add_output(parser: argparse.ArgumentParser) -> None:
    """Adds the option that names a results file."""
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the results as JSON, too")


def report(
    parser: argparse.ArgumentParser, argv: Sequence[str], output: Path | None, measure: Callable[[], dict[str, Any]]
) -> None:
    """Measures, prints the table, and writes the results with the command that repeats them where a file is named.

    Raises:
        ValueError: For a file that cannot be written, before anything is measured.
    """
    if output is not None:
        check_writable(output, "--output")
    with only_writer(output, "--output"):
        results = measure()
        results["command"] = " ".join([parser.prog, *map(without_folders, argv)])
        sys.stdout.write(table(results))
        if output is not None:
            write_json(output, results)
