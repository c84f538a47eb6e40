"""What a leaderboard says, as blocks that the Markdown and the page are both made of, and the Markdown.

Text of a block may hold `code` between backticks; everything else in it is plain.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..sweep.points import Point
from .board import Board, Entry, Group, Task
from .published import published


@dataclass(frozen=True)
class Cell:
    """A cell: its text, and the value that its column is sorted by (None: nothing to sort, always last)."""

    text: str
    value: float | str | None


@dataclass(frozen=True)
class Heading:
    level: int
    text: str
    name: str = ""


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Bullets:
    """Items of text, each with the address it is about, or none."""

    items: tuple[tuple[str, str | None], ...]


@dataclass(frozen=True)
class Table:
    """`numeric`: the columns that hold numbers; `sorted_by`: the column whose falling values the rows follow."""

    caption: str
    heads: tuple[str, ...]
    numeric: Collection[int]
    rows: tuple[tuple[Cell, ...], ...]
    sorted_by: int | None = None


@dataclass(frozen=True)
class Picture:
    """`name`: of the file without its ending."""

    name: str
    alt: str


@dataclass(frozen=True)
class Fold:
    """Blocks that the page shows on demand."""

    summary: str
    blocks: list["Block"] = field(default_factory=list)


Block = Heading | Paragraph | Bullets | Table | Picture | Fold

_DASH = "\N{EN DASH}"
_ABOUT = (
    "AUP, accuracy under parallelism, is the area under a curve of accuracy over tokens per forward (TPF), in percent "
    "times TPF. Accuracy below `y_max` loses weight, W = exp(-3 (1 - accuracy / `y_max`)), and points more than 5 "
    "percentage points below the slowest one are left out (hollow in the pictures). Two AUPs can be compared only "
    "under the same `y_max`: the ranks take the best accuracy of all curves on the task. The AUP under a curve's own "
    "best accuracy tells how little of its own accuracy it gives up."
)
_MEASURED = (
    "Intervals are 95 % bootstrap intervals over the task's samples, `y_max` counting as known where it is common. "
    "Curves whose intervals overlap widely are in no certain order."
)
_CAUSAL = (
    "Rows marked AR are causal models, which write from left to right. Their forwards are the target's, the one "
    "over the prompt among them; what drafts for it has forwards of its own, which no figure of tokens per forward "
    "counts. Answers by drafts were compared with plain greedy ones."
)
_MARKED = (
    "Figures with a dagger (†) were published by others and not measured here: other models, harness and hardware. "
    "They have no intervals, and few points per curve, most of them two. Do not read a rank of † against measured "
    "curves as a result."
)


def document(board: Board, pictures: Collection[str]) -> list[Block]:
    """The blocks of the page: tasks, tasks together, conditions, published figures. `pictures`: names of files."""
    measured = [entry for entry in board.entries if not entry.published]
    foreign = len(measured) < len(board.entries)
    blocks: list[Block] = [Heading(1, board.title), Paragraph(_ABOUT)]
    blocks += [Paragraph(_MEASURED)] if measured else []
    blocks += [Paragraph(_MARKED)] if foreign else []
    blocks += [Paragraph(_CAUSAL)] if any(entry.autoregressive for entry in measured) else []
    for task in board.tasks:
        blocks += _task(task, foreign)
    if board.groups:
        blocks.append(Heading(2, "Over tasks", "over-tasks"))
        blocks += [_group(group) for group in board.groups]
        if "radar.png" in pictures:
            blocks.append(
                Picture(
                    "radar", "Radar over tasks: each curve's AUP as a share of the best on each task; see the tables."
                )
            )
    if measured:
        blocks += [Heading(2, "How it was measured", "measured"), _conditions(measured)]
    if foreign:
        blocks += _published()
    return blocks


def _task(task: Task, foreign: bool) -> list[Block]:
    best = task.entries[0]
    order = "Another one changes the order:" if task.swaps else "Another one changes no order."
    blocks: list[Block] = [
        Heading(2, task.name, task.slug),
        _ranks(task, foreign),
        Paragraph(f"The common `y_max` is {task.y_max:.1f} %. {order}"),
    ]
    if task.swaps:
        pairs = Bullets(tuple((sentence, None) for sentence in task.swaps))
        few = len(task.swaps) <= 4
        blocks.append(pairs if few else Fold(f"{len(task.swaps)} pairs whose order depends on y_max", [pairs]))
    many = len(task.entries)
    blocks += [
        Picture(
            f"curves-{task.slug}",
            f"Accuracy over tokens per forward on {task.name}, {many} curve{'s' * (many > 1)}, and the area of each; "
            f"{best.label} has the largest, {best.common.aup:.1f}.",
        ),
        Picture(f"bars-{task.slug}", f"AUP on {task.name} as bars, largest first: the figures of the table."),
        Fold(f"All points on {task.name}", [_points(task, foreign)]),
    ]
    return blocks


def _names(entry: Entry, foreign: bool) -> list[Cell]:
    method = entry.method + " †" * entry.published + " (AR)" * entry.autoregressive
    figures = "published" if entry.published else "measured"
    return [Cell(method, entry.method), Cell(entry.model, entry.model), *([Cell(figures, figures)] * foreign)]


def _number(value: float | None, form: str = ".1f", unit: str = "", interval: Sequence[float] | None = None) -> Cell:
    """A number, with its interval behind it where there is one."""
    if value is None:
        return Cell(_DASH, None)
    ends = "" if interval is None else f" ({interval[0]:{form}}{_DASH}{interval[1]:{form}})"
    return Cell(f"{value:{form}}{unit}{ends}", round(value, 6))


def _ranks(task: Task, foreign: bool) -> Table:
    given = any(entry.as_published is not None for entry in task.entries)
    heads = ["Method", "Model", *["Figures"] * foreign, "AUP, common y_max", "AUP, own y_max"]
    heads += ["AUP, as published"] * given
    heads += ["Best accuracy", "Most TPF", "Accuracy there", "Tokens/s there", "Points counted"]
    rows = []
    for entry in task.entries:
        fast, count = entry.fastest, sum(entry.counted)
        rows.append(
            (
                *_names(entry, foreign),
                _number(entry.common.aup, interval=entry.common.interval),
                _number(entry.own.aup, interval=entry.own.interval),
                *[_number(entry.as_published)] * given,
                _number(entry.best["accuracy"], unit=" %"),
                _number(fast["tpf"], ".2f"),
                _number(fast["accuracy"], unit=" %"),
                _number(fast.get("tokens_per_second"), ".0f"),
                Cell(f"{count} of {len(entry.points)}", count),
            )
        )
    first = 2 + foreign
    caption = f"{task.name}: curves by AUP under the common y_max"
    return Table(caption, tuple(heads), range(first, len(heads)), tuple(rows), first)


def _points(task: Task, foreign: bool) -> Table:
    heads = ["Method", "Model", *["Figures"] * foreign, "Setting", "TPF", "Accuracy", "TPF, reference count"]
    heads += ["Positions per token", "Tokens/s", "Counted"]
    drafts = any(entry.autoregressive for entry in task.entries)
    heads += ["Draft forwards per token", "Draft positions per token", "Equal to plain greedy"] * drafts
    rows = []
    for entry in task.entries:
        for point, counted in zip(entry.points, entry.counted, strict=True):
            value = point["value"]
            setting = _DASH if point["parameter"] is None else f"{point['parameter']} = {value}"
            known = isinstance(value, (int, float))
            rows.append(
                (
                    *_names(entry, foreign),
                    Cell(setting, setting if not known else f"{point['parameter']} {float(value):020.6f}"),
                    _number(point["tpf"], ".2f", interval=point.get("tpf_interval")),
                    _number(point["accuracy"], unit=" %", interval=point.get("accuracy_interval")),
                    _number(point.get("tpf_reference"), ".2f"),
                    _number(point.get("positions_per_token"), ".1f"),
                    _number(point.get("tokens_per_second"), ".0f"),
                    Cell("yes" if counted else "no", "yes" if counted else "no"),
                    *(_drafted(point) if drafts else ()),
                )
            )
    first = 3 + foreign
    numeric = [*range(first, first + 5), *range(first + 6, len(heads))]
    return Table(f"{task.name}: all points", tuple(heads), numeric, tuple(rows))


def _drafted(point: Point) -> tuple[Cell, ...]:
    """Forwards and positions that drafted, and the share of answers that equal plain greedy decoding's."""
    equal = point.get("samples", {}).get("equal_to_plain")
    share = None if equal is None else 100 * sum(equal) / len(equal)
    return (
        _number(point.get("draft_forwards_per_token"), ".2f"),
        _number(point.get("draft_positions_per_token"), ".1f"),
        _number(share, unit=" %"),
    )


