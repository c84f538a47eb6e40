"""A leaderboard's curves, scored by accuracy under parallelism (AUP) and put in order.

AUP weighs accuracy by its distance from `y_max`, so two scores can be compared only under the same one. Every curve is
scored twice: under the best accuracy that any curve has on the task, by which it is ranked, and under its own best.
Where the two disagree on who is ahead, the leaderboard says so.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ...autoregressive.methods import is_autoregressive
from ...metrics.aup.curve import AUPResult, aup_score
from ..sweep.points import Point, curve_aup, curves
from .published import published_points


TITLE = "Accuracy under parallelism"
_EQUAL = 0.05  # AUPs that are shown as the same number are in no order


@dataclass(frozen=True)
class Score:
    """An AUP under one y_max. `interval`: 95 % bootstrap over samples; None where samples are not known."""

    result: AUPResult
    interval: tuple[float, float] | None

    @property
    def aup(self) -> float:
        return self.result.aup


@dataclass(frozen=True)
class Entry:
    """A curve: one model, one method, one task.

    Attributes:
        label: its name in pictures and sentences; published ones end in a dagger.
        published: whether the figures were published elsewhere, not measured here.
        points: by rising tokens per forward.
        counted: for each point, whether it is part of the area.
        common, own: scores under the task's y_max and under the curve's.
        as_published: the AUP that its authors give, if they do.
    """

    model: str
    method: str
    task: str
    label: str
    published: bool
    points: tuple[Point, ...]
    counted: tuple[bool, ...]
    common: Score
    own: Score
    as_published: float | None

    @property
    def autoregressive(self) -> bool:
        """Whether its model writes from left to right; not known of published figures."""
        return any(is_autoregressive(point.get("settings") or {}) for point in self.points)

    @property
    def best(self) -> Point:
        """The point of highest accuracy, the fastest of several."""
        return max(self.points, key=lambda point: (point["accuracy"], point["tpf"]))

    @property
    def fastest(self) -> Point:
        """The point of most tokens per forward among those that count."""
        return [point for point, counted in zip(self.points, self.counted, strict=True) if counted][-1]


@dataclass(frozen=True)
class Task:
    """A task's curves by falling AUP under `y_max`, the best accuracy of all of them.

    `swaps` holds one sentence for each pair of curves that another choice of y_max puts in another order.
    """

    name: str
    slug: str
    y_max: float
    entries: tuple[Entry, ...]
    swaps: tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """Curves that cover the same tasks, at least two: entries by label, one per task, by falling mean AUP."""

    tasks: tuple[str, ...]
    entries: dict[str, tuple[Entry, ...]]

    def mean(self, label: str, kind: str = "common") -> float:
        return sum(getattr(entry, kind).aup for entry in self.entries[label]) / len(self.tasks)


@dataclass(frozen=True)
class Board:
    """All of a leaderboard: tasks with measured curves first, then those with published ones only."""

    title: str
    tasks: tuple[Task, ...]
    groups: tuple[Group, ...]

    @property
    def entries(self) -> list[Entry]:
        return [entry for task in self.tasks for entry in task.entries]

    @property
    def labels(self) -> list[str]:
        """Every curve's label once, in the order in which they appear."""
        return list(dict.fromkeys(entry.label for entry in self.entries))


def build_board(points: Sequence[Point], *, published: bool = False, title: str = TITLE) -> Board:
    """Scores curves and puts them in order.

    Args:
        points: as `read_points` returns them.
        published: whether the published curves stand beside them. On a task that both have, they share the table.
        title: of the page.

    Raises:
        ValueError: without points; where one label stands for several models; where no curve of a task has an accuracy
            above 1 %; and as `points.curves` for points that make no curve.
    """
    if not points and not published:
        raise ValueError(
            "`results` must hold at least one point (got none). Make results with `d3llm sweep`, or show the "
            "published figures with `--published`."
        )
    _check_labels(points)
    found = {(*key, False): tuple(curve) for key, curve in curves(points).items()}
    for point in published_points() if published else ():
        key = (point["model"], point["method"], point["task"], True)
        found[key] = (*found.get(key, ()), point)
    several = len({model for model, _, _, _ in found}) > 1
    names = list(dict.fromkeys(task for _, _, task, _ in found))
    slugs = _slugs(names)
    tasks = tuple(
        _task(name, slugs[name], {key: curve for key, curve in found.items() if key[2] == name}, several)
        for name in names
    )
    return Board(title, tasks, _groups(tasks))


