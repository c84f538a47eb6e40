"""What a request of lm-eval asks of `generate`: its own arguments over those of the model, checked by name."""

import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...models.generation_config_d3llm import FIELDS, D3LLMGenerationConfig
from ...models.stock_settings import IDLE, REFUSED


LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the length of an answer, the first that is given counts: lm-eval's own order."""

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")

# The model's own affair: what is given, how it is cut and counted, and how many answers there are.
RESERVED = {
    "infill", "max_length", "min_length", "return_dict_in_generate", "num_return_sequences", "stop_strings",
    "use_cache", "cache_implementation", "eos_token_id", "pad_token_id", "bos_token_id", "generation_kwargs",
}  # fmt: skip
SETTINGS = frozenset(
    name
    for name in {*FIELDS, *D3LLMGenerationConfig().to_dict()} - RESERVED - set(REFUSED | IDLE) - set(LENGTHS)
    if not name.startswith("_") and name != "transformers_version"
)
"""Arguments of `generate` that a model or a request may set."""


@dataclass(frozen=True)
class RequestSettings:
    """How one request is decoded.

    Attributes:
        stops: stop strings, none of them empty.
        max_new_tokens: length of the canvas.
        generate: all other arguments of `generate`.
    """

    stops: tuple[str, ...]
    max_new_tokens: int
    generate: Mapping[str, Any]


def check_names(names: Iterable[str], more: Iterable[str], where: str, settings: Collection[str] = SETTINGS) -> None:
    """Refuses names that are neither in `settings`, those of decoding, nor in `more`.

    Raises:
        ValueError: naming the nearest name that exists.
    """
    known = [*settings, *LENGTHS, *more]
    for name in names:
        if name in known:
            continue
        if name in REFUSED or name in IDLE or name in RESERVED:
            raise ValueError(
                f"`{name}` in {where} cannot be chosen: {(REFUSED | IDLE).get(name, 'it is set for you')}."
            )
        near = difflib.get_close_matches(name, known, n=1)
        shown = sorted(FIELDS if settings is SETTINGS else settings)
        hint = f"Did you mean `{near[0]}`?" if near else f"Settings of decoding: {shown}."
        raise ValueError(f"`{name}` in {where} is no setting of decoding or of this model. {hint}")


def request_settings(
    asked: Mapping[str, Any],
    own: Mapping[str, Any],
    max_new_tokens: int,
    known: Collection[str] = SETTINGS,
) -> RequestSettings:
    """The settings of a request.

    A temperature of 0 is greedy decoding, another one is sampling unless `do_sample` says otherwise; without sampling
    what belongs to it is left out. `max_new_tokens` is the length where neither names one.

    Args:
        asked: `gen_kwargs` of the request, as the task or the command line gives them.
        own: settings of the model, for what the request leaves open.
        max_new_tokens: the length of an answer where neither names one.
        known: settings of decoding that there are.

    Raises:
        ValueError, TypeError: for unknown names, stop strings that are none, or a length that is none.
    """
    check_names(asked, ["until"], "`gen_kwargs`", known)
    stops = asked.get("until") or ()
    stops = (stops,) if isinstance(stops, str) else tuple(stops)
    if not all(isinstance(stop, str) for stop in stops):
        raise TypeError(f"`until` must be a string or a list of them (got {list(stops)!r}). Correct the task.")

    values = {name: value for name, value in asked.items() if name not in ("until", *LENGTHS)}
    if "temperature" in values:
        values.setdefault("do_sample", bool(values["temperature"]))
    values = {**own, **values}
    if "temperature" in values and not values["temperature"]:
        values["do_sample"] = False
    values.setdefault("do_sample", bool(values.get("temperature")))
    if not values["do_sample"]:
        values = {name: value for name, value in values.items() if name not in SAMPLING}

    given = [length for source in (asked, own) for name in LENGTHS if (length := source.get(name)) is not None]
    values = {name: value for name, value in values.items() if name not in LENGTHS}
    length = given[0] if given else max_new_tokens
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"`max_gen_toks` must be a positive integer (got {length!r}). Pass for example 256.")
    return RequestSettings(tuple(filter(None, stops)), length, values)


def draws(asked: RequestSettings, model: Any) -> bool:
    """Whether the answer to a request is drawn at random: its tokens, or the order in which they are decided."""
    config = model.check_settings(**asked.generate, max_new_tokens=asked.max_new_tokens)
    rules = config.rules(asked.max_new_tokens, model.traits)
    return bool(config.do_sample or rules.score == "noise" or rules.alg_temp)
