"""The decoding methods and caches of the field as tables of settings, and what these mean to the loop.

A new method is a row of `METHODS` and one of `RULES`, with at most one new selector in `selection.py`; a new setting
is a row of `RULE_OF`.
"""

import math
from collections.abc import Callable
from typing import Any

from .decoding import Rules
from .topology import Topology, Traits


# Name of a remasking strategy -> the score that ranks positions. LLaDA's and Dream's names for the same score.
REMASKING = {
    "entropy": "entropy",
    "low_confidence": "confidence",
    "maskgit_plus": "confidence",
    "topk_margin": "margin",
    "random": "noise",
    "origin": "noise",
    "sequential": "confidence",
}
DECODERS = {"threshold": "near_best", "hierarchy": "hierarchy", "credit": "near_best"}

# Kind of cache -> its settings where nothing else is said.
CACHES: dict[str, dict[str, Any]] = {
    "none": {},
    "prefix": {"cache_refresh_interval": None},
    "dual": {"cache_refresh_interval": None},
    "delayed": {"cache_delay": 2, "cache_refresh_interval": None},
    "dkv": {"cache_delay": 1, "cache_refresh_interval": 8},
    "dkv_greedy": {"cache_delay": 1, "cache_refresh_interval": 2, "cache_window": 4},
    "vicinity": {"cache_window": 16, "cache_warmup": 4, "cache_refresh_interval": None},
    "sliding": {"cache_window": 24, "cache_refresh_interval": None},
    "exact": {},
    "exact_dual": {},
}
# Those that hold no approximation: what block-causal attention lets be kept, and only it.
EXACT = ("none", "exact")
# Method -> a further cache of block-causal attention, with approximations inside the block that is being decided.
INSIDE_BLOCKS = {"fast_dllm_v2": "exact_dual"}
CACHE_FIELDS = {name for settings in CACHES.values() for name in settings}

# What says how long a canvas is that finds its length itself -> its settings where nothing else is said.
LENGTHS: dict[str, dict[str, Any]] = {
    "rho_eos": {"length_low": 0.4, "length_high": 0.6, "length_step": 8, "length_schedule": "exponential"},
    "rho_eos_tail": {
        "length_low": 0.4,
        "length_high": 0.6,
        "length_step": 8,
        "length_schedule": "exponential",
        "length_window": 32,
    },
    "daedal": {"length_low": 0.5, "length_step": 8, "length_window": 32},
}
# By how many steps such a canvas changes whose signal is so many tenths beyond a threshold (`(B,)` float, at least 1).
SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "constant": lambda tenths: tenths**0,
    "linear": lambda tenths: tenths,
    "exponential": lambda tenths: 2.0 ** (tenths - 1),
}
DEFAULT_LENGTH_RULE = "rho_eos"
INITIAL_LENGTH = 64  # positions of such a canvas before the first forward; `max_new_tokens` where these are fewer
LENGTH_FIELDS = ("initial_length", "length_rule", *dict.fromkeys(name for rule in LENGTHS.values() for name in rule))

# What every method has: field -> value where nothing else is said.
COMMON: dict[str, Any] = {
    "early_stop": True,
    "cfg_scale": 0.0,
    "kv_cache": "none",
    "suffix_length": None,
    "lookahead": 0,
    "lookahead_threshold": None,
    "length": "fixed",
}

LOOKAHEAD_IN_BLOCKS = 0.6
"""`lookahead_threshold` where nothing else is said and no window slides: at the end of a block only unsure tokens are
left to look ahead with, and whatever is written there makes the rest look surer."""

# Where candidates may lie: in blocks that open one after the other; among the leftmost undecided positions, as many as
# a block has; or among these within a span of positions.
WINDOWS = ("blocks", "slide", "slide_span")
_WINDOW: dict[str, Any] = {"window": "blocks", "window_span": None}
_RELAXED: dict[str, Any] = _WINDOW | {"threshold_relaxation": 0.0}
# What says when blocks open, of which a sliding window has none.
OPENING = ("block_add_threshold", "block_activation_threshold")

