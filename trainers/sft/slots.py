"""ReFusion's objective (https://huggingface.co/papers/2512.13586): slots of an answer in the order of their decision.

An answer is cut into slots from its start; some are masked. Behind the prompt come the others, clean and shuffled, and
then the masked ones in their order, all tokens at the positions that they have in the text. In a clean slot each token
predicts the next one; a masked position predicts its own token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


SIZES = (4, 8, 16, 32)
"""Slot sizes, of which each row draws one."""

NOTHING = -100
"""A label without a loss."""


@dataclass(frozen=True)
class SlotDraw:
    """What is drawn for one row.

    Args:
        size (`int`): Positions of a slot; the last one may be shorter.
        probability (`float`): With which each slot was masked.
        clean (`list[int]`): Slots that are not masked, in the order in which they are shown.
    """

    size: int
    probability: float
    clean: list[int]


def draw_slots(length: int, generator: torch.Generator, eps: float) -> SlotDraw:
    """Draws for an answer of `length` tokens: a size, a probability p = (1 - eps) t + eps, masks, and an order."""
    size = SIZES[int(torch.randint(len(SIZES), (), generator=generator))]
    count = -(-length // size)
    ratio, *chances = torch.rand(1 + count, generator=generator, dtype=torch.float64).tolist()
    probability = (1 - eps) * ratio + eps
    clean = [slot for slot, chance in enumerate(chances) if chance >= probability]
    order = torch.randperm(len(clean), generator=generator).tolist()
    return SlotDraw(size, probability, [clean[place] for place in order])


@dataclass(frozen=True)
class SlotRows:
    """A batch in its new order, everything `(B, L)` on the CPU.

    Args:
        order (long): Where a token stood.
        input_ids (long): Tokens, the mask token in masked slots.
        next_tokens (long): What a clean position predicts, `NOTHING` elsewhere.
        own_tokens (long): What a masked position predicts, `NOTHING` elsewhere.
        weights (float): 1 / p over the answer's length at masked positions, 0 elsewhere.
    """

    order: torch.Tensor
    input_ids: torch.Tensor
    next_tokens: torch.Tensor
    own_tokens: torch.Tensor
    weights: torch.Tensor


def in_slots(
    input_ids: torch.Tensor,
    starts: Sequence[int],
    lengths: Sequence[int],
    draws: Sequence[SlotDraw],
    mask_token_id: int,
) -> SlotRows:
    """Reorders the answers of `(B, L)` tokens on the CPU, of which nothing else moves.

    Args:
        starts, lengths: Of each row's answer.
        draws: Of each row.
        mask_token_id: Of a masked position.
    """
    order = torch.arange(input_ids.shape[1], device="cpu").repeat(len(input_ids), 1)
    next_tokens = torch.full_like(input_ids, NOTHING)
    own_tokens, weights = next_tokens.clone(), torch.zeros(input_ids.shape, device="cpu")
    for row, (start, length, draw) in enumerate(zip(starts, lengths, draws, strict=True)):
        masked = [slot for slot in range(-(-length // draw.size)) if slot not in draw.clean]
        place = start
        for slot in (*draw.clean, *masked):
            first, last = start + slot * draw.size, min(start + (slot + 1) * draw.size, start + length)
            here, there = slice(place, place + last - first), slice(first, last)
            order[row, here] = torch.arange(first, last, device="cpu")
            if slot in masked:
                own_tokens[row, here] = input_ids[row, there]
                weights[row, here] = 1 / (draw.probability * length)
            else:
                next_tokens[row, place : here.stop - 1] = input_ids[row, first + 1 : last]
            place = here.stop
    moved = input_ids.gather(1, order).masked_fill(own_tokens != NOTHING, mask_token_id)
    return SlotRows(order, moved, next_tokens, own_tokens, weights)


def slot_losses(logits: torch.Tensor, rows: SlotRows) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean loss of next tokens over the batch, and of each row that of its masked positions `(B,)`.

    Where no slot is clean, or all have one token, nothing predicts a next one: that loss is 0 then. (The official code
    divides by 0.)

    Args:
        logits (`(B, K, V)`): Of the last K columns, which have all answers.
        rows: The batch.
    """
    kept, device = logits.shape[1], logits.device
    following, own = (table[:, -kept:].to(device) for table in (rows.next_tokens, rows.own_tokens))
    weights = rows.weights[:, -kept:].to(device)
    learnt = (following != NOTHING) | (own != NOTHING)
    targets = torch.where(following != NOTHING, following, own)
    flat = torch.nn.functional.cross_entropy(logits[learnt].float(), targets[learnt], reduction="none")
    loss = torch.zeros_like(weights).masked_scatter(learnt, flat)
    clean = following != NOTHING
    return (loss * clean).sum() / clean.sum().clamp_min(1), (loss * weights).sum(1)
