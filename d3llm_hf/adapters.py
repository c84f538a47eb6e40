"""Gives a loaded model of transformers the decoder: any bidirectional language model that has a mask token."""

from functools import cache
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMixin

from .models.generation_config_d3llm import D3LLMGenerationConfig
from .models.generation_d3llm import D3LLMGenerationMixin
from .models.locality import limited_reach
from .models.probes import (
    close,
    evaluating,
    keeps_to_blocks,
    logits_of,
    long_text,
    ordinary_tokens,
    reaches_forward_only,
    reads_padding,
    takes_slot_cache,
)
from .models.text_config import text_config, text_setting


def as_diffusion_lm(
    model: Any,
    *,
    mask_token_id: int | None = None,
    logit_shift: int | None = None,
    bidirectional: bool = False,
    block_length: int | None = None,
    generation_config: GenerationConfig | None = None,
) -> Any:
    """Makes `model.generate` decode by diffusion, in place: no weight is copied, and the forward stays as it is.

    The model's class becomes a subclass of itself with [`D3LLMGenerationMixin`] in front, under the same name, so what
    `save_pretrained` writes is a checkpoint of the stock class. Mask token, shift and blocks go into `config`, where
    this function finds them when the checkpoint is loaded again.

    A few short forwards (of at most 72 tokens) check the contract, and find out whether a cache works and whether the
    padding of a batch is read. They are left out where the weights are not in place yet (on the meta device, or
    sharded by ZeRO-3): then only config and modules are asked whether attention is causal.

    Args:
        model ([`~transformers.PreTrainedModel`]): a loaded model with a language-model head, or one that PEFT
            wraps (then the wrapped model changes, and the wrapper generates through it).
        mask_token_id (`int`, *optional*): token of an undecided position; `config.mask_token_id` when unset.
        logit_shift (`int`, *optional*): 0 if logits row i predicts token i, 1 if it predicts token i + 1. When
            unset, `config.logit_shift`, or else 1 for a class that could generate from left to right before
            (`...ForCausalLM`: what starts from autoregressive weights keeps their shift, as Dream does), 0 for others.
        bidirectional (`bool`): first set `config.is_causal = False`, which makes the decoders of transformers attend
            to all positions. Without training, what such a model writes is of no use.
        block_length (`int`, *optional*): decode by blocks of so many tokens, counted from the beginning of the text,
            where a token sees its block and all earlier ones, as the model has to be trained for. Keys of finished
            blocks are kept and exact. Goes into `config.block_length`, beside `config.block_alignment`; what these
            say when unset. It sets `config.is_causal = False` too, so that what the masks of `generate` leave in is
            seen; a forward of yours without such a mask sees all positions.
        generation_config ([`~transformers.GenerationConfig`], *optional*): defaults of `generate`; the model's own
            when unset.

    Returns:
        The same object.

    Raises:
        TypeError: for anything but a model of transformers.
        ValueError: for encoder-decoders, models without logits, causal attention, a missing mask token or one outside
            the vocabulary, another shift, or positions that are not counted as `position_offset` says; for blocks
            without tokens, in a model with windows, or where attention follows no mask of each position. The model is
            then as it was.

    Example:

    ```python
    from d3llm_hf import as_diffusion_lm
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("answerdotai/ModernBERT-base")
    model = AutoModelForMaskedLM.from_pretrained("answerdotai/ModernBERT-base")
    model = as_diffusion_lm(model, mask_token_id=tokenizer.mask_token_id)
    output = model.generate(**tokenizer("Paris is", return_tensors="pt"), max_new_tokens=8)
    ```
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not isinstance(base, PreTrainedModel):
        raise TypeError(
            f"`model` must be a model of transformers (got {type(base).__name__}). Unwrap what `torch.compile` or a "
            "launcher wraps; other models can inherit from `D3LLMGenerationMixin`."
        )
    config, text = base.config, text_config(base.config)
    before, of_text = dict(vars(config)), dict(vars(text))
    if config.is_encoder_decoder:
        raise ValueError(
            f"`model` must be one stack over one canvas (got {type(base).__name__}, an encoder-decoder). Take an "
            "encoder with a language-model head, or a decoder with `bidirectional=True`."
        )
    mask_token_id = _mask_token_id(base, mask_token_id)
    logit_shift = _logit_shift(base, logit_shift)
    block_length = _block_length(base, block_length)
    stock: Any = type(base)
    held = dict(vars(base))
    try:
        if bidirectional or block_length is not None:  # without a mask, transformers would fall back to causal
            text.is_causal = False
        config.mask_token_id, config.logit_shift = mask_token_id, logit_shift
        if not isinstance(base, D3LLMGenerationMixin):
            base.__class__ = _with_decoder(stock)
        decoder: Any = base  # of its new class
        decoder.logit_shift = logit_shift
        if block_length is not None:
            config.block_length, config.block_alignment = block_length, decoder.block_alignment or "text"
            decoder.block_alignment = config.block_alignment
        in_blocks = decoder.block_alignment is not None
        decoder.check_contract(None, cached=False, in_blocks=in_blocks)
        if all(weight.numel() and not weight.is_meta for weight in base.parameters()):
            with evaluating(base):
                _check_forward(base, stock, mask_token_id)
                if in_blocks:
                    _check_blocks(base, stock, mask_token_id)
                if not decoder.supports_slot_cache:
                    decoder.supports_slot_cache = _takes_slot_cache(base, mask_token_id)
                if decoder.supports_padding is None:
                    decoder.supports_padding = reads_padding(base, mask_token_id)
        base.generation_config = _generation_config(base, generation_config)
    except BaseException:
        base.__class__ = stock
        _restore(base, held)
        _restore(text, of_text)
        _restore(config, before)
        raise
    return model


@cache
def _with_decoder(stock: type) -> type:
    """`stock` with the decoder in front. The name stays: checkpoints and losses of transformers go by it."""

    def reduce(self, protocol):
        return _without_weights, (stock,), vars(self)

    members = {"__module__": stock.__module__, "__doc__": stock.__doc__, "__reduce_ex__": reduce}
    return type(stock.__name__, (D3LLMGenerationMixin, stock), members)


def _without_weights(stock: Any) -> Any:
    """An empty object for pickle to fill: a class that is made here cannot be found by its name."""
    cls: Any = _with_decoder(stock)
    return cls.__new__(cls)


def _restore(target: Any, held: dict[str, Any]) -> None:
    vars(target).clear()
    vars(target).update(held)


def _mask_token_id(model: PreTrainedModel, given: int | None) -> int:
    vocabulary = text_config(model.config).vocab_size
    found = given if given is not None else text_setting(model.config, "mask_token_id")
    if found is None:
        raise ValueError(
            f"`mask_token_id` must name the token of an undecided position (got None, and {type(model).__name__}'s "
            "config names none). Pass `mask_token_id=tokenizer.mask_token_id`."
        )
    if not 0 <= found < vocabulary:
        raise ValueError(
            f"`mask_token_id` must lie inside the vocabulary of {vocabulary} tokens (got {found}). Call "
            "`model.resize_token_embeddings(len(tokenizer))` after adding a mask token."
        )
    return int(found)


def _logit_shift(model: PreTrainedModel, given: int | None) -> int:
    if isinstance(model, D3LLMGenerationMixin):
        usual = model.logit_shift
    else:
        usual = getattr(model.config, "logit_shift", int(isinstance(model, GenerationMixin)))
    shift = usual if given is None else given
    if shift not in (0, 1):
        raise ValueError(
            f"`logit_shift` must be 0 or 1 (got {shift!r}). Pass 0 if logits row i predicts token i, 1 if it predicts "
            "token i + 1."
        )
    return shift


def _block_length(model: Any, given: int | None) -> int | None:
    """That of the call or the config, `None` where every position sees all others."""
    found = given
    if given is None and getattr(model.config, "block_alignment", None) is not None:
        found = text_setting(model.config, "block_length")
    if found is None:
        return None
    if type(found) is not int or found < 1:
        raise ValueError(
            f"`block_length` must be a positive integer (got {found!r}). Pass the tokens of a block, or leave it "
            "unset where every position sees all others."
        )
    limit = limited_reach(model)
    if limit is not None:
        raise ValueError(
            f"`block_length` needs attention that reaches all earlier blocks (got {type(model).__name__}, in which "
            f"{limit} says that some layer does not). Leave it unset, or take a model without windows."
        )
    return found


def _generation_config(model: PreTrainedModel, given: GenerationConfig | None) -> D3LLMGenerationConfig:
    config = given if given is not None else getattr(model, "generation_config", None)
    if config is None:
        return D3LLMGenerationConfig.from_model_config(model.config)
    return config if isinstance(config, D3LLMGenerationConfig) else D3LLMGenerationConfig.coerce(config)


def _check_forward(model: Any, stock: type, mask_token_id: int) -> None:
    """Runs the texts one by one: in equal shapes, a causal model computes equal numbers for what precedes a change."""
    name = stock.__name__
    a, b, c, d = ordinary_tokens(model, mask_token_id, 4)
    texts = torch.stack([torch.stack([a, b, c]), torch.stack([a, b, d])])
    try:
        logits = [logits_of(model, text[None]) for text in texts]
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"`model` must run over three tokens with attention that is not causal (got {type(error).__name__} from "
            f"{name}: {error}). Its code does not follow `config.is_causal=False`, or its weights do not fit it."
        ) from error
    if logits[0] is None or logits[0].shape[:2] != (1, 3) or logits[0].shape[2] <= mask_token_id:
        shape = None if logits[0] is None else tuple(logits[0].shape)
        raise ValueError(
            f"`model` must return logits of the vocabulary for every position (got {shape} for 3 tokens from {name}). "
            "Load it with `AutoModelForMaskedLM` or `AutoModelForCausalLM`."
        )
    if torch.equal(logits[0][:, 0], logits[1][:, 0]):
        raise ValueError(
            f"Attention must not be causal: the last token of a text must reach the first position (in {name} it does "
            "not). Set `model.config.is_causal = False` or pass `bidirectional=True`, and train the model so; a "
            "model that does not follow that setting cannot be decoded this way."
        )
    positions = (torch.arange(3, device=texts.device) + model.position_offset)[None]
    placed = logits_of(model, texts[:1], position_ids=positions)
    if not close(placed, logits[0]):
        raise ValueError(
            f"Positions must be counted from `position_offset` (got {model.position_offset}, with which {name} gives "
            "other logits than with its own positions). Set `position_offset` on a class of yours with "
            "`D3LLMGenerationMixin` among its bases."
        )
    text = long_text(model, mask_token_id)
    if reaches_forward_only(model, text):
        raise ValueError(
            f"Attention must not be causal, nor causal by blocks: in {name} the beginning of a text of "
            f"{text.shape[1]} tokens reaches its end, and the end does not reach the beginning. Let every block "
            "attend to all, and train the model so."
        )


def _check_blocks(model: Any, stock: type, mask_token_id: int) -> None:
    if not keeps_to_blocks(model, long_text(model, mask_token_id)):
        raise ValueError(
            f"`block_length` needs a model that follows a mask of each position (got {stock.__name__}, whose first "
            "block sees what a 4-D `attention_mask` hides from it). Leave it unset."
        )


def _takes_slot_cache(model: Any, mask_token_id: int) -> bool:
    if model.cache_name is None or limited_reach(model) is not None:
        return False
    return takes_slot_cache(model, text_config(model.config).num_hidden_layers, long_text(model, mask_token_id))


__all__ = ["as_diffusion_lm"]
