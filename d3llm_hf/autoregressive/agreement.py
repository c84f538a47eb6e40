"""Whether a speculative method gave the tokens of plain greedy decoding, as it promises."""

from typing import Any

import torch

from .stock import next_scores


_LEAST = 1e-4  # of the largest score: what forwards of other widths may differ by in float32


def agrees(model: Any, prompt: list[int], ours: list[int], plain: list[int], method: str) -> bool:
    """Whether two answers to a prompt are the same tokens.

    They may part where two tokens are equally likely to the precision of a forward: forwards over one position and
    over several add up in other orders.

    Args:
        model: the target.
        prompt: token ids.
        ours, plain: new tokens by the speculative method and one by one.
        method: its name.

    Raises:
        ArithmeticError: where they part at tokens that are not equally likely.
    """
    if ours == plain:
        return True
    place = next((n for n, pair in enumerate(zip(ours, plain, strict=False)) if pair[0] != pair[1]), None)
    gap = float("inf")
    if place is not None:
        ids = torch.tensor([prompt + plain[:place]], device=model.device)
        scores = next_scores(model, ids)
        largest = scores[scores.isfinite()].abs().max().item()
        gap = abs(float(scores[ours[place]] - scores[plain[place]])) / max(largest, 1e-30)
    limit = max(_LEAST, 8 * torch.finfo(model.dtype).eps)
    if not gap <= limit:
        raise ArithmeticError(
            f"{method} must give the tokens of plain greedy decoding (got {ours} for {plain}; where they part the "
            f"scores differ by {gap:.1e} of the largest, and {limit:.1e} may be rounding). Try `dtype=float32`; if "
            "they differ there too it is a bug of the method or of transformers."
        )
    return False
