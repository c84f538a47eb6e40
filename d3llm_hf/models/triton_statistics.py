"""What the scores need of a table of logits, in one pass over it: a Triton kernel that makes no float32 copy.

Optional: nothing imports this file unless logits lie on a CUDA device, and `scoring.kernel_for` decides whether the
kernel may stand in for `scoring.statistics`.
"""

from __future__ import annotations  # `tl.constexpr` is asked for as a name, also where there is no Triton

from typing import Any

import torch


try:  # inside of a `try`, since transformers refuses a checkpoint's code whose other imports are not installed
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

# Entries of the vocabulary that a program holds at once.
BLOCK = 4096


def _row_sums(logits, row_stride, vocabulary, mask_token_id, best_at, sums_at, count, BLOCK: tl.constexpr):
    """One program: the sums of one row, block by block, relative to the largest logit seen so far.

    Kept apart from all others, the best token never enters `others` and `spread`: a sum that held its 1 would lose
    what is below 1e-7. Where a larger logit appears, the sums are rescaled to it; no term is negative, none cancels.
    """
    row = tl.program_id(0).to(tl.int64)  # a table may have more than 2^31 entries
    lowest = float("-inf")
    top, second, peak = lowest, lowest, lowest
    others, spread = 0.0, 0.0
    best, broken = 0, 0
    for start in range(0, vocabulary, BLOCK):
        token = start + tl.arange(0, BLOCK)
        value = tl.load(logits + row * row_stride + token, mask=token < vocabulary, other=lowest).to(tl.float32)
        broken = tl.maximum(broken, tl.max((value != value).to(tl.int32), axis=0))

        # 1. The block's best token, the lowest of equals and never the mask token, and all the rest of it
        allowed = tl.where(token == mask_token_id, lowest, value)
        block_top = tl.max(allowed, axis=0)
        is_top = (allowed == block_top) & (token != mask_token_id)
        block_best = tl.min(tl.where(is_top, token, vocabulary), axis=0)
        rest = tl.where(token == block_best, lowest, value)
        block_second = tl.max(rest, axis=0)
        loser = tl.minimum(top, block_top)  # the worse one of two best tokens joins the rest

        # 2. The sums so far, relative to the new peak (which is -inf only while everything is)
        new_peak = tl.maximum(peak, tl.maximum(block_top, block_second))
        reference = tl.where(new_peak == lowest, 0.0, new_peak)
        scale = tl.exp(peak - reference)
        rise = tl.where(scale > 0.0, reference - peak, 0.0)
        spread = (spread + rise * others) * scale
        others = others * scale

        # 3. The rest of the block and the loser: exp(l - peak), and that times -(l - peak)
        weight = tl.exp(rest - reference)
        distance = tl.where(weight > 0.0, reference - rest, 0.0)
        loser_weight = tl.exp(loser - reference)
        loser_distance = tl.where(loser_weight > 0.0, reference - loser, 0.0)
        others += tl.sum(weight, axis=0) + loser_weight
        spread += tl.sum(weight * distance, axis=0) + loser_weight * loser_distance

        second = tl.maximum(second, tl.maximum(block_second, loser))
        best = tl.where(block_top > top, block_best, best)
        top = tl.maximum(top, block_top)
        peak = new_peak

    tl.store(best_at + row, best.to(tl.int64))  # type: ignore[attr-defined]  # a number of Triton's by now
    tl.store(sums_at + row, tl.where(broken > 0, float("nan"), top))
    tl.store(sums_at + count + row, peak)
    tl.store(sums_at + 2 * count + row, others)
    tl.store(sums_at + 3 * count + row, tl.exp(second - tl.where(peak == lowest, 0.0, peak)))
    tl.store(sums_at + 4 * count + row, spread)


_kernel: Any = None if triton is None else triton.jit(_row_sums)  # untyped


def row_sums(logits: torch.Tensor, mask_token_id: int) -> tuple[torch.Tensor, ...]:
    """The best token of each row of `(n, V)` logits and what its distribution sums to; the logits stay as they are.

    Arithmetic is in float32, whatever the dtype of the logits. A device's fast `exp` is off by up to 1e-5 of the
    smallest weights, which add least.

    Returns:
        `(n,)` each: the best tokens (long; never the mask token, the lowest of equals); the best logit, NaN where the
        row holds NaN; the largest one, the mask token's included; and relative to it, over all tokens but the best,
        sum exp(l - peak), its largest term, and sum exp(l - peak) (peak - l).
    """
    count, vocabulary = logits.shape
    best = torch.empty(count, dtype=torch.long, device=logits.device)
    sums = torch.empty(5, count, dtype=torch.float32, device=logits.device)
    block = min(BLOCK, triton.next_power_of_2(vocabulary))
    arguments = (logits, logits.stride(0), vocabulary, mask_token_id, best, sums, count)
    if not logits.is_cuda:  # Triton's interpreter
        _kernel[(count,)](*arguments, BLOCK=block)
    else:
        with torch.cuda.device(logits.device):  # Triton starts kernels on the current device
            _kernel[(count,)](*arguments, BLOCK=block, num_warps=8)
    return best, *sums
