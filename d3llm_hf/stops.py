"""Where an answer ends: at a stop string, or at the first of several new tokens that a criterion ends it with."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.generation import StoppingCriteria


Decode = Callable[[list[int]], str]


def before_stop(text: str, stops: Sequence[str]) -> str:
    """`text` before the stop string that is complete first when it is read from the left.

    Of stop strings that end at the same character the longest counts. So a text that was ended at its first stop
    string and the same text in full give the same.
    """
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return text[: min(found)[1]] if found else text


def tokens_of(decode: Decode, ids: list[int], text: str) -> int:
    """How many of the first tokens of `ids` it takes for `text`, a prefix of what they decode to."""
    low, high = 0, len(ids)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(decode(ids[:middle])) >= len(text) else (middle + 1, high)
    return low


class StopInAnswer(StoppingCriteria):
    """Ends a row where its answer holds a stop string. For one call of `generate`.

    transformers' `stop_strings` reads the prompt's end as well: behind a prompt that ends in a newline it takes an
    answer that begins with `class` for the stop string "\\nclass". And it needs a table over the vocabulary for each
    stop string. This reads the decoded answer alone.

    Args:
        decode: token ids to text.
        stops: stop strings, none of them empty.
        prompt_length (`int`): slots of the prompt.
        mask_token_id (`int`): a row that still holds it has not come this far.
    """

    def __init__(self, decode: Decode, stops: Sequence[str], prompt_length: int, mask_token_id: int):
        self.decode, self.stops = decode, tuple(stops)
        self.prompt_length, self.mask_token_id = prompt_length, mask_token_id
        self.ends: dict[int, int] = {}  # row -> tokens of the answer with which it is complete
        self.read: dict[int, int] = {}  # row -> tokens without a stop string

    def __call__(self, input_ids: torch.LongTensor, scores=None, **kwargs) -> torch.BoolTensor:
        answers = input_ids[:, self.prompt_length :].tolist()
        found = [self._is_ended(row, answer) for row, answer in enumerate(answers)]
        ended = torch.tensor(found, dtype=torch.bool, device=input_ids.device)
        return ended  # type: ignore[return-value]  # torch declares tensors of all types alike

    def _is_ended(self, row: int, answer: list[int]) -> bool:
        if row in self.ends:
            return len(answer) >= self.ends[row]
        if len(answer) <= self.read.get(row, 0) or self.mask_token_id in answer:
            return False
        text = self.decode(answer)
        if any(stop in text for stop in self.stops):
            self.ends[row] = len(answer)
            return True
        self.read[row] = len(answer)
        return False


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
