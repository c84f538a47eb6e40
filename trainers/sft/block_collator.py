"""Batches for block-causal training: texts one behind the other in a row, each a document of its own."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from d3llm_hf.models.topology import Topology


PADDING = -1  # the document of slots without text
SAMPLES = "samples"  # the column of a packed data set


@dataclass
class BlockSFTCollator:
    """Puts examples with `prompt_ids` and `response_ids`, or packed ones, into rows; it masks nothing.

    A text begins where the one before it ends, and rows are padded on the right. A position counts from the beginning
    of its text, and so do the blocks.

    Args:
        pad_token_id (`int`): Token behind the last text of a row.
        eos_token_id (`int`): Token behind an answer, up to the end of its last block.
        topology ([`~d3llm_hf.models.topology.Topology`]): Where the blocks of a text lie.
        response_length (`int`): Longest answer; the fill ends there, too.
        supervise_eos_fill (`bool`): Whether answers are filled, and the fill is learnt: what is decided last is a
            whole block.
        row_length (`int`, *optional*): Length of every row; that of the longest in the batch if unset.

    Returns (when called on a list of examples):
        `dict` of `(B, L)` tensors: `input_ids`; `labels` with -100 where nothing is learnt; `documents`, the number of
        the text in its row, [`PADDING`] where there is none; `position_ids` and `blocks` of the text.

    Example:

    ```python
    >>> from d3llm_hf.models.topology import Topology
    >>> from trainers.sft.block_collator import BlockSFTCollator
    >>> collate = BlockSFTCollator(pad_token_id=0, eos_token_id=0, topology=Topology(2), response_length=4)
    >>> batch = collate([{"prompt_ids": [5, 6], "response_ids": [7]}])
    >>> batch["input_ids"], batch["labels"], batch["blocks"]
    (tensor([[5, 6, 7, 0]]), tensor([[-100, -100,    7,    0]]), tensor([[0, 0, 1, 1]]))
    ```
    """

    pad_token_id: int
    eos_token_id: int
    topology: Topology
    response_length: int
    supervise_eos_fill: bool = True
    row_length: int | None = None

    def size(self, example: dict[str, Any]) -> int:
        """Slots of an example in its row."""
        prompt, response = len(example["prompt_ids"]), len(example["response_ids"])
        if not self.supervise_eos_fill:
            return prompt + response
        whole = int(self.topology.whole(torch.tensor([prompt], device="cpu"), response))
        return prompt + max(response, min(whole, self.response_length))

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows = [self._row(example.get(SAMPLES) or [example]) for example in examples]
        length = self.row_length or max(len(row["input_ids"]) for row in rows)
        behind = {"input_ids": self.pad_token_id, "labels": -100, "documents": PADDING, "position_ids": 0, "blocks": 0}
        longest = max(len(row["input_ids"]) for row in rows)
        if longest > length:
            raise ValueError(
                f"An example must fit a row of {length} tokens (got {longest}). Raise `max_prompt_length` or "
                "`response_length`, or let the trainer leave long examples out."
            )
        return {
            name: torch.tensor([row[name] + [fill] * (length - len(row[name])) for row in rows], device="cpu")
            for name, fill in behind.items()
        }

    def _row(self, samples: Iterable[dict[str, Any]]) -> dict[str, list[int]]:
        row: dict[str, list[int]] = {
            name: [] for name in ("input_ids", "labels", "documents", "position_ids", "blocks")
        }
        for number, sample in enumerate(samples):
            prompt, response = list(sample["prompt_ids"]), list(sample["response_ids"])
            size = self.size(sample)
            learnt = response + [self.eos_token_id] * (size - len(prompt) - len(response))
            positions = torch.arange(size, device="cpu")[None]
            given = torch.tensor([len(prompt)], device="cpu")
            row["input_ids"] += prompt + learnt
            row["labels"] += [-100] * len(prompt) + learnt
            row["documents"] += [number] * size
            row["position_ids"] += positions[0].tolist()
            row["blocks"] += self.topology.blocks(positions, given)[0].tolist()
        return row


def pack(batch: dict[str, list[Any]], collator: BlockSFTCollator, length: int) -> dict[str, list[Any]]:
    """Examples in as few rows of `length` slots as first fit finds, for `Dataset.map(batched=True)`.

    Each goes into the first row that has room for it, so rows keep the order of the data as far as they can.

    Args:
        batch: columns `prompt_ids` and `response_ids`.
        collator: which says what room an example takes.
        length (`int`): of a row; no example may be longer.

    Returns:
        `dict` with one column of lists of examples.
    """
    rows: list[list[dict[str, Any]]] = []
    room: list[int] = []
    for prompt, response in zip(batch["prompt_ids"], batch["response_ids"], strict=True):
        example = {"prompt_ids": prompt, "response_ids": response}
        size = collator.size(example)
        place = next((index for index, left in enumerate(room) if left >= size), len(rows))
        if place == len(rows):
            rows.append([])
            room.append(length)
        rows[place].append(example)
        room[place] -= size
    return {SAMPLES: rows}
