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

# What both families have, though a switch may be off, or a word speak of another kind: names of keys, words refused.
_SWITCHES = re.compile(r"^(use_)?(rope|rotary\w*|rms_?norm|swiglu|glu|gated_mlp|bidirectional(_attention)?)$", re.I)
_WORDS = {
    "another norm than RMS": (r"^(layer_?)?norm(ali[sz]ation)?(_(type|layer|class|function))?$", r"^(?!.*rms)"),
    "other positions than rotary ones": (
        r"^(pos|position|positional)_?(emb(edding)?s?|encodings?)(_type)?$",
        r"^(?!.*(rope|rotary))",
    ),
    "attention that does not see everything": (
        r"^(attn|attention)_(type|mode|direction)$",
        r"(?<!non)(?<!non[_-])causal|unidirect|autoregress|slid|window|local|chunk|sparse|linear",
    ),
}
_OTHER_BASES = ("rope_base", "rope_freq_base", "rotary_base", "rotary_emb_base", "rotary_embedding_base")
_PARTS_TURNED = re.compile(r"^(partial_rotary_factor|(rotary|rope)(_emb)?_(pct|percent(age)?|fraction))$")

# What a key describes, unless its value says that there is none of it.
_FOREIGN = {
    "a mixture of experts": r"(^|_)(moe|experts?|routers?|routed)(_|$)|^(dense_intermediate_size|decoder_sparse_step"
    r"|first_k_dense_replace|mlp_only_layers|mixture_of_depths)$",
    "norms of queries and keys": r"(^|_)(q_?k|q|k|query|key|query_key)_?(layer_?)?norm(alization)?(_|$)",
    "norms at other places": r"(^|_)((pre|post)_?(attn|attention|ffn?|ffw|feedforward|mlp)_?(layer_?)?norm"
    r"|(sandwich|peri|post|after)_norm|norm_after|norm_reorder|parallel_(residual|attn|attention|block))$",
    "norms around another centre": r"(^|_)norm_(\w*offset|1p)$|zero_centered",
    "attention that does not see everything": rf"{LOCAL}|^((is|use)_)?causal(_mask|_attention)?$"
    r"|^is_(encoder_)?decoder$|(^|_)block_(attn|attention)(_mask)?$",
    "layers that are not attention": RECURRENT,
    "layers that run several times": r"^((num|n|total)_)?(loops?|loop_(count|steps)|(ut|recurrence)_steps|hc_mult"
    r"|hyper_connections?)$",
    "latent or crossed attention": r"(^|_)((q|kv)_lora_rank|mla|cross_attention|(attention|attn|use)_sinks?"
    r"|index_topk|kv_shared_layers)(_|$)",
    "attention with gates": r"(^|_)(gated_(attention|attn)|(attention|attn)_(output_)?gates?|value_residual"
    r"|diff(erential)?_(attention|attn))$",
    _SCALED: r"(^|_)(logits?_scal(e|ing)|(embed(ding)?s?|residual|attention|attn|softmax|lm_head)_(multiplier"
    r"|scal(e|ing))|scale_(emb|embed|embeddings?|depth|residual|attn_by\w*)|normali[sz]e_embeddings?|soft_?cap(ping)?"
    r"|logits?_(soft_?)?cap|clip_qkv|swiglu_limit|query_pre_attn_scalar|mup)(_|$)|_softcapping$",
    "other positions": r"^(use_)?alibi$|(^|_)(mrope\w*|rotary_n?dims?|rope_local_base_freq|no_rope_layers?"
    r"|nope_layers?|no_rope_layer_interval|rope_interleaved?|relative_attention\w*|rope_ratio)$",
    "images, video or sound": r"(^|_)(vision|visual|images?|videos?|audio|speech|mm|vq|codebook)(_|$)",
    "a time that the model is told": r"(^|_)(time_?steps?|time_embed\w*|adaln|sigma_embed\w*"
    r"|(time|sigma|noise|self)_condition(ing|ed)?)(_|$)",
    "further heads": r"(^|_)(num_nextn_predict_layers|mtp|medusa|value_head)(_|$)",
    "parts with configs of their own": r"^(text|llm|language(_model)?|encoder|decoder|attn|attention|ffn|mlp)_config$",
}
_COMPILED = {what: re.compile(pattern, re.IGNORECASE) for what, pattern in _FOREIGN.items()}

_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation", "activation_function", "activation_type", "mlp_act")
OUR_CLASSES = (
    "LLaDAModelLM",
    "LLaDAModel",
    "LLaDAPreTrainedModel",
    "MMadaModelLM",
    "MMadaModel",
    "DreamModel",
    "DreamBaseModel",
    "DreamPreTrainedModel",
    "LLaDA2MoeModelLM",
    "LLaDA2MoeModel",
    "LLaDA2MoePreTrainedModel",
    "SDARForCausalLM",
    "SDARMoeForCausalLM",
    "SDARMoeModel",
    "SDARMoePreTrainedModel",
    "SDARModel",
    "SDARPreTrainedModel",
    "ReFusionForCausalLM",
    "ReFusionModel",
    "ReFusionPreTrainedModel",
    "Fast_dLLM_QwenForCausalLM",
    "Fast_dLLM_QwenModel",
    "Fast_dLLM_QwenPreTrainedModel",
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
        if _SWITCHES.search(name) and value is False:
            _refuse(family, name, value, "switches off what belongs to the architecture", keys)
        for what, (names, words) in _WORDS.items():
            if isinstance(value, str) and re.search(names, name, re.I) and re.search(words, value, re.I):
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
    return None if found == _SCALED and value == 1 and value is not True else found


def _check_rope(family: str, keys: Mapping[str, Any]) -> None:
    parameters = keys.get("rope_parameters") or {}
    form = parameters.get("rope_type", "default")
    if form not in ROPE_TYPES or any(isinstance(value, dict) for value in parameters.values()):
        raise ValueError(
            f"`rope_scaling` (or `rope_parameters`) must have one `rope_type` of {list(ROPE_TYPES)} (got "
            f"{parameters!r}). {family} has no other positions; correct config.json."
        )
    base = parameters.get("rope_theta")
    for name, value in (dict(keys) | parameters).items():
        if _PARTS_TURNED.search(name) and value not in (None, 1):
            _refuse(family, name, value, "describes heads that are turned in part", keys)
        if name in _OTHER_BASES and value not in (None, base):
            _refuse(family, name, value, f"describes another base than {base}, that of `rope_theta`", keys)
    for name, value in parameters.items():
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