DEFAULT_METHOD = "d3llm"

# Method -> its own settings where nothing else is said; then what models with shifted logits (Dream) use instead.
METHODS: dict[str, dict[str, Any]] = {
    "d3llm": {
        "block_length": 32,
        "remasking": "entropy",
        "entropy_threshold": 0.5,
        "block_add_threshold": 0.1,
        "block_activation_threshold": 0.95,
        **_RELAXED,
    },
    "dparallel": {"block_length": 32, "remasking": "entropy", "entropy_threshold": 0.5, **_RELAXED},
    "fast_dllm": {"block_length": 32, "confidence_threshold": 0.9, "factor": None, **_RELAXED},
    "dinfer": {
        "block_length": 32,
        "decoder": "threshold",
        "confidence_threshold": 0.9,
        "low_threshold": 0.6,
        "credit_decay": 0.8,
        "credit_exponent": 0.2,
        "credit_weight": 0.7,
        **_RELAXED,
    },
    "dkv": {"block_length": 32, "remasking": "low_confidence", "steps": None, "kv_cache": "dkv"},
    "entropy_bound": {"block_length": 32, "entropy_bound": 0.1, **_WINDOW},
    "local_leap": {
        "block_length": 32,
        "confidence_threshold": 0.9,
        "relaxed_threshold": 0.75,
        "leap_radius": 4,
        **_RELAXED,
    },
    "klass": {"block_length": 32, "confidence_threshold": 0.9, "kl_threshold": 0.01, "kl_history": 2},
    "wino": {"block_length": 128, "confidence_threshold": 0.6, "threshold_back": 0.9},
    "llada": {
        "block_length": 32,
        "remasking": "low_confidence",
        "steps": None,
        "lossless": False,
        "draft_length": 4,
        **_WINDOW,
    },
    "dream": {
        "block_length": None,
        "remasking": "entropy",
        "steps": None,
        "confidence_threshold": None,
        "alg_temp": 0.0,
        "lossless": False,
        "draft_length": 4,
    },
    "sdar": {
        "block_length": 4,
        "steps": None,
        "remasking": "low_confidence",
        "confidence_threshold": None,
        "entropy_bound": None,
    },
    "d2f": {
        "block_length": 32,
        "remasking": "low_confidence",
        "confidence_threshold": 0.9,
        "block_add_threshold": 0.1,
        "block_activation_threshold": 0.95,
        "kv_cache": "exact",
    },
    "llada2": {
        "block_length": 32,
        "steps": None,
        "confidence_threshold": 0.95,
        "min_commits": 1,
        "edit_threshold": None,
        "max_post_steps": 16,
    },
    "fast_dllm_v2": {"block_length": 32, "sub_block_length": 8, "confidence_threshold": 0.9},
    "refusion": {"slot_size": 8, "serial_num_blocks": 2, "slot_threshold": 0.9, "token_threshold": 0.9},
}
# Methods that decide whole slots (`slots.py`), of models that were trained for it and know no other; and their cache.
IN_SLOTS = {"refusion"}
CACHE_OF_SLOTS = "exact"
# Methods with a shadow block, which asks a slot about its own token; and their cache, which has no slots for it.
IN_SHADOWS = {"wino"}
CACHE_OF_SHADOWS = "none"
# Method -> where its blocks begin, of one that brings block-causal attention whatever the model's class says: an
# adapter of LLaDA or Dream was trained with it.
ALIGNMENT_OF = {"d2f": "prompt"}
SHIFTED_METHODS = {"d3llm": {"entropy_threshold": 0.4}, "dparallel": {"entropy_threshold": 0.45}}
RANKED = ("low_confidence", "maskgit_plus", "entropy", "topk_margin", "random")
ALLOWED_REMASKING = {
    "d3llm": ("entropy", "random"),
    "dparallel": ("entropy", "random"),
    "dkv": RANKED,
    "llada": RANKED,
    "dream": (*RANKED, "origin"),
    "sdar": ("low_confidence", "sequential"),
    "d2f": ("low_confidence", "entropy", "topk_margin"),
}


