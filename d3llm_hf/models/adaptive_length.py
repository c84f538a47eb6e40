"""A length that finds itself: how long a row's canvas is follows what the model predicts on it.

A diffusion model writes on a canvas whose length somebody chose, and shows by the stop tokens that it would write on
the undecided rest whether that is too long or too short. Three published rules read that:

rho_eos       rho-EOS (arXiv:2601.22527): in every forward, the share of the undecided positions whose most probable
              token is a stop token. Under `length_low` the canvas grows, over `length_high` it shrinks.
rho_eos_tail  the same loop as its code has it: the probability of a stop token at the end of the canvas, decided
              positions included, which are cut off as well.
daedal        the first stage of DAEDAL (arXiv:2508.00819): before anything is decided the canvas grows until its end
              is sure to hold stop tokens; some more are then given behind it.

`"rho_eos"` is more careful than the published loop where the canvas shrinks. What is decided stays, so that what a
caller was shown stays true; so does a position where the model would go on writing; and no more is cut off than takes
the share back to `length_high`. As published, the last forwards, of whose few undecided positions nearly all would be
stop tokens, cut the text itself. And the canvas may still shrink once it has reached its limit.
"""

import torch

from .canvas import Canvas
from .decoding import Rules, State, resize
from .methods import SCHEDULES
from .scoring import CHUNK_ELEMENTS


CHANGES = 64  # forwards of a row in which its length may change (rho-EOS)
MOST_STEPS = 8  # of `length_step` at once (rho-EOS)


