"""A slow, obvious WINO decoder of one unpadded prompt, written apart from the library, which must reproduce it."""

from dataclasses import dataclass

import torch


@dataclass
class Decoded:
    """The canvas, `None` where nothing was decided, and how it came about."""

    canvas: list[int | None]
    step_map: list[int]  # of the new positions: the forward that decided it for good, -1 where none did
    forwards: int
    revoked: int
    positions_computed: int


@torch.no_grad()
def probabilities(model, mask: int, canvas: list[int | None], block: range) -> torch.Tensor:
    """Rows of the canvas, then of a shadow of each slot of the block, which sees all but that slot of the canvas."""
    length, size = len(canvas), len(block)
    ids = [mask if token is None else token for token in canvas] + [mask] * size
    seen = torch.zeros(length + size, length + size, dtype=torch.bool)
    for query in range(length + size):
        for key in range(length + size):
            of_canvas = key < length
            seen[query, key] = of_canvas if query < length else not of_canvas or key != block[query - length]
    places = torch.tensor([[*range(length), *block]])
    return model(
        input_ids=torch.tensor([ids]), position_ids=places, attention_mask=seen[None, None]
    ).logits[0].double().softmax(-1)  # fmt: skip


def decode(
    model,
    prompt: list[int],
    *,
    mask: int,
    length: int,
    block_length: int,
    threshold: float,
    back: float,
    stops: tuple[int, ...] = (),
    early_stop: bool = False,
) -> Decoded:
    """Block by block: commits what is sure, takes back what its shadow would not write, until all is decided."""
    canvas: list[int | None] = list(prompt) + [None] * length
    steps, forwards, taken, computed = [-1] * len(canvas), 0, 0, 0

    def answered() -> bool:
        for token in canvas[len(prompt) :]:
            if token is None:
                return False
            if early_stop and token in stops:
                return True
        return True

    for start in range(len(prompt), len(canvas), block_length):
        block, last = range(start, min(start + block_length, len(canvas))), 30
        while any(canvas[slot] is None for slot in block) and not answered():
            table = probabilities(model, mask, canvas, block)
            forwards, computed = forwards + 1, computed + len(canvas) + len(block)
            hidden = [slot for slot in block if canvas[slot] is None]
            shown = [slot for slot in block if canvas[slot] is not None]
            best = table.clone()
            best[:, mask] = -1
            sureness, tokens = best.max(-1)
            order = sorted(hidden, key=lambda slot: (-float(sureness[slot]), slot))
            chosen = [slot for slot in order if sureness[slot] > threshold][: min(max(int(0.7 * len(hidden)), 5), 20)]
            chosen = chosen or order[:1]
            gone: list[int] = []
            if len(chosen) > 1:
                doubt = {slot: float(table[len(canvas) + slot - start, canvas[slot]]) for slot in shown}
                gone = [slot for slot in shown if doubt[slot] < back]
                if len(gone) >= last:
                    gone = sorted(shown, key=lambda slot: (doubt[slot], slot))[: last - 1]
            for slot in chosen:
                canvas[slot], steps[slot] = int(tokens[slot]), forwards
            for slot in gone:
                canvas[slot], steps[slot] = None, -1
            last, taken = len(chosen), taken + len(gone)
    return Decoded(canvas, steps[len(prompt) :], forwards, taken, computed)
