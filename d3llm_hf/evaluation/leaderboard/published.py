"""Published figures of diffusion language models, with their sources and where these contradict each other.

`published.json` holds, as they were published: the curves of d3LLM's and TAD's leaderboards (pairs of tokens per
forward and accuracy, with the y_max of their table, and the AUP where one is given), averages, tokens per second, the
ablation, and `contradictions`, the ledger of what differs between paper, repository, poster and the rest, each with
the value that is used here.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any


PATH = Path(__file__).with_name("published.json")
SCHEMA = 1
# Section -> the fields that each of its entries has, and their types.
_TEXT, _NUMBER = (str,), (int, float)
_GIVEN = (type(None), *_NUMBER)
_FIELDS: dict[str, dict[str, tuple[type, ...]]] = {
    "curves": {"tables": (list,), "model": _TEXT, "method": _TEXT, "task": _TEXT, "pairs": (list,), "aup": _GIVEN},
    "averages": {"table": _TEXT, "model": _TEXT, "method": _TEXT, "aup": _NUMBER},
    "throughput": {"model": _TEXT, "method": _TEXT, "task": _TEXT, "backend": _TEXT, "tokens_per_second": (dict,)},
    "contradictions": {
        "id": (int,),
        "about": _TEXT,
        "differs": _TEXT,
        "where": (list,),
        "used": _TEXT,
        "why": _TEXT,
    },
}


def published() -> dict[str, Any]:
    """All of `published.json`, checked. The caller may change what it gets.

    Raises:
        ValueError: as [`check`].
    """
    return json.loads(_text())


@lru_cache(maxsize=1)
def _text() -> str:
    text = PATH.read_text(encoding="utf-8")
    check(json.loads(text))
    return text


def check(content: dict[str, Any]) -> None:
    """Checks that figures are complete and consistent: every field there, every source and table named, y_max right.

    Raises:
        ValueError: naming the entry that is wrong.
    """
    _require(content.get("schema") == SCHEMA, "`schema`", f"must be {SCHEMA}", content.get("schema"))
    sources, tables = content["sources"], content["tables"]
    for section, fields in _FIELDS.items():
        for place, entry in enumerate(content[section]):
            name = f"{section}[{place}]"
            for field, types in fields.items():
                found = entry.get(field)
                _require(isinstance(found, types), f"`{name}.{field}`", f"must be {types[-1].__name__}", found)
            named = entry["where"] if section == "contradictions" else [entry["source"]] if "source" in entry else []
            _require(set(named) <= set(sources), f"`{name}`", f"must name sources of {sorted(sources)}", named)
    for place, curve in enumerate(content["curves"]):
        _require(
            all(len(pair) == 2 and pair[0] >= 1 and 1 < pair[1] <= 100 for pair in curve["pairs"]),
            f"`curves[{place}].pairs`",
            "must be pairs of tokens per forward and percent",
            curve["pairs"],
        )
        _require(set(curve["tables"]) <= set(tables), f"`curves[{place}].tables`", "must exist", curve["tables"])
    for table, name, task in ((t, n, task) for n, t in tables.items() for task in t["tasks"]):
        best = max(
            accuracy
            for curve in content["curves"]
            if name in curve["tables"] and curve["task"] == task["task"]
            for _, accuracy in curve["pairs"]
        )
        _require(
            task["y_max"] == best,
            f"`tables.{name}`, {task['task']}: y_max",
            f"must be {table['y_max_rule']}: {best}",
            task["y_max"],
        )


def _require(holds: bool, what: str, rule: str, got: Any) -> None:
    if not holds:
        raise ValueError(f"{what} {rule} (got {got!r}). Correct {PATH.name}.")


def published_points() -> list[dict[str, Any]]:
    """The points of the published curves, in the form of a sweep's points as far as they have the figures.

    Returns:
        dicts with `model`, `method`, `task`, `tpf`, `accuracy` (percent) and `parameter`, `value`, `settings` that are
        empty; there are no `samples`. Also `published`, always True; `source`, the name of a source; `tables`; the
        curve's `aup` as published, `None` where it is not, and the `y_max` of its table.
    """
    content = published()
    y_max = {
        (name, task["task"]): task["y_max"] for name, table in content["tables"].items() for task in table["tasks"]
    }
    return [
        {
            "schema": SCHEMA,
            "kind": "point",
            "model": curve["model"],
            "method": curve["method"],
            "parameter": None,
            "value": None,
            "settings": {},
            "task": curve["task"],
            "accuracy": accuracy,
            "tpf": tpf,
            "published": True,
            "source": curve["source"],
            "tables": curve["tables"],
            "aup": curve["aup"],
            "y_max": y_max[curve["tables"][0], curve["task"]],
        }
        for curve in content["curves"]
        for tpf, accuracy in curve["pairs"]
    ]


def contradictions() -> list[dict[str, Any]]:
    """The ledger: what differs between the sources (`about`, `differs`, `where`), which value is `used`, and `why`."""
    return published()["contradictions"]