def _group(group: Group) -> Table:
    """Mean and single AUPs of the curves that cover the same tasks."""
    foreign = any(row[0].published for row in group.entries.values())
    given = all(entry.as_published is not None for row in group.entries.values() for entry in row)
    heads = ["Method", "Model", *["Figures"] * foreign, "Mean AUP", "Mean, own y_max", *["Mean, as published"] * given]
    rows = []
    for label, row in group.entries.items():
        cells = [
            *_names(row[0], foreign),
            _number(group.mean(label)),
            _number(group.mean(label, "own")),
            *[_number(sum(entry.as_published or 0 for entry in row) / len(row))] * given,
            *(_number(entry.common.aup) for entry in row),
        ]
        rows.append(tuple(cells))
    first = 2 + foreign
    heads += group.tasks
    caption = f"AUP under each task's common y_max: {', '.join(group.tasks)}"
    return Table(caption, tuple(heads), range(first, len(heads)), tuple(rows), first)


def _conditions(entries: Sequence[Entry]) -> Table:
    """Once each: which model on which samples, and with what."""
    heads = ("Model", "Task", "Samples", "Device", "Type", "New tokens", "Batch", "Versions", "Date", "Fingerprint")
    rows: list[tuple[Cell, ...]] = []
    for entry in entries:
        for point in entry.points:
            made: dict[str, Any] = point["provenance"]
            versions = ", ".join(
                f"{name} {made[name]}" for name in ("d3llm_hf", "torch", "transformers") if name in made
            )
            texts = [
                entry.model,
                entry.task,
                f"{point['num_samples']} (seed {point['seed']})",
                *(str(made.get(name, _DASH)) for name in ("device", "dtype", "max_new_tokens", "batch_size")),
                versions or _DASH,
                str(made.get("date", _DASH))[:10],
                str(made.get("model_fingerprint", _DASH))[:12],
            ]
            row = tuple(Cell(text, text) for text in texts)
            rows += [row] if row not in rows else []
    return Table("Models, samples and machines of the measured curves", heads, (), tuple(rows))


