"""Turns a causal language model into a block-causal diffusion language model, before it is trained as one."""

from dataclasses import fields
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)

from .adapters import as_diffusion_lm
from .models.configuration_fast_dllm_v2 import Fast_dLLM_QwenConfig
from .models.configuration_sdar import SDARConfig
from .models.generation_config_d3llm import D3LLMGenerationConfig
from .models.generation_d3llm import D3LLMGenerationMixin
from .models.locality import limited_reach
from .models.methods import METHODS
from .models.modeling_fast_dllm_v2 import Fast_dLLM_QwenForCausalLM
from .models.modeling_sdar import SDARForCausalLM
from .models.text_config import text_config, text_setting


MASK_TOKEN = "<|MASK|>"
"""Text of the mask token that is added where a tokenizer has none: SDAR's."""

# Form -> which token a row of logits predicts, and the tokens of a block, both as its family has them.
SHIFTS = {"fast_dllm_v2": Fast_dLLM_QwenForCausalLM.logit_shift, "sdar": SDARForCausalLM.logit_shift}
BLOCK_LENGTHS = {"fast_dllm_v2": Fast_dLLM_QwenConfig.bd_size, "sdar": SDARConfig.block_size}

# Fields of a family's config that say how it is a diffusion model, and do not come from the causal one.
_OWN = {"is_causal", "layer_types", "rope_theta", "mask_token_id", "bd_size", "block_size"}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def block_causal_lm(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    into: str = "fast_dllm_v2",
    *,
    block_length: int | None = None,
) -> Any:
    """Makes a causal model block-causal: with its weights, a mask token, and the decoder of this package.

    A token of the result sees its block of `block_length` tokens and all earlier ones, over the same weights. Before
    it is trained so, what it writes is of no use: that is `trainers/run_sft.py`, or any trainer of yours.

    | `into` | logits row i predicts | Qwen2, Qwen3 and Llama become | blocks |
    |---|---|---|---|
    | `"fast_dllm_v2"` | token i + 1, as in the causal model | [`Fast_dLLM_QwenForCausalLM`] | 32 |
    | `"sdar"` | token i | [`SDARForCausalLM`] | 4 |

    Biases that the class has and the model lacks are zero, and `config.qk_norm` says whether there are norms of
    queries and keys. These classes carry their code where they are saved, and the Auto classes, `d3llm generate` and
    `d3llm export` know them. Any other architecture keeps its stock class, as does one with biases that the class
    lacks (in the MLP, or for Fast-dLLM v2 behind the attention): [`as_diffusion_lm`] makes it block-causal,
    `d3llm generate` and the training scripts know it by its config, and `as_diffusion_lm(model)` gives a loaded one
    its decoder.

    A tokenizer without a mask token gets `"<|MASK|>"`. Rows of embedding and head that no token had before are the
    mean of the others. Of the generation config the special tokens stay, and how to sample does not: it was chosen
    for another way of writing.

    Source: Fast-dLLM v2 (https://huggingface.co/papers/2509.26328), SDAR (https://huggingface.co/papers/2510.06303).

    Args:
        model ([`~transformers.PreTrainedModel`]): a causal model, not quantised and without an adapter. It must not be
            used afterwards: the result takes its weights over.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the model's; the mask token is added in place. Save it
            beside the result.
        into (`str`): the form, `"fast_dllm_v2"` or `"sdar"`.
        block_length (`int`, *optional*): tokens of a block, counted from the beginning of the text; as in the table
            when unset.

    Returns:
        The block-causal model, in evaluation mode.

    Raises:
        TypeError: for anything but a model of transformers.
        ValueError: for an unknown form, a block without tokens, a model that is not causal, has windows, is quantised
            or is a diffusion model already, or a mask token that is another one's token or not the config's.

    Example:

    ```python
    from d3llm_hf import block_causal_lm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen2.5-0.5B-Instruct")
    model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B-Instruct")
    model = block_causal_lm(model, tokenizer, "fast_dllm_v2", block_length=32)
    model.save_pretrained("qwen-blocks")
    tokenizer.save_pretrained("qwen-blocks")
    ```
    """
    # 1. What cannot work is refused before anything is changed
    if into not in SHIFTS:
        raise ValueError(f"`into` must be one of {list(SHIFTS)} (got {into!r}). Correct it.")
    block_length = BLOCK_LENGTHS[into] if block_length is None else block_length
    if type(block_length) is not int or block_length < 1:
        raise ValueError(
            f"`block_length` must be a positive integer (got {block_length!r}). Pass the tokens of a block, or leave "
            f"it unset for {BLOCK_LENGTHS[into]}."
        )
    _check_causal(model)
    _check_mask_token(model, tokenizer)

    # 2. The mask token, with rows of embedding and head
    _add_mask_token(model, tokenizer)

    # 3. The family's class over the same weights, or the decoder on the stock class
    tokens = {name: _special_token(model, name) for name in _TOKENS} | {"mask_token_id": tokenizer.mask_token_id}
    generation = D3LLMGenerationConfig(decoding_method=into, do_sample=False, **tokens)
    if into == "fast_dllm_v2" and block_length % METHODS[into]["sub_block_length"]:
        generation.sub_block_length = block_length  # its parts of 8 would not fill a block
    family = _family(model, into)
    if family is None:
        return as_diffusion_lm(
            model,
            mask_token_id=tokenizer.mask_token_id,
            logit_shift=SHIFTS[into],
            block_length=block_length,
            generation_config=generation,
        ).eval()
    made = _of_family(family, model, {"block_length": block_length, "mask_token_id": tokenizer.mask_token_id})
    made.generation_config = generation
    return made


