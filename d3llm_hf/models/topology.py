"""What the positions of a text see of one another: all, or nothing of later blocks."""

from dataclasses import dataclass
from typing import Any

import torch

from .text_config import text_setting


@dataclass(frozen=True)
class Topology:
    """Block-causal attention: a block sees itself and all earlier ones, so that keys of finished blocks are final.

    A model without one sees everything.

    Attributes:
        block_length (`int`): tokens of a block.
        alignment (`str`): where blocks begin. `"text"`: at the first token of the text, so that the end of a prompt
            may share a block with the answer (SDAR, LLaDA2, Fast-dLLM v2). `"prompt"`: behind the prompt, which is one
            block whatever its length (D2F).
    """

    block_length: int
    alignment: str = "text"

    def offset(self, given: torch.Tensor) -> torch.Tensor:
        """Tokens `(B,)` of prompts of `given` `(B,)` tokens that lie in the first block of the answer."""
        return given % self.block_length if self.alignment == "text" else torch.zeros_like(given)

    def whole(self, given: torch.Tensor, new_length: int) -> torch.Tensor:
        """Positions `(B,)` to decide for `new_length` tokens: up to the end of a block, decided as a whole."""
        offset = self.offset(given)
        blocks = (offset + new_length + self.block_length - 1) // self.block_length
        return blocks * self.block_length - offset

    def blocks(self, positions: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """The block `(B, L)` of each slot; a slot sees those whose block is not a later one.

        Args:
            positions (`(B, L)` long): of the slots in their text, from 0.
            given (`(B,)` long): tokens of the prompt.
        """
        if self.alignment == "text":
            return positions // self.block_length
        behind = positions - given[:, None]
        return torch.where(behind < 0, 0, 1 + behind.div(self.block_length, rounding_mode="floor"))


@dataclass(frozen=True)
class Traits:
    """What the settings of decoding have to know of a model.

    Attributes:
        logit_shift (`int`): 0 where logits row i predicts token i, 1 where it predicts token i + 1.
        topology (`Topology`, *optional*): of a model that was trained with block-causal attention.
        method (`str`, *optional*): its decoding method where nobody names one.
    """

    logit_shift: int = 0
    topology: Topology | None = None
    method: str | None = None

    @classmethod
    def of(cls, model: Any, config: Any) -> "Traits":
        """Those of a model, or of a model class, with a config; where blocks begin, either may say."""
        topology = None
        alignment = model.block_alignment or text_setting(config, "block_alignment")
        if alignment is not None:
            topology = Topology(text_setting(config, "block_length"), alignment)
        return cls(model.logit_shift, topology, model.default_method)


PLAIN = Traits()
"""Those of a model of which nothing is known: LLaDA's."""

__all__ = ["PLAIN", "Topology", "Traits"]
