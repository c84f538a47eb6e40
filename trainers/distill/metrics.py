"""What is logged of a distillation: sums over the learnt positions, and the averages that they become."""

from __future__ import annotations

from typing import Any

import torch

from .batch import COMPLEMENT, PRIMARY, SFT, BatchViews
from .loss import TokenTerms


# Metric -> (sum, count). One without a count since the last log is left out, rather than logged as 0.
_AVERAGES = {
    "cross_entropy": ("cross_entropy", "masked"),
    "complementary_cross_entropy": ("complementary_cross_entropy", "complement"),
    "divergence": ("divergence", "soft"),
    "entropy": ("entropy", "right"),
    "complementary_entropy": ("complementary_entropy", "complement_right"),
    "certainty": ("certainty", "masked"),
    "accuracy": ("right", "masked"),
    "masked_fraction": ("masked", "window_tokens"),
    "noise_level": ("noise_level", "noise_rows"),
    "rollout_forwards": ("rollout_forwards", "rollout_rows"),
    "sft_loss": ("sft_loss", "sft_rows"),
}
SOFT_METRICS = frozenset({"divergence"})  # of targets that are distributions
METRICS = frozenset(_AVERAGES) - SOFT_METRICS - {"rollout_forwards"}  # no evaluation rolls anything out


@torch.no_grad()
def sums_of(
    terms: TokenTerms,
    of_kind: dict[str, torch.Tensor],
    views: BatchViews,
    sft_sum: torch.Tensor,
    divergence: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Sums of one micro-batch, float32 scalars on the model's device.

    Args:
        terms ([`TokenTerms`]): Of all learnt positions.
        of_kind (`dict[str, torch.FloatTensor]`): For each kind of view, 1 for its positions.
        views ([`BatchViews`]): Where these come from.
        sft_sum (`torch.FloatTensor`): Sum of the SFT losses of all samples.
        divergence (`torch.FloatTensor` of shape `(M,)`): From the softer targets, of the M positions that have one.
    """
    masked = of_kind[PRIMARY]
    complement = of_kind.get(COMPLEMENT, torch.zeros_like(masked))
    right, complement_right = masked * terms.correct, complement * terms.correct
    rows = float(views.learnt.shape[1])
    return {
        "cross_entropy": (terms.cross_entropy * masked).sum(),
        "complementary_cross_entropy": (terms.cross_entropy * complement).sum(),
        "entropy": (terms.entropy * right).sum(),
        "complementary_entropy": (terms.entropy * complement_right).sum(),
        "divergence": divergence.sum(),
        "soft": masked.new_tensor(float(len(divergence))),
        "certainty": (terms.certainty * masked).sum(),
        "masked": masked.sum(),
        "complement": complement.sum(),
        "right": right.sum(),
        "complement_right": complement_right.sum(),
        "sft_loss": sft_sum,
        "sft_rows": masked.new_tensor(rows if SFT in of_kind else 0.0),
        "noise_level": views.noise_levels.sum().to(masked),
        "noise_rows": masked.new_tensor(float(len(views.noise_levels))),
        "rollout_forwards": views.forwards.sum().to(masked),
        "rollout_rows": masked.new_tensor(float(len(views.forwards))),
        "window_tokens": views.window_tokens.sum().to(masked),
    }


def averages(sums: dict[str, torch.Tensor] | None, accelerator: Any) -> dict[str, float]:
    """The metrics of all ranks together; empty where nothing was computed."""
    if not sums:
        return {}
    totals = accelerator.gather(torch.stack(list(sums.values()))[None]).sum(0).tolist()
    of = dict(zip(sums, totals, strict=True))
    return {name: round(of[total] / of[count], 6) for name, (total, count) in _AVERAGES.items() if of[count]}
