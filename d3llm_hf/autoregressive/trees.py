"""EAGLE-3 as a row of `AR_METHODS`: a request is decoded by `eagle3_generate`, and counted as others are."""

from collections.abc import Mapping
from typing import Any

from .counting import counted
from .eagle3.arguments import check_tree
from .eagle3.generate import eagle3_generate
from .eagle3.target import check_head, check_target
from .request import Continued, Request
from .settings import SAMPLING


TREE = ("total_tokens", "depth", "draft_top_k")
# Of a generation config, what changes or ends plain decoding by transformers, and has no effect on a tree.
_UNREAD = (
    "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
    "min_length", "min_new_tokens", "bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens",
    "forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty", "watermarking_config",
    "remove_invalid_values", "max_time", "stop_strings",
)  # fmt: skip
_UNREAD_SAMPLING = ("min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")


def decode(request: Request) -> Continued:
    """Drafts are a tree that the head grows from the model's hidden states; one forward verifies all of it."""
    settings = request.settings
    with counted(request.model, request.draft_head) as found:
        output = eagle3_generate(
            request.model,
            request.draft_head,
            request.input_ids,
            request.attention_mask,
            max_new_tokens=request.max_new_tokens,
            eos_token_id=list(request.eos_token_ids),
            stopping_criteria=request.stopping_criteria,
            do_sample=settings["do_sample"],
            **(_sampling(request.model, settings) if settings["do_sample"] else {}),
            **{name: settings[name] for name in TREE},
        )
    return Continued(output.sequences[:, request.input_ids.shape[1] :], found.target, found.drafts)


def check(model: Any, settings: Mapping[str, Any]) -> None:
    """Refuses a model that cannot verify a tree, and a generation config of which that would not keep the promise.

    Raises:
        ValueError: naming the entry; see also [`~.eagle3.target.check_target`].
    """
    check_target(model)
    own = model.generation_config
    neutral = own._get_default_generation_params()
    for name in (*_UNREAD, *(_UNREAD_SAMPLING if settings["do_sample"] else ())):
        value = getattr(own, name, None)
        if value and value != neutral.get(name):
            raise ValueError(
                f"`{name}` in the model's generation config must be unset for 'eagle3' (got {value!r}): no tree "
                f"follows it. Set `model.generation_config.{name} = None`."
            )


def check_drafter(model: Any, given: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuses a head of another model, and a tree that it cannot fill.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    head = given["draft_head"]
    check_head(model, head)
    check_tree(head, *(settings[name] for name in TREE))


def _sampling(model: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a call leaves open is the checkpoint's, and then transformers' own default, as with the other methods."""
    own = model.generation_config
    sources = (settings, vars(own), own._get_default_generation_params())
    return {name: next(value for source in sources if (value := source.get(name)) is not None) for name in SAMPLING}


__all__ = ["TREE", "check", "check_drafter", "decode"]
