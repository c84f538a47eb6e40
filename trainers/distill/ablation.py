"""What each part of a distillation gives: the summary of an ablation's points, with bootstrap intervals.

Students of several arms (training recipes), several seeds each, and their teacher are decoded with the same grids of
thresholds on the same samples. Of every curve: the score AUP, and the tokens per forward (TPF) that it reaches before
its accuracy has fallen too far. Ratios to the teacher and to another arm are taken within each resample, so that what
is easy for one model and easy for all does not widen them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from d3llm_hf.evaluation.sweep.points import Point
from d3llm_hf.metrics.aup.curve import aup_score
from d3llm_hf.progress import progress_bar


@dataclass(frozen=True)
class Curves:
    """The points of one arm and decoding.

    Args:
        correct, tokens, forwards: arrays of shape `(seeds, points, samples)`; a teacher has one seed.
    """

    correct: np.ndarray
    tokens: np.ndarray
    forwards: np.ndarray

    @classmethod
    def of(cls, curves: Sequence[Sequence[Point]]) -> "Curves":
        """From the points of each seed, which have the same grid.

        Raises:
            ValueError: where the grids or samples of the seeds differ.
        """
        grids = [[(point["parameter"], point["value"], point["num_samples"]) for point in curve] for curve in curves]
        if any(grid != grids[0] for grid in grids):
            raise ValueError(
                f"The students of an arm must be decoded with the same grid on the same samples (got {grids}). Finish "
                "the ablation, or measure it anew in another folder."
            )
        return cls(
            *(
                np.array([[point["samples"][name] for point in curve] for curve in curves], dtype=np.float64)
                for name in ("correct", "tokens", "forwards")
            )
        )

    def figures(self, times: np.ndarray, seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Accuracy in percent and TPF `(seeds, points)` where sample i counts `times[i]` times, for some seeds."""
        accuracy = 100 * (self.correct[seeds] @ times) / times.sum()
        return accuracy, (self.tokens[seeds] @ times) / (self.forwards[seeds] @ times)


def tpf_at(accuracy: Sequence[float], tpf: Sequence[float], floor: float) -> float:
    """The most tokens per forward of a curve, drawn with straight lines, at an accuracy of at least `floor`.

    Args:
        accuracy, tpf: of each point, from the most careful to the boldest.
        floor: in percent.

    Returns:
        NaN where the curve is under `floor` everywhere.
    """
    best = max((speed for right, speed in zip(accuracy, tpf, strict=True) if right >= floor), default=float("nan"))
    for (right, speed), (next_right, next_speed) in pairwise(zip(accuracy, tpf, strict=True)):
        if (right >= floor) != (next_right >= floor):
            crossing = speed + (right - floor) / (right - next_right) * (next_speed - speed)
            best = np.fmax(best, crossing)
    return float(best)


