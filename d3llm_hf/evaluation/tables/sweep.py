"""The table of a results file of `d3llm sweep`, for documents: its points one under the other, diffusion and not."""

from collections.abc import Callable, Mapping
from typing import Any


def sweep_table(results: Mapping[str, Any]) -> str:
    """The Markdown of points, in the order of the file, and what they have in common.

    Raises:
        ValueError: for points that were not measured alike, in one table of which times would say nothing.
    """
    points = results["points"]
    lines = [
        "| model | arguments of `generate` | batch | accuracy | tokens per forward | forwards per token | "
        "positions per token | tokens/s | CPU s |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
        *map(_row, points),
    ]
    return "\n".join([*lines, "", _notes(points)]) + "\n"


def _row(point: Mapping[str, Any]) -> str:
    settings = ", ".join(f"`{name}={value!r}`" for name, value in point["settings"].items())
    low, high = point["accuracy_interval"]
    samples = point["samples"]
    forwards = sum(samples["forwards"]) / max(1, sum(samples["tokens"]))
    cells = [
        point["model"],
        settings,
        f"{point['provenance']['batch_size']}",
        f"{point['accuracy']:.1f} % ({low:.1f} to {high:.1f})",
        f"{point['tpf']:.2f}",
        f"{forwards:.2f}",
        f"{point['positions_per_token']:.1f}",
        f"{point['tokens_per_second']:.0f}",
        f"{point['cpu_seconds']:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def _notes(points: list[dict[str, Any]]) -> str:
    shared: dict[str, set[Any]] = {name: {point[name] for point in points} for name in ("task", "num_samples", "seed")}
    names = ("dtype", "device", "device_name", "threads", "torch", "transformers", "max_new_tokens")
    shared |= {name: {point["provenance"].get(name) for point in points} for name in names}
    for name, values in shared.items():
        if len(values) > 1:
            raise ValueError(
                f"`{name}` must be the same in all points of a table (got {sorted(map(str, values))}). Measure them "
                "in one run."
            )
    of = {name: next(iter(values)) for name, values in shared.items()}
    compared = [sample for point in points for sample in point["samples"].get("equal_to_plain", ())]
    same = f" Drafted answers with the tokens of plain greedy decoding: {sum(compared)} of {len(compared)}."
    return (
        f"{of['task']}, {of['num_samples']} samples of seed {of['seed']}, at most {of['max_new_tokens']} new tokens, "
        f"greedy, {of['dtype']}, {of['threads']} thread{'' if of['threads'] == 1 else 's'} of "
        f"{of['device'].upper()} ({of['device_name']}), torch {of['torch']}, transformers "
        f"{of['transformers']}. In brackets 95 % bootstrap intervals over the samples; tokens are those before the "
        f"stop token.{same if compared else ''}"
    )


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {"sweep": sweep_table}
