"""Regular languages over bytes, written as expressions: what a hole may hold."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class OneOf:
    """One byte of a set."""

    bytes: frozenset[int]


@dataclass(frozen=True)
class Sequence:
    """Its parts one behind the other; without parts the empty text."""

    parts: tuple["Language", ...]


@dataclass(frozen=True)
class Either:
    """One of its parts; without parts no text at all."""

    parts: tuple["Language", ...]


@dataclass(frozen=True)
class Repeated:
    """A part at least `least` times, at most `most`, any number of times where that is `None`."""

    part: "Language"
    least: int = 0
    most: int | None = None


Language = OneOf | Sequence | Either | Repeated


def literal(text: str | bytes) -> Language:
    """One text."""
    encoded = text.encode() if isinstance(text, str) else text
    return Sequence(tuple(OneOf(frozenset([byte])) for byte in encoded))


def span(first: int, last: int) -> OneOf:
    """One byte between two, both included."""
    return OneOf(frozenset(range(first, last + 1)))


def optional(part: Language) -> Language:
    """A part or nothing."""
    return Repeated(part, 0, 1)


def sequence(*parts: Language) -> Language:
    """Parts one behind the other."""
    return Sequence(parts)


def characters(without: Iterable[str]) -> Language:
    """One character of Unicode as UTF-8 writes it (RFC 3629): no control character below 0x20, none of `without`.

    Args:
        without: characters of ASCII.
    """
    ascii_ = OneOf(frozenset(range(0x20, 0x7F)) - frozenset(map(ord, without)))
    last = span(0x80, 0xBF)
    # By how many bytes are left: what these parts share is one state each. ED is narrow for it begins surrogates.
    three = span(0xF1, 0xF3)
    two = Either(
        (
            OneOf(frozenset(range(0xE1, 0xF0)) - {0xED}),
            sequence(span(0xF0, 0xF0), span(0x90, 0xBF)),
            sequence(span(0xF4, 0xF4), span(0x80, 0x8F)),
            sequence(three, last),
        )
    )
    one = Either(
        (
            span(0xC2, 0xDF),
            sequence(span(0xE0, 0xE0), span(0xA0, 0xBF)),
            sequence(span(0xED, 0xED), span(0x80, 0x9F)),
            sequence(two, last),
        )
    )
    return Either((ascii_, sequence(one, last)))


JSON_CHARACTER = Either((characters(without='"\\'), sequence(literal("\\"), OneOf(frozenset(b'"\\/bfnrt')))))
"""One character within a JSON string, with the short escapes (RFC 8259); all others stand for themselves."""
