"""Masks of the block-causal objective: which tokens of a noisy text are hidden, and what each weighs in the loss.

A ratio t ~ U(0, 1) is drawn for each text, or for each of its blocks; a learnt token is hidden with probability
p = (1 - eps) t + eps. The loss is over the learnt tokens of the batch, N of them:

* with one view, `sum(CE / p) / N` over the hidden ones, as in SDAR's training;
* with complementary views, the second of which hides what the first one leaves, `sum(CE) / N`: every token is learnt
  once, and weighs the same (Fast-dLLM v2, https://huggingface.co/papers/2509.26328).
"""

from dataclasses import dataclass

import torch

from .masking import draw_mask_ratios, draw_uniform


@dataclass(frozen=True)
class BlockObjective:
    """How a family was trained, where that is known.

    Attributes:
        complementary (`bool`): Whether a second view hides what the first one leaves.
        per_block (`bool`): Whether each block has a ratio of its own, and not each text.
    """

    complementary: bool = False
    per_block: bool = False


OBJECTIVES = {"Fast_dLLM_Qwen": BlockObjective(complementary=True, per_block=True)}
"""By `model_type`; other families have SDAR's."""


@dataclass(frozen=True)
class BlockMask:
    """Masks of one batch in each of V views.

    Attributes:
        hidden (`(V, B, L)` bool): Tokens replaced by the mask token.
        weights (`(V, B, L)` float): Weight of each token's cross-entropy; the loss is the weighted sum.
    """

    hidden: torch.Tensor
    weights: torch.Tensor


def block_mask(learnt: torch.Tensor, p: torch.Tensor, uniform: torch.Tensor, complementary: bool) -> BlockMask:
    """The masks that draws say.

    Args:
        learnt (`(B, L)` bool): Tokens that may be hidden.
        p (`(B, L)` float): Probability with which each is.
        uniform (`(B, L)` float): Draws from [0, 1); a token is hidden where it lies below p.
        complementary (`bool`): Whether there is a second view.
    """
    hidden = learnt & (uniform < p)
    count = learnt.sum().clamp_min(1)
    if not complementary:
        return BlockMask(hidden[None], (hidden / p / count)[None])
    both = torch.stack([hidden, learnt & ~hidden])
    return BlockMask(both, both / count)


def draw_block_mask(
    learnt: torch.Tensor,
    documents: torch.Tensor,
    blocks: torch.Tensor,
    generator: torch.Generator,
    objective: BlockObjective,
    *,
    min_mask_ratio: float = 0.0,
    eps: float = 1e-3,
    stratified: bool = False,
) -> BlockMask:
    """Draw the masks of one batch on the CPU.

    Args:
        learnt (`(B, L)` bool): Tokens that may be hidden.
        documents, blocks (`(B, L)` long): The document of each slot in its row, and its block in the document.
        generator (`torch.Generator`): The only source of chance, on the CPU.
        objective ([`BlockObjective`]): What has a ratio of its own, and how many views there are.
        min_mask_ratio, eps, stratified: See [`MaskedDiffusionSFTConfig`].

    Returns:
        [`BlockMask`] on the CPU.
    """
    # 1. What has a ratio: the texts, or blocks, with something to learn, in their order
    row = torch.arange(len(learnt), device="cpu")[:, None].expand_as(documents)
    place = torch.stack([row, documents] + ([blocks] if objective.per_block else []), dim=-1)
    names, owner = place[learnt].unique(dim=0, return_inverse=True)  # (U, 2 or 3), (n,)

    # 2. The ratios, and the probability of each learnt token; the others have one that nobody reads
    ratio = draw_mask_ratios(len(names), generator, min_mask_ratio=min_mask_ratio, eps=eps, stratified=stratified)
    p = torch.ones(learnt.shape, device="cpu").masked_scatter(learnt, ratio[owner])

    # 3. The tokens
    return block_mask(learnt, p, draw_uniform(generator, *learnt.shape), objective.complementary)
