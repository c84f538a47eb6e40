"""What answering the requests of an evaluation took: one record a request, their totals, and a file of them."""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...files import replace_file


@dataclass(frozen=True)
class GenerationRecord:
    """What one answer took.

    Attributes:
        task, doc_id, index, repeat: which request of lm-eval; `index` counts the requests of a document and `repeat`
            the answers to a request.
        prompt_tokens, max_new_tokens: slots of the prompt, and of the canvas behind it.
        tokens: of the answer, up to and excluding the first stop token and the first stop string.
        forwards, forwards_reference: see [`D3LLMGenerationOutput`].
        positions: pushed through the model.
        seconds: wall clock of its batch in `generate`, shared equally by the rows.
        draft_forwards, draft_positions: of whatever drafts for a causal model; `None` for others.
    """

    task: str | None
    doc_id: int | None
    index: int
    repeat: int
    prompt_tokens: int
    max_new_tokens: int
    tokens: int
    forwards: int
    forwards_reference: int
    positions: int
    seconds: float
    draft_forwards: int | None = None
    draft_positions: int | None = None


DRAFTED = ("draft_forwards", "draft_positions")
SUMMED = ("tokens", "forwards", "forwards_reference", "positions", "seconds")


def totals(records: Iterable[GenerationRecord]) -> dict[str, Any]:
    """Sums of the records, and their ratios: all tokens over all forwards (not the mean of the rows' ratios).

    Returns:
        `requests`, `tokens`, `forwards`, `forwards_reference`, `positions`, `seconds`; `tpf` and `tpf_reference`
        (tokens over forwards, by either count), `positions_per_token`, `tokens_per_second`; `None` where the
        denominator is 0. Of causal models also `draft_forwards` and `draft_positions`.
    """
    records = list(records)
    sums = {name: sum(getattr(record, name) for record in records) for name in SUMMED}
    for name in DRAFTED:
        found = [value for record in records if (value := getattr(record, name)) is not None]
        if found:
            sums[name] = sum(found)
    pairs = {
        "tpf": ("tokens", "forwards"),
        "tpf_reference": ("tokens", "forwards_reference"),
        "positions_per_token": ("positions", "tokens"),
        "tokens_per_second": ("tokens", "seconds"),
    }
    ratios = {name: sums[top] / sums[bottom] if sums[bottom] else None for name, (top, bottom) in pairs.items()}
    return {"requests": len(records), **sums, **ratios}


def write_records(path: str | os.PathLike, records: Sequence[GenerationRecord]) -> None:
    """Writes JSON lines, one a record; the file is complete or as it was."""
    lines = [
        {name: value for name, value in asdict(record).items() if name not in DRAFTED or value is not None}
        for record in records
    ]
    replace_file(Path(path), "".join(json.dumps(line) + "\n" for line in lines).encode())


def read_records(path: str | os.PathLike) -> list[GenerationRecord]:
    """The records of a file of [`write_records`], in its order.

    Raises:
        ValueError: for a line that is no record, naming it.
    """
    records = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            records.append(GenerationRecord(**json.loads(line)))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(
                f"`path` must hold one record a line (got {error} in line {number} of {str(path)!r}). Pass what an "
                "evaluation wrote with `stats_path`."
            ) from error
    return records
