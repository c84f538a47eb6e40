"""The table of a results file of `d3llm sweep`, point by point, for documents."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def points_of(file: Path) -> dict[str, Any]:
    """The points of a file of JSON lines, in the form of other results files."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return {"suite": "sweep", "points": [json.loads(line) for line in lines]}


# Head of a column -> its text for a point; columns in which no point has a figure are left out, and the batch where
# it is the same for all.
_COLUMNS: dict[str, Callable[[dict[str, Any]], str | None]] = {
    "batch": lambda point: f"{point['provenance']['batch_size']}",
    "accuracy": lambda point: f"{point['accuracy']:.1f} %",
    "tokens": lambda point: f"{sum(point['samples']['tokens'])}",
    "forwards": lambda point: f"{sum(point['samples']['forwards'])}",
    "tokens per forward": lambda point: f"{point['tpf']:.2f}",
    "positions per token": lambda point: f"{point['positions_per_token']:.1f}",
    "draft forwards per token": lambda point: _positive(point, "draft_forwards_per_token", ".2f"),
    "draft positions per token": lambda point: _positive(point, "draft_positions_per_token", ".1f"),
    "tokens/s": lambda point: f"{point['tokens_per_second']:.1f}",
    "answers as plain greedy's": lambda point: _share(point["samples"].get("equal_to_plain")),
}


def _positive(point: dict[str, Any], name: str, form: str) -> str | None:
    return f"{point[name]:{form}}" if point.get(name) else None


def _share(values: Sequence[int] | None) -> str | None:
    return None if values is None else f"{sum(values)} of {len(values)}"


def sweep_table(results: dict[str, Any]) -> str:
    """The Markdown of the points of a sweep, and how they were made."""
    points = results["points"]
    shown = {head: [text(point) for point in points] for head, text in _COLUMNS.items()}
    if len(set(shown["batch"])) == 1:
        del shown["batch"]
    shown = {head: texts for head, texts in shown.items() if any(texts)}
    names = [f"{point['model']}, {point['method']}" + _setting(point) for point in points]
    lines = [f"| decoding | {' | '.join(shown)} |", f"|---|{'---:|' * len(shown)}"]
    rows = zip(names, *shown.values(), strict=True)
    lines += [f"| {' | '.join(text or '' for text in row)} |" for row in rows]
    return "\n".join([*lines, "", _made(points)]) + "\n"


def _setting(point: dict[str, Any]) -> str:
    return "" if point["parameter"] is None else f", `{point['parameter']}={point['value']!r}`"


def _made(points: Sequence[dict[str, Any]]) -> str:
    """Task, machine and commands, each once."""

    def each(text: Callable[[dict[str, Any]], Any], word: str = " and ") -> str:
        return word.join(dict.fromkeys(str(found) for point in points if (found := text(point)) is not None))

    batches = each(lambda point: point["provenance"]["batch_size"])
    commands = each(lambda point: _code(point["provenance"].get("command")), ", ")
    return (
        f"{each(lambda point: point['num_samples'])} samples of {each(lambda point: point['task'])}, at most "
        f"{each(lambda point: point['provenance']['max_new_tokens'])} new tokens, batches of {batches}, "
        f"{each(lambda point: point['provenance']['dtype'])}, threads: "
        f"{each(lambda point: point['provenance']['threads'])}, {each(_versions)}. Tokens before "
        f"the stop token count; forwards and positions are the model's, those of drafts apart."
        + (f" Regenerate: {commands}." if commands else "")
    )


def _code(text: str | None) -> str | None:
    return None if text is None else f"`{text}`"


def _versions(point: dict[str, Any]) -> str:
    made = point["provenance"]
    return f"{made['device'].upper()}, torch {made['torch']}, transformers {made['transformers']}"


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {"sweep": sweep_table}
