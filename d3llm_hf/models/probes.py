"""Short forwards that tell what a model does with what it is given, where its code alone does not say."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .cache import SlotCache
from .text_config import text_setting


LONGEST = 72
"""Positions of the longest probe: more than two of the usual blocks of 32."""


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout and gradients inside; every module's mode is what it was afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal up to rounding in the model's dtype.

    What rounding adds up to grows with the layers and depends on the processor; a wrong key or position moves a logit
    by much more, so that there is room for both.
    """
    tolerance = max(32 * torch.finfo(b.dtype).eps, 1e-4) * float(b.abs().max())
    return bool(torch.allclose(a, b, rtol=0, atol=tolerance))


def ordinary_tokens(model: Any, mask_token_id: int | None, count: int) -> torch.Tensor:
    """Some `(count,)` tokens, none of them the mask or the pad token, as many different ones as six ids leave."""
    special = {mask_token_id, text_setting(model.config, "pad_token_id")}
    tokens = [token for token in range(6) if token not in special]
    return torch.tensor([tokens[index % len(tokens)] for index in range(count)], device=model.device)


def long_text(model: Any, mask_token_id: int | None) -> torch.Tensor:
    """One text `(1, L)`, as long as the model's positions allow, up to `LONGEST`."""
    positions = text_setting(model.config, "max_position_embeddings")
    length = LONGEST if positions is None else min(LONGEST, positions - model.position_offset)
    return ordinary_tokens(model, mask_token_id, length)[None]


def logits_of(model: Any, input_ids: torch.Tensor, **inputs: Any) -> Any:
    """What a forward over whole texts returns as logits, `None` if it has none; nothing is kept of it."""
    inputs = {"input_ids": input_ids, "use_cache": False} | inputs
    return getattr(model(**model.accepted(inputs)), "logits", None)


def reaches_forward_only(model: Any, text: torch.Tensor) -> bool:
    """Whether the beginning of a text reaches its end, and the end does not reach the beginning.

    So it is where blocks are causal. A window reaches as far in both directions.
    """
    half = text.shape[1] // 2
    other = text.roll(1, dims=1)  # another token in every place
    earlier = torch.cat([other[:, :half], text[:, half:]], dim=1)
    later = torch.cat([text[:, :half], other[:, half:]], dim=1)
    try:
        plain, earlier, later = (logits_of(model, ids) for ids in (text, earlier, later))
    except (IndexError, RuntimeError):
        return False  # the model takes no text of that length
    return torch.equal(later[:, 0], plain[:, 0]) and not torch.equal(earlier[:, -1], plain[:, -1])


def keeps_to_blocks(model: Any, text: torch.Tensor) -> bool:
    """Whether the first half of a text `(1, L)` gets the logits that it gets alone, where a mask hides the second."""
    length, half = text.shape[1], text.shape[1] // 2
    place = torch.arange(length, device=text.device)
    first = (place < half)[None]
    hidden = (place[:, None] < half) & (place >= half)
    positions = (place + model.position_offset)[None]
    try:
        whole = model.canvas_logits(
            {"input_ids": text, "position_ids": positions, "attention_mask": ~hidden[None, None]}, first
        )
        alone = model.canvas_logits(
            {"input_ids": text[:, :half], "position_ids": positions[:, :half], "attention_mask": None},
            first[:, :half],
        )
    except (IndexError, RuntimeError, TypeError, ValueError):
        return False  # it takes no such mask
    return close(whole, alone)


def takes_slot_cache(model: Any, num_layers: int, text: torch.Tensor) -> bool:
    """Whether some slots of a text `(1, L)` get the logits of the whole once the keys of the rest are in the cache."""
    length = text.shape[1]
    everything = torch.ones_like(text, dtype=torch.bool)
    positions = (torch.arange(length, device=text.device) + model.position_offset)[None]
    cache = SlotCache(num_layers, length)

    def forward(slots: slice | torch.Tensor) -> torch.Tensor:
        ids, places, wanted = (
            table[:, slots] if isinstance(slots, slice) else table.gather(1, slots)
            for table in (text, positions, everything)
        )
        inputs = {"input_ids": ids, "position_ids": places, "attention_mask": everything}
        return model.canvas_logits(inputs, wanted, cache.at(slots))

    apart = torch.tensor([[0, length // 2, length - 1]], device=text.device)
    windows = (slice(1, length), slice(length // 3, length // 3 + 2), apart)
    try:
        whole = forward(slice(0, length))
        return all(close(forward(slots), whole[slots if isinstance(slots, slice) else slots[0]]) for slots in windows)
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False  # a cache of another kind, e.g. a state space's


def reads_padding(model: Any, mask_token_id: int | None) -> bool:
    """Whether a padded text gets the logits that it gets alone, and others than with its padding for text."""
    text = ordinary_tokens(model, mask_token_id, 5)[None]
    seen = torch.tensor([[False, False, True, True, True]], device=text.device)
    positions = torch.tensor([[0, 0, 0, 1, 2]], device=text.device) + model.position_offset

    def forward(start: int, mask: torch.Tensor) -> torch.Tensor:
        inputs = {
            "input_ids": text[:, start:],
            "position_ids": positions[:, start:],
            "attention_mask": mask[:, start:],
        }
        return model.canvas_logits(inputs, seen[:, start:])

    try:
        padded, unread, alone = forward(0, seen), forward(0, torch.ones_like(seen)), forward(2, seen)
    except (RuntimeError, TypeError, ValueError):
        return True  # it needs more than a text; what it does with padding is not known
    return not torch.equal(padded, unread) and close(padded, alone)
