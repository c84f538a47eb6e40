"""Settings of autoregressive decoding: the values that each may have, and names that have no place here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


NUMBER = (int, float)


@dataclass(frozen=True)
class Rule:
    """`holds(value)`, `what` in words, and a value to `try_`."""

    holds: Callable[[Any], bool]
    what: str
    try_: Any


def _count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, NUMBER) and not isinstance(value, bool) and low <= value <= high


SCHEDULES = ("constant", "heuristic_transient")
_COUNT = Rule(_count, "a positive integer", 10)
RULES: dict[str, Rule] = {
    "do_sample": Rule(lambda value: isinstance(value, bool), "a bool", False),
    "temperature": Rule(lambda value: _number(0, 1e9)(value) and value > 0, "a positive number", 0.7),
    "top_p": Rule(lambda value: _number(0, 1)(value) and value > 0, "a number in (0, 1]", 0.9),
    "top_k": _COUNT,
    "prompt_lookup_num_tokens": _COUNT,
    "max_matching_ngram_size": _COUNT,
    "num_assistant_tokens": _COUNT,
    "num_assistant_tokens_schedule": Rule(
        lambda value: value in SCHEDULES,
        f"one of {list(SCHEDULES)}; with 'heuristic' the assistant keeps what one prompt taught it, so that counts "
        "of a prompt would depend on those before it",
        "heuristic_transient",
    ),
    "assistant_confidence_threshold": Rule(
        lambda value: _number(0, 1)(value) and value < 1, "a probability in [0, 1)", 0.4
    ),
    "assistant_early_exit": _COUNT,
    "total_tokens": Rule(lambda value: _count(value) and value >= 2, "an integer of at least 2", 60),
    "depth": _COUNT,
    "draft_top_k": _COUNT,
}
COMMON: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
"""Settings of every method. What is not given is the checkpoint's own where it samples."""

SAMPLING = ("temperature", "top_p", "top_k")

# Names that transformers takes, where they have no effect, another one than they promise, or another place here.
NO_PLACE = {
    "assistant_ensemble_weight": "it verifies against a mixture of both models, whose tokens are not the target's",
    "speculation_type": "transformers ignores it without its own kind of drafter",
    "use_mtp": "choose the method 'ar_mtp'",
    "assistant_model": "it is an argument of its own (`--assistant`)",
    "draft_head": "it is an argument of its own (`--draft-head`)",
    "num_beams": "drafts are ignored beside beams",
    "penalty_alpha": "drafts are ignored beside contrastive search",
    "dola_layers": "drafts are ignored beside it",
    "guidance_scale": "it doubles the forwards of every token",
    "cache_implementation": "drafts are rolled back, which takes a dynamic cache",
    "use_cache": "every method here keeps keys and values",
    "max_length": "pass `max_new_tokens`",
}


def check_values(settings: Mapping[str, Any]) -> None:
    """Refuses values outside their rule.

    Raises:
        ValueError: naming the setting, its rule, and a value that it may have.
    """
    for name, value in settings.items():
        rule = RULES[name]
        if not rule.holds(value):
            raise ValueError(f"`{name}` must be {rule.what} (got {value!r}). Try {rule.try_!r}.")
    idle = [name for name in SAMPLING if name in settings and not settings.get("do_sample", False)]
    if idle:
        raise ValueError(
            f"`{idle[0]}` needs sampling (got {settings[idle[0]]!r} with do_sample=False). Set `do_sample=True`, or "
            "leave it out."
        )
