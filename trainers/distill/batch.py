"""The canvases of one batch: every view of every sample, drawn on the CPU and moved to the model's device at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..sft.masking import draw_answer_mask, generator_for
from .noisy_views import draw_view


if TYPE_CHECKING:
    from .config import PseudoTrajectoryDistillConfig

PRIMARY, COMPLEMENT, SFT = "primary", "complement", "sft"


@dataclass(frozen=True)
class BatchViews:
    """K views of B samples over answer canvases of R positions.

    Args:
        kinds (`list[str]`): What each of the K views is: primary, complement or sft.
        hidden (`torch.BoolTensor` of shape `(K, B, R)`): Positions that show the mask token.
        learnt (`torch.BoolTensor` of shape `(K, B, R)`): Positions with a loss; they are hidden as well.
        weights (`torch.FloatTensor` of shape `(K, B, R)`): Weight of a position in the SFT loss; 0 in other views.
        noise_levels (`torch.FloatTensor` of shape `(B,)`): Noise level of each sample.
        window_tokens (`torch.LongTensor` of shape `(B,)`): Positions of each sample's window.
    """

    kinds: list[str]
    hidden: torch.Tensor
    learnt: torch.Tensor
    weights: torch.Tensor
    noise_levels: torch.Tensor
    window_tokens: torch.Tensor


def draw_batch(
    batch: dict[str, torch.Tensor],
    args: PseudoTrajectoryDistillConfig,
    identity: tuple[int, ...],
    window: int,
    noise_range: tuple[float, float],
) -> BatchViews:
    """Draw the views of a collated batch.

    Args:
        batch (`dict`): `labels` and `step_map` `(B, R)`, `content_lengths` and `sample_ids` `(B,)`.
        args ([`PseudoTrajectoryDistillConfig`]): What to draw.
        identity (`tuple[int, ...]`): What identifies the draws together with a sample's id.
        window (`int`), noise_range (`tuple[float, float]`): Where the curricula are.
    """
    device = batch["labels"].device
    learnable = batch["labels"].ne(-100).cpu()  # (B, R)
    canvas_lengths, content_lengths = learnable.sum(1).tolist(), batch["content_lengths"].cpu()
    step_map = batch["step_map"].cpu()
    views, sft = [], []
    for row, sample_id in enumerate(batch["sample_ids"].tolist()):
        generator = generator_for(*identity, sample_id)
        views.append(
            draw_view(
                step_map[row],
                generator,
                objective=args.objective,
                content_length=int(content_lengths[row]),
                canvas_length=canvas_lengths[row],
                window=window,
                noise_range=noise_range,
                blockwise=args.blockwise,
                windows_over_fill=args.windows_over_fill,
            )
        )
        if args.sft_weight:
            sft.append(
                draw_answer_mask(
                    learnable[row : row + 1],
                    content_lengths[row : row + 1],
                    generator,
                    min_mask_ratio=args.sft_min_mask_ratio,
                    suffix_fraction=args.sft_suffix_mask_fraction,
                    suffix_window=args.sft_suffix_window,
                )
            )
    masked, complement, future = (
        torch.stack([getattr(view, name) for view in views]) for name in ("masked", "complement", "future")
    )
    kinds, hidden, learnt = [PRIMARY], [masked | future], [masked]
    weights = [torch.zeros_like(masked, dtype=torch.float32)]
    if args.complementary:
        kinds.append(COMPLEMENT)
        hidden.append(complement | future)
        learnt.append(complement)
        weights.append(torch.zeros_like(weights[0]))
    if sft:
        kinds.append(SFT)
        hidden.append(torch.cat([mask.hidden for mask in sft]))
        weights.append(torch.cat([mask.weights for mask in sft]))
        learnt.append(weights[-1] > 0)
    return BatchViews(
        kinds=kinds,
        hidden=torch.stack(hidden).to(device),
        learnt=torch.stack(learnt).to(device),
        weights=torch.stack(weights).to(device),
        noise_levels=torch.tensor([view.noise_level for view in views], dtype=torch.float32, device="cpu"),
        window_tokens=(masked | complement).sum(1),
    )
