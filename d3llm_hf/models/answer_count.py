"""How many tokens an answer has, from what every kind of decoding reports."""

import torch


class AnswerCount:
    """Of an output with `tokens_per_forward` and `num_forwards`, `(B,)` each."""

    tokens_per_forward: torch.Tensor | None
    num_forwards: torch.Tensor | None

    @property
    def num_tokens(self) -> torch.Tensor:
        """Answer tokens `(B,)` long before the first stop token."""
        return (self.tokens_per_forward * self.num_forwards).round().long()  # type: ignore[operator]  # set in outputs


__all__ = ["AnswerCount"]
