"""Which settings a sweep visits: a curve is a decoding method, what it is given, and a grid of one parameter."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...autoregressive.methods import AR_METHODS
from ...autoregressive.settings import COMMON as AR_COMMON
from ...models.generation_config_d3llm import FIELDS, NUMBER
from ...models.methods import CACHES, COMMON, METHODS
from ..suites import Settings


# Method -> the parameter that trades accuracy for speed, and values from careful to bold. Steps are fractions of the
# answer's length: 1, 1/2, ...
NATURAL: dict[str, tuple[str, tuple[float, ...]]] = {
    "d3llm": ("entropy_threshold", (0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)),
    "dparallel": ("entropy_threshold", (0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)),
    "fast_dllm": ("confidence_threshold", (0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)),
    "dinfer": ("confidence_threshold", (0.99, 0.95, 0.9, 0.8, 0.7)),
    "sdar": ("confidence_threshold", (0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)),
    "llada2": ("confidence_threshold", (0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)),
    "fast_dllm_v2": ("confidence_threshold", (0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)),
    "refusion": ("token_threshold", (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)),
    "d2f": ("confidence_threshold", (0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5)),
    "local_leap": ("confidence_threshold", (0.99, 0.95, 0.9, 0.85, 0.8)),
    "klass": ("confidence_threshold", (0.9, 0.8, 0.7, 0.6, 0.5)),
    "wino": ("confidence_threshold", (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)),
    "entropy_bound": ("entropy_bound", (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)),
    "dkv": ("steps", (1, 1 / 2, 1 / 4)),
    "llada": ("steps", (1, 1 / 2, 1 / 4)),
    "dream": ("steps", (1, 1 / 2, 1 / 4)),
}

# Arguments of `generate` that a sweep gives itself, and how to ask for them.
GIVEN = {
    "decoding_method": "name it among the methods",
    "max_new_tokens": "pass `max_new_tokens` (`--max-new-tokens`)",
    "max_length": "pass `max_new_tokens` (`--max-new-tokens`)",
    "seed": "pass the sweep's seed (`--seed`), from which each sample's own is made",
    "stop_strings": "the task says what ends an answer",
    "return_dict_in_generate": "leave it out",
    "num_return_sequences": "leave it out: a sample has one answer",
    "infill": "leave it out: a prompt of a task has no gaps",
}


@dataclass(frozen=True)
class Curve:
    """A decoding method and a grid of one of its parameters.

    Args:
        method: a key of `METHODS`, or of `AR_METHODS`, which make one point where no parameter is given.
        label: name of the curve in results; the method's where nothing is given.
        settings: further arguments of `generate`, the same at every point.
        parameter: what is swept; the method's natural parameter where nothing is given.
        values: of the parameter; those of [`NATURAL`] where nothing is given, one point without a grid where empty.

    Raises:
        ValueError: for an unknown method or parameter, an argument that a sweep gives itself, or values without a
            parameter that could take them.
    """

    method: str
    label: str | None = None
    settings: Settings = field(default_factory=dict)
    parameter: str | None = None
    values: Sequence[Any] | None = None

    def __post_init__(self):
        known = [*METHODS, *AR_METHODS]
        if self.method not in known:
            raise ValueError(f"`methods` must be of {known} (got {self.method!r}). Correct the name.")
        if self.parameter is not None and self.parameter not in settings_of(self.method, self.settings):
            raise ValueError(
                f"`parameter` must be a setting of {self.method} (got {self.parameter!r}). Choose one of "
                f"{sorted(settings_of(self.method, self.settings))}."
            )
        for name in [*self.settings, self.parameter]:
            if name in GIVEN:
                raise ValueError(f"`settings` must not hold `{name}`: {GIVEN[name]} (got it for {self.name}).")
        if self.swept is None and self.values != () and not (self.method in AR_METHODS and self.values is None):
            raise ValueError(
                f"`parameter` must be given for {self.method}, which has no grid of its own (got None). Name one of "
                f"{sorted(settings_of(self.method, self.settings))}, or pass `values=()` (`--no-grid`)."
            )
        if self.parameter not in (None, self._natural[0]) and self.values is None:
            raise ValueError(f"`values` must be given for `{self.parameter}` (got None for {self.name}). Name some.")
        if self.swept in self.settings and self.values != ():
            raise ValueError(
                f"`settings` must not hold `{self.swept}`, which is swept (got it for {self.name}). Leave it out, or "
                "pass `values=()` (`--no-grid`)."
            )

    @property
    def name(self) -> str:
        """The curve's label."""
        return self.label or self.method

    @property
    def swept(self) -> str | None:
        """The parameter of the grid; `None` for a method without one in [`NATURAL`] where nothing is given."""
        return self.parameter or self._natural[0]

    @property
    def _natural(self) -> tuple[str | None, Sequence[Any]]:
        return NATURAL.get(self.method, (None, ()))

    def points(self, max_new_tokens: int) -> list[tuple[str | None, Any, Settings]]:
        """`(parameter, value, arguments of generate)` of every point; without a grid the first two are `None`."""
        base = {"decoding_method": self.method} | {name: tidy(name, value) for name, value in self.settings.items()}
        swept, values = self.swept, self.values
        if values is None:
            values = self._natural[1]
            if swept == "steps":
                values = sorted({max(1, round(max_new_tokens * part)) for part in values}, reverse=True)
        if swept is None or not values:
            return [(None, None, base)]
        tidied = list(dict.fromkeys(tidy(swept, value) for value in values))
        return [(swept, value, base | {swept: value}) for value in tidied]


