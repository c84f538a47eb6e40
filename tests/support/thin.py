"""Fewer cases of a large product by default: those that cover its values or their pairs; the others are marked `full`.

A fault that a value of one axis brings, or a pair of values of two axes, shows in a selection in which each of them
occurs (pairwise design). Where other tests show the same, a part of the selection will do. `make test-full` runs the
others.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations, product
from typing import Any

import pytest


GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


def covering(*axes: Iterable[Any], strength: int = 2, every: int = 1) -> list[Any]:
    """The product of all axes as arguments of `pytest.mark.parametrize`.

    Args:
        axes: the values of each; one that consists of tuples stands for several arguments.
        strength: how many values of different arguments occur together in some case that runs by default, wherever
            they do so in the product: 1 is every value, 2 every pair.
        every: of these cases each so-many-th runs by default, where others show the same.
    """
    rows = [_flat(row) for row in product(*axes)]
    chosen = sorted(_chosen(rows, strength))[::every]
    marks = [() if number in chosen else (pytest.mark.full,) for number in range(len(rows))]
    return [
        pytest.param(*row, marks=mark) if len(row) > 1 else pytest.param(row[0], marks=mark)
        for row, mark in zip(rows, marks, strict=True)
    ]


def some_of(values: Iterable[Any], *, every: int) -> list[Any]:
    """Values of one argument, of which each `every`-th runs by default."""
    return [
        pytest.param(value, marks=() if number % every == 0 else (pytest.mark.full,))
        for number, value in enumerate(values)
    ]


def thin_out(items: Iterable[pytest.Item]) -> None:
    """Of a test that is marked `every(n)` each n-th case of its default ones stays, the others are marked `full`.

    They are spread by the golden ratio: with a fixed stride, an axis of n values would always show the same one.
    """
    seen: Counter[str] = Counter()
    for item in items:
        mark = item.get_closest_marker("every")
        if mark is None or item.get_closest_marker("full"):
            continue
        name = item.nodeid.partition("[")[0]
        if seen[name] * GOLDEN_RATIO % 1 >= 1 / mark.args[0]:
            item.add_marker(pytest.mark.full)
        seen[name] += 1


def _flat(row: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(value for part in row for value in (part if isinstance(part, tuple) else (part,)))


def _chosen(rows: Sequence[tuple[Any, ...]], strength: int) -> set[int]:
    """Numbers of rows that together show all that is to be covered: again and again the one that shows most of it."""
    shown = [_parts(row, min(strength, len(row))) for row in rows]
    missing = set().union(*shown)
    chosen: set[int] = set()
    while missing:
        best = max(range(len(rows)), key=lambda number: len(shown[number] & missing))
        chosen.add(best)
        missing -= shown[best]
    return chosen


def _parts(row: tuple[Any, ...], strength: int) -> set[Any]:
    """The values of a row with their places, `strength` at a time."""
    return set(combinations([(place, repr(value)) for place, value in enumerate(row)], strength))
