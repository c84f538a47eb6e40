"""The table of autoregressive methods: their settings, what they need, and the function that carries each out."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from . import stock
from .request import Continued, Request
from .settings import COMMON, NO_PLACE, check_values


@dataclass(frozen=True)
class ARMethod:
    """A way of decoding from left to right.

    Attributes:
        decode: continues the rows of a request.
        settings: name -> default; `None` where there is none and a value must be given.
        one_row: whether it takes one row at a time; several are then decoded one after the other.
        drafts: whether something drafts, so that the tokens are to be those of plain decoding.
        check_assistant: refuses an `assistant_model` that cannot draft for the model, given both and the tokenizers of
            both; `None` where the method takes none.
        check: refuses a model that cannot do it, given the complete settings.
    """

    decode: Callable[[Request], Continued]
    settings: Mapping[str, Any] = field(default_factory=dict)
    one_row: bool = True
    drafts: bool = True
    check_assistant: Callable[[Any, Any, Any, Any], None] | None = None
    check: Callable[[Any, Mapping[str, Any]], None] = lambda model, settings: None

    @property
    def needs_assistant(self) -> bool:
        return self.check_assistant is not None


_DRAFTING: dict[str, Any] = {
    "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.4,
}
AR_METHODS: dict[str, ARMethod] = {
    "ar": ARMethod(stock.plain, one_row=False, drafts=False),
    "ar_prompt_lookup": ARMethod(stock.prompt_lookup, {"prompt_lookup_num_tokens": 10, "max_matching_ngram_size": 2}),
    "ar_assistant": ARMethod(stock.assistant, _DRAFTING, check_assistant=stock.check_assistant),
    "ar_early_exit": ARMethod(
        stock.early_exit, {"assistant_early_exit": None, **_DRAFTING}, check=stock.check_early_exit
    ),
    "ar_mtp": ARMethod(stock.mtp, check=stock.check_mtp),
}
"""Method -> what it is. A further one is one more row."""


def is_autoregressive(settings: Mapping[str, Any]) -> bool:
    """Whether the `decoding_method` of some settings is one of these."""
    return settings.get("decoding_method") in AR_METHODS


def complete_settings(method: str, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The settings of a method with its defaults, checked by name and value.

    Args:
        method: a key of `AR_METHODS`.
        settings: what is not as by default; see `AR_METHODS` and `COMMON`.

    Raises:
        ValueError: for an unknown method, a name that is no setting of it, a value outside its rule, or a setting
            without a default that is missing.
    """
    if method not in AR_METHODS:
        raise ValueError(f"`method` must be one of {list(AR_METHODS)} (got {method!r}). Correct the name.")
    row, given = AR_METHODS[method], dict(settings or {})
    known = sorted({*row.settings, *COMMON})
    for name in given:
        if name not in known:
            reason = NO_PLACE.get(name) or _owners(name)
            raise ValueError(
                f"`{name}` must be a setting of {method} (got {given[name]!r}): {reason}. Known: {known}."
            )
    complete = COMMON | dict(row.settings) | {name: value for name, value in given.items() if value is not None}
    missing = [name for name in row.settings if complete[name] is None]
    if missing:
        raise ValueError(f"`{missing[0]}` must be given for {method}, which has no default (got None). Pass a value.")
    check_values({name: value for name, value in complete.items() if value is not None})
    return complete


def _owners(name: str) -> str:
    owners = [method for method, row in AR_METHODS.items() if name in row.settings]
    return f"it belongs to {', '.join(owners)}" if owners else "no autoregressive method has it"
