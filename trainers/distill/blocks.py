"""Which models that see nothing of later blocks can be distilled, and where their blocks lie."""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any

from d3llm_hf.models.wrappers import base_of, learnt_prompt


if TYPE_CHECKING:
    from d3llm_hf.models.topology import Topology

    from .config import PseudoTrajectoryDistillConfig


def topology_of_model(model: Any) -> Topology | None:
    """The blocks that a model was trained with; `None` where every position sees all others."""
    traits = getattr(base_of(model), "traits", None)
    return None if traits is None else traits.topology


def blocks_to_distil(model: Any, args: PseudoTrajectoryDistillConfig, label_shift: int) -> Topology | None:
    """The blocks of a student.

    Args:
        model ([`~transformers.PreTrainedModel`]): The student, with its adapter where it has one.
        args ([`PseudoTrajectoryDistillConfig`]): Whose rollouts have blocks of their own.
        label_shift (`int`): 0 if logits row i predicts token i, 1 if row i - 1 does.

    Raises:
        ValueError: For a block-causal student whose states would not be those of its decoding.
    """
    topology = topology_of_model(model)
    if topology is None:
        return None
    base = base_of(model)
    name = type(base).__name__
    if label_shift:
        raise ValueError(
            f"`model` must predict token i in row i, or see the whole canvas (got {name}, which sees nothing of later "
            f"blocks, with `label_shift={label_shift}`): the row before a block sees nothing of it. Fine-tune it with "
            "`MaskedDiffusionSFTTrainer`, or distil LLaDA, SDAR or Dream."
        )
    if "position_ids" not in signature(type(base).forward).parameters:
        raise ValueError(
            f"`model` must take `position_ids` to be distilled in blocks (got {name}, whose forward has none): a mask "
            "for each position does not say where a text begins. Add them to its forward."
        )
    if learnt_prompt(model) is not None:
        prompt = model.active_peft_config.peft_type.value
        raise ValueError(
            f"`peft_config` must put nothing in front of texts that are seen in blocks (got {prompt}): what each "
            "position sees is counted from the first token. Train a LoRA adapter."
        )
    own = (topology.block_length, topology.alignment)
    if args.objective == "rollout" and own != (args.rollout_block_length, "prompt"):
        raise ValueError(
            "`rollout_block_length` must be the tokens of a block of the model, whose blocks begin behind the prompt "
            f"(got {args.rollout_block_length} for blocks of {own[0]} from the beginning of the {own[1]}): the states "
            "are those of its decoding. Correct it, or choose another `objective`."
        )
    return topology
