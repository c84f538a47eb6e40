"""AUP, accuracy under parallelism: the weighted area under a curve of accuracy over tokens per forward.

A decoder that decides several tokens in each forward trades accuracy for speed by some setting. Each value of that
gives a point: rho, its tokens per forward (TPF), and y, its accuracy in percent. With the points sorted by rho,

    AUP = rho_1 * y_1 + sum over i >= 2 of (rho_i - rho_(i-1)) * (y_i * W(y_i) + y_(i-1) * W(y_(i-1))) / 2
    W(y) = min(exp(-alpha * (1 - y / y_max)), 1)

where points under y_min = y_1 - slack are left out. The first term is not weighted. y_max is the best accuracy that
any of the compared methods has on the task: two AUPs can be compared only if they have the same y_max.

Source: d3LLM, arXiv 2601.07568, and its leaderboard, whose values are reproduced. Two differences: points of equal
TPF are sorted by accuracy (there: as given), so that the order of the input does not matter; and a last point under
y_min is left out like any other, as the formula has it (there: an assertion fails).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


_RESAMPLED_AT_ONCE = 4_000_000  # samples, which bounds the memory of the bootstrap


@dataclass(frozen=True)
class AUPResult:
    """A score and what it was made of.

    Attributes:
        aup: accuracy in percent times tokens per forward.
        y_max: the accuracy of full weight, in percent.
        y_min: points under this accuracy, in percent, were left out.
        used: `(tpf, accuracy)` of the points under whose curve the area lies, by ascending tpf.
        dropped: those of the points that were left out, by ascending tpf.
        areas: what each point of `used` adds to the score: tpf * accuracy for the first, for each other one the
            weighted area between it and the one before. They sum to `aup`.
    """

    aup: float
    y_max: float
    y_min: float
    used: tuple[tuple[float, float], ...]
    dropped: tuple[tuple[float, float], ...]
    areas: tuple[float, ...]


@dataclass(frozen=True)
class AUPInterval:
    """A score with its bootstrap interval.

    Attributes:
        aup: the score of all samples.
        low, high: ends of the interval.
        tpf: tokens per forward of each point, in the order given: all tokens over all forwards.
        accuracy: accuracy of each point in percent, in the order given.
        score: the score of all samples in full.
    """

    aup: float
    low: float
    high: float
    tpf: tuple[float, ...]
    accuracy: tuple[float, ...]
    score: AUPResult


def aup_score(
    tpf: Sequence[float],
    accuracy: Sequence[float],
    *,
    y_max: float | None = None,
    alpha: float = 3.0,
    slack: float = 5.0,
) -> AUPResult:
    """Accuracy under parallelism of one curve.

    Args:
        tpf: tokens per forward of each point, positive; in any order.
        accuracy: accuracy of each point in percent.
        y_max: accuracy of full weight in percent, the best of the methods that are compared. `None` takes the best of
            this curve, which makes the score a number of this curve alone.
        alpha: how fast accuracy under `y_max` loses weight; 0 weighs all points alike.
        slack: percentage points that accuracy may fall below that of the slowest point; what falls further is left
            out. 100 leaves nothing out.

    Raises:
        TypeError: when an argument is no number, or no sequence of numbers.
        ValueError: for no points, unequal lengths, NaN, a tpf that is not positive, or accuracies that are not in
            percent: outside of 0 to 100, or, as fractions are, all between 0 and 1.
    """
    rho, y = _series("tpf", tpf), _series("accuracy", accuracy)
    if len(rho) != len(y):
        raise ValueError(
            f"`tpf` and `accuracy` must have the same length (got {len(rho)} and {len(y)}). Pass one of each."
        )
    if rho.min() <= 0:
        raise ValueError(
            f"`tpf` must be positive (got {rho.min():g}). Pass tokens per forward; leave out points without tokens."
        )
    if y.min() < 0 or y.max() > 100:
        wrong = y.min() if y.min() < 0 else y.max()
        raise ValueError(f"`accuracy` must be in percent, between 0 and 100 (got {wrong:g}).")
    if 0 < y.max() <= 1:
        raise ValueError(
            f"`accuracy` must be in percent, not fractions (got none above {y.max():g}). Multiply by 100; if the "
            "accuracies are really at most 1 percent, pass the results of each sample to `bootstrap_aup`."
        )
    return _score(rho, y, _checked_y_max(y_max), *_checked_shape(alpha, slack))


def bootstrap_aup(
    tokens: Sequence[Sequence[float]],
    forwards: Sequence[Sequence[float]],
    correct: Sequence[Sequence[float]],
    *,
    y_max: float | None = None,
    alpha: float = 3.0,
    slack: float = 5.0,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> AUPInterval:
    """Accuracy under parallelism of one curve from the results of each sample, with a bootstrap interval.

    The samples are resampled with replacement, the same ones for all points of the curve, since a hard question is
    hard for every setting. The interval is that of the percentiles. It tells how the score would vary with other
    samples of the same kind; `y_max`, if given, counts as known, and `None` takes the best of each resampled curve.
    Where a point's accuracy is close to y_min the score jumps with the choice of samples, and the interval is wide.

    Args:
        tokens: for each point, the answer tokens of each sample.
        forwards: for each point, the forwards of each sample, positive.
        correct: for each point, whether each sample was answered correctly: booleans, 0 and 1, or scores between.
        y_max, alpha, slack: as in `aup_score`.
        confidence: the probability with which the interval should contain the score of infinitely many samples.
        num_resamples: how often the samples are drawn.
        seed: of the draws; the same seed gives the same interval.

    Raises:
        TypeError: when an argument is no number, or not one sequence of numbers per point.
        ValueError: for no points or samples, unequal lengths, NaN, or values out of range.
    """
    table = {"tokens": tokens, "forwards": forwards, "correct": correct}
    a, f, c = (_per_sample(name, values) for name, values in table.items())
    if not a.shape == f.shape == c.shape:
        raise ValueError(
            "`tokens`, `forwards` and `correct` must have the same number of points and samples (got "
            f"{a.shape}, {f.shape} and {c.shape}). Measure all points on the same samples."
        )
    if a.min() < 0 or (a.sum(-1) == 0).any():
        raise ValueError("`tokens` must not be negative, nor 0 in all samples of a point. Leave such a point out.")
    if f.min() <= 0:
        raise ValueError(f"`forwards` must be positive (got {f.min():g}).")
    if c.min() < 0 or c.max() > 1:
        wrong = c.min() if c.min() < 0 else c.max()
        raise ValueError(f"`correct` must be between 0 and 1 for each sample (got {wrong:g}).")
    if not 0 < _number("confidence", confidence) < 1:
        raise ValueError(f"`confidence` must be between 0 and 1 (got {confidence}). Pass 0.95 for 95 %.")
    if isinstance(num_resamples, bool) or not isinstance(num_resamples, (int, np.integer)) or num_resamples < 1:
        raise ValueError(f"`num_resamples` must be a positive integer (got {num_resamples!r}).")
    best, (alpha, slack) = _checked_y_max(y_max), _checked_shape(alpha, slack)

    # 1. The curve of all samples; percentages of counts, so that 23 of 40 are 57.5 and within 5 of 25 of 40
    rho, y = a.sum(-1) / f.sum(-1), 100 * c.sum(-1) / c.shape[1]  # (points,)
    score = _score(rho, y, best, alpha, slack)

    # 2. Those of the resamples
    generator = np.random.default_rng(seed)
    scores = []
    for size in _portions(num_resamples, a.shape[1]):
        times = _draw(generator, size, a.shape[1])  # (size, samples): how often each sample was drawn
        rho_drawn, y_drawn = (times @ a.T) / (times @ f.T), 100 * (times @ c.T) / a.shape[1]  # (size, points)
        best_drawn = y_drawn.max(-1) if best is None else np.full(size, best)
        scores.append(_areas(rho_drawn, y_drawn, best_drawn, alpha, slack)[0].sum(-1))
    low, high = np.quantile(np.concatenate(scores), [(1 - confidence) / 2, (1 + confidence) / 2])
    return AUPInterval(score.aup, float(low), float(high), tuple(rho.tolist()), tuple(y.tolist()), score)


def _score(rho: np.ndarray, y: np.ndarray, y_max: float | None, alpha: float, slack: float) -> AUPResult:
    """The score of one curve whose values have been checked."""
    best = float(y.max()) if y_max is None else y_max
    if best == 0:
        raise ValueError("`y_max` must not be 0, which is this curve's best accuracy. Pass that of another method.")
    areas, kept, order = _areas(rho, y, np.array(best), alpha, slack)
    points = list(zip(rho[order].tolist(), y[order].tolist(), strict=True))
    return AUPResult(
        aup=math.fsum(areas),  # exact, so that the areas of 0 of points left out cannot change it
        y_max=best,
        y_min=points[0][1] - slack,
        used=tuple(point for point, keep in zip(points, kept, strict=True) if keep),
        dropped=tuple(point for point, keep in zip(points, kept, strict=True) if not keep),
        areas=tuple(areas[kept].tolist()),
    )


def _areas(
    rho: np.ndarray, y: np.ndarray, y_max: np.ndarray, alpha: float, slack: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What each point adds to the score, which points count, and their order by rho. For many curves at once.

    `rho` and `y` are (..., points), `y_max` is (...); so are the results (..., points), the first two sorted by rho.
    """
    order = np.lexsort((y, rho), axis=-1)
    rho, y = np.take_along_axis(rho, order, -1), np.take_along_axis(y, order, -1)
    kept = y >= y[..., :1] - slack
    # A point that is left out becomes a copy of the last one that counts: the area between the two is 0.
    last = np.maximum.accumulate(np.where(kept, np.arange(y.shape[-1]), 0), axis=-1)
    rho, y = np.take_along_axis(rho, last, -1), np.take_along_axis(y, last, -1)
    share = y / np.where(y_max > 0, y_max, 1.0)[..., None]  # a curve that is 0 everywhere has no area whatever W is
    weighted = y * np.exp(np.minimum(-alpha * (1 - share), 0))
    between = np.diff(rho, axis=-1) * (weighted[..., 1:] + weighted[..., :-1]) / 2
    return np.concatenate([rho[..., :1] * y[..., :1], between], axis=-1), kept, order


