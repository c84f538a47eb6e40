"""Config keys that describe another architecture than the one implemented here, refused by their names.

A config.json may say `model_type` "llada" or "Dream" and mean something else: a mixture of experts, a model that sees
images, attention with windows. Unknown keys are kept, for many say nothing about the architecture; so what is refused
is listed here, by pattern. Whatever no key tells is found by the names of the tensors (see `tensors`).
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from huggingface_hub.errors import StrictDataclassClassValidationError

from .locality import LOCAL, RECURRENT, asks_for_nothing


class ArchitectureError(StrictDataclassClassValidationError, ValueError):
    """A config that is not implemented here: an error of validation and, as transformers expects, a `ValueError`."""

    def __init__(self, message: str):
        Exception.__init__(self, message)


@contextmanager
def refusing() -> Iterator[None]:
    """Makes a `ValueError` inside an [`ArchitectureError`]."""
    try:
        yield
    except ValueError as error:
        raise ArchitectureError(str(error)) from error


_SCALED = "scores or states that are scaled"  # by 1, they are not

# What a key describes, unless its value says that there is none of it.
_FOREIGN = {
    "a mixture of experts": r"(^|_)(moe|experts?|routers?|routed)(_|$)|^(dense_intermediate_size|decoder_sparse_step"
    r"|first_k_dense_replace|mlp_only_layers|mixture_of_depths)$",
    "norms of queries and keys": r"(^|_)(q_?k|q|k|query|key|query_key)_?(layer_?)?norm(alization)?(_|$)",
    "norms at other places": r"(^|_)((pre|post)_?(attn|attention|ffn?|ffw|feedforward|mlp)_?(layer_?)?norm"
    r"|(sandwich|peri|post|after)_norm|norm_after|norm_reorder|parallel_(residual|attn|attention|block))$",
    "attention that does not see everything": LOCAL,
    "layers that are not attention": RECURRENT,
    "latent or crossed attention": r"(^|_)((q|kv)_lora_rank|cross_attention|attention_sinks?|index_topk|kv_shared"
    r"_layers)(_|$)",
    _SCALED: r"(^|_)(logits?_scal(e|ing)|(embedding|residual|attention|lm_head)_multiplier"
    r"|scale_(emb|depth)|softcap(ping)?|clip_qkv|query_pre_attn_scalar|mup)(_|$)|_softcapping$",
    "other positions": r"^(use_)?alibi$|(^|_)(mrope\w*|rotary_dim|rope_local_base_freq|no_rope_layers?|nope_layers?"
    r"|no_rope_layer_interval|rope_interleaved?|relative_attention\w*)$",
    "images, video or sound": r"(^|_)(vision|visual|images?|videos?|audio|speech|mm|vq)(_|$)",
    "a time that the model is told": r"(^|_)(time_?steps?|time_embed\w*|adaln|sigma_embed\w*)(_|$)",
    "further heads": r"(^|_)(num_nextn_predict_layers|mtp|medusa|value_head)(_|$)",
}
_COMPILED = {what: re.compile(pattern, re.IGNORECASE) for what, pattern in _FOREIGN.items()}

_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation", "activation_function", "activation_type", "mlp_act")
OUR_CLASSES = (
    "LLaDAModelLM",
    "LLaDAModel",
    "LLaDAPreTrainedModel",
    "DreamModel",
    "DreamBaseModel",
    "DreamPreTrainedModel",
)
"""Names of the model classes here, which are those of the official code: transformers renames tensors by them."""

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
"""Forms of rotary positions that hold whatever else lies in a forward ("longrope" changes with its longest row)."""


def refuse_another_architecture(family: str, keys: Mapping[str, Any], activation: str | None = None) -> None:
    """Refuses what no code of this package computes.

    Args:
        family (`str`): the name that users know.
        keys: all keys of the config.
        activation (`str`, *optional*): the only one that the family has; `None` where `hidden_act` is followed.

    Raises:
        ValueError: naming the key, its value and the way out.
    """
    for name, value in keys.items():
        own = name.startswith("_")  # of transformers, such as `_experts_implementation_internal`
        what = None if own or asks_for_nothing(value) else _described(name, value, keys)
        if what is not None:
            _refuse(family, name, value, f"describes {what}", keys)
    for name in _ACTIVATIONS:
        wanted = activation if activation is not None else keys.get("hidden_act")
        value = keys.get(name)
        if isinstance(value, str) and value != wanted and {value, wanted} != {"silu", "swish"}:
            _refuse(family, name, value, f"describes another activation than {wanted!r}", keys)
    kinds = set(keys.get("layer_types") or ()) - {"full_attention"}
    if kinds:
        _refuse(family, "layer_types", sorted(kinds), "describes layers other than full attention", keys)
    _check_rope(family, keys)


def _described(name: str, value: Any, keys: Mapping[str, Any]) -> str | None:
    if name == "sliding_window" and keys.get("use_sliding_window") is False:
        return None  # Qwen2's keys, which Dream has: a window that is switched off
    found = next((what for what, pattern in _COMPILED.items() if pattern.search(name)), None)
    return None if found == _SCALED and value == 1 else found


def _check_rope(family: str, keys: Mapping[str, Any]) -> None:
    parameters = keys.get("rope_parameters") or {}
    form = parameters.get("rope_type", "default")
    if form not in ROPE_TYPES or any(isinstance(value, dict) for value in parameters.values()):
        raise ValueError(
            f"`rope_scaling` (or `rope_parameters`) must have one `rope_type` of {list(ROPE_TYPES)} (got "
            f"{parameters!r}). {family} has no other positions; correct config.json."
        )
    for name, value in (parameters | {"rotary_pct": keys.get("rotary_pct")}).items():
        if name in ("partial_rotary_factor", "rotary_pct") and value not in (None, 1):
            _refuse(family, name, value, "describes heads that are turned in part", keys)
        if name.startswith("mrope") and value:
            _refuse(family, name, value, "describes positions of several kinds", keys)


def _refuse(family: str, name: str, value: Any, what: str, keys: Mapping[str, Any]) -> None:
    raise ValueError(
        f"`{name}` {what} (got {value!r}), which {family} does not have and this package does not implement. Remove "
        f"the key from config.json if the checkpoint does not need it{own_code_hint(keys)}."
    )


def own_code_hint(keys: Mapping[str, Any]) -> str:
    """A further way out, where a config names model code of its own."""
    return ", or load it with `trust_remote_code=True`, which runs its own code" if brings_own_code(keys) else ""


def brings_own_code(keys: Mapping[str, Any]) -> bool:
    """Whether `auto_map` names a config and a model that are not the ones of this package."""
    auto_map = keys.get("auto_map") or {}
    models = {str(value).rpartition(".")[2] for name, value in auto_map.items() if name.startswith("AutoModel")}
    return "AutoConfig" in auto_map and bool(models) and models.isdisjoint(OUR_CLASSES)
