"""Stopping criteria where several tokens may come at once: the first prefix that they end is the answer."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.generation import StoppingCriteria


class FirstEnd(StoppingCriteria):
    """Asks criteria about each prefix in turn, and remembers where a row ended. For one call of `generate`.

    Speculative decoding accepts a run of tokens and asks about the whole. A stop string inside the run would then be
    passed over, or leave tokens behind it; plain decoding has neither.

    Args:
        criteria: stopping criteria of transformers.
        prompt_length: slots of the prompt.
    """

    def __init__(self, criteria: Sequence[Any], prompt_length: int):
        self.criteria, self.prompt_length = criteria, prompt_length
        self.ends: dict[int, int] = {}  # row -> tokens of its answer
        self.seen = 0

    def __call__(self, input_ids: torch.LongTensor, scores=None, **kwargs) -> torch.BoolTensor:
        length = input_ids.shape[1] - self.prompt_length
        for new in range(self.seen + 1, length + 1):
            prefix = input_ids[:, : self.prompt_length + new]
            for criterion in self.criteria:
                for row in criterion(prefix, scores).nonzero().flatten().tolist():
                    self.ends.setdefault(row, new)
        self.seen = length
        ended = torch.tensor([row in self.ends for row in range(len(input_ids))], device=input_ids.device)
        return ended  # type: ignore[return-value]  # torch declares tensors of all types alike
