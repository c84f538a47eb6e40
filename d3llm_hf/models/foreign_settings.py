"""Settings by the names that other projects' generation configs have for them (see docs/coming-from.md)."""

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
}

# What only the configs of one project hold, and the method that these are settings of.
_MARKS = {
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


def translated(values: dict[str, Any]) -> dict[str, Any]:
    """The entries of a generation config by our names, with the `decoding_method` whose settings they are.

    Entries that are ours stay, also where another name says otherwise. Of what has no counterpart only values that
    change nothing are left out.

    Raises:
        ValueError: for an `alg` that Dream's code does not know.
    """
    project = next((name for name, marks in _MARKS.items() if any(mark in values for mark in marks)), None)
    if project is None:
        return values
    found = {name: value for name, value in values.items() if value is not None}
    ours: dict[str, Any] = {"decoding_method": project}
    for name, effect in _NO_EFFECT.items():
        if name in found and found[name] in (effect, None, False):
            del found[name]
    if project == "dream":
        ours |= _of_dream(found)
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
    algorithm = found.pop("alg", "origin")
    if algorithm not in known:
        raise ValueError(
            f"`alg` of the model's generation config must be one of {list(known)} (got {algorithm!r}). Correct "
            "generation_config.json."
        )
    if algorithm == "confidence_threshold":
        found.pop("alg_temp", None)
        in_blocks = "block_length" in found or "dual_cache" in found  # Fast-dLLM's port to Dream
        method = {"decoding_method": "fast_dllm"} if in_blocks else {}
        return method | {"confidence_threshold": found.pop("threshold", 0.9)}
    found.pop("threshold", None)
    if algorithm == "origin" or not found.get("alg_temp"):
        found.pop("alg_temp", None)
    return {"remasking": algorithm}


__all__ = ["RENAMED", "translated"]
