"""Verification: the target chooses a token behind every node, and the tree is followed while it has that token.

The target's choice depends on its own logits alone, and the tree is drafted before. So what is accepted is what the
target would have chosen one by one: greedily the same tokens, and with sampling the same distribution. EAGLE's own
rule, to accept a child with the target's probability and to renormalise behind a refusal, has that distribution too,
and accepts as much: a draw is among the children as often as one of them is accepted.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ...models.scoring import Sampler


@dataclass
class Choice:
    """How the target chooses a token.

    Attributes:
        sampler ([`~d3llm_hf.models.scoring.Sampler`], *optional*): source of random numbers; unset for greedy
            decoding. A number belongs to a position of the text, so that a draw is the same in whatever forward.
        temperature, top_k, top_p: as in transformers, in this order; unset or neutral ones change nothing.
    """

    sampler: Sampler | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        self._warpers = LogitsProcessorList()
        if self.temperature != 1:
            self._warpers.append(TemperatureLogitsWarper(float(self.temperature)))
        if self.top_k:
            self._warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p is not None and self.top_p < 1:
            self._warpers.append(TopPLogitsWarper(float(self.top_p)))

    def __call__(self, logits: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """A token `(n,)` for each of n rows.

        Args:
            logits (`(n, V)`): of the target.
            positions (`(n,)` long): where the tokens would stand in the text.

        Raises:
            ValueError: for logits that are not finite.
        """
        if not logits.isfinite().all():  # a host sync
            raise ValueError("The target's logits must be finite (got NaN or inf). Check its weights and its dtype.")
        if self.sampler is None:
            return logits.argmax(-1)
        text: Any = positions[:, None]  # which these samplers do not read
        scores = self._warpers(text, logits.float())
        return self.sampler.tokens(scores, torch.zeros_like(positions), torch.zeros_like(positions), positions)


def accepted_path(tokens: list[int], parents: list[int], choices: list[int]) -> list[int]:
    """The nodes from the root on whose tokens are the target's choices.

    Args:
        tokens, parents: of T nodes, as in [`Tree`]; no two children of a node have the same token.
        choices: the target's token behind each node.

    Returns:
        nodes, the root first; the choice behind the last one stands in no node.
    """
    below = {(parent, token): node for node, (parent, token) in enumerate(zip(parents, tokens, strict=True))}
    path = [0]
    while (node := below.get((path[-1], choices[path[-1]]))) is not None:
        path.append(node)
    return path


__all__ = ["Choice", "accepted_path"]
