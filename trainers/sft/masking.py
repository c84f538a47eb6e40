"""Masks of the fine-tuning objective: which answer tokens are hidden, and what each weighs in the loss.

Uniform masks are LLaDA's (https://huggingface.co/papers/2502.09992, Algorithm 2): a ratio t ~ U(0, 1) per row, every
answer token hidden with probability p = (1 - eps) t + eps, cross-entropy weighted by 1/p over the answer's length.

Suffix masks hide everything from a random place of the answer on and learn the next few tokens. A uniform mask seldom
hides all copies of a computed value at once, so a small model learns to copy results rather than to compute them;
under a suffix mask nothing can be copied from further on.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AnswerMask:
    """Masks of one batch, all over the answer canvas.

    Args:
        hidden (`torch.BoolTensor` of shape `(B, R)`): Tokens replaced by the mask token.
        weights (`torch.FloatTensor` of shape `(B, R)`): Weight of each token's cross-entropy; a row's loss is the
            weighted sum.
        is_suffix (`torch.BoolTensor` of shape `(B,)`): Rows with a suffix mask.
    """

    hidden: torch.Tensor
    weights: torch.Tensor
    is_suffix: torch.Tensor


def draw_answer_mask(
    learnt: torch.Tensor,
    content_lengths: torch.Tensor,
    generator: torch.Generator,
    *,
    min_mask_ratio: float = 0.0,
    eps: float = 1e-3,
    stratified: bool = False,
    suffix_fraction: float = 0.0,
    suffix_window: int = 8,
) -> AnswerMask:
    """Draw the masks of one batch on the CPU.

    Args:
        learnt (`torch.BoolTensor` of shape `(B, R)`): Answer tokens that may be hidden.
        content_lengths (`torch.LongTensor` of shape `(B,)`): Answer length without the end-of-text fill; cuts of
            suffix masks fall inside.
        generator (`torch.Generator`): The only source of chance, on the CPU.
        min_mask_ratio, eps, stratified, suffix_fraction, suffix_window: See [`MaskedDiffusionSFTConfig`].

    Returns:
        [`AnswerMask`] on the CPU.
    """
    batch_size, length = learnt.shape

    p = draw_mask_ratios(batch_size, generator, min_mask_ratio=min_mask_ratio, eps=eps, stratified=stratified)[
        :, None
    ]  # (B, 1)
    hidden = (draw_uniform(generator, batch_size, length) < p) & learnt
    weights = hidden / p / learnt.sum(1, keepdim=True).clamp_min(1)

    # The fraction is kept on average for any batch size: 0.5 of a batch of one is every other batch.
    num_suffix = int(batch_size * suffix_fraction + draw_uniform(generator).item())
    is_suffix = torch.randperm(batch_size, generator=generator, device="cpu") < num_suffix
    cut = (draw_uniform(generator, batch_size) * content_lengths).long()[:, None]
    position = torch.arange(length, device="cpu")[None]
    suffix_hidden = (position >= cut) & learnt
    window = suffix_hidden & (position < cut + suffix_window)
    suffix_weights = window.float() / window.sum(1, keepdim=True).clamp_min(1)
    return AnswerMask(
        hidden=torch.where(is_suffix[:, None], suffix_hidden, hidden),
        weights=torch.where(is_suffix[:, None], suffix_weights, weights),
        is_suffix=is_suffix,
    )


def draw_mask_ratios(
    count: int, generator: torch.Generator, *, min_mask_ratio: float, eps: float, stratified: bool
) -> torch.Tensor:
    """Probabilities `(count,)` with which tokens are hidden, one for each text or block, drawn on the CPU.

    Args:
        count (`int`): Texts or blocks; stratified ratios are spread over all of them.
        generator (`torch.Generator`): The only source of chance, on the CPU.
        min_mask_ratio, eps, stratified: See [`MaskedDiffusionSFTConfig`].
    """
    ratio = draw_uniform(generator, count)
    if stratified:
        order = torch.randperm(count, generator=generator, device="cpu")
        ratio = (ratio + order) / max(count, 1)
    return (1 - eps) * ratio.clamp_min(min_mask_ratio) + eps


def draw_uniform(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Float32 draws from [0, 1) of a CPU generator, whatever torch's default dtype and device are."""
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")


def generator_for(*identity: int) -> torch.Generator:
    """A CPU generator seeded by what identifies a draw, such as `(seed, step, micro-step, rank)`.

    Two identities that differ anywhere give unrelated streams (splitmix64 over the entries), so the masks of a step
    do not depend on what ran before it, and a resumed run repeats them.
    """
    state = 0
    for value in identity:
        state = (state ^ (value & _MASK64)) + 0x9E3779B97F4A7C15 & _MASK64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK64
        state ^= state >> 31
    return torch.Generator().manual_seed(state >> 1)


_MASK64 = (1 << 64) - 1