def summarise(
    arms: Mapping[str, Mapping[str, Sequence[Sequence[Point]]]],
    teacher: Mapping[str, Sequence[Point]],
    one_token: Point,
    *,
    twin: str,
    slack: float = 1.0,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """The rows of an ablation: the teacher, then each arm, for every decoding.

    1. Draw the samples and the seeds of each resample, the same for all curves.
    2. Of each curve in each resample: AUP, with the teacher's accuracy at one token a forward as `y_max`, and the TPF
       at an accuracy of at least that minus `slack`, both averaged over seeds.
    3. Ratios within each resample, then percentiles.

    Args:
        arms: arm -> decoding -> the points of each seed.
        teacher: decoding -> points.
        one_token: the teacher at one token a forward.
        twin: the arm that others are compared with.
        slack: accuracy that may be lost, in points.
        num_resamples, confidence, seed: of the bootstrap, over samples and, within an arm, over seeds.

    Returns:
        rows with `arm`, `decoding`, `seeds`; `aup`, `tpf`, `over_teacher`, `over_twin`, each with `_interval`
        (`None` where the curve does not reach the accuracy); `curve`, a list of `value`, `accuracy` and `tpf`,
        averaged over seeds, with the smallest and largest of the seeds.

    Raises:
        ValueError: where the teacher is never right, or the grids or samples of an arm's seeds differ.
    """
    if not any(one_token["samples"]["correct"]):
        raise ValueError(
            f"The teacher must answer some of the problems right (got none of {one_token['num_samples']} at one token "
            "a forward): nothing can be measured against it. Choose another checkpoint or easier problems."
        )
    curves = {("teacher", decoding): Curves.of([points]) for decoding, points in teacher.items()}
    curves |= {(arm, decoding): Curves.of(runs) for arm, each in arms.items() for decoding, runs in each.items()}
    grid = {decoding: [point["value"] for point in points] for decoding, points in teacher.items()}
    base = Curves.of([[one_token]])
    num_samples = base.correct.shape[-1]

    # 1. Draw the samples and seeds of each resample; number 0 is what was measured
    generator = np.random.default_rng(seed)
    measured = np.ones(num_samples)
    drawn = [measured] + [
        np.bincount(generator.integers(num_samples, size=num_samples), minlength=num_samples).astype(np.float64)
        for _ in range(num_resamples)
    ]
    picks = {key: [np.arange(len(curve.correct))] for key, curve in curves.items()}
    for key, curve in curves.items():
        count = len(curve.correct)
        picks[key] += [generator.integers(count, size=count) for _ in range(num_resamples)]

    # 2. AUP and TPF of each curve in each resample
    found = {key: np.empty((len(drawn), 2)) for key in curves}
    for number, times in enumerate(progress_bar(None, "resample", "intervals", iterable=drawn)):
        best = float(base.figures(times, np.arange(1))[0].item())
        for key, curve in curves.items():
            values = [
                (aup_score(tpf, accuracy, y_max=best).aup, tpf_at(accuracy, tpf, best - slack))
                for accuracy, tpf in zip(*curve.figures(times, picks[key][number]), strict=True)
            ]
            found[key][number] = np.mean(values, axis=0)

    # 3. Ratios within each resample, then percentiles
    def with_interval(name: str, values: np.ndarray) -> dict[str, Any]:
        if not np.isfinite(values[0]):
            return {name: None, f"{name}_interval": None}
        tail = 50 * (1 - confidence)
        interval = np.nanpercentile(values[1:], [tail, 100 - tail])
        return {name: round(float(values[0]), 3), f"{name}_interval": [round(float(end), 3) for end in interval]}

    rows = []
    for (arm, decoding), values in found.items():
        row = {"arm": arm, "decoding": decoding, "seeds": len(curves[arm, decoding].correct)}
        row |= with_interval("aup", values[:, 0]) | with_interval("tpf", values[:, 1])
        if arm != "teacher":
            row |= with_interval("over_teacher", values[:, 1] / found["teacher", decoding][:, 1])
        if arm not in ("teacher", twin):
            row |= with_interval("over_twin", values[:, 1] / found[twin, decoding][:, 1])
        rows.append(row | {"curve": _curve(curves[arm, decoding], grid[decoding], measured)})
    return rows


def _curve(curves: Curves, grid: Sequence[float], measured: np.ndarray) -> list[dict[str, Any]]:
    accuracy, tpf = curves.figures(measured, np.arange(len(curves.correct)))
    return [
        {
            "value": value,
            **{
                name: round(float(each.mean()), 3)
                for name, each in (("accuracy", accuracy[:, index]), ("tpf", tpf[:, index]))
            },
            "accuracy_range": [round(float(end), 3) for end in (accuracy[:, index].min(), accuracy[:, index].max())],
            "tpf_range": [round(float(end), 3) for end in (tpf[:, index].min(), tpf[:, index].max())],
        }
        for index, value in enumerate(grid)
    ]