class AdaptiveLength:
    """Reads the logits of every forward, and changes the lengths of rows after it; nothing where rules have a length.

    Args:
        rules: of the method.
        stop_ids (`(S,)`, *optional*): the stop tokens; the first is what DAEDAL gives behind a canvas.
        canvas: of the batch.
        least: positions that a canvas keeps, as many as an answer must have.

    Raises:
        ValueError: without a stop token, where the length shall find itself.
    """

    def __init__(self, rules: Rules, stop_ids: torch.Tensor | None, canvas: Canvas, least: int):
        if rules.length_rule is not None and stop_ids is None:
            raise ValueError(
                '`length="adaptive"` needs an `eos_token_id`, by which the model says how long its answer becomes '
                "(got None). Pass one, or leave `length` unset."
            )
        self.rules, self.mask_token_id, self.least = rules, canvas.mask_token_id, least
        self.stop_ids = torch.empty(0, dtype=torch.long, device="cpu") if stop_ids is None else stop_ids
        self.by_share, self.measures = rules.length_rule == "rho_eos", rules.length_rule == "daedal"
        self.cuts = rules.length_rule == "rho_eos_tail"  # what is decided, too
        self.stops = torch.empty(
            0, dtype=torch.bool, device="cpu"
        )  # (B, N) bool: where a stop token was predicted in the last forward
        self.sureness = torch.empty(
            0, dtype=torch.float32, device="cpu"
        )  # (B, N) float: with what probability; 0 elsewhere

    def begin(self, state: State) -> None:
        """Shortens the canvases to their first length."""
        if self.rules.length_rule is None:
            return
        limit = state.tokens.shape[1]
        first = torch.full_like(state.length, min(max(self.rules.initial_length, self.least), limit))
        resize(state, self.rules, first, self.mask_token_id)
        self._go_on(state, torch.ones_like(state.finding))

    def heard(self, scored: torch.Tensor, state: State) -> torch.Tensor:
        """Positions `(B, N)` whose logits are wanted: those `scored`, and those that say something of the length."""
        if self.rules.length_rule is None:
            return scored
        column = torch.arange(scored.shape[1], device=scored.device)
        where = state.undecided if self.by_share else column < state.length[:, None]
        return scored | (where & state.finding[:, None])

    def read(
        self, logits: torch.Tensor, scored: torch.Tensor, where: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Reads the model's own distributions, before anything is taken from them.

        Args:
            logits (`(n, V)`): at rows and columns `where`.
            scored (`(B, N)` bool): the positions among them of which scores are wanted.

        Returns:
            logits, rows and columns of those.
        """
        if self.rules.length_rule is None:
            return logits, where
        size = max(1, CHUNK_ELEMENTS // logits.shape[1])
        stops = torch.zeros_like(where[0], dtype=torch.bool)
        sureness = torch.zeros(len(stops), dtype=torch.float32, device=logits.device)
        mask_token = torch.tensor([self.mask_token_id], device=logits.device)
        for start in range(0, len(stops), size):
            part = slice(start, start + size)
            values = logits[part].float()
            top, best = values.index_fill(1, mask_token, float("-inf")).max(-1)
            stops[part] = torch.isin(best, self.stop_ids)
            if not self.by_share:
                sureness[part] = (top - values.logsumexp(-1)).exp().masked_fill(~stops[part], 0.0)
        self.stops = torch.zeros_like(scored).index_put(where, stops)
        self.sureness = sureness.new_zeros(scored.shape).index_put(where, sureness)
        wanted = scored[where]
        return logits[wanted], (where[0][wanted], where[1][wanted])

    def permitted(self, commits: torch.Tensor, state: State) -> torch.Tensor:
        """The commits `(B, N)` without those of rows whose forward only measures."""
        return commits & ~state.finding[:, None] if self.measures else commits

    def change(self, state: State, stop: torch.Tensor) -> bool:
        """Changes the lengths of the rows after the commits of a forward; whether any could change.

        1. How full of stop tokens the canvas is.
        2. How long it should be.
        3. What is new is undecided; what is cut off is nobody's.
        4. Whether the length may change again.

        Args:
            stop (`(B,)` long): column of the first decided stop token, N where there is none.
        """
        if self.rules.length_rule is None:
            return False

        # 1. How full of stop tokens the canvas is
        signal, known = self._share(state) if self.by_share else self._tail()

        # 2. How long it should be
        limit = state.tokens.shape[1]
        low, high = self.rules.length_low, self.rules.length_high
        longer, shorter = self._steps(low - signal), self._steps(signal - high)
        if self.rules.early_stop or self.rules.whole_blocks:  # what lies behind a stop token is not output
            longer = longer.masked_fill(stop < limit, 0)
        length = (state.length + longer).clamp_max(limit)
        cut = (state.length - shorter).clamp_min(self.least)
        if self.by_share:
            cut = torch.maximum(cut, self._needed(state, stop))
        length = torch.where(shorter > 0, torch.minimum(cut, length), length)
        length = torch.where(state.finding & known, length, state.length)

        # 3. What is new is undecided; what is cut off is nobody's
        found = state.finding & (length == state.length)
        resize(state, self.rules, length, self.mask_token_id)

        # 4. Whether the length may change again
        if self.measures:
            state.step = state.step - state.finding.long()  # a forward that only measures is no step
            self._give_tail(state, found)
            state.finding = state.finding & ~found
        else:
            self._go_on(state, state.finding & (state.step < CHANGES))
        return True

    def _go_on(self, state: State, finding: torch.Tensor) -> None:
        """The rows `(B,)` whose length may still change; rho-EOS's code leaves a canvas at its limit as it is."""
        state.finding = finding & (state.length < state.tokens.shape[1]) if self.cuts else finding
        state.held = state.finding & self.cuts

    def _share(self, state: State) -> tuple[torch.Tensor, torch.Tensor]:
        """The share `(B,)` of the undecided positions that would be stop tokens, and the rows that have such."""
        number = state.undecided.sum(1)
        return (self.stops & state.undecided).sum(1).float() / number.clamp_min(1), number > 0

    def _tail(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean probability `(B,)` of the last `length_window` predicted stop tokens; those that lack are 0."""
        from_end = self.stops.flip(1).cumsum(1).flip(1)
        counted = self.stops & (from_end <= self.rules.length_window)
        total = self.sureness.masked_fill(~counted, 0.0).sum(1)
        return total / self.rules.length_window, torch.ones_like(total, dtype=torch.bool)

    def _steps(self, gap: torch.Tensor) -> torch.Tensor:
        """Positions `(B,)` by which a canvas changes whose signal is so far beyond a threshold; 0 where it is not."""
        tenths = torch.ceil(gap / 0.1).clamp_min(1.0)
        steps = SCHEDULES[self.rules.length_schedule](tenths).clamp_max(MOST_STEPS)
        return (steps.long() * self.rules.length_step).masked_fill(~(gap > 0), 0)

    def _needed(self, state: State, stop: torch.Tensor) -> torch.Tensor:
        """Positions `(B,)` that a canvas keeps where it shrinks by the share.

        All up to the last that is decided output, or where the model would go on writing; and behind these as many
        that would be stop tokens as take the share back to `length_high`.
        """
        column = torch.arange(state.tokens.shape[1], device=stop.device)
        kept = ~self.stops | ~state.undecided
        if self.rules.early_stop:
            kept &= column <= stop[:, None]
        last = torch.where(kept & (column < state.length[:, None]), column + 1, 0).amax(1)
        writing = (state.undecided & ~self.stops).sum(1)
        high = min(self.rules.length_high, 1 - 1e-6)  # of 1 there is nothing above
        return torch.minimum(last + torch.ceil(writing.double() * (high / (1 - high))).long(), state.length)

    def _give_tail(self, state: State, found: torch.Tensor) -> None:
        """Stop tokens behind the canvas of the rows `(B,)` whose length was just found; they are no part of it."""
        room = state.tokens.shape[1] - state.length
        size = room.clamp_max(self.rules.length_window // 2).masked_fill(~found, 0)
        column = torch.arange(state.tokens.shape[1], device=room.device)
        first, behind = state.length[:, None], (state.length + size)[:, None]
        given = (column >= first) & (column < behind)
        state.tokens = torch.where(given, self.stop_ids[0], state.tokens)
        state.changed = state.changed | given
        state.tail = state.tail + size


__all__ = ["AdaptiveLength"]
