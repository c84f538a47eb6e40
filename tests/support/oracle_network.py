"""How the oracle runs a model over some slots of a canvas, and what it reads off a row of logits."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache


UNDECIDED = -1


class SlotPerPosition(Cache):
    """One key and value per canvas position; `slots` are those of the running forward's tokens."""

    def __init__(self):
        super().__init__(layers=[])
        self.stored: dict[int, list[torch.Tensor]] = {}
        self.slots: list[int] = []

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if layer_idx not in self.stored:
            assert self.slots == list(range(key_states.shape[2])), "the first forward covers the canvas"
            self.stored[layer_idx] = [key_states.clone(), value_states.clone()]
        for stored, fresh in zip(self.stored[layer_idx], (key_states, value_states), strict=True):
            stored[:, :, self.slots] = fresh
        return tuple(stored.clone() for stored in self.stored[layer_idx])

    def get_seq_length(self, layer_idx=0):
        return self.slots[0]


class Network:
    """Rows of a model such that row i predicts token i; forwards the tokens of some slots, which attend to all."""

    def __init__(self, model, shift: int, mask_token_id: int):
        self.model, self.shift, self.mask_token_id = model, shift, mask_token_id
        self.cache = SlotPerPosition()

    def source(self, position: int) -> int:
        """The slot whose row predicts `position`."""
        return max(position - self.shift, 0)

    @torch.no_grad()
    def __call__(self, canvas: list[int], slots: list[int], wanted: list[int]) -> dict[int, torch.Tensor]:
        """Forwards `slots` (ascending) and returns the rows that predict the positions `wanted`."""
        ids = torch.tensor([self.mask_token_id if canvas[slot] == UNDECIDED else canvas[slot] for slot in slots])
        self.cache.slots = slots
        raw = self.model(
            input_ids=ids[None],
            position_ids=torch.tensor(slots)[None],
            attention_mask=torch.ones(1, 1, len(slots), len(canvas), dtype=torch.bool),
            past_key_values=self.cache,
        ).logits[0]
        return {position: raw[slots.index(self.source(position))] for position in wanted}


class Scripted:
    """The same for a function from the canvas (a 1-D tensor of token ids) to its rows `(L, V)`; no cache."""

    shift = 0

    def __init__(self, logits_fn: Callable[[torch.Tensor], torch.Tensor], mask_token_id: int):
        self.logits_fn, self.mask_token_id = logits_fn, mask_token_id

    def source(self, position: int) -> int:
        return position

    def __call__(self, canvas: list[int], slots: list[int], wanted: list[int]) -> dict[int, torch.Tensor]:
        ids = torch.tensor([self.mask_token_id if token == UNDECIDED else token for token in canvas])
        rows = self.logits_fn(ids)
        return {position: rows[position] for position in wanted}


@dataclass
class Look:
    """What a row of logits says of its position."""

    token: int  # the most probable one that is not the mask token
    probability: float  # its probability, the mask token counted in
    margin: float  # that probability less the highest of all other tokens
    entropy: float  # nats, the mask token counted in


def look(rows: dict[int, torch.Tensor], mask_token_id: int) -> dict[int, Look]:
    """Looks at every row, in float64."""
    if not rows:
        return {}
    p = torch.stack(list(rows.values())).double().softmax(-1)  # (rows, V)
    entropies = -(p * (p + 1e-12).log()).sum(-1)
    allowed = p.clone()
    allowed[:, mask_token_id] = -1.0
    probabilities, tokens = allowed.max(-1)
    margins = probabilities - p.scatter(1, tokens[:, None], -1.0).max(-1).values
    columns = [column.tolist() for column in (tokens, probabilities, margins, entropies)]
    return {position: Look(*values) for position, *values in zip(rows, *columns, strict=True)}
