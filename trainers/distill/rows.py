"""Trajectories of a data set, checked before a student is trained on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from datasets import Dataset

from ..common.rows import Canvas, columns_of, in_row, integers, keep_fitting, plain, token_ids


if TYPE_CHECKING:
    from .config import PseudoTrajectoryDistillConfig


def prepare_trajectories(dataset, args: PseudoTrajectoryDistillConfig, canvas: Canvas):
    """Check columns and rows, number the samples, and leave out wrong answers and what does not fit the canvas.

    Raises:
        RowError: for a row whose ids, steps or verdict are none.
        ValueError: if a column is missing, or nothing is left.
    """
    columns = columns_of(dataset)
    text = "target_ids" if args.use_target_ids else "response_ids"
    needed = {"prompt_ids", "response_ids", "step_map", text} | ({"correct"} if args.only_correct else set())
    if not needed <= set(columns):
        raise ValueError(
            f"The data set must have the columns {sorted(needed)} (got {sorted(columns)}). Extract trajectories of a "
            "teacher first, or rename columns with `dataset.rename_column`."
        )
    if "sample_id" not in columns:
        dataset = dataset.map(lambda row, index: {"sample_id": index}, with_indices=True)
    checked = sorted(needed | {"sample_id"})
    kept = dataset.filter(
        _is_wanted,
        input_columns=checked,
        with_indices=True,
        fn_kwargs={"columns": checked, "vocab_size": canvas.vocab_size},
    )
    if isinstance(kept, Dataset) and len(kept) == 0:
        raise ValueError(
            f"`only_correct` must leave at least one sample (got none of {len(dataset)}). Unset it, or extract "
            "trajectories of a better teacher."
        )
    return keep_fitting(kept, canvas, text)


def _is_wanted(*values: Any, columns: list[str], vocab_size: int) -> bool:
    """Whether a row, whose number comes last, is to be learnt from; one that cannot be is an error."""
    row = dict(zip(columns, values[:-1], strict=True))
    with in_row(values[-1]):
        _check(row, vocab_size)
        correct = plain(row.get("correct", True))
        if correct is not None and not isinstance(correct, bool):
            raise ValueError(
                f"`correct` must be true, false or null (got {correct!r}). Convert the column with "
                '`dataset.cast_column("correct", Value("bool"))`, or unset `only_correct`.'
            )
    return correct is True


def _check(row: dict[str, Any], vocab_size: int) -> None:
    if type(plain(row["sample_id"])) is not int:
        raise ValueError(
            f"`sample_id` must be an integer (got {row['sample_id']!r}): it seeds the sample's draws. Remove the "
            "column, and the row number takes its place."
        )
    for name in ("prompt_ids", "response_ids", "target_ids"):
        if name in row:
            token_ids(row[name], name, vocab_size)
    if not len(row["prompt_ids"]):
        raise ValueError("`prompt_ids` must hold at least one token (got none). Leave such rows out.")
    steps = integers(row["step_map"], "step_map")
    if len(steps) != len(row["response_ids"]):
        raise ValueError(
            f"`step_map` must have one entry per token of `response_ids` (got {len(steps)} and "
            f"{len(row['response_ids'])}). Extract the trajectories again."
        )
    if steps and min(steps) < -1:
        raise ValueError(
            "`step_map` must hold steps from 1, 0 for given tokens, and -1 where none was decided (got "
            f"{min(steps)}). Extract the trajectories again."
        )
