"""A trajectory as a step map: what a record holds, its canvases, and the published format of lists of states.

A step map says of each new token which forward of the teacher committed it. With the tokens it says what the canvas
looked like after any forward, in place of one copy of the whole text for each.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import datasets
import numpy as np
import pyarrow as pa


class TrajectoryError(ValueError):
    """Trajectories that are damaged, incomplete, or of another run, model or tokenizer."""


def _ids() -> pa.ListType:
    return pa.list_(pa.field("element", pa.int32()))


SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.int64(), nullable=False),
        pa.field("prompt_ids", _ids(), nullable=False),
        pa.field("response_ids", _ids(), nullable=False),
        pa.field("step_map", _ids(), nullable=False),
        pa.field("num_forwards", pa.int32(), nullable=False),
        pa.field("positions_computed", pa.int64(), nullable=False),
        pa.field("correct", pa.bool_()),
        pa.field("attempt", pa.int32()),
        pa.field("seed", pa.int64()),
        pa.field("target_ids", _ids()),
    ]
)
"""Columns of a record.

- `sample_id`: index of the prompt in its data set.
- `prompt_ids`: the prompt as the fine-tuning collator tokenises it.
- `response_ids`: the N tokens of the canvas as they were decoded, the stop token and what follows it included. With
  `early_stop` nothing is decoded behind the stop token; the end-of-text token stands there.
- `step_map`: the forward, from 1, that committed each of the N tokens; -1 where none did.
- `num_forwards`, `positions_computed`: the decoder's counts, see [`D3LLMGenerationOutput`].
- `correct`: whether the answer agrees with the reference, null without one.
- `attempt`: 0 for the first attempt, whose temperature is the first of the list.
- `seed`: what `generate` was given for this row.
- `target_ids`: the data set's own response, its end-of-turn token included; null without one.
"""


def to_dataset(records: Iterable[Mapping[str, Any]]) -> datasets.Dataset:
    """Records as a [`~datasets.Dataset`] in memory, with the columns of `SCHEMA`; missing ones are null."""
    records, chunks = iter(records), []
    while chunk := list(islice(records, 1000)):
        chunks.append(pa.Table.from_pylist(chunk, schema=SCHEMA))
    table = pa.concat_tables(chunks) if chunks else SCHEMA.empty_table()
    return datasets.Dataset(datasets.table.InMemoryTable(table))


def canvas_at(record: Mapping[str, Any], step: int, mask_token_id: int) -> list[int]:
    """The canvas after `step` forwards, prompt included; after 0 forwards every new token is masked.

    Args:
        record: with `prompt_ids`, `response_ids`, `step_map` and `num_forwards`.
        step (`int`): 0 to `num_forwards`.
        mask_token_id (`int`): token of an undecided position. What no forward committed is undecided to the end.

    Raises:
        ValueError: for a step that the trajectory does not have.
    """
    if not 0 <= step <= record["num_forwards"]:
        raise ValueError(
            f"`step` must be between 0 and the {record['num_forwards']} forwards of the trajectory (got {step})."
        )
    answer = zip(record["response_ids"], record["step_map"], strict=True)
    return [*record["prompt_ids"], *(token if 0 < at <= step else mask_token_id for token, at in answer)]


def step_map_of_states(
    states: Sequence[Sequence[int]], prompt_ids: Sequence[int], mask_token_id: int
) -> tuple[list[int], list[int]]:
    """The tokens and the step map of a list of states, the canvas after each forward.

    Args:
        states: T whole sequences of P + N tokens; the masked canvas before the first forward is not among them.
        prompt_ids: the P tokens with which every state begins.
        mask_token_id (`int`): token of an undecided position.

    Returns:
        N tokens (the mask token where the last state has it) and N steps (there -1).

    Raises:
        TrajectoryError: for states that are no decoding: none at all, of different lengths, with another prompt, or
            where a decided token changes or is masked again.
    """
    lengths = {len(state) for state in states}
    if len(lengths) != 1:
        raise TrajectoryError(f"A list of states must hold states of one length (got the lengths {sorted(lengths)}).")
    table = np.asarray(states, dtype=np.int64)  # (T, P + N)
    start = len(prompt_ids)
    if start >= table.shape[1] or (table[:, :start] != np.asarray(prompt_ids, dtype=np.int64)).any():
        raise TrajectoryError(
            f"Every state must begin with the {start} prompt tokens and go on (got {table.shape[1]} tokens, or other "
            "ones at the start)."
        )
    answer = table[:, start:]
    decided = answer != mask_token_id  # (T, N)
    for wrong, what in (
        (decided[:-1] & ~decided[1:], "is masked again"),
        (decided[:-1] & (answer[:-1] != answer[1:]), "changes"),
    ):
        if wrong.any():
            state, position = np.argwhere(wrong)[0].tolist()
            raise TrajectoryError(
                f"A decided token must stay (got one that {what} at position {position} in state {state + 2})."
            )
    steps = np.where(decided[-1], decided.argmax(0) + 1, -1)
    return answer[-1].tolist(), steps.tolist()


def read_published_states(rows: Iterable[Mapping[str, Any]], mask_token_id: int) -> datasets.Dataset:
    """Converts rows of the format that d3LLM publishes (`d3LLM/trajectory_data_*`, or its JSON files) to step maps.

    Args:
        rows: each with `prompt_ids` and `trajectory`, the list of states; `idx` (or `sample_idx`, or the row's index)
            becomes `sample_id`, and `is_correct` becomes `correct`.
        mask_token_id (`int`): the teacher's mask token.

    Returns:
        [`~datasets.Dataset`] with the columns of `SCHEMA`, those that the format does not have being null.

    Raises:
        TrajectoryError: naming the row, for one that is no trajectory, see [`step_map_of_states`].
    """

    def records():
        for index, row in enumerate(rows):
            missing = [name for name in ("prompt_ids", "trajectory") if row.get(name) is None]
            if missing:
                raise TrajectoryError(f"Row {index} must have `prompt_ids` and `trajectory` (got no {missing}).")
            states = row["trajectory"]
            try:
                tokens, steps = step_map_of_states(states, row["prompt_ids"], mask_token_id)
            except TrajectoryError as error:
                raise TrajectoryError(f"Row {index}: {error}") from None
            yield {
                "sample_id": row.get("idx", row.get("sample_idx", index)),
                "prompt_ids": row["prompt_ids"],
                "response_ids": tokens,
                "step_map": steps,
                "num_forwards": len(states),
                "positions_computed": len(states) * len(states[0]),
                "correct": row.get("is_correct"),
            }

    return to_dataset(records())