def settings_of(method: str, settings: Mapping[str, Any]) -> set[str]:
    """Names of the settings that a method has, with those of the cache that `settings` choose."""
    if method in AR_METHODS:
        return {*AR_METHODS[method].settings, *AR_COMMON}
    cache = settings.get("kv_cache", METHODS[method].get("kv_cache", "none"))
    return {*METHODS[method], *COMMON, *CACHES.get(cache, {})}


def tidy(name: str, value: Any) -> Any:
    """A value as results keep it, so that 1 and 1.0 nats are one setting.

    Raises:
        ValueError: for a number that is not finite, which JSON cannot hold.
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"`{name}` must be finite in a sweep (got {value}). Pass a large number, such as 1e9.")
    real = FIELDS.get(name, ((),))[0] == NUMBER
    return float(value) if real and isinstance(value, NUMBER) and not isinstance(value, bool) else value


def curves_of(
    methods: Iterable[tuple[str, str, Settings]],
    *,
    settings: Settings | None = None,
    thresholds: Sequence[float] | None = None,
    grids: Mapping[str, Sequence[Any]] | None = None,
    no_grid: bool = False,
) -> list[Curve]:
    """Curves of several methods from what was asked for all of them.

    Args:
        methods: label, name and own settings of each.
        settings: of all methods.
        thresholds: values of the natural parameter of the methods that have a threshold or a bound.
        grids: parameter -> values, for the methods that have the parameter; of several the natural one.
        no_grid: one point for each method, with its settings alone.

    Raises:
        ValueError: for a grid that no method, or more than one grid that a method could take; see also [`Curve`].
    """
    grids, used = dict(grids or {}), set()
    if no_grid and (grids or thresholds):
        raise ValueError("`no_grid` leaves no room for `thresholds` or `grids` (got both). Leave one of them out.")
    found = []
    for label, method, own in methods:
        given = (settings or {}) | own
        if method not in {*METHODS, *AR_METHODS} or no_grid:
            found.append(Curve(method, label, given, values=() if no_grid else None))
            continue
        natural = NATURAL.get(method, (None, ()))[0]
        known = [name for name in grids if name in settings_of(method, given)]
        if len(known) > 1 and natural not in known:
            raise ValueError(f"`grids` must leave one parameter for {method} (got {known}). Leave all but one out.")
        used.update(known)
        if known:
            name = natural if natural in known else known[0]
            found.append(Curve(method, label, given, name, tuple(grids[name])))
        elif thresholds and natural not in (None, "steps"):
            found.append(Curve(method, label, given, natural, tuple(thresholds)))
        else:
            found.append(Curve(method, label, given))
    unused = [name for name in grids if name not in used]
    if unused:
        raise ValueError(
            f"`grids` must name a setting of one of the methods (got {unused[0]!r}, which none of them has). Leave it "
            "out, or add the method."
        )
    names = [curve.name for curve in found]
    if len(set(names)) < len(names):
        raise ValueError(f"`methods` must have different labels (got {names}). Write LABEL=METHOD.")
    return found
