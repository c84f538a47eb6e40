"""What a model says of training it in blocks, and settings of fine-tuning that its attention leaves without effect."""

from dataclasses import fields
from inspect import signature
from typing import Any

from d3llm_hf.models.text_config import text_setting
from d3llm_hf.models.topology import Topology
from d3llm_hf.models.wrappers import base_of, learnt_prompt

from .block_masking import OBJECTIVES, BlockObjective
from .config import MaskedDiffusionSFTConfig


# Settings that one kind of attention has no use for, and why.
_OF_BLOCKS = {
    "block_length": "it sees the whole canvas. Leave it unset, or make a decoder block-causal with `as_diffusion_lm`",
    "complementary_masks": "it sees the whole canvas, which has one view. Leave it unset",
    "mask_ratio_per_block": "it sees the whole canvas, which has no blocks. Leave it unset",
    "packing": "it sees the whole canvas, and other texts with it. Leave it unset",
}
_OF_CANVASES = {
    "suffix_mask_fraction": "its blocks are never decided with what follows in sight. Leave it at 0",
    "suffix_window": "it has no suffix masks. Leave it unset",
}


def block_topology(model: Any, args: MaskedDiffusionSFTConfig) -> Topology | None:
    """Where the blocks of a model lie; `None` where it sees everything.

    A `block_length` of the arguments goes into the model's config, so that it decodes as it was trained.

    Raises:
        ValueError: For a setting without effect on the model's attention, or a model that takes no positions or has a
            learnt prompt in front of the text.
    """
    base = base_of(model)
    alignment = getattr(base, "block_alignment", None)
    defaults = {field.name: field.default for field in fields(args)}
    for name, reason in (_OF_BLOCKS if alignment is None else _OF_CANVASES).items():
        value = getattr(args, name)
        if value != defaults[name]:
            raise ValueError(f"`{name}` has no effect on {type(base).__name__} (got {value!r}): {reason}.")
    if alignment is None:
        return None
    if learnt_prompt(model) is not None:
        kind = model.active_peft_config.peft_type.value
        raise ValueError(
            f"`peft_config` must put nothing in front of texts that are seen in blocks (got {kind}): each row holds "
            "them twice. Train a LoRA adapter."
        )
    if "position_ids" not in signature(type(base).forward).parameters:
        raise ValueError(
            f"`model` must take `position_ids` to be trained in blocks (got {type(base).__name__}, whose forward has "
            "none): each text comes twice, at the same positions. Add them to its forward."
        )
    if args.block_length is not None:
        base.config.block_length = args.block_length
    return Topology(text_setting(base.config, "block_length"), alignment)


def block_objective(model: Any, args: MaskedDiffusionSFTConfig) -> BlockObjective:
    """How a block-causal model is trained: as the arguments say, else as its family was."""
    family = OBJECTIVES.get(base_of(model).config.model_type, BlockObjective())
    return BlockObjective(
        family.complementary if args.complementary_masks is None else args.complementary_masks,
        family.per_block if args.mask_ratio_per_block is None else args.mask_ratio_per_block,
    )
