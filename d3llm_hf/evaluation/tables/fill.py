"""Tables in documents, made from results files, so that no figure is typed by hand.

    python -m d3llm_hf.evaluation.tables docs/methods.md           # rewrite what stands between the markers
    python -m d3llm_hf.evaluation.tables --check docs/methods.md   # fail if that would change anything

A document marks a table with `<!-- results:begin FILE -->` and `<!-- results:end -->`; FILE is relative to it.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..suites import SUITES, Suite
from . import ablation, bench, estimate, forms, leaderboard, sweep


# Results files that are not made of a suite's rows.
_OTHERS = bench.TABLES | ablation.TABLES | estimate.TABLES | forms.TABLES | leaderboard.TABLES | sweep.TABLES
_MARKED = re.compile(r"(<!-- results:begin (?P<file>\S+) -->\n).*?(<!-- results:end -->)", re.DOTALL)


def _arguments(settings: dict[str, Any]) -> str:
    return ", ".join(f"`{name}={value!r}`" for name, value in settings.items())


def _added(row: dict[str, Any], rows: dict[str, dict[str, Any]]) -> str:
    """What a row's settings add to those of the row that it is compared with; that row shows all of its own."""
    base = {} if row["against"] == row["name"] else rows[row["against"]]["settings"]
    return _arguments({name: value for name, value in row["settings"].items() if base.get(name) != value})


# Column -> its head, whether it is a number, and its text for a row among all (by name).
COLUMNS: dict[str, tuple[str, bool, Callable[[dict[str, Any], dict[str, dict[str, Any]]], str]]] = {
    "name": ("decoding", False, lambda row, rows: row["name"]),
    "settings": ("arguments of `generate`", False, lambda row, rows: _arguments(row["settings"])),
    "added": ("arguments of `generate`", False, _added),
    "batch": ("batch", True, lambda row, rows: f"{row['batch']}"),
    "accuracy": ("accuracy", True, lambda row, rows: f"{row['accuracy']:.1f} %"),
    "equal_tokens": ("same tokens", True, lambda row, rows: f"{row['equal_tokens']:.1f} %"),
    "differing_answers": ("answers that differ", True, lambda row, rows: f"{row['differing_answers']}"),
    "forwards": ("forwards", True, lambda row, rows: f"{row['forwards']}"),
    "forwards_saved": ("forwards saved", True, lambda row, rows: f"{row['forwards_saved']:.0f} %"),
    "positions": ("positions", True, lambda row, rows: f"{row['positions']}"),
    "tpf": ("tokens per forward", True, lambda row, rows: f"{row['tpf']:.2f}"),
    "positions_per_token": ("positions per token", True, lambda row, rows: f"{row['positions_per_token']:.0f}"),
    "seconds": ("s", True, lambda row, rows: f"{row['seconds']:.1f}"),
    "cpu_seconds": ("CPU s", True, lambda row, rows: f"{row['cpu_seconds']:.1f}"),
    "relative_cpu": ("relative", True, lambda row, rows: f"{row['relative_cpu']:.2f}"),
}


def table(results: dict[str, Any]) -> str:
    """The Markdown of a results file, with what it takes to repeat it.

    Raises:
        ValueError: for a suite that does not exist.
    """
    name = results.get("suite", "card")
    if name in _OTHERS:
        return _OTHERS[name](results)
    if name not in SUITES:
        known = [*SUITES, *_OTHERS]
        raise ValueError(f"`suite` of a results file must be one of {known} (got {name!r}). Measure it again.")
    suite, made = SUITES[name], results["provenance"]
    notes = f" {suite.notes}" if suite.notes else ""
    lines = [
        *_rows(suite, results["rows"]),
        "",
        f"{results['problems']} {results['task']}; {results['parameters'] / 1e6:.2f} M parameters in float32 on "
        f"{made['device'].upper()}, torch {made['torch']}, transformers {made['transformers']}.{notes} "
        f"Regenerate: `{results['command']}`.",
    ]
    if suite.larger is not None:
        larger = results["larger"]
        lines += [
            "",
            *_rows(suite.larger, larger["rows"]),
            "",
            f"{suite.larger.notes} {larger['parameters'] / 1e6:.1f} M parameters ({larger['layers']} layers of width "
            f"{larger['width']}, {larger['vocabulary']} tokens), {larger['prompt_tokens']} tokens of prompt, "
            f"{larger['new_tokens']} new ones, float32, one thread; rounds: {larger['rounds']}. Made by the same "
            "command.",
        ]
    return "\n".join(lines) + "\n"


def _rows(suite: Suite, rows: list[dict[str, Any]]) -> list[str]:
    columns = [COLUMNS[column] for column in suite.columns]
    by_name = {row["name"]: row for row in rows}
    lines = [
        f"| {' | '.join(head for head, _, _ in columns)} |",
        f"|{'|'.join('---:' if number else '---' for _, number, _ in columns)}|",
    ]
    return lines + [f"| {' | '.join(text(row, by_name) for _, _, text in columns)} |" for row in rows]


def _loaded(source: Path) -> dict[str, Any]:
    """A results file; as its `cuda` the one that `d3llm bench all` has written beside it, where there is one.

    One of JSON lines is that of a sweep.
    """
    if source.suffix == ".jsonl":
        return sweep.points_of(source)
    results = json.loads(source.read_text(encoding="utf-8"))
    cuda = source.with_name(f"{source.stem}-cuda.json")
    return results | {"cuda": json.loads(cuda.read_text(encoding="utf-8"))} if cuda.is_file() else results


def fill(document: Path) -> str:
    """The document's text with every marked table made anew.

    Raises:
        ValueError: where the document has no marker, or a marker names a file that does not exist.
    """

    def replacement(match: re.Match) -> str:
        source = document.parent / match["file"]
        if not source.is_file():
            raise ValueError(
                f"The marker in {document.name} must name a results file (got {match['file']!r}). Correct the marker, "
                "or make the file with `python -m d3llm_hf.evaluation.measure` or `d3llm bench`."
            )
        return match[1] + table(_loaded(source)) + match[3]

    text, count = _MARKED.subn(replacement, document.read_text(encoding="utf-8"))
    if not count:
        raise ValueError(
            f"`document` must hold `<!-- results:begin FILE -->` and `<!-- results:end -->` (got {document.name} "
            "without them). Add the markers where the table belongs."
        )
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrites the documents, or with `--check` reports those whose tables differ from the results files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", type=Path, nargs="+")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where a table differs")
    args = parser.parse_args(argv)
    stale = [document for document in args.documents if fill(document) != document.read_text(encoding="utf-8")]
    for document in stale:
        if args.check:
            sys.stderr.write(f"{document}: its tables differ from the results files; run without --check.\n")
        else:
            document.write_text(fill(document), encoding="utf-8")
    return int(args.check and bool(stale))