def _check_causal(model: Any) -> None:
    """Whether blocks can be made of the attention of a causal model."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"`model` must be a causal model of transformers (got {name}). Load it with `AutoModelForCausalLM`; merge "
            "an adapter of PEFT first with `merge_and_unload`."
        )
    if isinstance(model, D3LLMGenerationMixin):
        raise ValueError(
            f"`model` must be a causal model (got {name}, which decodes by diffusion already). Use it as it is."
        )
    if model.config.is_encoder_decoder or not model.can_generate():
        raise ValueError(
            f"`model` must be a causal model, a decoder with a language-model head (got {name}). An encoder sees both "
            "sides already: `as_diffusion_lm` gives it the decoder."
        )
    limit = limited_reach(model)
    if limit is not None:
        raise ValueError(
            f"`model` must attend to all earlier tokens (got {name}, in which {limit} says that some layer does not). "
            "Take a model without windows, or switch them off in its config where your texts are shorter."
        )
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(
            f"`model` must not be quantised (got {name} with a `quantization_config`): rows are added to its tables. "
            "Load it without, a GGUF file with `GgufConfig(dequantize=True)`, and quantise the result."
        )


def _check_mask_token(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Whether tokenizer and config mean the same token, and one that has no other meaning."""
    named, token = text_setting(model.config, "mask_token_id"), tokenizer.mask_token_id
    if named is not None and named != token:
        raise ValueError(
            f"`tokenizer` must have the mask token that the model's config names (got {token}, and {named} in "
            "config.json). Set `tokenizer.mask_token`, or `model.config.mask_token_id = None`."
        )
    if token is None:
        return
    for name in _TOKENS:
        theirs = [getattr(tokenizer, name), _special_token(model, name)]
        if any(token in (ids if isinstance(ids, list) else [ids]) for ids in theirs):
            raise ValueError(
                f"`tokenizer` must have a mask token of its own (got {tokenizer.mask_token!r}, which is `{name}`, "
                "too). Set `tokenizer.mask_token = None`, and one is added."
            )


def _special_token(model: Any, name: str) -> int | list[int] | None:
    """The generation config knows all tokens that end an answer, the config often one of them."""
    generation: GenerationConfig | None = getattr(model, "generation_config", None)
    found = getattr(generation, name, None)
    return text_setting(model.config, name) if found is None else found


@torch.no_grad()
def _add_mask_token(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Adds the mask token where there is none; rows that had no token are the mean of those that had one."""
    known, rows = len(tokenizer), model.get_input_embeddings().weight.shape[0]
    new = []
    if tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
        new = [tokenizer.mask_token_id]  # often a row that only fills the table up
    wanted = max(len(tokenizer), tokenizer.mask_token_id + 1)
    if wanted > rows:
        model.resize_token_embeddings(wanted, mean_resizing=False)
    new += range(rows, wanted)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    for table in (embedding,) if head is embedding else (embedding, head):
        table[new] = table[: min(known, rows)].float().mean(0).to(table.dtype)


def _family(model: Any, into: str) -> Any:
    """The class whose architecture a model has, or `None`."""
    if type(model) not in (Qwen2ForCausalLM, Qwen3ForCausalLM, LlamaForCausalLM):
        return None
    if type(model) is LlamaForCausalLM and model.config.mlp_bias:
        return None
    if into == "sdar":
        return SDARForCausalLM
    biased = type(model) is not Qwen2ForCausalLM and model.config.attention_bias  # also behind the attention
    return None if biased else Fast_dLLM_QwenForCausalLM


def _of_family(family: Any, model: Any, blocks: dict[str, int]) -> Any:
    """A model of that class over the tensors of another, which has them under the same names."""
    # 1. The config: what both have, the width of a head, and which biases and norms there are
    source, config_class = text_config(model.config), family.config_class
    own = {field.name for field in fields(config_class)} & {*config_class.__annotations__}
    keys = {name: getattr(source, name) for name in own - _OWN if hasattr(source, name)}
    keys["qk_norm"] = isinstance(model, Qwen3ForCausalLM)
    if getattr(source, "head_dim", None) is not None:
        keys["head_dim"] = source.head_dim
    elif "head_dim" in own:
        keys["head_dim"] = source.hidden_size // source.num_attention_heads
    biased = ["q_proj", "k_proj", "v_proj"]
    if family is SDARForCausalLM:
        keys["attention_bias"] = isinstance(model, Qwen2ForCausalLM) or source.attention_bias
        biased = [*biased, "o_proj"] if keys["attention_bias"] else []
    config = config_class(**keys, **blocks)
    config._attn_implementation = source._attn_implementation

    # 2. The tensors, with biases of zero where the model has none
    tensors = model.state_dict()
    for name in [name for name in tensors if name.endswith(tuple(f"{projection}.weight" for projection in biased))]:
        tensors.setdefault(name.removesuffix("weight") + "bias", tensors[name].new_zeros(len(tensors[name])))
    made = family.from_pretrained(None, config=config, state_dict=tensors, dtype=model.dtype).to(model.device)
    made.config.name_or_path = model.config.name_or_path  # what was it made from, for cards
    return made.eval()


__all__ = ["BLOCK_LENGTHS", "MASK_TOKEN", "SHIFTS", "block_causal_lm"]
