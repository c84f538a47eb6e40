"""How the cost of decoding grows with prompt length, answer length and batch: `d3llm bench growth`.

From one shape, one axis is changed at a time. The method is LLaDA's quota unless another is asked for, so that every
forward decides as many tokens at every point and what grows is the cost of a forward.
"""

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..progress import progress_bar
from .decoding import check, contestants, decode, figures, results
from .pictures import drawing, saved
from .shapes import DecodingBench, prepared
from .split import steps_timed


SUITE = "bench_growth"
AXES = {"prompt_length": "prompt length", "new_tokens": "answer length", "batch_size": "batch"}
QUANTITIES = {
    "tokens_per_second": "tokens/s",
    "positions_per_token": "positions per token",
    "ms_median_step": "median step, ms",
}
SCHEDULE = 4
CACHE = "dual"


def growth_bench(bench: DecodingBench) -> DecodingBench:
    """The bench with the method and the cache of this suite, where none are chosen."""
    if not bench.schedule and "decoding_method" not in bench.settings:
        bench = replace(bench, schedule=SCHEDULE)
    if "kv_cache" not in bench.settings:
        bench = replace(bench, settings=bench.settings | {"kv_cache": CACHE})
    return bench


def measure_growth(bench: DecodingBench, axes: dict[str, Sequence[int]]) -> dict[str, Any]:
    """Measures all contestants along the axes.

    Args:
        bench: the shape that the axes change; of a random model.
        axes: of `AXES`, the values of each.

    Returns:
        the results; each row has its `axis` and `value` beside what `decoding.figures` gives; `ms_per_step`, the
        milliseconds of a turn for each forward of a batch; and `ms_median_step`, those of the median step, which with
        a cache is one of the many that read it and not one of the few that refresh it.

    Raises:
        ValueError: For a checkpoint, whose prompts have the lengths that they have, or for no axis.
        ArithmeticError: If tokens in float32 differ.
    """
    if bench.model:
        raise ValueError(f"`model` must be left out: growth is measured on random models (got {bench.model!r}).")
    if not any(axes.values()):
        raise ValueError(f"`axes` must give values to one of {list(AXES)} at least (got none).")
    rows, scale = [], None
    points: list[tuple[str, Any]] = [(axis, value) for axis, values in axes.items() for value in values]
    chosen = [contestants(replace(bench, **{axis: value})) for axis, value in points]
    with progress_bar(sum(map(len, chosen)) * (1 + bench.repeats), "turn", "growth") as bar:
        for (axis, value), each in zip(points, chosen, strict=True):
            point = replace(bench, **{axis: value})
            bar.set_postfix_str(f"{AXES[axis]} {value}", refresh=False)
            with prepared(point, scale) as (work, scale):  # the same head everywhere
                turns, median = {}, {}
                for name, contestant in each.items():
                    with steps_timed(work.model, point.device) as seconds:
                        turns[name] = decode(contestant, work)
                    median[name] = statistics.median(seconds) if seconds else 0.0
                    bar.update()
                check(point, turns, each)
                for row in figures(point, work, turns, each, bar.update):
                    steps = {
                        "ms_per_step": round(1000 * row["seconds"] / max(1, row["steps"]), 3),
                        "ms_median_step": round(1000 * median[row["name"]], 3),
                    }
                    rows.append({"axis": axis, "value": value} | row | steps)
    return results(SUITE, bench, axes={axis: list(values) for axis, values in axes.items()}, rows=rows)


def draw(found: dict[str, Any], kind: str) -> bytes:
    """The picture of a results file: a column for each axis, a row for each of `QUANTITIES`, a line per contestant.

    Args:
        kind: "png" or "svg".

    Raises:
        ImportError: Without matplotlib.
    """
    axes = [axis for axis, values in found["axes"].items() if values]
    names = list(dict.fromkeys(row["name"] for row in found["rows"]))
    with drawing("d3llm bench growth", 2.9 * len(axes) + 0.6, 7) as figure:
        from matplotlib.ticker import LogLocator

        grid = figure.subplots(len(QUANTITIES), len(axes), squeeze=False, sharex="col", sharey="row")
        for column, axis in enumerate(axes):
            for place, (quantity, label) in enumerate(QUANTITIES.items()):
                plot = grid[place][column]
                for name, marker in zip(names, "os^Dv", strict=False):
                    mine = [row for row in found["rows"] if (row["axis"], row["name"]) == (axis, name)]
                    values = [row["value"] for row in mine]
                    plot.plot(values, [row[quantity] for row in mine], label=name, marker=marker)
                plot.set_xscale("log", base=2)
                plot.set_yscale("log")
                plot.set_xticks(found["axes"][axis], [str(value) for value in found["axes"][axis]])
                plot.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                plot.yaxis.set_major_formatter("{x:g}")
                plot.minorticks_off()
                plot.grid(color="#dddddd", linewidth=0.6)
                if column == 0:
                    plot.set_ylabel(label)
            grid[-1][column].set_xlabel(AXES[axis])
        figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
        return saved(figure, kind)