def defaults_of(method: str, traits: Traits) -> dict[str, Any]:
    """The settings of a method on a model where nothing else is said; those of its cache are in `CACHES`."""
    if method in IN_SLOTS:  # what COMMON has beside these speaks of a canvas
        return {"early_stop": COMMON["early_stop"], "kv_cache": CACHE_OF_SLOTS} | METHODS[method]
    values = COMMON | METHODS[method] | (SHIFTED_METHODS.get(method, {}) if traits.logit_shift else {})
    topology = topology_of(method, traits)
    if topology is not None:
        values["block_length"] = topology.block_length
        values["kv_cache"] = METHODS[method].get("kv_cache", "exact")
    return values


def caches_of(method: str, traits: Traits) -> list[str]:
    """The caches that a method can have on a model."""
    if method in IN_SLOTS:
        return [CACHE_OF_SLOTS]
    if method in IN_SHADOWS:
        return [CACHE_OF_SHADOWS]
    if topology_of(method, traits) is not None:
        return [*EXACT, INSIDE_BLOCKS[method]] if method in INSIDE_BLOCKS else [*EXACT]
    return [name for name in CACHES if name == "none" or name not in (*EXACT, *INSIDE_BLOCKS.values())]


def methods_of(traits: Traits) -> list[str]:
    """The methods that a model can be decoded with; one may have a cache of its own."""
    known = [name for name in METHODS if (name in IN_SLOTS) == decides_slots(traits)]
    known = [name for name in known if name not in IN_SHADOWS or casts_shadows(traits)]
    return [name for name in known if defaults_of(name, traits)["kv_cache"] in caches_of(name, traits)]


def decides_slots(traits: Traits) -> bool:
    """Whether a model decides whole slots, which no canvas has."""
    return traits.method in IN_SLOTS


def casts_shadows(traits: Traits) -> bool:
    """Whether a slot can be asked about its own token beside the canvas, with all of which it goes together."""
    return not traits.logit_shift and traits.topology is None


def _cost(probability: float | None) -> float:
    """The cost of a position with that probability; none and 0 are exceeded by every position."""
    return -math.log(probability) if probability else float("inf")


# Setting -> the rule that it becomes, and how. Others keep their names, or need a closer look below.
RULE_OF: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "remasking": ("score", REMASKING.__getitem__),
    "entropy_threshold": ("threshold", float),
    "entropy_bound": ("threshold", lambda bound: math.inf if bound is None else float(bound)),
    "confidence_threshold": ("threshold", _cost),
    "relaxed_threshold": ("relaxed_threshold", _cost),
    "low_threshold": ("relaxed_threshold", _cost),
    "leap_radius": ("radius", int),
    "sub_block_length": ("sub_block_length", int),
    "threshold_relaxation": ("threshold_relaxation", float),
    "steps": ("steps", lambda steps: steps or 0),
    "min_commits": ("min_commits", int),
    "edit_threshold": ("edit_threshold", lambda probability: None if probability is None else _cost(probability)),
    "max_post_steps": ("max_post_steps", int),
    "threshold_back": ("revoke_threshold", _cost),
    "kl_threshold": ("kl_threshold", float),
    "kl_history": ("kl_history", int),
    "alg_temp": ("alg_temp", float),
    "block_add_threshold": ("block_add_threshold", float),
    "block_activation_threshold": ("block_activation_threshold", float),
}

