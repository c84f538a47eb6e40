"""What a method is given, and what it gives back: the two sides of a row of `AR_METHODS`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Request:
    """Prompts to be continued, checked.

    Attributes:
        model: the target.
        input_ids, attention_mask (`(B, P)` long): prompts, padded on the left.
        settings: all settings of the method, and the common ones.
        max_new_tokens: of each answer.
        eos_token_ids: stop tokens; may be empty.
        pad_token_id: fills up rows.
        stopping_criteria: of transformers; they are asked about each prefix of an answer.
        assistant_model: a model that drafts, where the method needs one.
        tokenizer, assistant_tokenizer: of the two, where their vocabularies differ.
        draft_head: a draft head for the model, where the method needs one.
    """

    model: Any
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    settings: Mapping[str, Any]
    max_new_tokens: int
    eos_token_ids: Sequence[int]
    pad_token_id: int
    stopping_criteria: Sequence[Any] = ()
    assistant_model: Any = None
    tokenizer: Any = None
    assistant_tokenizer: Any = None
    draft_head: Any = None


@dataclass
class Continued:
    """Rows that were continued together.

    Attributes:
        answers (`(B, N)` long): the new tokens; whatever stands behind the end of a row is cut off later.
        target: positions of each forward of the target, in order.
        drafts: the same of whatever drafts.
        ends: row -> tokens of the answer with which a stopping criterion ended it.
    """

    answers: torch.Tensor
    target: list[int]
    drafts: list[int]
    ends: dict[int, int] = field(default_factory=dict)
