"""The leaderboard's pictures as PNG and SVG: curves with their areas, bars, and a radar over tasks.

What is shaded is what AUP counts: the rectangle of the first point, unweighted, and between points the accuracy times
its weight. Colours are those of Okabe and Ito, which people with colour-blindness tell apart; each curve keeps its
colour and marker in all pictures. Equal boards give equal bytes.
"""

import io
import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...progress import progress_bar
from .board import Board, Entry, Group, Task


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, FigureBase

WIDTH = 4.8  # inches, little more than a phone is wide, so that the text can be read there
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", ">")
_DASHES = ("-", "--", ":", "-.")
_GREY = "#595959"
_ALPHA = 3.0  # of the weight, as `aup_score` has it by default
_SETTINGS = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _GREY,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "axes.grid": False,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "svg.hashsalt": "d3llm-hf",  # else the ids in an SVG are random
    "svg.fonttype": "path",
}


def draw(board: Board) -> dict[str, bytes]:
    """File name -> content: `curves-TASK`, `bars-TASK` for each task and `radar` if curves share three tasks.

    Raises:
        ImportError: without matplotlib, naming what to install.
    """
    try:
        import matplotlib
        import matplotlib.style
    except ImportError as error:
        raise ImportError(
            "The leaderboard's pictures need matplotlib, which is not installed. Run `pip install 'd3llm-hf[eval]'`."
        ) from error
    styles = {label: _style(place) for place, label in enumerate(board.labels)}
    wide = [group for group in board.groups if len(group.tasks) > 2]
    files: dict[str, bytes] = {}
    # The reader's own matplotlibrc must not change the pictures.
    with (
        matplotlib.style.context(["default", _SETTINGS]),
        progress_bar(2 * len(board.tasks) + bool(wide), "picture", "drawing") as bar,
    ):
        for task in board.tasks:
            files |= _saved(f"curves-{task.slug}", _curves(task, styles))
            bar.update()
            files |= _saved(f"bars-{task.slug}", _bars(task, styles))
            bar.update()
        if wide:
            files |= _saved("radar", _radar(wide, styles))
            bar.update()
    return files


def _style(place: int) -> dict[str, Any]:
    turns, colour = divmod(place, len(_COLOURS))
    return {
        "color": _COLOURS[colour],
        "marker": _MARKERS[place % len(_MARKERS)],
        "linestyle": _DASHES[turns % len(_DASHES)],
    }


def _saved(name: str, figure: "Figure") -> dict[str, bytes]:
    from matplotlib.layout_engine import PlaceHolderLayoutEngine

    figure.draw_without_rendering()  # lays it out, which takes longest and would be done again for each file
    figure.set_layout_engine(PlaceHolderLayoutEngine(adjust_compatible=False, colorbar_gridspec=False))
    files = {}
    for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=200, metadata=metadata, facecolor="white")
        files[f"{name}.{kind}"] = buffer.getvalue()
    return files


def _figure(height: float) -> "Figure":
    from matplotlib.figure import Figure  # without pyplot there is no window system and no state that is shared

    figure = Figure(figsize=(WIDTH, height))
    figure.set_layout_engine("constrained", h_pad=0.05, w_pad=0.12)
    return figure