def _published() -> list[Block]:
    """Where published figures come from, further ones, and the ledger of what contradicts what."""
    content = published()
    sources, tables = content["sources"], content["tables"]

    def text(value: Any) -> Cell:
        return Cell(_DASH if value is None else str(value), value)

    def title(names: Sequence[str]) -> Cell:
        return text("; ".join(sources[name]["title"] for name in names))

    limits = [
        (text(table["title"]), *(text(task[name]) for name in ("task", "as_published", "shots")),
         _number(task["y_max"], ".2f", " %"), text(task["y_max_of"]))
        for table in tables.values() for task in table["tasks"]
    ]  # fmt: skip
    speeds = [
        (text(row["method"]), text(row["model"]), text(row["backend"]), text(row["batch_size"]),
         *(_number(row["tokens_per_second"].get(machine), ".1f") for machine in ("B200", "H100", "A100")),
         _number(row["tpf"], ".2f"), _number(row["accuracy"], ".2f", " %"), title([row["source"]]))
        for row in content["throughput"]
    ]  # fmt: skip
    ablation = content["ablation"]
    steps = [
        (text(row["row"]), text(row["setting"]), _number(row["tpf"], ".2f"), _number(row["accuracy"], unit=" %"),
         _number(row["aup"]))
        for row in ablation["rows"]
    ]  # fmt: skip
    ledger = [
        (text(e["id"]), text(e["about"]), text(e["differs"]), title(e["where"]), text(e["used"]), text(e["why"]))
        for e in content["contradictions"]
    ]
    heads = ("Table", "Task", "Called there", "Shots", "y_max", "Accuracy of")
    speed_heads = ("Method", "Model", "Backend", "Batch", "B200", "H100", "A100", "TPF", "Accuracy", "Source")
    return [
        Heading(2, "Published figures", "published"),
        Bullets(tuple((source["title"], source["url"]) for source in sources.values())),
        Paragraph(
            f"An AUP as published has its table's own `y_max` for each task: {tables['llada']['y_max_rule']}. "
            + " ".join(table["note"] for table in tables.values())
        ),
        Fold("y_max of the published tables", [Table("y_max of the published tables", heads, (3, 4), tuple(limits))]),
        Fold(
            "Published tokens per second on GSM8K-CoT",
            [Table("Published tokens per second on GSM8K-CoT", speed_heads, range(3, 9), tuple(speeds))],
        ),
        Fold(
            "Published ablation of d3LLM on LLaDA, GSM8K-CoT",
            [
                Paragraph(ablation["note"]),
                Table("Ablation of d3LLM", ("Row", "Setting", "TPF", "Accuracy", "AUP"), (0, 2, 3, 4), tuple(steps)),
            ],
        ),
        Heading(2, "Where published figures contradict each other", "contradictions"),
        Table(
            "Contradictions, and what the tables here use",
            ("No.", "About", "What differs", "Where", "Used here", "Why"),
            (0,),
            tuple(ledger),
        ),
    ]


def markdown(blocks: Sequence[Block]) -> str:
    """The blocks as Markdown; pictures are the PNG files beside it."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {_safe(block.text)}"
    if isinstance(block, Paragraph):
        return _safe(block.text)
    if isinstance(block, Bullets):
        return "\n".join(
            f"- {_safe(text)}" if url is None else f"- [{_safe(text)}]({url})" for text, url in block.items
        )
    if isinstance(block, Picture):
        return f"![{_safe(block.alt)}]({block.name}.png)"
    if isinstance(block, Fold):
        return markdown(block.blocks).rstrip("\n")
    rule = "|".join("---:" if place in block.numeric else "---" for place in range(len(block.heads)))
    lines = [
        " | ".join(map(_safe, block.heads)),
        *(" | ".join(_safe(cell.text) for cell in row) for row in block.rows),
    ]
    table = [f"| {line} |" for line in lines]
    return "\n".join([f"**{_safe(block.caption)}**", "", table[0], f"|{rule}|", *table[1:]])


def _safe(text: str) -> str:
    """Text that is neither markup nor the end of a cell, but for `code`."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for sign in "\\|[]*_":
        text = text if sign == "_" and "`" in text else text.replace(sign, "\\" + sign)
    return text
