"""Settings by the names that other projects' generation configs have for them (see docs/coming-from.md)."""

from collections.abc import Iterable
from typing import Any

from transformers.utils import logging


logger = logging.get_logger(__name__)

# Name elsewhere -> name here, where a value means the same.
RENAMED = {
    "alg": "remasking",
    "gen_length": "max_new_tokens",
    "mask_id": "mask_token_id",
    "block_size": "block_length",
    "decoded_token_threshold": "block_activation_threshold",
    "cache_delay_iter": "cache_delay",
    "refresh_interval": "cache_refresh_interval",
    "denoising_steps": "steps",
    "remasking_strategy": "remasking",
    "eb_threshold": "entropy_bound",
    "editing_threshold": "edit_threshold",
    "num_to_transfer": "min_commits",
    "eos_early_stop": "early_stop",
    "small_block_size": "sub_block_length",
    "skip_threshold": "confidence_threshold",
    "sampling_strategy": "remasking",
}

# What only the configs of one project hold, and the method that these are settings of. The first that is found counts:
# the projects of block diffusion took over names of those before them.
_MARKS = {
    "sdar": ("denoising_steps", "remasking_strategy", "eb_threshold"),
    "llada2": ("editing_threshold", "num_to_transfer", "eos_early_stop"),
    "fast_dllm_v2": ("small_block_size", "use_block_cache"),
    "d2f": ("skip_threshold", "sampling_strategy"),
    "dream": ("alg", "eps", "output_history"),
    "llada": ("gen_length", "mask_id", "logits_eos_inf", "confidence_eos_eot_inf"),
    "d3llm": ("decoded_token_threshold", "cache_delay_iter", "refresh_interval", "lazy_cache_refresh_num"),
    "fast_dllm": ("threshold", "dual_cache"),
}
_OFF = 10000  # d3LLM's number for "never"

# The value that changes nothing here; another one is a setting that does not exist here.
_NO_EFFECT = {
    "eps": 1e-3,
    "output_history": False,
    "confidence_eos_eot_inf": False,
    "lazy_cache_refresh_num": None,
    "generation_tokens_hook_func": None,
    "generation_logits_hook_func": None,
}

# What a strategy of SDAR stands for here, and which of its thresholds it does not read.
_SDAR_STRATEGIES = {
    "low_confidence_dynamic": ("low_confidence", ("eb_threshold",)),
    "low_confidence_static": ("low_confidence", ("confidence_threshold", "eb_threshold")),
    "sequential": ("sequential", ("confidence_threshold", "eb_threshold")),
    "entropy_bounded": (None, ("confidence_threshold",)),
}
_D2F_STRATEGIES = {"default": None, "margin_confidence": "topk_margin", "neg_entropy": "entropy"}


def translated(values: dict[str, Any]) -> dict[str, Any]:
    """The entries of a generation config by our names, with the `decoding_method` whose settings they are.

    Entries that are ours stay, also where another name says otherwise. Of what has no counterpart only values that
    change nothing are left out.

    Raises:
        ValueError: for an `alg`, `remasking_strategy` or `sampling_strategy` that its project's code does not know.
    """
    project = next((name for name, marks in _MARKS.items() if any(mark in values for mark in marks)), None)
    if project is None:
        return values
    found = {name: value for name, value in values.items() if value is not None}
    ours: dict[str, Any] = {"decoding_method": project}
    for name, effect in _NO_EFFECT.items():
        if name in found and found[name] in (effect, None, False):
            del found[name]
    if project in _RULES:
        ours |= _RULES[project](found)
    if ours["decoding_method"] in ("fast_dllm", "d3llm"):  # neither reads these, beside a threshold
        found = {n: v for n, v in found.items() if n != "steps" and (n, v) != ("remasking", "low_confidence")}
    threshold = found.pop("threshold", None)
    if threshold is not None:
        ours["entropy_threshold" if project == "d3llm" else "confidence_threshold"] = threshold
    if "dual_cache" in found:
        dual = found.pop("dual_cache")
        if found.get("use_cache", dual):
            ours["kv_cache"] = "dual" if dual else "prefix"
    if found.pop("logits_eos_inf", False) and found.get("eos_token_id") is not None:
        eos = found["eos_token_id"]
        ours["suppress_tokens"] = list(eos) if isinstance(eos, list | tuple) else [eos]
    delay = found.get("cache_delay_iter", _OFF)
    if delay < _OFF:
        ours["kv_cache"] = "delayed"
    for name in ("cache_delay_iter", "refresh_interval"):
        if found.get(name, 0) >= _OFF:
            del found[name]
    ours |= {new: found.pop(old) for old, new in RENAMED.items() if old in found}
    temperature = found.get("temperature")
    if temperature is not None and "do_sample" not in found:  # there, a temperature alone samples
        ours["do_sample"] = temperature > 0
        if not temperature:
            del found["temperature"]
    return ours | found


def _of_dream(found: dict[str, Any]) -> dict[str, Any]:
    """What Dream's `alg` stands for; it is taken out of `found`, with what that algorithm does not read."""
    known = ("origin", "maskgit_plus", "topk_margin", "entropy", "confidence_threshold")
    algorithm = _taken(found, "alg", known, "origin")
    if algorithm == "confidence_threshold":
        found.pop("alg_temp", None)
        in_blocks = "block_length" in found or "dual_cache" in found  # Fast-dLLM's port to Dream
        method = {"decoding_method": "fast_dllm"} if in_blocks else {}
        return method | {"confidence_threshold": found.pop("threshold", 0.9)}
    found.pop("threshold", None)
    if algorithm == "origin" or not found.get("alg_temp"):
        found.pop("alg_temp", None)
    return {"remasking": algorithm}


def _of_sdar(found: dict[str, Any]) -> dict[str, Any]:
    """What SDAR's `remasking_strategy` stands for; it is taken out of `found`, with what it does not read."""
    if "remasking_strategy" not in found:
        return {}
    remasking, unread = _SDAR_STRATEGIES[_taken(found, "remasking_strategy", _SDAR_STRATEGIES)]
    for name in unread:
        found.pop(name, None)
    if remasking is None:
        found.pop("denoising_steps", None)
    return {} if remasking is None else {"remasking": remasking}


def _of_llada2(found: dict[str, Any]) -> dict[str, Any]:
    """Nothing of its own: with edits its code computes a quota from `steps` and does not use it."""
    if "editing_threshold" in found:
        found.pop("steps", None)
    return {}


def _of_fast_dllm_v2(found: dict[str, Any]) -> dict[str, Any]:
    """The cache that `use_block_cache` stands for."""
    return {"kv_cache": "exact_dual"} if found.pop("use_block_cache", False) else {}


def _of_d2f(found: dict[str, Any]) -> dict[str, Any]:
    """The `remasking` that D2F's `sampling_strategy` stands for."""
    remasking = _D2F_STRATEGIES[_taken(found, "sampling_strategy", _D2F_STRATEGIES, "default")]
    return {} if remasking is None else {"remasking": remasking}


def _taken(found: dict[str, Any], name: str, known: Iterable[str], default: str | None = None) -> Any:
    value = found.pop(name, default)
    if value not in known:
        raise ValueError(
            f"`{name}` of the model's generation config must be one of {list(known)} (got {value!r}). Correct "
            "generation_config.json."
        )
    return value


_RULES = {
    "dream": _of_dream,
    "sdar": _of_sdar,
    "llada2": _of_llada2,
    "fast_dllm_v2": _of_fast_dllm_v2,
    "d2f": _of_d2f,
}


__all__ = ["RENAMED", "translated"]