def _curves(task: Task, styles: dict[str, dict[str, Any]]) -> "Figure":
    """All curves with their error bars above, each with its area below."""
    columns = 3
    rows = -(-len(task.entries) // columns)
    legend_rows = -(-len(task.entries) // _legend_columns([entry.label for entry in task.entries]))
    heights = [2.9 + 0.17 * legend_rows, 1.35 * rows + 0.25]
    figure = _figure(sum(heights))
    above, below = figure.subfigures(2, 1, height_ratios=heights)  # type: ignore[misc]  # declared as one
    axes = above.subplots()
    for entry in task.entries:
        _curve(axes, entry, styles[entry.label], errors=True)
    axes.axhline(task.y_max, color=_GREY, linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
    axes.annotate(
        f"$y_{{max}}$ = {task.y_max:.1f} %",
        (1, task.y_max),
        xycoords=("axes fraction", "data"),
        xytext=(0, 2),
        textcoords="offset points",
        ha="right",
        fontsize=7,
        color=_GREY,
    )
    axes.set(title=_plain(task.name), xlabel="Tokens per forward", ylabel="Accuracy (%)", xlim=(0, None))
    axes.grid(True)
    axes.margins(y=0.08)
    _legend(above, axes)
    panels = below.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for panel, entry in zip(panels, task.entries, strict=False):
        _area(panel, entry, styles[entry.label])
    for panel in panels[len(task.entries) :]:
        panel.set_axis_off()
    for panel in panels[max(0, len(task.entries) - columns) : len(task.entries)]:
        panel.tick_params(labelbottom=True)
    panels[0].set(
        xlim=(0, 1.05 * max(point["tpf"] for entry in task.entries for point in entry.points)),
        ylim=(0, 1.1 * task.y_max),
    )
    below.suptitle("AUP: the shaded area, accuracy by its weight", x=0.01, ha="left", fontsize=8.5)
    below.supxlabel("Tokens per forward", fontsize=8)
    return figure


def _curve(axes: "Axes", entry: Entry, style: dict[str, Any], *, errors: bool) -> None:
    """A curve's line through the points that count; the others are hollow."""
    counted = [p for p, counts in zip(entry.points, entry.counted, strict=True) if counts]
    axes.plot(*_columns(counted), **style, markersize=4.5, label=_plain(entry.label), zorder=3)
    hollow = {"linestyle": "none", "marker": style["marker"], "markeredgecolor": style["color"]}
    left_out = [p for p, counts in zip(entry.points, entry.counted, strict=True) if not counts]
    if left_out:
        axes.plot(*_columns(left_out), **hollow, markerfacecolor="white", markersize=4.5, zorder=3)
    for point in entry.points if errors and not entry.published else ():
        low, high = point["accuracy_interval"]
        axes.plot([point["tpf"]] * 2, [low, high], color=style["color"], linewidth=0.8, alpha=0.7, zorder=2)
        axes.plot(point["tpf_interval"], [point["accuracy"]] * 2, color=style["color"], linewidth=0.8, alpha=0.7)


def _columns(points: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    return [point["tpf"] for point in points], [point["accuracy"] for point in points]


def weighted_outline(entry: Entry) -> tuple[list[float], list[float]]:
    """The upper edge of the area that a curve's AUP under the common y_max is, from 0 tokens per forward on.

    The first rectangle has the accuracy as its height, all that follows the accuracy times its weight.
    """
    result = entry.common.result
    tpf, accuracy = zip(*result.used, strict=True)
    weighted = [y * min(math.exp(-_ALPHA * (1 - y / result.y_max)), 1) for y in accuracy]
    return [0, tpf[0], *tpf], [accuracy[0], accuracy[0], *weighted]


def _area(axes: "Axes", entry: Entry, style: dict[str, Any]) -> None:
    axes.fill_between(*weighted_outline(entry), color=style["color"], alpha=0.3, linewidth=0)
    _curve(axes, entry, style | {"linestyle": "-"}, errors=False)
    for line in axes.lines:
        line.set(markersize=2.5, linewidth=1)
    axes.set_title(f"{_name(entry, 24)}\n", fontsize=7, pad=2)
    axes.annotate(
        f"{entry.common.aup:.1f}", (0, 1), (0, 3), xycoords="axes fraction", textcoords="offset points", fontsize=7.5
    ).set_fontweight("bold")
    axes.tick_params(labelsize=7)


def _bars(task: Task, styles: dict[str, dict[str, Any]]) -> "Figure":
    """AUPs under the common y_max with their intervals; a diamond marks the one under the curve's own."""
    figure = _figure(1.0 + 0.36 * len(task.entries))
    axes = figure.subplots()
    for place, entry in enumerate(task.entries):
        hatch = "////" if entry.published else None
        colour = styles[entry.label]["color"]
        axes.barh(place, entry.common.aup, height=0.62, color=colour, alpha=0.75, hatch=hatch, edgecolor="white")
        if entry.common.interval is not None:
            axes.plot(entry.common.interval, [place] * 2, color="black", linewidth=1.1, solid_capstyle="butt")
        axes.plot(
            [entry.own.aup], [place], "D", color="white", markeredgecolor="black", markersize=4, markeredgewidth=0.8
        )
        axes.annotate(
            f"{entry.common.aup:.1f}", (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=8
        )
    axes.set_yticks(range(len(task.entries)), [_name(entry, 26) for entry in task.entries], fontsize=7.5)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(task.entries) - 0.5, -0.5)
    axes.grid(True, axis="x")
    note = "bar: one $y_{max}$ for all;  ◇ the curve's own $y_{max}$;  line: 95 % interval"
    axes.set(title=_plain(task.name), xlim=(0, None))
    axes.set_xlabel(f"AUP (accuracy in % \N{MULTIPLICATION SIGN} tokens per forward)\n{note}", fontsize=7.5)
    return figure


def _radar(groups: Sequence[Group], styles: dict[str, dict[str, Any]]) -> "Figure":
    """One panel per group; each axis is a task, its end the best AUP of the panel's curves on it."""
    heights = [4.0 + 0.17 * -(-len(group.entries) // _legend_columns(list(group.entries))) for group in groups]
    figure = _figure(sum(heights))
    parts = figure.subfigures(len(groups), 1, height_ratios=heights, squeeze=False).ravel()
    for part, group in zip(parts, groups, strict=True):
        axes = part.subplots(subplot_kw={"projection": "polar"})
        best = [max(row[place].common.aup for row in group.entries.values()) for place in range(len(group.tasks))]
        angles = [2 * math.pi * place / len(group.tasks) for place in range(len(group.tasks))]
        for label, row in group.entries.items():
            shares = [100 * entry.common.aup / most for entry, most in zip(row, best, strict=True)]
            axes.plot([*angles, angles[0]], [*shares, shares[0]], **styles[label], markersize=3.5, label=_plain(label))
        names = [textwrap.fill(_plain(name), 18, break_long_words=False) for name in group.tasks]
        axes.set_xticks(angles, [f"{name}\n{most:.1f}" for name, most in zip(names, best, strict=True)], fontsize=7.5)
        for text, angle in zip(axes.get_xticklabels(), angles, strict=True):  # away from the circle
            side = math.sin(angle)
            text.set_horizontalalignment("center" if abs(side) < 0.1 else "left" if side > 0 else "right")
        axes.set_theta_zero_location("N")
        axes.set_theta_direction(-1)
        axes.set_ylim(0, 104)
        axes.set_yticks([25, 50, 75, 100], ["25 %", "50 %", "75 %", "100 %"], fontsize=6, color=_GREY)
        axes.set_rlabel_position(180 / len(group.tasks))
        axes.spines["polar"].set_visible(False)
        axes.grid(True)
        _legend(part, axes)
        part.suptitle("AUP as a share of the best on each task (its value at the axis)", fontsize=9)
    return figure


def _legend(figure: "FigureBase", axes: "Axes") -> None:
    """Below the axes, in two columns if the names are short enough."""
    handles, labels = axes.get_legend_handles_labels()
    columns = _legend_columns(labels)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=2.6)


def _legend_columns(labels: Sequence[str]) -> int:
    return 2 if max(map(len, labels)) < 28 else 1


def _name(entry: Entry, width: int) -> str:
    """A curve's name in two lines at most, cut to `width` letters each."""
    lines = " ".join(entry.label.split()).split(" · ", 1)
    return "\n".join(_plain(line if len(line) <= width else line[: width - 1] + "…") for line in lines)


def _plain(text: str) -> str:
    """Text that matplotlib writes as it is: `$` would begin a formula."""
    return " ".join(text.split()).replace("$", r"\$")