# Method -> the rules that none of its settings change.
RULES: dict[str, dict[str, Any]] = {
    "d3llm": {"select": "threshold"},
    "dparallel": {"select": "threshold"},
    "fast_dllm": {"score": "confidence", "select": "threshold", "force_best": True},
    "dinfer": {"score": "confidence"},
    "dkv": {"select": "quota"},
    "entropy_bound": {"score": "entropy", "select": "entropy_bound"},
    "local_leap": {"score": "confidence", "select": "neighbourhood"},
    "klass": {"score": "confidence", "select": "stability"},
    "wino": {"score": "confidence", "select": "wide_in", "revoke": "narrow_out", "shadow_block": True},
    "llada": {"select": "quota"},
    "dream": {"select": "schedule", "score_processed": True},
    "sdar": {"select": "quota_or_threshold", "stores_apart": True},
    "d2f": {
        "select": "threshold",
        "inclusive": False,
        "force_each": True,
        "stop_closes": True,
        "starts_with_one": True,
        "score_processed": True,
    },
    "llada2": {"score": "confidence", "select": "quota_or_threshold"},
    "fast_dllm_v2": {
        "score": "confidence",
        "select": "threshold",
        "inclusive": False,
        "force_best": True,
        "stores_apart": True,
        "first_alone": True,
    },
    "refusion": {"score": "confidence", "select": "slots"},
}


def _entropy_threshold(values: dict[str, Any], shifted: bool) -> dict[str, Any]:
    """The published rules of the two families differ.

    LLaDA commits `H <= threshold` and always the surest candidate of the row; Dream commits `H < threshold`, and only
    a block that must advance is helped.
    """
    rules = dict.fromkeys(("inclusive", "force_best", "greedy_force"), not shifted)
    return rules | {"eos_fill": values["early_stop"] and "block_add_threshold" in values}


def _factor(values: dict[str, Any], shifted: bool) -> dict[str, Any]:
    return {} if values["factor"] is None else {"select": "factor", "factor": values["factor"]}


def _decoder(values: dict[str, Any], shifted: bool) -> dict[str, Any]:
    credit = tuple(values[f"credit_{name}"] for name in ("decay", "exponent", "weight"))
    return {"select": DECODERS[values["decoder"]], "credit": credit if values["decoder"] == "credit" else None}


def _klass(values: dict[str, Any], shifted: bool) -> dict[str, Any]:
    """The published rules of the two families differ: Dream's also commits what is exactly at the threshold."""
    return {"inclusive": shifted}


def _schedule(values: dict[str, Any], shifted: bool) -> dict[str, Any]:
    if values["confidence_threshold"] is not None:
        return {"score": "confidence", "select": "quota_and_threshold"}
    if values["remasking"] == "origin":
        return {"select": "coin"}
    # A temperature is put on the probability itself, not on its logarithm.
    return {"score": "probability"} if values["alg_temp"] and REMASKING[values["remasking"]] == "confidence" else {}


def _sdar(values: dict[str, Any], shifted: bool) -> dict[str, Any]:
    """A stop token ends a row with its block; confidence is that at the temperature, whatever top-k and top-p leave.

    Without a threshold there is none that a probability exceeds.
    """
    rules = {"whole_blocks": values["early_stop"], "score_temperature": values["temperature"] or 1.0}
    if values["remasking"] == "sequential":
        return rules | {"select": "leftmost"}
    if values["entropy_bound"] is not None:
        return rules | {"score": "entropy", "select": "entropy_sum", "threshold": float(values["entropy_bound"])}
    threshold = values["confidence_threshold"]
    return rules | {"threshold": -math.inf if threshold is None else _cost(threshold)}


def _forced(values: dict[str, Any], shifted: bool) -> dict[str, Any]:
    """The threshold is one of the confidence, whatever ranks the position that is forced."""
    forced = REMASKING[values["remasking"]]
    return {"score": "confidence", "force_score": None if forced == "confidence" else forced}


def _llada2(values: dict[str, Any], shifted: bool) -> dict[str, Any]:
    """LLaDA2.0 always ends with the block of a stop token, and before it where told to stop early; 2.1 only then."""
    edits = values["edit_threshold"] is not None
    whole_blocks = values["early_stop"] if edits else not values["early_stop"]
    return {"whole_blocks": whole_blocks, "score_processed": values["temperature"] is not None}


