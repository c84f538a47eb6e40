"""What model and arguments say of blocks, and settings of fine-tuning that would have no effect beside them."""

from dataclasses import fields
from inspect import signature
from typing import Any

from d3llm_hf.models.modeling_common import MaskedDiffusionLMMixin
from d3llm_hf.models.text_config import text_setting
from d3llm_hf.models.topology import Topology
from d3llm_hf.models.wrappers import base_of, learnt_prompt

from .block_masking import OBJECTIVES, BlockObjective
from .config import MaskedDiffusionSFTConfig


_D2F_BLOCK = 16  # of the published adapters' training
_NO_SUFFIX = {
    "suffix_mask_fraction": "blocks are never decided with what follows in sight. Leave it at 0",
    "suffix_window": "there are no suffix masks. Leave it unset",
}
_ONE_VIEW = {
    "complementary_masks": "each text has one view. Leave it unset",
    "packing": "other texts of the row would be seen. Leave it unset",
}
# Settings without effect, and why: of a model that sees everything, of a block-causal one, and of D2F.
_IDLE_ON_CANVASES = _ONE_VIEW | {
    "block_length": "every position sees all others. Leave it unset, or make a decoder block-causal with "
    "`as_diffusion_lm`",
    "mask_ratio_per_block": "there are no blocks. Leave it unset",
}
_IDLE_ON_BLOCKS = _NO_SUFFIX | {
    "objective": "it makes a bidirectional model see blocks. Leave it unset, or train LLaDA or Dream",
}
_D2F_RATIOS = "ratios are D2F's own, one for each block. Leave it unset"
_IDLE_IN_D2F = (
    _NO_SUFFIX
    | _ONE_VIEW
    | dict.fromkeys(("min_mask_ratio", "mask_ratio_eps", "stratified_mask_ratio", "mask_ratio_per_block"), _D2F_RATIOS)
)


def block_topology(model: Any, args: MaskedDiffusionSFTConfig) -> Topology | None:
    """Where the blocks of a model, or of one that learns to see blocks, lie; `None` where it sees everything.

    A `block_length` goes into the config of a block-causal model, so that it decodes as it was trained.

    Raises:
        ValueError: For a setting without effect on what the model sees, or a model whose forward cannot be given that.
    """
    base = base_of(model)
    alignment = getattr(base, "block_alignment", None)
    d2f = args.objective != "masked_diffusion"
    if alignment is None:
        idle, kind = (_IDLE_IN_D2F, "d2f") if d2f else (_IDLE_ON_CANVASES, "full attention")
    else:
        idle, kind = _IDLE_ON_BLOCKS, "block-causal attention"
    defaults = {field.name: field.default for field in fields(args)}
    for name, reason in idle.items():
        value = getattr(args, name)
        if value != defaults[name]:
            raise ValueError(f"`{name}` has no effect on {type(base).__name__} with {kind} (got {value!r}): {reason}.")
    if alignment is None and not d2f:
        return None

    if learnt_prompt(model) is not None:
        prompt = model.active_peft_config.peft_type.value
        raise ValueError(
            f"`peft_config` must put nothing in front of texts that are seen in blocks (got {prompt}): what each "
            "position sees is counted from the first token. Train a LoRA adapter."
        )
    if alignment is None:
        _check_teacher(model, args)
        return Topology(args.block_length or _D2F_BLOCK, "prompt")
    if "position_ids" not in signature(type(base).forward).parameters:
        raise ValueError(
            f"`model` must take `position_ids` to be trained in blocks (got {type(base).__name__}, whose forward has "
            "none): each text comes twice, at the same positions. Add them to its forward."
        )
    if args.block_length is not None:
        base.config.block_length = args.block_length
    return Topology(text_setting(base.config, "block_length"), alignment)


def _check_teacher(model: Any, args: MaskedDiffusionSFTConfig) -> None:
    """Whether the student can be shown blocks, and is another than the teacher."""
    base = base_of(model)
    if not isinstance(base, MaskedDiffusionLMMixin):
        raise ValueError(
            f"`objective` must be masked_diffusion for {type(base).__name__} (got {args.objective!r}): D2F was made "
            "for LLaDA and Dream, whose layers follow a mask for each position. Leave it unset."
        )
    if args.objective == "d2f" and not hasattr(model, "disable_adapter"):
        raise ValueError(
            f'`model` must have an adapter with `objective="d2f"` (got {type(model).__name__}): without it the model '
            'is the teacher. Pass a `peft_config`, or learn the text itself with `objective="d2f_labels"`.'
        )


def block_objective(model: Any, args: MaskedDiffusionSFTConfig) -> BlockObjective:
    """How a block-causal model is trained: as the arguments say, else as its family was."""
    family = OBJECTIVES.get(base_of(model).config.model_type, BlockObjective())
    return BlockObjective(
        family.complementary if args.complementary_masks is None else args.complementary_masks,
        family.per_block if args.mask_ratio_per_block is None else args.mask_ratio_per_block,
    )
