"""Credit decoding (dInfer): what the model has favoured in earlier forwards adds to its present logits."""

import torch


class Credit:
    """Accumulates, for each position, evidence for the tokens that were its best, and adds it to the logits.

    After `n` forwards a token has the credit `sum_s decay^(n - s) * p_s^exponent` over the forwards s in which it was
    the position's best token, with probability p_s; `weight * log(1 + credit)` is added to its logit. Only such tokens
    are kept: the field's dense `(position, vocabulary)` table would weigh more than the canvas's logits.

    Args:
        decay, exponent, weight: of the formula.
    """

    def __init__(self, decay: float, exponent: float, weight: float):
        self.decay, self.exponent, self.weight = decay, exponent, weight
        # For each step: the best token of each candidate, and what it earned.
        self.tokens = torch.empty(
            0, 0, 0, dtype=torch.long, device="cpu"
        )  # (S, rows, columns), -1 where it was no candidate
        self.earned = torch.empty(0, 0, 0, dtype=torch.float32, device="cpu")

    def __call__(
        self,
        logits: torch.Tensor,
        mask_token_id: int,
        rows: torch.Tensor,
        steps: torch.Tensor,
        columns: torch.Tensor,
    ) -> torch.Tensor:
        """Books `(m, V)` float32 logits of candidates at `(m,)` rows, steps and columns; returns them with credit."""
        # 1. The best token of each candidate, never the mask token, with its probability over the whole vocabulary
        log_z = logits.logsumexp(-1)
        top, token = logits.index_fill(1, torch.tensor([mask_token_id], device=logits.device), float("-inf")).max(-1)
        self._reserve(int(steps.max()) + 1, int(rows.max()) + 1, int(columns.max()) + 1, logits.device)
        self.tokens[steps, rows, columns] = token
        self.earned[steps, rows, columns] = (top - log_z).mul(self.exponent).exp()

        # 2. Credit of each remembered token: the decayed sum over the forwards that favoured the same one. Where a
        #    position was no candidate its present best token stands in, and earns nothing.
        past = self.tokens[:, rows, columns].T  # (m, S)
        age = steps[:, None] - torch.arange(past.shape[1], device=past.device)
        worth = (self.earned[:, rows, columns].T * self.decay ** age.clamp_min(0).float()).masked_fill(past < 0, 0.0)
        past = torch.where(past < 0, token[:, None], past)
        credit = ((past[:, :, None] == past[:, None, :]) * worth[:, None, :]).sum(-1)

        # 3. Equal tokens have equal credit, so that writing one twice does no harm
        return logits.scatter(1, past, logits.gather(1, past) + self.weight * torch.log1p(credit))

    def forget(self, row: int) -> None:
        """From now on a row is another text, of which nothing was booked."""
        if row < self.tokens.shape[1]:
            self.tokens[:, row] = -1

    def _reserve(self, steps: int, rows: int, columns: int, device: torch.device) -> None:
        """Makes room for that many forwards, rows and columns."""
        shape = [max(new, old) for new, old in zip((steps, rows, columns), self.tokens.shape, strict=True)]
        if shape != list(self.tokens.shape):
            kept = tuple(slice(size) for size in self.tokens.shape)
            tokens = torch.full(shape, -1, dtype=torch.long, device=device)
            earned = torch.zeros(shape, dtype=torch.float32, device=device)
            tokens[kept], earned[kept] = self.tokens.to(device), self.earned.to(device)
            self.tokens, self.earned = tokens, earned
