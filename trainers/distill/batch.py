"""The canvases of one batch: every view of every sample, drawn on the CPU and moved to the model's device at once.

Views are windows of the answer (`noisy_views`), or states that the student's own decoding visits (`rollout`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..sft.masking import AnswerMask, draw_answer_mask, generator_for
from .noisy_views import draw_view
from .rollout import EntropyAt, roll_out


if TYPE_CHECKING:
    from .config import PseudoTrajectoryDistillConfig

PRIMARY, COMPLEMENT, SFT = "primary", "complement", "sft"


@dataclass(frozen=True)
class BatchViews:
    """K views of B samples over answer canvases of R positions.

    Args:
        kinds (`list[str]`): What each of the K views is: primary (several of a rollout), complement or sft.
        hidden (`torch.BoolTensor` of shape `(K, B, R)`): Positions that show the mask token.
        learnt (`torch.BoolTensor` of shape `(K, B, R)`): Positions with a loss; they are hidden as well.
        weights (`torch.FloatTensor` of shape `(K, B, R)`): Weight of a position in the SFT loss; 0 in other views.
        noise_levels (`torch.FloatTensor` of shape `(B,)`): Noise level of each sample; of shape `(0,)` in a rollout.
        window_tokens (`torch.LongTensor` of shape `(B,)`): Positions of each sample's window, or of what its states
            have open.
        forwards (`torch.LongTensor` of shape `(B,)`): Forwards of each sample's rollout; of shape `(0,)` without one.
        distances (`torch.LongTensor` of shape `(K, B, R)`): After how many more tokens the teacher decides a position,
            see [`NoisyView`]; 0 where its order is not asked for.
        revealed (`torch.BoolTensor` of shape `(K, B, R)`): Learnt positions that the state of a softer target shows.
    """

    kinds: list[str]
    hidden: torch.Tensor
    learnt: torch.Tensor
    weights: torch.Tensor
    noise_levels: torch.Tensor
    window_tokens: torch.Tensor
    forwards: torch.Tensor
    distances: torch.Tensor
    revealed: torch.Tensor


def draw_batch(
    batch: dict[str, torch.Tensor],
    args: PseudoTrajectoryDistillConfig,
    identity: tuple[int, ...],
    window: int,
    noise_range: tuple[float, float],
) -> BatchViews:
    """Draw windows of a collated batch; beside rollouts they are those of `"trajectory"`.

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
    objective = "trajectory" if args.objective == "rollout" else args.objective
    views, sft, reveals = [], [], []
    for row, sample_id in enumerate(batch["sample_ids"].tolist()):
        generator = generator_for(*identity, sample_id)
        views.append(
            draw_view(
                step_map[row],
                generator,
                objective=objective,
                content_length=int(content_lengths[row]),
                canvas_length=canvas_lengths[row],
                window=window,
                noise_range=noise_range,
                blockwise=args.blockwise,
                windows_over_fill=args.windows_over_fill,
                several_blocks=args.state_region == "blocks",
            )
        )
        if args.sft_weight:
            sft.append(_sft_mask(learnable[row : row + 1], content_lengths[row : row + 1], generator, args))
        reveals.append(_reveal(2, step_map.shape[1], generator, args))
    masked, complement, future = (
        torch.stack([getattr(view, name) for view in views]) for name in ("masked", "complement", "future")
    )
    distances = torch.zeros_like(step_map)
    if args.far_target is not None or args.distance_weight:
        distances = torch.stack([view.distances for view in views])
    far = distances > args.near_steps if args.far_target == "none" else torch.zeros_like(masked)
    kinds, hidden, learnt = [PRIMARY], [masked | future], [masked & ~far]
    weights = [torch.zeros_like(masked, dtype=torch.float32)]
    if args.complementary:
        kinds.append(COMPLEMENT)
        hidden.append(complement | future)
        learnt.append(complement)
        weights.append(torch.zeros_like(weights[0]))
    return _gathered(
        kinds,
        hidden,
        learnt,
        weights,
        sft,
        torch.stack(reveals, 1),
        device,
        distances=distances,
        noise_levels=torch.tensor([view.noise_level for view in views], dtype=torch.float32, device="cpu"),
        window_tokens=(masked | complement).sum(1),
        forwards=torch.zeros(0, device="cpu"),
    )


