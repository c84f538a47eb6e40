"""Whether what `generate` got beside the prompt has the prompt's shape."""

from collections.abc import Mapping
from typing import Any

import torch

from .prompt_checks import check_mask


BESIDE = ("input_ids", "attention_mask", "position_ids", "token_type_ids")
"""Arguments with an entry for each token of the prompt. (`infill_mask` has one too; see `canvas.holes_of`.)"""


def check_shapes(name: str, prompt: torch.Tensor, others: Mapping[str, Any], width: int | None) -> None:
    """Refuses what would be broadcast, cut or misread.

    Args:
        name (`str`): `"input_ids"` or `"inputs_embeds"`.
        prompt: `(B, P)` token ids or `(B, P, D)` embeddings.
        others: the call's further arguments for the model.
        width: D of the model's embeddings, where known.

    Raises:
        TypeError: for what is no tensor, or embeddings that are none.
        ValueError: naming both shapes, and for a mask of anything but zeros and ones.
    """
    if not isinstance(prompt, torch.Tensor):
        raise TypeError(f"`{name}` must be a tensor (got {type(prompt).__name__}). Pass `torch.tensor([...])`.")
    shape = tuple(prompt.shape)
    if len(shape) != (3 if name == "inputs_embeds" else 2):
        form = "(B, P, D)" if name == "inputs_embeds" else "(B, P)"
        raise ValueError(f"`{name}` must have the shape {form} (got {shape}). Pass a single prompt as one row.")
    if name == "inputs_embeds" and not prompt.is_floating_point():
        raise TypeError(
            f"`inputs_embeds` must hold floating-point numbers (got a tensor of {prompt.dtype}). Pass token ids as "
            "`input_ids`."
        )
    if name == "inputs_embeds" and width is not None and shape[2] != width:
        raise ValueError(
            f"`inputs_embeds` must be as wide as the model's embeddings, {width} (got {shape}). Take them from "
            "`model.get_input_embeddings()`."
        )
    for beside in BESIDE:
        value = others.get(beside)
        if value is None or beside == name:
            continue
        if beside == "input_ids" and not value.numel():  # transformers' own, beside embeddings
            continue
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"`{beside}` must be a tensor (got {type(value).__name__}). Convert it first.")
        shared = beside == "position_ids" and tuple(value.shape) == (1, shape[1])
        if tuple(value.shape) != shape[:2] and not shared:
            raise ValueError(
                f"`{beside}` must have the shape (B, P) of `{name}`, {shape[:2]} (got {tuple(value.shape)}). Pass one "
                "entry per token of the prompt; the answer's are added."
            )
        if beside == "attention_mask":
            check_mask(value)
