"""Matrix products in half precision on a CPU that has no instructions for them.

Without such instructions (x86 up to AVX2, and AVX-512 before it learnt bfloat16) torch multiplies bfloat16 and float16
matrices some eight times slower than float32 ones. Decoding then widens a weight to float32 a piece at a time, while
the piece lies in the processor's cache, and rounds the product once: as exact as the slow way, and no weight is kept
twice.
"""

import platform
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode


PIECE = 1 << 20  # weights of a piece, 4 MB in float32
_FEWEST_ROWS = 4  # a product of fewer rows waits for memory, whatever the dtype
_HALF = (torch.bfloat16, torch.float16)


class WidenedProducts(TorchFunctionMode):
    """Inside, `torch.nn.functional.linear` of half-precision tensors multiplies in float32 and rounds its result."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is linear and not kwargs and len(args) in (2, 3) and _can_widen(*args[:2]):
            return widened_linear(*args)
        return func(*args, **(kwargs or {}))


def _can_widen(states: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        weight.dtype in _HALF
        and states.dtype == weight.dtype
        and weight.device.type == "cpu"
        and type(weight) in (torch.Tensor, torch.nn.Parameter)  # what is quantised multiplies in its own way
        and weight.ndim == 2
        and not torch.is_grad_enabled()
        and states.numel() >= _FEWEST_ROWS * weight.shape[1]
    )


def widened_linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`(..., in)` states times `(out, in)` weights, in float32, rounded to the dtype of the states: `(..., out)`."""
    wide = states.float()
    product = states.new_empty(*states.shape[:-1], len(weight))
    rows = max(1, PIECE // weight.shape[1])
    for start in range(0, len(weight), rows):
        piece = slice(start, start + rows)
        added = None if bias is None else bias[piece].float()
        product[..., piece] = linear(wide, weight[piece].float(), added)
    return product


@lru_cache
def is_slow(dtype: torch.dtype) -> bool:
    """Whether this machine's processor multiplies matrices of `dtype` without instructions for it.

    Known of x86 alone; of other processors it is not claimed.
    """
    if dtype not in _HALF or platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    kind = "bf16" if dtype == torch.bfloat16 else "fp16"
    has_instructions = getattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported", None)
    return has_instructions is not None and not has_instructions()


def fast_products(model: torch.nn.Module, *, compiled: bool) -> AbstractContextManager:
    """Inside, products of the model's dtype are fast on its device; a compiler finds its own way."""
    slow = model.device.type == "cpu" and not compiled and is_slow(model.dtype)
    return WidenedProducts() if slow else nullcontext()


__all__ = ["WidenedProducts", "fast_products", "is_slow", "widened_linear"]