def draw_rollouts(
    batch: dict[str, torch.Tensor],
    args: PseudoTrajectoryDistillConfig,
    identity: tuple[int, ...],
    entropy_at: EntropyAt,
    stop_token_id: int,
    anyone: Callable[[torch.Tensor], bool],
) -> BatchViews:
    """Roll out a collated batch, and draw states of each sample.

    Args:
        batch, args, identity: As in [`draw_batch`].
        entropy_at (`Callable`), stop_token_id (`int`), anyone (`Callable`): See [`roll_out`].
    """
    device = batch["labels"].device
    learnable = batch["labels"].ne(-100).cpu()  # (B, R)
    content_lengths = batch["content_lengths"].cpu()
    low, high = args.rollout_threshold
    thresholds, picks, sft, reveals = [], [], [], []
    for row, sample_id in enumerate(batch["sample_ids"].tolist()):
        generator = generator_for(*identity, sample_id)
        drawn = torch.rand(1 + args.rollout_states, generator=generator, dtype=torch.float64, device="cpu")
        thresholds.append(low + (high - low) * drawn[0])
        picks.append(drawn[1:])
        if args.sft_weight:
            sft.append(_sft_mask(learnable[row : row + 1], content_lengths[row : row + 1], generator, args))
        reveals.append(_reveal(args.rollout_states, learnable.shape[1], generator, args))
    rollout = roll_out(
        batch["labels"],
        content_lengths,
        torch.stack(thresholds).float(),
        entropy_at,
        block_length=args.rollout_block_length,
        max_forwards=args.rollout_max_forwards,
        stop_token_id=stop_token_id,
        anyone=anyone,
    )
    hidden, region = rollout.select(torch.stack(picks, 1))  # (K, B, R)
    return _gathered(
        [PRIMARY] * args.rollout_states,
        list(hidden),
        list(hidden & region),
        list(torch.zeros_like(hidden, dtype=torch.float32)),
        sft,
        torch.stack(reveals, 1),
        device,
        distances=torch.zeros_like(batch["step_map"]),
        noise_levels=torch.zeros(0, device="cpu"),
        window_tokens=region.sum((0, 2)),
        forwards=rollout.forwards,
    )


def _sft_mask(
    learnable: torch.Tensor,
    content_length: torch.Tensor,
    generator: torch.Generator,
    args: PseudoTrajectoryDistillConfig,
) -> AnswerMask:
    return draw_answer_mask(
        learnable,
        content_length,
        generator,
        min_mask_ratio=args.sft_min_mask_ratio,
        suffix_fraction=args.sft_suffix_mask_fraction,
        suffix_window=args.sft_suffix_window,
    )


def _reveal(count: int, length: int, generator: torch.Generator, args: PseudoTrajectoryDistillConfig) -> torch.Tensor:
    """Positions `(count, length)` that the states of a softer target show, of as many views."""
    if args.teacher_reveal is None:
        return torch.zeros(count, length, dtype=torch.bool, device="cpu")
    drawn = torch.rand(count, length, generator=generator, dtype=torch.float32, device="cpu")
    return drawn < args.teacher_reveal


def _gathered(
    kinds: list[str],
    hidden: list[torch.Tensor],
    learnt: list[torch.Tensor],
    weights: list[torch.Tensor],
    sft: list[AnswerMask],
    reveals: torch.Tensor,
    device: torch.device,
    distances: torch.Tensor,
    **told: torch.Tensor,
) -> BatchViews:
    """The views, with that of the fine-tuning loss where there is one, on the model's device."""
    revealed = reveals[: len(kinds)].to(device) & torch.stack(learnt).to(device)
    if sft:
        kinds = [*kinds, SFT]
        hidden = [*hidden, torch.cat([mask.hidden for mask in sft]).to(hidden[0].device)]
        weights = [*weights, torch.cat([mask.weights for mask in sft]).to(weights[0].device)]
        learnt = [*learnt, weights[-1] > 0]
        revealed = torch.cat([revealed, torch.zeros_like(revealed[:1])])
    return BatchViews(
        kinds=kinds,
        hidden=torch.stack(hidden).to(device),
        learnt=torch.stack(learnt).to(device),
        weights=torch.stack(weights).to(device),
        distances=distances.to(device).expand(len(kinds), -1, -1),
        revealed=revealed,
        **told,
    )