def _check_labels(points: Iterable[Point]) -> None:
    weights: dict[str, Any] = {}
    for point in points:
        found = point["provenance"].get("model_fingerprint")
        if weights.setdefault(point["model"], found) != found:
            raise ValueError(
                f"A model's label must stand for one model (got {point['model']!r} for "
                f"{weights[point['model']]!r} and {found!r}). Measure one of them under another label, as in "
                "`d3llm sweep LABEL=MODEL`."
            )


def _task(name: str, slug: str, found: dict[tuple, tuple[Point, ...]], several: bool) -> Task:
    y_max = max(point["accuracy"] for curve in found.values() for point in curve)
    if y_max <= 1:
        raise ValueError(
            f"`results` must hold a curve with an accuracy above 1 % for each task (got {y_max:g} % as the best of "
            f"{name!r}). Under that AUP tells nothing; leave the task out."
        )
    entries = [_entry(key, curve, y_max, several) for key, curve in found.items()]
    entries.sort(key=lambda entry: (-entry.common.aup, entry.label))
    return Task(name, slug, y_max, tuple(entries), tuple(_swaps(entries)))


def _entry(key: tuple, curve: tuple[Point, ...], y_max: float, several: bool) -> Entry:
    model, method, task, published = key
    best = max(point["accuracy"] for point in curve)
    common, pairs = _score(curve, y_max, published)
    # A curve that is 0 everywhere has no y_max of its own; its area is 0 under any.
    own, _ = _score(curve, None if best else y_max, published)
    return Entry(
        model=model,
        method=method,
        task=task,
        label=(f"{method} · {model}" if several else method) + " †" * published,
        published=published,
        points=curve,
        counted=tuple(pair in common.result.used for pair in pairs),
        common=common,
        own=own,
        as_published=curve[0]["aup"] if published else None,
    )


def _score(curve: tuple[Point, ...], y_max: float | None, published: bool) -> tuple[Score, list[tuple[float, float]]]:
    """The score, and the exact `(tpf, accuracy)` of each point that it was made of."""
    if published:
        pairs = [(point["tpf"], point["accuracy"]) for point in curve]
        return Score(aup_score(*zip(*pairs, strict=True), y_max=y_max), None), pairs
    interval = curve_aup(curve, y_max=y_max)
    pairs = list(zip(interval.tpf, interval.accuracy, strict=True))
    return Score(interval.score, (interval.low, interval.high)), pairs


def _swaps(entries: Sequence[Entry]) -> list[str]:
    """Sentences on the pairs that are in another order under their own y_max, or as published; best first."""
    sentences = []
    for place, high in enumerate(entries):
        for low in entries[place + 1 :]:
            if high.common.aup - low.common.aup < _EQUAL:
                continue
            behind = []
            if low.own.aup - high.own.aup >= _EQUAL:
                behind.append(f"under each curve's own `y_max` ({high.own.aup:.1f} and {low.own.aup:.1f})")
            one, other = high.as_published, low.as_published
            if one is not None and other is not None and other - one >= _EQUAL:
                behind.append(f"as published ({one:.1f} and {other:.1f})")
            if behind:
                sentences.append(
                    f"{high.label} ({high.common.aup:.1f}) is ahead of {low.label} ({low.common.aup:.1f}), but behind "
                    f"{' and '.join(behind)}."
                )
    return sentences


def _groups(tasks: Sequence[Task]) -> tuple[Group, ...]:
    """One group for every set of two tasks or more that several curves have in common, first ones first."""
    curves_of: dict[str, dict[str, Entry]] = {}
    for task in tasks:
        for entry in task.entries:
            curves_of.setdefault(entry.label, {})[task.name] = entry
    groups: dict[tuple[str, ...], Group] = {}
    sets = list(dict.fromkeys(tuple(found) for found in curves_of.values() if len(found) > 1))
    for names in sets:
        members = {
            label: tuple(found[name] for name in names)
            for label, found in curves_of.items()
            if set(names) <= set(found)
        }
        # Fewer tasks are worth a group of their own only if more curves cover them.
        if (len(members) > 1 or len(curves_of) == 1) and tuple(members) not in groups:
            group = Group(names, members)
            order = sorted(members, key=lambda label: (-group.mean(label), label))
            groups[tuple(members)] = Group(names, {label: members[label] for label in order})
    return tuple(groups.values())


def _slugs(names: Iterable[str]) -> dict[str, str]:
    """Parts of file names, a different one for each task."""
    slugs: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"[^a-z0-9]+", "-", name.lower().replace("+", "-plus")).strip("-") or "task"
        slug, number = plain, 2
        while slug in slugs.values():
            slug, number = f"{plain}-{number}", number + 1
        slugs[name] = slug
    return slugs
