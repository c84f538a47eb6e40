"""How the terms of all learnt positions become one loss.

With C the cost of a position (cross-entropy to the text, or the divergence from a softer target), H its entropy, and
means over the positions of a view:

1. C of the primary view, far positions being a mean of their own (TAD, https://huggingface.co/papers/2605.09536);
2. H of what it predicts right, where it is not sure yet (dParallel; WINO+, https://huggingface.co/papers/2605.16941);
3. minus H of what it is sure of and predicts wrong (WINO+);
4. the same of the complementary view;
5. a hinge that wants H in the teacher's order (TABOM, https://huggingface.co/papers/2605.11854);
6. all of it times `loss_scale`, and the fine-tuning loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .batch import COMPLEMENT, PRIMARY, SFT, BatchViews
from .loss import TokenTerms, mean_over, order_hinge


if TYPE_CHECKING:
    from .config import PseudoTrajectoryDistillConfig


def positions_by_kind(views: BatchViews, like: torch.Tensor) -> dict[str, torch.Tensor]:
    """Kind of view -> 1 for each of the N learnt positions in such a view, else 0; `(N,)`, of the dtype of `like`."""
    view = views.learnt.nonzero()[:, 0]
    found: dict[str, torch.Tensor] = {}
    for index, kind in enumerate(views.kinds):
        found[kind] = found.get(kind, 0.0) + view.eq(index).to(like)
    return found


def distillation_loss(
    terms: TokenTerms,
    cost: torch.Tensor,
    views: BatchViews,
    of_kind: dict[str, torch.Tensor],
    args: PseudoTrajectoryDistillConfig,
    *,
    entropy_on_complement: bool,
    steps: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of N learnt positions.

    Args:
        terms ([`TokenTerms`]): Of all positions.
        cost (`torch.FloatTensor` of shape `(N,)`): What the distillation makes small at each.
        views ([`BatchViews`]): Where the positions are.
        of_kind (`dict[str, torch.FloatTensor]`): See [`positions_by_kind`].
        args ([`PseudoTrajectoryDistillConfig`]): Weights and gates.
        entropy_on_complement (`bool`): Whether the complementary view has entropy terms.
        steps (`torch.LongTensor` of shape `(B, R)`): The step of the teacher that decided each position, -1 for none.

    Returns:
        the loss, and the sum of the fine-tuning losses of all samples in it.
    """
    num_rows = views.learnt.shape[1]
    view, row = views.learnt.nonzero()[:, :2].unbind(1)  # (N,)
    entropy, right = terms.entropy, terms.correct
    far = None if args.far_target is None else views.distances[views.learnt] > args.near_steps
    if args.distance_weight:
        distance = views.distances[views.learnt].clamp_min(0)
        weight = torch.exp(-args.distance_weight * distance / views.learnt.shape[2])
        cost, entropy = cost * weight, entropy * weight
    if args.entropy_below is not None:
        right = right * (terms.certainty < args.entropy_below)

    def mean(values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        return mean_over(values, chosen, row, num_rows, args.loss_reduction)

    def certainty(chosen: torch.Tensor) -> torch.Tensor:
        found = args.entropy_weight * mean(entropy, chosen * right)
        if args.wrong_entropy_weight:
            wrong = chosen * (1 - terms.correct) * (terms.certainty > args.wrong_confidence)
            found = found - args.wrong_entropy_weight * mean(entropy, wrong)
        return found

    # 1. Costs, near ones and far ones
    primary = of_kind[PRIMARY]
    loss = mean(cost, primary) if far is None else mean(cost, primary * ~far) + mean(cost, primary * far)
    # 2. and 3. Certainty
    loss = loss + certainty(primary)
    # 4. The complementary view, all of which is near
    if COMPLEMENT in of_kind:
        loss = loss + mean(cost, of_kind[COMPLEMENT])
        if entropy_on_complement:
            loss = loss + certainty(of_kind[COMPLEMENT])
    # 5. The order
    if args.rank_weight:
        group = torch.where(primary > 0, view * num_rows + row, -1)
        place = steps.expand_as(views.learnt)[views.learnt]
        hinges, of_row = order_hinge(terms.entropy, place, group, args.rank_margin)
        hinge = mean_over(hinges, torch.ones_like(hinges), of_row % num_rows, num_rows, args.loss_reduction)
        loss = loss + args.rank_weight * hinge
    # 6. The scale, and the fine-tuning loss
    loss = args.loss_scale * loss
    sft_sum = (terms.cross_entropy * views.weights[views.learnt]).sum()
    if SFT in of_kind:
        loss = loss + args.sft_weight * sft_sum / num_rows
    return loss, sft_sum.detach()
