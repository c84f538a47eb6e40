"""The Space of the metric: points go into a table, the curve and its score come out."""

from typing import Any

import gradio as gr
from curve import AUPResult, aup_score
from matplotlib.figure import Figure


TITLE = "AUP: accuracy under parallelism"
DESCRIPTION = (
    "The area under accuracy (in percent) over tokens per forward, where accuracy loses weight as it falls under "
    "`y_max`, the best accuracy of the compared methods, and points that fall further than the slack under the "
    "slowest one are left out. [d3LLM, arXiv 2601.07568](https://arxiv.org/abs/2601.07568)"
)
HEADERS = ["tokens per forward", "accuracy (%)"]
# d3LLM and dParallel on GSM8K-CoT as their leaderboard lists them, with the y_max that it takes for each.
EXAMPLES: list[list[Any]] = [
    [[[1.0, 74.02], [9.11, 73.09]], 74.98, 3.0, 5.0],
    [[[1.0, 83.8], [3.02, 82.12]], 83.94, 3.0, 5.0],
    [[[1.0, 74.0], [2.0, 72.0], [3.0, 66.0], [4.0, 73.0]], 0, 3.0, 5.0],
]


def points_of(table: list[list]) -> tuple[list[float], list[float]]:
    """Tokens per forward and accuracies of the rows of the table; rows that are empty do not count.

    Raises:
        ValueError: for a row of which one half is empty, or that is no number.
    """
    rows = [[str(cell).strip() if cell is not None else "" for cell in row] for row in table]
    rows = [row for row in rows if any(row)]
    try:
        return [float(row[0]) for row in rows], [float(row[1]) for row in rows]
    except ValueError as error:
        raise ValueError(f"each row must be two numbers ({error})") from error


def figure_of(result: AUPResult) -> Figure:
    """The curve, the points that were left out, the two limits, and bars whose area is the score."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    tpf, accuracy = zip(*result.used, strict=True)
    starts = (0.0, *tpf[:-1])
    bars = [(start, end, area) for start, end, area in zip(starts, tpf, result.areas, strict=True) if end > start]
    left, right, area = (list(column) for column in zip(*bars, strict=True))
    width = [end - start for start, end in zip(left, right, strict=True)]
    height = [part / length for part, length in zip(area, width, strict=True)]
    axes.bar(left, height, width, align="edge", alpha=0.2, edgecolor="C0", label="weighted area")
    axes.plot(tpf, accuracy, marker="o", label="used")
    if result.dropped:
        axes.plot(*zip(*result.dropped, strict=True), marker="x", linestyle="none", color="C3", label="left out")
    axes.axhline(result.y_max, color="C2", linestyle="--", linewidth=1, label=f"y_max = {result.y_max:g}")
    axes.axhline(result.y_min, color="C3", linestyle=":", linewidth=1, label=f"y_min = {result.y_min:g}")
    axes.set(xlabel="tokens per forward", ylabel="accuracy (%)", title=f"AUP {result.aup:.1f}", xlim=(0, None))
    axes.set_ylim(0, 1.05 * max(*accuracy, result.y_max))
    axes.legend(loc="lower right")
    return figure


def text_of(result: AUPResult) -> str:
    """The score and what it was made of, in Markdown."""
    areas = " + ".join(f"{area:.1f}" for area in result.areas)
    lines = [f"## AUP {result.aup:.2f}", f"{areas}, with y_max = {result.y_max:g} and y_min = {result.y_min:g}."]
    if result.dropped:
        points = ", ".join(f"({tpf:g}, {accuracy:g})" for tpf, accuracy in result.dropped)
        lines.append(f"Left out, under y_min: {points}.")
    return "\n\n".join(lines)


def show(table: list[list], y_max: float | None, alpha: float, slack: float) -> tuple[Figure, str]:
    """What the button does; `y_max` of 0 or nothing takes the best accuracy of the table.

    Raises:
        gr.Error: with the reason, for input that has no score.
    """
    try:
        tpf, accuracy = points_of(table)
        result = aup_score(tpf, accuracy, y_max=y_max or None, alpha=alpha, slack=slack)
    except (TypeError, ValueError) as error:
        raise gr.Error(str(error), print_exception=False) from error
    return figure_of(result), text_of(result)


def build() -> gr.Blocks:
    with gr.Blocks(title=TITLE) as demo:
        gr.Markdown(f"# {TITLE}\n\n{DESCRIPTION}")
        with gr.Row():
            with gr.Column():
                table = gr.Dataframe(EXAMPLES[0][0], headers=HEADERS, datatype="number", type="array", label="points")
                y_max = gr.Number(EXAMPLES[0][1], label="y_max (%), 0 for the best of the table")
                alpha = gr.Slider(0, 10, value=3.0, step=0.5, label="alpha")
                slack = gr.Slider(0, 100, value=5.0, step=0.5, label="slack (percentage points)")
                button = gr.Button("Score", variant="primary")
            with gr.Column():
                text = gr.Markdown()
                plot = gr.Plot(label="curve")
        inputs, outputs = [table, y_max, alpha, slack], [plot, text]
        gr.Examples(EXAMPLES, inputs=inputs)
        button.click(show, inputs, outputs)
        demo.load(show, inputs, outputs)
    return demo


if __name__ == "__main__":
    build().launch()
