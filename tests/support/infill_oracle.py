"""The slow oracle for a text with holes: the decoder of `oracle.py` over the holes, put back for each forward."""

from dataclasses import dataclass

import torch
from oracle import UNDECIDED, Oracle, Rules


@dataclass
class Filled:
    """The result, for the P + N slots of the text and what is appended."""

    sequence: list[int]
    step_map: list[int]  # forward that committed the slot, -1 where none did, as on the given text
    forwards: int
    positions_computed: int


class InfillOracle(Oracle):
    """Position i of its canvas is the i-th slot to decide: what was marked, then what is appended.

    Args:
        model: of this package.
        text: the tokens, unpadded; what stands in a hole does not matter.
        holes: slots of `text` to decide.
        rules: `max_new_tokens` slots are appended.
    """

    def __init__(self, model, text: list[int], holes: list[int], rules: Rules):
        dream = model.logit_shift == 1
        rules.strict, rules.always_lowest, rules.serial_stamps = dream, not dream, not dream
        self.model, self.text = model, list(text) + [UNDECIDED] * rules.max_new_tokens
        self.slots = [*sorted(holes), *range(len(text), len(self.text))]
        self.appended = [slot >= len(text) for slot in self.slots]
        super().__init__(None, [], Rules(**vars(rules) | {"max_new_tokens": len(self.slots)}))

    def whole(self, hide: bool = False) -> list[int]:
        """The text as the model sees it; with `hide` all that was given is masked."""
        whole = [UNDECIDED] * len(self.text) if hide else list(self.text)
        for slot, token in zip(self.slots, self.canvas, strict=True):
            whole[slot] = token
        return [self.rules.mask_token_id if token == UNDECIDED else token for token in whole]

    @torch.no_grad()
    def rows(self, hide: bool = False) -> dict[int, torch.Tensor]:
        logits = self.model(input_ids=torch.tensor([self.whole(hide)])).logits[0]
        return {i: logits[max(self.slots[i] - self.model.logit_shift, 0)] for i in self.undecided()}

    def forward(self, wanted: list[int]) -> dict[int, torch.Tensor]:
        self.recomputed.append(list(range(len(self.text))))
        self.positions_computed += len(self.text) * (2 if self.rules.cfg_scale else 1)
        rows = self.rows()
        if self.rules.cfg_scale:
            blind = self.rows(hide=True)
            rows = {i: blind[i] + (self.rules.cfg_scale + 1) * (rows[i] - blind[i]) for i in rows}
        return {i: rows[i] for i in wanted}

    def first_eos(self) -> int | None:
        stops = self.rules.eos_token_ids
        return next((i for i, token in enumerate(self.canvas) if token in stops and self.appended[i]), None)

    def result(self) -> Filled:
        eos = self.first_eos()
        whole, steps = self.whole(), [-1] * len(self.text)
        for i, slot in enumerate(self.slots):
            steps[slot] = self.committed.get(i, -1)
            if self.canvas[i] == UNDECIDED or (eos is not None and i > eos):
                whole[slot] = self.rules.pad_token_id
        return Filled(whole, steps, self.forwards, self.positions_computed)


def fill(model, text: list[int], holes: list[int], **rules) -> Filled:
    """Fills `holes` of `text` and appends `max_new_tokens`, by the [`Rules`] named."""
    return InfillOracle(model, text, holes, Rules(**rules)).run()
