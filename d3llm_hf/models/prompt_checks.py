"""What a text has to be for a model: tokens that it knows, at positions that it has, counted as decoding does."""

from typing import Any

import torch

from .modeling_common import positions_of


def check_tokens(input_ids: torch.Tensor, vocab_size: int | None) -> None:
    """Refuses what is no token of the model, in a text or its padding.

    Raises:
        TypeError: for numbers that are no integers.
        ValueError: for tokens outside the vocabulary.
    """
    if input_ids.dtype == torch.bool or input_ids.is_floating_point():
        raise TypeError(
            f"`input_ids` must hold integers (got a tensor of {input_ids.dtype}). Pass token ids, and other inputs by "
            "their own names."
        )
    if vocab_size is None or not input_ids.numel():
        return
    least, largest = torch.stack(input_ids.aminmax()).tolist()  # a host sync
    if least < 0 or largest >= vocab_size:
        raise ValueError(
            f"`input_ids` must lie inside the vocabulary of {vocab_size} tokens (got "
            f"{least if least < 0 else largest}). Encode the text with the model's own tokenizer, and hide padding by "
            "`attention_mask`."
        )


def check_mask(attention_mask: torch.Tensor) -> None:
    """Raises a ValueError for other numbers than zeros and ones, which would be taken for ones."""
    if ((attention_mask != 0) & (attention_mask != 1)).any():  # a host sync
        raise ValueError(
            "`attention_mask` must hold ones for tokens and zeros for padding (got other numbers). Pass what the "
            "tokenizer returns; packed texts and masks that are added to scores have no meaning here."
        )


def check_positions(position_ids: Any, attention_mask: torch.Tensor | None, offset: int) -> None:
    """Raises a ValueError for other positions than decoding counts: those of its canvas are its own affair."""
    if position_ids is None:
        return
    given = torch.as_tensor(position_ids)
    if attention_mask is None:
        expected = torch.arange(given.shape[-1], device=given.device) + offset
        same = torch.equal(given, expected.expand_as(given))
    else:
        seen = attention_mask.to(given.device)
        fits = given.shape in (seen.shape, seen.shape[-1:], (1, *seen.shape[-1:]))
        same = fits and not ((given != positions_of(seen) + offset) & seen.bool()).any()
    if not same:
        raise ValueError(
            f"`position_ids` must count each text from its first token, {offset}, {offset + 1}, ... (got others): "
            "the answer's continue them. Leave them out."
        )


__all__ = ["check_mask", "check_positions", "check_tokens"]
