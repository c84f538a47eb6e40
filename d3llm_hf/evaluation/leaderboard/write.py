"""A leaderboard's folder: its page, its document, its pictures and its figures.

    d3llm leaderboard results.jsonl -o leaderboard

`board` scores the curves, `document` makes texts and tables of a `Board`, `page` a web page of these, `pictures` its
pictures.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...files import check_writable_folder, replace_file
from ...locks import only_writer
from ..sweep.points import read_points
from .board import TITLE, Board, Entry, Score, build_board
from .document import document, markdown
from .page import page
from .pictures import draw


SCHEMA = 1


def figures(board: Board) -> dict[str, Any]:
    """The figures of the tables, as `leaderboard.json` has them: AUPs, intervals, points, order changes."""

    def score(found: Score) -> dict[str, Any]:
        interval = None if found.interval is None else [round(end, 4) for end in found.interval]
        return {"aup": round(found.aup, 4), "interval": interval, "y_max": round(found.result.y_max, 4)}

    def entry(found: Entry) -> dict[str, Any]:
        point: tuple[str, ...] = ("parameter", "value", "num_samples", "tpf", "tpf_interval")
        point += ("accuracy", "accuracy_interval", "tokens_per_second")
        return {
            "model": found.model,
            "method": found.method,
            "published": found.published,
            "common": score(found.common),
            "own": score(found.own),
            "as_published": found.as_published,
            **({"autoregressive": True} if found.autoregressive else {}),
            "points": [
                {name: p.get(name) for name in point} | {"counted": counted}
                for p, counted in zip(found.points, found.counted, strict=True)
            ],
        }

    return {
        "schema": SCHEMA,
        "suite": "leaderboard",
        "title": board.title,
        "tasks": [
            {
                "task": task.name,
                "y_max": round(task.y_max, 4),
                "entries": [entry(found) for found in task.entries],
                "order_changes": list(task.swaps),
            }
            for task in board.tasks
        ],
        "over_tasks": [
            {
                "tasks": list(group.tasks),
                "mean_aup": {label: round(group.mean(label), 4) for label in group.entries},
            }
            for group in board.groups
        ],
    }


def write_leaderboard(
    results: Sequence[str | Path], output: str | Path, *, published: bool = False, title: str = TITLE
) -> Path:
    """Writes `leaderboard.md`, `index.html`, `leaderboard.json` and the pictures into a folder.

    Equal input gives equal bytes. Each file is written beside its place and then moved there; files of other names
    stay as they are.

    Args:
        results: results files of `d3llm sweep`.
        output: the folder; made if it is not there.
        published, title: as in [`build_board`].

    Returns:
        the folder.

    Raises:
        FileNotFoundError: for a results file that does not exist.
        ImportError: without matplotlib, which draws the pictures.
        ValueError: where `output` is a file, or another process is writing it; for a line that is no point; and as
            [`build_board`].
    """
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`output` must be a folder (got {str(output)!r}, which is a file). Choose another name.")
    check_writable_folder(folder.absolute(), "output")
    board = build_board(read_points(*results), published=published, title=title)
    files = draw(board)
    blocks = document(board, files)
    files["leaderboard.md"] = markdown(blocks).encode()
    files["index.html"] = page(board.title, blocks, files).encode()
    files["leaderboard.json"] = (json.dumps(figures(board), indent=1, ensure_ascii=False) + "\n").encode()
    with only_writer(folder, "output"):  # the files speak of each other
        for name, content in files.items():
            replace_file(folder / name, content)
    return folder
