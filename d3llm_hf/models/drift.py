"""The memory of the last distributions (KLASS): how long a position has been of the same opinion."""

import torch

from .decoding import State


# Added to probabilities before their logarithm, as KLASS does.
TINY = 1e-12


class Drift:
    """Counts for each position the forwards in a row in which its distribution has hardly changed.

    Kullback-Leibler divergence of a position's distribution in this forward against that in the forward before, over
    the whole vocabulary, in nats. Only the last forward's distributions are kept: `(n, V)` float32 of the n positions
    that it scored.

    Args:
        threshold: nats under which a position was calm.
    """

    def __init__(self, threshold: float):
        self.threshold = threshold
        self.last: torch.Tensor | None = None  # (n, V) probabilities
        self.place: torch.Tensor | None = None  # (rows of the call, N): which of them is a position's, -1 for none

    def admit(self, rows: torch.Tensor, columns: int) -> None:
        """Makes room for further rows `(n,)` of answers of so many columns; nothing is known of these rows."""
        if self.place is None:
            return
        count = max(len(self.place), int(rows.max()) + 1)  # a host sync
        missing = columns - self.place.shape[1]
        self.place = torch.nn.functional.pad(self.place, (0, missing, 0, count - len(self.place)), value=-1)
        self.place[rows] = -1

    def __call__(
        self, logits: torch.Tensor, state: State, where: tuple[torch.Tensor, torch.Tensor], size: int
    ) -> torch.Tensor:
        """Books the `(n, V)` logits of one forward at rows and columns `where`.

        Args:
            size: positions that are worked on at once.

        Returns:
            what `state.calm` `(B, N)` is after the forward: 0 again where a position was not calm, or was not scored
            in the forward before.
        """
        rows, columns = state.rows[where[0]], where[1]
        probability = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
        calm = torch.zeros_like(rows, dtype=torch.bool)
        known = None if self.place is None else self.place[rows, columns]
        for start in range(0, logits.shape[0], size):
            part = slice(start, start + size)
            now = logits[part].float().softmax(-1)
            probability[part] = now
            if self.last is not None and known is not None:
                before = self.last[known[part].clamp_min(0)]
                divergence = (now * ((now + TINY).log() - (before + TINY).log())).sum(-1)
                calm[part] = (divergence < self.threshold) & (known[part] >= 0)
        if self.place is None:
            self.place = state.tokens.new_empty(int(state.rows.max()) + 1, state.tokens.shape[1])  # a host sync, once
        self.place.fill_(-1)
        self.place[rows, columns] = torch.arange(len(rows), device=rows.device)
        self.last = probability
        return state.calm.index_put(where, torch.where(calm, state.calm[where] + 1, 0))


__all__ = ["Drift"]
