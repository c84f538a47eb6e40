"""The selection of cases that runs by default."""

from itertools import combinations, product

import pytest
from thin import covering, some_of, thin_out


AXES = (range(7), "abcd", (True, False), [("x", 1), ("x", 2), ("y", 1)])


def by_default(cases) -> list[tuple]:
    return [case.values for case in cases if not case.marks]


@pytest.mark.parametrize("strength", [1, 2, 3])
def test_what_is_covered_is_in_the_default_and_nothing_is_lost(strength):
    cases = covering(*AXES, strength=strength)
    everything = [(a, b, c, *d) for a, b, c, d in product(*AXES)]
    assert [case.values for case in cases] == everything
    for places in combinations(range(5), strength):
        there = {tuple(row[place] for place in places) for row in by_default(cases)}
        assert there == {tuple(row[place] for place in places) for row in everything}
    assert all(mark.name == "full" for case in cases for mark in case.marks)


def test_the_selection_is_small_and_always_the_same():
    assert len(by_default(covering(*AXES, strength=1))) == 7
    assert 7 * 4 <= len(by_default(covering(*AXES))) <= 7 * 4 + 6
    assert covering(*AXES) == covering(*AXES)


def test_a_part_of_the_selection_may_do():
    whole, part = by_default(covering(*AXES)), by_default(covering(*AXES, every=3))
    assert part == whole[::3]


def test_one_axis_stays_whole():
    assert by_default(covering("abc")) == by_default(covering("abc", strength=1)) == [("a",), ("b",), ("c",)]


def test_some_of_many_run_by_default_and_none_is_lost():
    assert by_default(some_of("abcdefg", every=3)) == [("a",), ("d",), ("g",)]
    assert [case.values for case in some_of("abc", every=2)] == [("a",), ("b",), ("c",)]


class Case:
    """What the selection asks of a collected test."""

    def __init__(self, name: str, *marks):
        self.nodeid, self.marks = name, list(marks)

    def get_closest_marker(self, name: str):
        return next((mark for mark in self.marks if mark.name == name), None)

    def add_marker(self, mark):
        self.marks.append(getattr(mark, "mark", mark))


@pytest.mark.parametrize("share", [1, 2, 3, 5])
def test_of_marked_tests_a_share_runs_and_every_value_of_a_short_axis(share):
    cases = [
        Case(f"file::test[{row}-{column}]", pytest.mark.every(share).mark) for row in range(20) for column in "abc"
    ]
    others = [Case("file::test[other]"), Case("file::other", pytest.mark.full.mark, pytest.mark.every(2).mark)]
    thin_out([*cases, *others])
    stay = [case.nodeid for case in cases if not case.get_closest_marker("full")]
    assert stay[0] == cases[0].nodeid and abs(len(stay) - 60 / share) <= 1
    assert {name[-2] for name in stay} == set("abc")
    assert [len(case.marks) for case in others] == [0, 2]
