"""The short table of a `leaderboard.json`, for documents; the leaderboard itself has all points."""

from collections.abc import Callable
from typing import Any


def leaderboard_table(results: dict[str, Any]) -> str:
    """The Markdown of a leaderboard: each task's curves by falling AUP."""
    return "\n".join(_task(task) for task in results["tasks"])


def _task(task: dict[str, Any]) -> str:
    lines = ["| | method | model | AUP | most accurate | fastest that counts |", "|---:|---|---|---:|---:|---:|"]
    for rank, entry in enumerate(task["entries"], 1):
        score, points = entry["common"], entry["points"]
        low, high = score["interval"] or (None, None)
        aup = f"{score['aup']:.0f}" + (f" ({low:.0f} to {high:.0f})" if low is not None else "")
        best = max(points, key=lambda point: (point["accuracy"], point["tpf"]))
        fastest = max((point for point in points if point["counted"]), key=lambda point: point["tpf"])
        lines.append(f"| {rank} | {entry['method']} | {entry['model']} | {aup} | {_pair(best)} | {_pair(fastest)} |")
    counts = sorted({point["num_samples"] for entry in task["entries"] for point in entry["points"]} - {None})
    samples = " or ".join(map(str, counts)) or "published"
    lines += [
        "",
        f"Task {task['task']}, {samples} samples; `y_max` {task['y_max']:.1f} % for all. Accuracy and tokens per "
        "forward of each curve's most accurate point, and of its fastest among those that count; in brackets 95 % "
        "bootstrap intervals over the samples.",
        "",
    ]
    return "\n".join(lines)


def _pair(point: dict[str, Any]) -> str:
    return f"{point['accuracy']:.1f} % at {point['tpf']:.2f}"


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {"leaderboard": leaderboard_table}
