"""Tables in documents, made from results files, so that no figure is typed by hand.

    python -m d3llm_hf.evaluation.tables README.md           # rewrite what stands between the markers
    python -m d3llm_hf.evaluation.tables --check README.md   # fail if that would change anything

A document marks a table with `<!-- results:begin FILE -->` and `<!-- results:end -->`; FILE is relative to it.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


_MARKED = re.compile(r"(<!-- results:begin (?P<file>\S+) -->\n).*?(<!-- results:end -->)", re.DOTALL)


def table(results: dict[str, Any]) -> str:
    """The Markdown table of a results file of `d3llm_hf.evaluation.measure`, with what it takes to repeat it."""
    lines = [
        "| decoding | arguments of `generate` | accuracy | tokens per forward | positions per token |",
        "|---|---|---:|---:|---:|",
    ]
    for row in results["rows"]:
        arguments = ", ".join(f"`{name}={value!r}`" for name, value in row["settings"].items())
        lines.append(
            f"| {row['name']} | {arguments} | {row['accuracy']:.1f} % | {row['tpf']:.2f} | "
            f"{row['positions_per_token']:.0f} |"
        )
    made = results["provenance"]
    lines += [
        "",
        f"{results['problems']} {results['task']}; {results['parameters'] / 1e6:.2f} M parameters in float32 on "
        f"{made['device'].upper()}, torch {made['torch']}, transformers {made['transformers']}. "
        f"Regenerate: `{results['command']}`.",
    ]
    return "\n".join(lines) + "\n"


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
                "or make the file with `python -m d3llm_hf.evaluation.measure`."
            )
        return match[1] + table(json.loads(source.read_text(encoding="utf-8"))) + match[3]

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


if __name__ == "__main__":
    sys.exit(main())