def _portions(count: int, samples: int) -> list[int]:
    """`count` resamples divided so that each portion draws a bounded number of samples."""
    size = max(1, _RESAMPLED_AT_ONCE // samples)
    return [min(size, count - start) for start in range(0, count, size)]


def _draw(generator: np.random.Generator, size: int, samples: int) -> np.ndarray:
    """How often each of `samples` was drawn in each of `size` resamples: (size, samples) float64."""
    drawn = generator.integers(samples, size=(size, samples)) + samples * np.arange(size)[:, None]
    return np.bincount(drawn.ravel(), minlength=size * samples).reshape(size, samples).astype(np.float64)


def _checked_y_max(y_max: float | None) -> float | None:
    if y_max is None:
        return None
    value = _number("y_max", y_max)
    if not 1 < value <= 100:
        raise ValueError(
            f"`y_max` must be an accuracy in percent, above 1 and at most 100 (got {value:g}). Pass the best accuracy "
            "of the compared methods, or None for that of this curve."
        )
    return value


def _checked_shape(alpha: float, slack: float) -> tuple[float, float]:
    for name, value in (("alpha", alpha), ("slack", slack)):
        if _number(name, value) < 0:
            raise ValueError(f"`{name}` must not be negative (got {value}).")
    return float(alpha), float(slack)


def _number(name: str, value: float) -> float:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"`{name}` must be a number (got {value!r}).")
    if not np.isfinite(value):
        raise ValueError(f"`{name}` must be finite (got {value}).")
    return float(value)


