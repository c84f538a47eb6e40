"""D2F: a bidirectional model learns to see blocks, from itself without its adapter.

Discrete Diffusion Forcing (https://huggingface.co/papers/2508.09192): the answer is cut into blocks that begin behind
the prompt, and later ones are hidden more: the first with a ratio r ~ U(0.2, 0.7), each further one with more, 0.7 at
most. With its adapter the model sees the prompt, earlier blocks and its own one; without, it sees the whole noisy
canvas, and what it then predicts are the targets. The loss is the mean over hidden tokens of CE / r.
"""

from dataclasses import dataclass

import torch

from .masking import draw_uniform


_LEAST, _MOST = 0.2, 0.7  # of the ratios


@dataclass(frozen=True)
class BlockNoise:
    """Masks of one batch, all over the answer canvas.

    Attributes:
        hidden (`(B, R)` bool): Tokens replaced by the mask token.
        weights (`(B, R)` float): Weight of each token's cross-entropy; the loss is the weighted sum.
    """

    hidden: torch.Tensor
    weights: torch.Tensor


def answer_blocks(learnt: torch.Tensor, block_length: int) -> torch.Tensor:
    """The block `(B, R)` of each answer position, from 0 at the first learnt one; -1 before it.

    Args:
        learnt (`(B, R)` bool): Answer tokens that may be hidden.
        block_length (`int`): Tokens of a block.
    """
    place = torch.arange(learnt.shape[1], device=learnt.device) - learnt.long().argmax(1, keepdim=True)
    return place.div(block_length, rounding_mode="floor").clamp_min(-1)


def rising_ratios(first: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """The ratio `(B, n)` of each of n blocks, from draws out of [0, 1).

    Args:
        first (`(B, 1)` float): draw of the first block's ratio.
        steps (`(B, n - 1)` float): draws of how much more each further block has.
    """
    begin = _LEAST + (_MOST - _LEAST) * first
    rise = steps * (_MOST - begin) / max(steps.shape[1], 1)
    return torch.cat([begin, begin + rise.cumsum(1)], dim=1)


def block_noise(learnt: torch.Tensor, p: torch.Tensor, uniform: torch.Tensor) -> BlockNoise:
    """The masks that draws say: a learnt token is hidden where its draw lies below p; all are `(B, R)`."""
    hidden = learnt & (uniform < p)
    return BlockNoise(hidden, hidden / p / hidden.sum().clamp_min(1))


def draw_block_noise(learnt: torch.Tensor, block_length: int, generator: torch.Generator) -> BlockNoise:
    """Draw the masks of one batch on the CPU, from a generator that is the only source of chance."""
    rows, length = learnt.shape
    blocks = answer_blocks(learnt, block_length)
    first, steps = draw_uniform(generator, rows, 1), draw_uniform(generator, rows, -(-length // block_length) - 1)
    ratios = rising_ratios(first, steps)
    return block_noise(learnt, ratios.gather(1, blocks.clamp_min(0)), draw_uniform(generator, rows, length))


def block_causal_mask(attention_mask: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Which slots see which, `(B, 1, L, L)` bool: the prompt is a block of its own, and padding sees all that is text.

    Args:
        attention_mask (`(B, L)`): 0 on padding.
        blocks (`(B, R)` long): of the last R slots, see [`answer_blocks`].
    """
    prompt = attention_mask.shape[1] - blocks.shape[1]
    seen = attention_mask.bool()
    whole = torch.nn.functional.pad(blocks, (prompt, 0), value=-1).masked_fill(~seen, blocks.shape[1])
    return ((whole[:, :, None] >= whole[:, None]) & seen[:, None])[:, None]