def _fast_dllm_v2(values: dict[str, Any], shifted: bool) -> dict[str, Any]:
    """Where tokens are drawn, confidence is that of the distribution they are drawn from."""
    return {"score_processed": values["temperature"] is not None}


# Method -> what depends on several settings, or on the model's family.
_FURTHER: dict[str, Callable[[dict[str, Any], bool], dict[str, Any]]] = {
    "d3llm": _entropy_threshold,
    "dparallel": _entropy_threshold,
    "fast_dllm": _factor,
    "dinfer": _decoder,
    "klass": _klass,
    "dream": _schedule,
    "sdar": _sdar,
    "d2f": _forced,
    "llada2": _llada2,
    "fast_dllm_v2": _fast_dllm_v2,
}


def topology_of(method: str, traits: Traits) -> Topology | None:
    """The blocks of a call before its settings: the method's own, or those of the model with `traits`, if any."""
    if traits.topology is not None or method not in ALIGNMENT_OF:
        return traits.topology
    return Topology(METHODS[method]["block_length"], ALIGNMENT_OF[method])


def rules_of(method: str, values: dict[str, Any], length: int, traits: Traits) -> Rules:
    """The loop's rules.

    Args:
        method: a key of `METHODS`.
        values: all its settings, those of its cache, those that every method has, and the `temperature` at which
            tokens are drawn, `None` where they are not.
        length: positions to decide, of the longest row.
        traits: of the model.
    """
    if method in IN_SLOTS:
        given = {name: values[name] for name in (*METHODS[method], "early_stop", "kv_cache")}
        return Rules(block_length=length, **given, **RULES[method])
    logit_shift, block_length = traits.logit_shift, values["block_length"] or length
    rules = {
        # A block of block-causal attention goes on behind what was asked for.
        "block_length": block_length if topology_of(method, traits) else min(block_length, length),
        "early_stop": values["early_stop"],
        "shift": logit_shift,
        "cfg_scale": values["cfg_scale"],
        "kv_cache": values["kv_cache"],
        "suffix_length": values["suffix_length"],
        # Dream stamps the end of a block when it comes, LLaDA when the block before is cached.
        "serial_stamps": not logit_shift,
    }
    rules |= {RULE_OF[name][0]: RULE_OF[name][1](values[name]) for name in METHODS[method] if name in RULE_OF}
    rules |= {name: values[name] or 0 for name in CACHES[values["kv_cache"]]}
    if values.get("lossless"):
        rules["draft_length"] = values["draft_length"]
    remembers = "kl_threshold" in values and topology_of(method, traits) is None  # what nobody sees has no history
    rules["scores_ahead"] = remembers or bool(values.get("lossless") or values.get("lookahead"))
    if values.get("lookahead"):
        floor = values["lookahead_threshold"]
        if floor is None and values.get("window", "blocks") == "blocks":
            floor = LOOKAHEAD_IN_BLOCKS
        rules |= {"lookahead": values["lookahead"], "lookahead_threshold": _cost(floor)}
    if values.get("window", "blocks") != "blocks":  # it slides over the whole answer, which is one block
        rules |= {"block_length": length, "window_length": min(block_length, length)}
        rules["window_span"] = (values["window_span"] or block_length) if values["window"] == "slide_span" else 0
    if values.get("length", "fixed") == "adaptive":
        rules |= {name: values[name] for name in LENGTH_FIELDS if name in values}
        rules["initial_length"] = min(values["initial_length"] or INITIAL_LENGTH, length)
    rules |= RULES[method]
    if method in _FURTHER:
        rules |= _FURTHER[method](values, bool(logit_shift))
    if traits.topology is None or not logit_shift:  # no row that sees nothing of a block predicts its first token
        rules.pop("first_alone", None)
    return Rules(**rules)


__all__ = ["CACHES", "METHODS", "rules_of", "topology_of"]
