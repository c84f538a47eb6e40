"""Side queries: slots behind the canvas that are asked in the same forward, and that no slot of the canvas sees."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .decoding import Rules, State


@dataclass
class Aside:
    """WINO's shadow block: what would the model write at a slot of the open block, had it not been told?

    One mask token for each position of a row's open block, at the same place of the text. It sees the canvas but for
    the slot that it stands for, and the whole shadow block. B rows, E places, which shorter blocks do not fill.

    Attributes:
        first (`(B,)` long): column of the block's first position.
        slots (`(B, E)` long): the slot that each stands for.
        real (`(B, E)` bool): False behind the end of a shorter block.
    """

    first: torch.Tensor
    slots: torch.Tensor
    real: torch.Tensor

    @classmethod
    def of_open_block(cls, state: State, rules: Rules, seen: int) -> "Aside":
        """That of each row's last open block, of a forward over `seen` slots of the canvas."""
        columns, size = state.tokens.shape[1], min(rules.block_length, state.tokens.shape[1])
        first = (state.open_count - 1) * rules.block_length
        column = first[:, None] + torch.arange(size, device=first.device)
        real = column < state.length[:, None]
        slots = state.slots.gather(1, column.clamp_max(columns - 1)).clamp_max(seen - 1)
        return cls(first, slots, real)

    @property
    def size(self) -> int:
        """E."""
        return self.slots.shape[1]

    def index(self, column: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        """The place `(n,)` among the E of positions at `(n,)` rows and columns of the block."""
        return column - self.first[row]

    def joined(
        self,
        inputs: dict[str, Any],
        positions: torch.Tensor,
        token_types: torch.Tensor | None,
        mask_token_id: int,
        embed: Callable[[torch.Tensor], torch.Tensor],
    ) -> dict[str, Any]:
        """The inputs of a forward over S slots of the canvas, or of several batches of it, with the E behind them.

        Args:
            inputs: tokens or embeddings, `position_ids`, and as `attention_mask` `(B', S)` what every slot sees, or
                `None`.
            positions, token_types (`(B, L)`): of the canvas.
            mask_token_id: of an undecided position.
            embed: makes embeddings of tokens.

        Returns:
            the same for S + E slots, with an `attention_mask` `(B', 1, S + E, S + E)` of what each sees.
        """
        copies = inputs["position_ids"].shape[0] // self.slots.shape[0]
        slots, real = self.slots.repeat(copies, 1), self.real.repeat(copies, 1)
        tokens = torch.full_like(slots, mask_token_id)
        added = {"position_ids": positions.repeat(copies, 1).gather(1, slots)}
        if token_types is not None:
            added["token_type_ids"] = token_types.repeat(copies, 1).gather(1, slots)
        if "input_ids" in inputs:
            added["input_ids"] = tokens
        else:
            added["inputs_embeds"] = embed(tokens).to(inputs["inputs_embeds"].dtype)
        joined = {name: torch.cat([inputs[name], more], dim=1) for name, more in added.items()}
        return joined | {"attention_mask": self._mask(inputs["attention_mask"], inputs["position_ids"], slots, real)}

    def _mask(
        self, mask: torch.Tensor | None, canvas: torch.Tensor, slots: torch.Tensor, real: torch.Tensor
    ) -> torch.Tensor:
        """What each slot sees, bool. Every one sees something: what has no softmax would spread."""
        batch, seen = canvas.shape
        visible = torch.ones_like(canvas, dtype=torch.bool) if mask is None else mask
        table = torch.zeros(batch, seen + self.size, seen + self.size, dtype=torch.bool, device=canvas.device)
        table[:, :, :seen] = visible[:, None]
        own = torch.arange(seen, device=canvas.device) == slots[:, :, None]
        table[:, seen:, :seen] &= ~(own & real[:, :, None])
        table[:, seen:, seen:] = real[:, None]
        return table[:, None]


__all__ = ["Aside"]
