"""The table of `d3llm_hf.evaluation.forms`."""

from collections.abc import Callable
from typing import Any


def forms_table(results: dict[str, Any]) -> str:
    """The Markdown of forms against free text, with what it takes to repeat it."""
    lines = [
        "| checkpoint | answered as | accuracy | valid | forwards | positions | s |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in results["rows"]:
        lines.append(
            f"| {row['model']} | {row['name']} | {row['accuracy']:.1f} % | {row['valid']:.1f} % | "
            f"{row['forwards']:.1f} | {row['positions']:.0f} | {row['seconds']:.0f} |"
        )
    settings = ", ".join(f"`{name}={value!r}`" for name, value in results["settings"].items())
    made = next(iter(results["provenance"].values()))
    lines += [
        "",
        f"{results['problems']} held-out word problems of 2-5 steps, {settings}, batches of 25, float32, one thread. "
        "Accuracy: the number is right. Valid: there is one where it belongs. Forwards and positions are those of a "
        f"problem, seconds those of all. torch {made['torch']}, transformers {made['transformers']}. Regenerate: "
        f"`{results['command']}`.",
    ]
    return "\n".join(lines) + "\n"


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {"forms": forms_table}
