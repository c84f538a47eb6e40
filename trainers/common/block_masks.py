"""What each position of a batch of canvases sees, of a model that sees nothing of later blocks."""

from __future__ import annotations

import torch

from d3llm_hf.models.modeling_common import positions_of
from d3llm_hf.models.topology import Topology


def block_mask_of(attention_mask: torch.Tensor, answer_length: int, topology: Topology) -> torch.Tensor:
    """Which slots see which, `(B, 1, L, L)` bool; padding is seen by nothing, and sees all that is text.

    Args:
        attention_mask (`(B, L)`): 0 on padding.
        answer_length (`int`): the last slots of each row, before which its prompt lies.
        topology ([`Topology`]): where blocks lie.
    """
    seen = attention_mask.bool()
    given = seen[:, : seen.shape[1] - answer_length].sum(1)
    blocks = topology.blocks(positions_of(attention_mask), given).masked_fill(~seen, seen.shape[1])
    return ((blocks[:, :, None] >= blocks[:, None]) & seen[:, None])[:, None]
