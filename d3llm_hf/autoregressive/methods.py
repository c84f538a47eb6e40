"""The table of autoregressive methods: their settings, what they need, and the function that carries each out."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from . import stock, trees
from .drafters import ASSISTANT, DRAFT_HEAD, DRAFTERS, Drafter
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
        needs: what has to be given to draft, beside the model; `None` where nothing has.
        check: refuses a model that cannot do it, given the complete settings.
        check_drafter: refuses what cannot draft for the model, given the arguments about it and the complete settings.
    """

    decode: Callable[[Request], Continued]
    settings: Mapping[str, Any] = field(default_factory=dict)
    one_row: bool = True
    drafts: bool = True
    needs: Drafter | None = None
    check: Callable[[Any, Mapping[str, Any]], None] = lambda model, settings: None
    check_drafter: Callable[[Any, Mapping[str, Any], Mapping[str, Any]], None] = lambda model, given, settings: None

    def drafter_of(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Of the arguments about all that could draft those that this method takes."""
        return {} if self.needs is None else {name: given[name] for name in self.needs.arguments if name in given}


_DRAFTING: dict[str, Any] = {
    "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.4,
}
AR_METHODS: dict[str, ARMethod] = {
    "ar": ARMethod(stock.plain, one_row=False, drafts=False),
    "ar_prompt_lookup": ARMethod(stock.prompt_lookup, {"prompt_lookup_num_tokens": 10, "max_matching_ngram_size": 2}),
    "ar_assistant": ARMethod(stock.assistant, _DRAFTING, needs=ASSISTANT, check_drafter=stock.check_assistant),
    "ar_early_exit": ARMethod(
        stock.early_exit, {"assistant_early_exit": None, **_DRAFTING}, check=stock.check_early_exit
    ),
    "ar_mtp": ARMethod(stock.mtp, check=stock.check_mtp),
    "eagle3": ARMethod(
        trees.decode,
        {"total_tokens": 60, "depth": 7, "draft_top_k": 10},
        needs=DRAFT_HEAD,
        check=trees.check,
        check_drafter=trees.check_drafter,
    ),
}
"""Method -> what it is. A further one is one more row."""


def is_autoregressive(settings: Mapping[str, Any]) -> bool:
    """Whether the `decoding_method` of some settings is one of these."""
    return settings.get("decoding_method") in AR_METHODS


def methods_with(drafter: Drafter) -> list[str]:
    """The methods that something drafts with."""
    return [method for method, row in AR_METHODS.items() if row.needs is drafter]


def check_drafters_used(given: Mapping[str, Any], methods: Iterable[str], dashes: str = "") -> None:
    """Refuses what is given to draft where no method takes it.

    Args:
        given: option of a [`Drafter`] -> what was given; `None` where nothing was.
        methods: those that are to be used.
        dashes: before the option, where it is one of a command.

    Raises:
        ValueError: naming the option.
    """
    methods = list(methods)
    for drafter in DRAFTERS:
        takers = methods_with(drafter)
        if given.get(drafter.option) is not None and not set(methods) & set(takers):
            option = dashes + (drafter.option.replace("_", "-") if dashes else drafter.option)
            raise ValueError(
                f"`{option}` drafts with {' or '.join(map(repr, takers))} (got it with {methods}). Leave it out, or "
                "add the method."
            )


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
