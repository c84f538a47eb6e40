"""Next tokens of an answer: what a causal model learns of the same rows, to be compared with a masked one.

A row is a prompt and its answer, padded on the right, which no token of a causal model sees. The loss is the mean of
the cross-entropy of the batch's answer tokens, each given all before it, as in transformers' own loss of causal
models; the end-of-turn token is the last one that is learnt, and the prompt is not.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.nn import functional as F

from d3llm_hf.models.generation_d3llm import D3LLMGenerationMixin
from d3llm_hf.models.text_config import text_config
from d3llm_hf.models.wrappers import base_of

from .config import CAUSAL, MaskedDiffusionSFTConfig


NOTHING = -100
"""A label without a loss."""

_NO_MASKS = "nothing is masked. Leave it unset"
_IDLE = dict.fromkeys(
    (
        "min_mask_ratio",
        "mask_ratio_eps",
        "stratified_mask_ratio",
        "suffix_mask_fraction",
        "suffix_window",
        "mask_ratio_per_block",
        "complementary_masks",
    ),
    _NO_MASKS,
) | {
    "block_length": "a token sees those before it, in no blocks. Leave it unset",
    "label_shift": "row i - 1 of the logits always predicts token i. Leave it unset",
    "packing": "other texts of the row would be seen. Leave it unset",
}


def check_causal_objective(model: Any, args: MaskedDiffusionSFTConfig) -> None:
    """Refuses models that see later tokens, and settings of masks.

    Raises:
        ValueError: Naming the argument.
    """
    base = base_of(model)
    sees_later = isinstance(base, D3LLMGenerationMixin) or getattr(text_config(base.config), "is_causal", 1) is False
    if sees_later or base.config.is_encoder_decoder or not base.can_generate():
        raise ValueError(
            f"`objective` must be another one for {type(base).__name__} (got {args.objective!r}), which is no causal "
            "model of transformers. Leave it unset, or load a model with `AutoModelForCausalLM`."
        )
    defaults = {field.name: field.default for field in fields(args)}
    for name, reason in _IDLE.items():
        value = getattr(args, name)
        if value != defaults[name]:
            raise ValueError(f"`{name}` has no effect with `objective={CAUSAL!r}` (got {value!r}): {reason}.")
    if args.supervise_eos_fill:
        raise ValueError(
            f"`supervise_eos_fill` must be False with `objective={CAUSAL!r}` (got True): a causal model stops at the "
            "end of its turn, and nothing is filled. Set it so."
        )


@dataclass
class CausalSFTCollator:
    """Puts examples with `prompt_ids` and `response_ids` into rows, padded on the right.

    Args:
        pad_token_id (`int`): Token behind a text (not attended to).
        row_length (`int`, *optional*): Length of every row; that of the longest in the batch if unset.

    Returns (when called on a list of examples):
        `dict` of `(B, L)` tensors: `input_ids`, `attention_mask`, and `labels` with -100 where nothing is learnt.

    Example:

    ```python
    >>> from trainers.sft.causal import CausalSFTCollator
    >>> collate = CausalSFTCollator(pad_token_id=0)
    >>> batch = collate([{"prompt_ids": [5, 6], "response_ids": [7, 8]}, {"prompt_ids": [5], "response_ids": [9]}])
    >>> batch["input_ids"], batch["labels"]
    (tensor([[5, 6, 7, 8],
            [5, 9, 0, 0]]), tensor([[-100, -100,    7,    8],
            [-100,    9, -100, -100]]))
    ```
    """

    pad_token_id: int
    row_length: int | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        texts = [(list(example["prompt_ids"]), list(example["response_ids"])) for example in examples]
        longest = max(len(prompt) + len(response) for prompt, response in texts)
        length = self.row_length or longest
        if longest > length:
            raise ValueError(
                f"An example must fit a row of {length} tokens (got {longest}). Raise `max_prompt_length` or "
                "`response_length`, or let the trainer leave long examples out."
            )
        rows: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for prompt, response in texts:
            used = len(prompt) + len(response)
            rows["input_ids"].append(prompt + response + [self.pad_token_id] * (length - used))
            rows["attention_mask"].append([1] * used + [0] * (length - used))
            rows["labels"].append([NOTHING] * len(prompt) + response + [NOTHING] * (length - used))
        return {name: torch.tensor(values, device="cpu") for name, values in rows.items()}


def kept_columns(labels: torch.Tensor) -> int:
    """How many of the last columns of `(B, L)` labels hold all that is learnt and the rows that predict it."""
    first = int((labels != NOTHING).any(0).long().argmax())
    return labels.shape[1] - max(first - 1, 0)


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy of the learnt tokens that have a row before them; 0 where none has.

    Args:
        logits (`(B, K, V)`): Of the last K columns.
        labels (`(B, L)`): Of all columns.
    """
    targets = labels[:, labels.shape[1] - logits.shape[1] + 1 :]
    learnt = targets != NOTHING
    summed = F.cross_entropy(logits[:, :-1][learnt].float(), targets[learnt], reduction="sum")
    return summed / learnt.sum().clamp_min(1)
