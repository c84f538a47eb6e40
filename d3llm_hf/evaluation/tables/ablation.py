"""The tables of the results file of `trainers/run_ablation.py`."""

from collections.abc import Callable, Sequence
from typing import Any


def ablation_table(results: dict[str, Any]) -> str:
    """The Markdown of an ablation: a table for every decoding, then what was measured and how to repeat it."""
    plan, one_token, made = results["plan"], results["one_token"], results["provenance"]
    lines = []
    for decoding, settings in plan["decodings"].items():
        rows = [row for row in results["rows"] if row["decoding"] == decoding]
        arguments = ", ".join(f"`{name}={value!r}`" for name, value in settings.items())
        lines += [f"Decoded {decoding} ({arguments}):", "", *_rows(rows, plan["twin"], plan["slack"]), ""]
    low, high = one_token["accuracy_interval"]
    within = f"TPF within {plan['slack']:g} point{'s' * (plan['slack'] != 1)}"
    lines.append(
        f"Accuracy and tokens per forward (TPF) at each `entropy_threshold`, averages of {len(plan['seeds'])} students"
        f" an arm. {within}: the most that the curve reaches while its accuracy is at most so much under the teacher's"
        f" at one token a forward, which is {one_token['accuracy']:.1f} % ({low:.1f} to {high:.1f}) and also AUP's"
        f" `y_max`. Ratios compare it with the teacher's and with that of “{plan['twin']}”. In brackets: 95 %"
        f" bootstrap intervals over {one_token['num_samples']} held-out problems, the same for all, and over seeds."
        f" Float32 on {made['device'].upper()}, torch {made['torch']}, transformers {made['transformers']}."
        f" Regenerate: `{results['command']}`."
    )
    return "\n".join(lines) + "\n"


def _rows(rows: Sequence[dict[str, Any]], twin: str, slack: float) -> list[str]:
    thresholds = [point["value"] for point in rows[0]["curve"]]
    heads = [*(f"{value:g}" for value in thresholds), f"TPF within {slack:g}", "to teacher", f"to {twin}", "AUP"]
    lines = [f"| model | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    for row in rows:
        cells = [f"{point['accuracy']:.1f} % / {point['tpf']:.2f}" for point in row["curve"]]
        cells += [_with_interval(row, name, 2) for name in ("tpf", "over_teacher", "over_twin")]
        cells.append(_with_interval(row, "aup", 0))
        lines.append(f"| {row['arm']} | {' | '.join(cells)} |")
    return lines


def _with_interval(row: dict[str, Any], name: str, digits: int) -> str:
    if name not in row:
        return ""
    if row[name] is None:
        return "not reached"
    low, high = row[f"{name}_interval"]
    return f"{row[name]:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {"ablation": ablation_table}
