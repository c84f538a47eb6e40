"""SDAR's loop as plainly as it can be written: one row, the whole text anew in every forward, no tensors of state."""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class BlockRules:
    """Of a call; `threshold` `None` is the static rule."""

    new_tokens: int
    block_length: int
    steps: int
    mask_token_id: int
    stop_ids: tuple[int, ...] = ()
    threshold: float | None = None
    sequential: bool = False


@dataclass
class Decoded:
    answer: list[int]
    decided_after: list[int]
    forwards: int
    separate_stores: int  # of the prompt's whole blocks, and of every finished block


@torch.no_grad()
def decode_blocks(model: Any, prompt: list[int], rules: BlockRules) -> Decoded:
    """Decodes block by block; a block sees itself and all earlier ones."""
    size, given = rules.block_length, len(prompt)
    blocks = -(-(given + rules.new_tokens) // size)
    text = prompt + [rules.mask_token_id] * (blocks * size - given)
    decided = [0] * given + [-1] * (blocks * size - given)
    forwards, stores = 0, int(given >= size)
    for block in range(given // size, blocks):
        start, end = block * size, (block + 1) * size
        number = torch.arange(end) // size
        mask = (number[:, None] >= number)[None, None]
        step = 0
        while any(step_of < 0 for step_of in decided[start:end]):
            forwards += 1
            logits = model(torch.tensor([text[:end]]), attention_mask=mask).logits[0].double()
            logits_known = logits.clone()
            logits_known[:, rules.mask_token_id] = float("-inf")
            tokens = logits_known.argmax(-1).tolist()
            sure = {i: float(logits[i].softmax(-1)[tokens[i]]) for i in range(start, end) if decided[i] < 0}
            quota = size // rules.steps + (step < size % rules.steps)
            ranked = sorted(sure, key=lambda i: (0 if rules.sequential else -sure[i], i))
            chosen = ranked[: max(quota, 1)]
            if rules.threshold is not None:
                above = [i for i in sure if sure[i] > rules.threshold]
                chosen = above if len(above) >= max(quota, 1) else chosen
            for i in chosen:
                text[i], decided[i] = tokens[i], forwards
            step += 1
        stores += 1
        if any(token in rules.stop_ids for token in text[given:end]):
            break
    answer = text[given : given + rules.new_tokens]
    return Decoded(answer, decided[given : given + rules.new_tokens], forwards, stores)