def _series(name: str, values: Sequence[float]) -> np.ndarray:
    """(points,) float64"""
    array = _array(name, values, "a sequence of numbers, one per point", dimensions=1)
    if array.dtype.kind == "b":
        raise TypeError(f"`{name}` must be a sequence of numbers (got booleans). Pass one number per point.")
    return array.astype(np.float64)


def _per_sample(name: str, values: Sequence[Sequence[float]]) -> np.ndarray:
    """(points, samples) float64"""
    return _array(name, values, "one sequence of numbers per point, all over the same samples", dimensions=2).astype(
        np.float64
    )


def _array(name: str, values, rule: str, *, dimensions: int) -> np.ndarray:
    try:
        array = np.asarray(values)
    except ValueError as error:  # sequences of unequal lengths
        raise ValueError(f"`{name}` must be {rule} (got unequal lengths).") from error
    if array.size == 0 and array.dtype.kind in "fiub":
        raise ValueError(f"`{name}` must not be empty. Pass at least one value.")
    if array.ndim != dimensions or array.dtype.kind not in "fiub":
        raise TypeError(f"`{name}` must be {rule} (got {type(values).__name__} of shape {array.shape}).")
    if not np.isfinite(array).all():
        raise ValueError(f"`{name}` must be finite (got NaN or infinity).")
    return array
