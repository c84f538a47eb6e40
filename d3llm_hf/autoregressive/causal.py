"""What a causal model is here, and what of its generation config no method follows."""

from typing import Any

from transformers import PreTrainedModel
from transformers.generation import GenerationMixin

from ..models.generation_d3llm import D3LLMGenerationMixin
from ..models.methods import METHODS
from ..models.text_config import text_config


# What would decode in another way than one token, or one verified run of drafts, a forward.
_OTHER_WAYS = {
    "num_beams": (None, 1),
    "penalty_alpha": (None, 0, 0.0),
    "dola_layers": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
    "guidance_scale": (None, 1, 1.0),
    "assistant_ensemble_weight": (None,),
    "speculation_type": (None,),
}


def check_causal(model: Any, method: str) -> None:
    """Refuses what is no causal model of transformers, and one whose generation config no method follows.

    Args:
        method: what it is to be decoded by, for the message.

    Raises:
        TypeError: for another kind of model.
        ValueError: naming the entry of the generation config.
    """
    name = type(model).__name__
    if isinstance(model, D3LLMGenerationMixin):
        raise TypeError(
            f"`model` must be a causal model for the method {method!r} (got {name}, which decodes by diffusion). Load "
            f"an autoregressive checkpoint, or choose one of {list(METHODS)}."
        )
    stock = isinstance(model, PreTrainedModel) and isinstance(model, GenerationMixin) and model.can_generate()
    if not stock or model.config.is_encoder_decoder or getattr(text_config(model.config), "is_causal", True) is False:
        raise TypeError(
            f"`model` must be a causal language model of transformers for the method {method!r} (got {name}). Load it "
            "with `AutoModelForCausalLM`; merge an adapter of PEFT with `merge_and_unload`."
        )
    for entry, allowed in _OTHER_WAYS.items():
        value = getattr(model.generation_config, entry, None)
        if value not in allowed:
            raise ValueError(
                f"`{entry}` in the model's generation config must be unset (got {value!r}): no method follows it. "
                f"Set `model.generation_config.{entry} = None`."
            )


def max_positions(model: Any) -> int | None:
    """Positions that a causal model was made for; `None` where its config names none."""
    return getattr(text_config(model.config), "max_position_embeddings", None)
