"""The methods that transformers has: its `generate`, settings put where they take effect, hooks that count."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from ..models.text_config import text_config
from ..stops import FirstEnd
from .causal import check_causal
from .counting import Forwards, counted, counted_by_last_layer, num_layers
from .request import Continued, Request
from .settings import SAMPLING


# What makes `generate` draft. A method passes its own and no other counts, whatever the checkpoint's config says.
_SWITCHES = ("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "use_mtp")
_DRAFTING = ("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold")


def plain(request: Request) -> Continued:
    """One token a forward."""
    with counted(request.model) as found:
        return _generate(request, found)


def prompt_lookup(request: Request) -> Continued:
    """Drafts are what followed the last tokens where these stood before, in the prompt or the answer."""
    names = ("prompt_lookup_num_tokens", "max_matching_ngram_size")
    with counted(request.model) as found:
        return _generate(request, found, **{name: request.settings[name] for name in names})


def assistant(request: Request) -> Continued:
    """Drafts are a smaller model's; with tokenizers where the vocabularies differ."""
    drafter = request.assistant_model
    tokenizers: dict[str, Any] = {"tokenizer": request.tokenizer, "assistant_tokenizer": request.assistant_tokenizer}
    tokenizers = {name: value for name, value in tokenizers.items() if value is not None}
    with counted(request.model, drafter) as found, _drafting(drafter, request.settings):
        return _generate(request, found, assistant_model=drafter, **tokenizers)


def early_exit(request: Request) -> Continued:
    """Drafts are the model's own after its first layers (LayerSkip, 2404.16710)."""
    exit_after = request.settings["assistant_early_exit"]
    with counted_by_last_layer(request.model, exit_after) as found:
        return _generate(request, found, assistant_early_exit=exit_after)


def mtp(request: Request) -> Continued:
    """Drafts are those of the checkpoint's layers for multi-token prediction (DeepSeek-V3, 2412.19437)."""
    from transformers.modeling_layers import MtpModel

    with counted(request.model, draft_class=MtpModel) as found:
        return _generate(request, found, use_mtp=True)


def check_early_exit(model: Any, settings: Mapping[str, Any]) -> None:
    """Refuses a layer that is not before the last one, or a model whose layers cannot be told apart.

    Raises:
        ValueError: naming `assistant_early_exit`.
    """
    layers, chosen = num_layers(model), settings["assistant_early_exit"]
    if layers is None:
        raise ValueError(
            f"`assistant_early_exit` needs a model whose decoder lists its `layers` (got {type(model).__name__}: "
            "its drafts could not be told from its forwards). Choose another method."
        )
    if chosen >= layers:
        raise ValueError(
            f"`assistant_early_exit` must be below the {layers} layers of the model (got {chosen}). Lower it."
        )


def check_mtp(model: Any, settings: Mapping[str, Any]) -> None:
    """Refuses a checkpoint without layers for multi-token prediction.

    Raises:
        ValueError: naming the method.
    """
    if not getattr(text_config(model.config), "num_mtp_layers", None):
        raise ValueError(
            f"The method 'ar_mtp' needs a checkpoint with `num_mtp_layers` in its config (got {type(model).__name__} "
            "without). Choose another method."
        )


def check_assistant(model: Any, given: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuses an assistant that is the target itself, no causal model, or of another vocabulary without tokenizers.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    assistant_model = given["assistant_model"]
    tokenizer, assistant_tokenizer = given.get("tokenizer"), given.get("assistant_tokenizer")
    if assistant_model is model:
        raise ValueError(
            "`assistant_model` must be another model than the target, or its forwards could not be counted apart (got "
            f"the same {type(model).__name__}). Choose 'ar_early_exit', or load a smaller one."
        )
    check_causal(assistant_model, "ar_assistant")
    sizes = [text_config(each.config).vocab_size for each in (model, assistant_model)]
    both = tokenizer is not None and assistant_tokenizer is not None
    if sizes[0] != sizes[1] and not both:
        raise ValueError(
            f"`tokenizer` and `assistant_tokenizer` must be given where the vocabularies differ (got {sizes[0]} and "
            f"{sizes[1]} tokens). Pass both, or an assistant of the same vocabulary."
        )
    if sizes[0] == sizes[1] and assistant_tokenizer is not None:
        raise ValueError(
            f"`assistant_tokenizer` has no effect where both vocabularies have {sizes[0]} tokens (got "
            f"{type(assistant_tokenizer).__name__}). Leave it out."
        )


def _generate(request: Request, found: Forwards, **switches: Any) -> Continued:
    """Calls `generate` of transformers with the defaults of the checkpoint, but for what the method settles."""
    ends = FirstEnd(request.stopping_criteria, request.input_ids.shape[1])
    criteria = {"stopping_criteria": [ends]} if request.stopping_criteria else {}
    with _drafting(request.model, request.settings):
        sequences = request.model.generate(
            request.input_ids,
            attention_mask=request.attention_mask,
            max_new_tokens=request.max_new_tokens,
            eos_token_id=list(request.eos_token_ids) or None,
            pad_token_id=request.pad_token_id,
            return_dict_in_generate=False,
            **criteria,
            **switches,
        )
    answers = sequences[:, request.input_ids.shape[1] :]
    return Continued(answers, found.target, found.drafts, ends.ends)


@contextmanager
def _drafting(model: Any, settings: Mapping[str, Any]) -> Iterator[None]:
    """Inside, a model's generation config is a copy of its own with what a method settles.

    transformers fills every `None` of a call from the model's generation config, so a switch that is on there can be
    turned off only there. And it reads length and threshold of drafts from that of the drafter: given to the target's
    `generate` they have no effect. What it changes on the copy is forgotten.
    """
    own = model.generation_config
    config = copy.deepcopy(own)
    for name in _SWITCHES:
        setattr(config, name, None)
    for name in ("cache_implementation", "prefill_chunk_size", "compile_config", "max_length", "max_new_tokens"):
        setattr(config, name, None)
    config.use_cache, config.num_return_sequences, config.num_beams = True, 1, 1
    config.do_sample = settings["do_sample"]
    if not config.do_sample:
        for name in (*SAMPLING, "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"):
            setattr(config, name, None)
    for name in (*SAMPLING, *_DRAFTING):
        if settings.get(name) is not None:
            setattr(config, name, settings[name])
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


def next_scores(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """What plain greedy decoding chooses the next token of a text `(1, L)` by: `(V,)`, float32."""
    with _drafting(model, {"do_sample": False}):
        output = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=1,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
        )
    return output.scores[0][0].float()
