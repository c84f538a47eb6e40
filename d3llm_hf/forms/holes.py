"""The types of holes: what each may hold, and how many positions it needs."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from ..models.plain_values import plain
from ..text import check_text
from .languages import JSON_CHARACTER, Either, Language, Repeated, characters, literal, sequence
from .numbers import numbers


MOST_CHARACTERS = 1000
DIGITS = 15
"""Of a number at most, those behind the point included: float64 still tells all of them apart."""
MOST_DECIMALS = 6
SLOTS = 24
"""Positions of a text whose length nobody says."""


@dataclass(frozen=True)
class Hole:
    """A gap of a form.

    Args:
        language: of the bytes that it may hold.
        fillings: what might need most positions, each a sequence of texts and of holes; the hole gets as many as the
            longest of them.
        slots: positions in place of those.
        lines: whether its text may go on in another line.
    """

    language: Language
    fillings: tuple[tuple["str | Hole", ...], ...] = ()
    slots: int | None = None
    lines: bool = False

    @property
    def weight(self) -> int:
        """Texts and types of holes that its fillings are made of."""
        return max(1, sum(map(weight_of, self.fillings)))

    @property
    def sample(self) -> str:
        """How a text of the hole may begin and end; given text beside it is cut into tokens as it is beside this."""
        first = next(iter(self.fillings), ("a",))[0]
        return first if isinstance(first, str) else first.sample

    def width(self, tokenizer) -> int:
        """Positions of the hole with a tokenizer."""
        if self.slots is not None:
            return self.slots

        def size(part: "str | Hole") -> int:
            if isinstance(part, Hole):
                return part.width(tokenizer)
            return len(tokenizer(part, add_special_tokens=False)["input_ids"])

        return max(1, *(sum(map(size, filling)) for filling in self.fillings))


def weight_of(parts: Sequence["str | Hole"]) -> int:
    """Texts and types of holes that some parts are made of; bounds the time that they take."""
    return sum(1 if isinstance(part, str) else part.weight for part in parts)


def language_of(parts: Sequence["str | Hole"]) -> Language:
    """The language of texts and holes one behind the other."""
    return sequence(*(literal(part) if isinstance(part, str) else part.language for part in parts))


def text(slots: int = SLOTS, *, least: int = 0, most: int | None = None, lines: bool = False) -> Hole:
    """A line of text, or several: any characters but control characters.

    Args:
        slots (`int`): positions of the hole; what the text does not need is closed up.
        least, most (`int`, *optional*): characters.
        lines (`bool`): whether line feeds are among them. The text behind such a hole begins with none: the hole ends
            where the model goes on with that text, which would be at its first line.

    Raises:
        TypeError, ValueError: for numbers that are no counts, or in the wrong order, and `lines` that is no truth.
    """
    slots, (least, most) = count("slots", slots, 1), _lengths(least, most)
    if not isinstance(lines, bool):
        raise TypeError(f"`lines` must be True or False (got {lines!r}). Leave it out for a single line.")
    character = characters(without="")
    return Hole(Repeated(Either((character, literal("\n"))) if lines else character, least, most), (), slots, lines)


def string(slots: int = SLOTS, *, least: int = 0, most: int | None = None) -> Hole:
    """What stands between the quotes of a JSON string; arguments as those of [`text`]."""
    slots, (least, most) = count("slots", slots, 1), _lengths(least, most)
    return Hole(Repeated(JSON_CHARACTER, least, most), slots=slots)


def integer(least: int | None = None, most: int | None = None) -> Hole:
    """An integer, in the usual decimal form.

    Args:
        least, most (`int`, *optional*): bounds, both included; 15 digits of either sign when unset.

    Raises:
        TypeError, ValueError: for a bound that is no integer, or when no integer lies between them.
    """
    for name, value in (("least", least), ("most", most)):
        value = plain(value)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"`{name}` must be an integer (got {value!r}). Use `number` for decimals.")
    return number(least, most, decimals=0)


def number(least: float | None = None, most: float | None = None, *, decimals: int = 2) -> Hole:
    """A number with up to so many digits behind the point, without an exponent.

    Args:
        least, most (number, *optional*): bounds, both included; 15 digits of either sign, decimals included, when
            unset.
        decimals (`int`): at most 6.

    Raises:
        TypeError, ValueError: for a bound that is no finite number of so many digits, for `decimals` out of range, or
            when no such number lies between the bounds.
    """
    decimals = count("decimals", decimals, 0)
    if decimals > MOST_DECIMALS:
        raise ValueError(f"`decimals` must be at most {MOST_DECIMALS} (got {decimals}). Pass fewer.")
    largest = 10 ** (DIGITS - decimals) - 1
    low = -Decimal(largest) if least is None else _bound("least", least, largest)
    high = Decimal(largest) if most is None else _bound("most", most, largest)
    language = numbers(low, high, decimals)
    if language == Either(()):
        raise ValueError(
            f"`least` and `most` must have a number of {decimals} decimals between them (got {least} and {most}). "
            "Move them apart, or allow more decimals."
        )
    width = max(len(str(abs(int(bound)))) for bound in (low, high))
    fraction = "." + "8" * decimals if decimals else ""
    sign = "-" if low < 0 else ""
    return Hole(language, (("8" * width + fraction,), (sign + "8" * width + fraction,)))


def one_of(options: Sequence[str]) -> Hole:
    """One of several texts.

    Raises:
        TypeError, ValueError: for something else than a list of different strings, of which none is empty.
    """
    check_options(options)
    return Hole(Either(tuple(map(literal, options))), tuple((option,) for option in options))


def json_one_of(values: Sequence[Any]) -> Hole:
    """One of several values, written as JSON."""
    return one_of([json.dumps(value, ensure_ascii=False) for value in values])


def check_options(options: Any) -> None:
    """Refuses what is no list of different texts.

    Raises:
        TypeError, ValueError: naming `options`.
    """
    if isinstance(options, str) or not isinstance(options, Sequence):
        raise TypeError(f'`options` must be a list of texts (got {type(options).__name__}). Pass ["yes", "no"].')
    for option in options:
        if not isinstance(option, str):
            raise TypeError(f"`options` must hold strings (got {type(option).__name__}). Write them as text.")
        check_text(option, "options")
    if not options or "" in options or len(set(options)) < len(options):
        raise ValueError(
            f"`options` must be different texts, none of them empty (got {list(options)}). Remove others."
        )


def count(name: str, value: Any, least: int) -> int:
    """A plain integer of at least `least`.

    Raises:
        TypeError, ValueError: naming `name`.
    """
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer (got {value!r}). Pass for example {max(least, 1)}.")
    if value < least:
        raise ValueError(f"`{name}` must be at least {least} (got {value}). Raise it.")
    return value


def _lengths(least: Any, most: Any) -> tuple[int, int | None]:
    least = count("least", least, 0)
    most = None if most is None else count("most", most, 0)
    if max(least, most or 0) > MOST_CHARACTERS:
        raise ValueError(
            f"`least` and `most` must be at most {MOST_CHARACTERS} characters (got {least} and {most}). Leave `most` "
            "out: the slots of a hole bound its text, too."
        )
    if most is not None and most < least:
        raise ValueError(f"`most` must be at least `least` (got {most} and {least}). Exchange them.")
    return least, most


def _bound(name: str, value: Any, largest: int) -> Decimal:
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise TypeError(f"`{name}` must be a number (got {value!r}). Pass an integer or a float.")
    bound = Decimal(repr(value)) if isinstance(value, float) else Decimal(value)
    if not bound.is_finite() or abs(bound) > largest:
        raise ValueError(
            f"`{name}` must lie between {-largest} and {largest} (got {value}): {DIGITS} digits with the decimals. "
            "Leave it out for these bounds."
        )
    return bound
