"""The bootstrap interval of an AUP: its coverage on simulated curves, and what it refuses."""

import math

import numpy as np
import pytest
from base_seed import of_a_recording

import d3llm_hf
from d3llm_hf.metrics.aup import curve
from d3llm_hf.metrics.aup.curve import aup_score, bootstrap_aup


# Accuracy and tokens per forward of three settings, with the same samples under each: whether a sample is hard decides
# for all of them. The known value comes from two million samples.
ACCURACY, SPEED, SAMPLES = (0.74, 0.73, 0.72), (1.0, 4.0, 8.0), 300


def simulate(seed: int, samples: int = SAMPLES, accuracy=ACCURACY):
    generator = np.random.default_rng(seed)
    tokens = generator.integers(20, 60, samples).astype(float)
    hardness = generator.random(samples)
    forwards = [np.maximum(1, np.round(tokens / speed * generator.uniform(0.7, 1.3, samples))) for speed in SPEED]
    return [tokens] * len(SPEED), forwards, [hardness < limit for limit in accuracy]


def coverage(curves: int, num_resamples: int, *, accuracy=ACCURACY, y_max: float | None) -> float:
    """In how many of the curves the interval contains the known value."""
    tokens, forwards, _ = simulate(1, 2_000_000, accuracy)
    tpf = [a.sum() / f.sum() for a, f in zip(tokens, forwards, strict=True)]
    known = aup_score(tpf, [100 * value for value in accuracy], y_max=y_max).aup
    hits = 0
    for seed in range(curves):
        found = bootstrap_aup(
            *simulate(seed + 10, accuracy=accuracy), y_max=y_max, num_resamples=num_resamples, seed=seed
        )
        hits += found.low <= known <= found.high
    return hits / curves


def test_the_interval_covers_the_known_value_of_simulated_curves():
    assert 0.90 <= coverage(200, 200, y_max=74.98) <= 0.99


@pytest.mark.slow
@pytest.mark.parametrize("y_max", [74.98, None])
def test_the_interval_covers_the_known_value_in_93_to_97_percent_of_simulated_curves(y_max):
    assert 0.93 <= coverage(1000, 400, y_max=y_max) <= 0.97


@pytest.mark.slow
def test_the_interval_covers_less_where_a_point_lies_on_the_limit_of_the_slack():
    assert 0.88 <= coverage(1000, 400, accuracy=(0.74, 0.73, 0.69), y_max=74.98) <= 0.94


def test_score_and_points_are_those_of_all_samples():
    tokens, forwards = [[10, 20, 0], [10, 20, 0]], [[10, 20, 5], [2, 4, 4]]
    found = bootstrap_aup(tokens, forwards, [[1, 1, 0], [1, 1, 0.4]], y_max=80.0)
    assert found.tpf == (30 / 35, 3.0)
    assert found.accuracy == pytest.approx((200 / 3, 80.0))
    assert found.score == aup_score(found.tpf, found.accuracy, y_max=80.0)
    assert found.aup == found.score.aup
    assert found.low < found.aup < found.high
    assert d3llm_hf.bootstrap_aup is bootstrap_aup


@pytest.mark.parametrize("samples", [20, 40, 200, 1000])
def test_a_point_exactly_at_the_slack_counts_whatever_its_fraction_rounds_to(samples):
    step = samples // 20  # 5 percentage points
    for right in range(step, samples + 1, max(1, samples // 40)):
        correct = [[1] * right + [0] * (samples - right), [1] * (right - step) + [0] * (samples - right + step)]
        found = bootstrap_aup([[8] * samples] * 2, [[8] * samples, [4] * samples], correct, num_resamples=1)
        assert len(found.score.used) == 2, right


def test_intervals_are_those_of_resampling_one_after_the_other(monkeypatch):
    tokens, forwards, correct = simulate(3, samples=40)
    generator = np.random.default_rng(of_a_recording(5))  # as the function makes it
    scores = []
    for _ in range(60):
        drawn = generator.integers(40, size=40)
        tpf = [a[drawn].sum() / f[drawn].sum() for a, f in zip(tokens, forwards, strict=True)]
        scores.append(aup_score(tpf, [100 * c[drawn].sum() / 40 for c in correct]).aup)
    for at_once in (curve._RESAMPLED_AT_ONCE, 40 * 7, 1):  # all in one portion, in portions of seven, one by one
        monkeypatch.setattr(curve, "_RESAMPLED_AT_ONCE", at_once)
        found = bootstrap_aup(tokens, forwards, correct, confidence=0.8, num_resamples=60, seed=5)
        assert (found.low, found.high) == pytest.approx(tuple(np.quantile(scores, [0.1, 0.9])), rel=1e-12)


def test_the_same_seed_gives_the_same_interval_and_more_confidence_a_wider_one():
    samples = simulate(0)
    first = bootstrap_aup(*samples, seed=7)
    assert bootstrap_aup(*samples, seed=7) == first
    assert bootstrap_aup(*samples, seed=8).low != first.low
    wide = bootstrap_aup(*samples, seed=7, confidence=0.99)
    assert wide.low < first.low < first.high < wide.high


def test_samples_that_are_all_alike_have_an_interval_of_no_width():
    found = bootstrap_aup([[8] * 5], [[4] * 5], [[1] * 5])
    assert (found.low, found.aup, found.high) == (200.0, 200.0, 200.0)


def test_accuracies_of_at_most_one_percent_are_no_fractions_here():
    correct = [[1] + [0] * 199] * 2
    found = bootstrap_aup([[8] * 200] * 2, [[8] * 200, [4] * 200], correct)
    assert found.accuracy == (0.5, 0.5)
    assert found.aup == pytest.approx(1.0)
    assert found.low == 0.0  # resamples without the one sample that was answered


GOOD = {"tokens": [[8, 9], [8, 9]], "forwards": [[8, 9], [4, 5]], "correct": [[1, 1], [1, 0]]}


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"tokens": [[8, 9]]}, ValueError, r"must have the same number .* \(got \(1, 2\), \(2, 2\) and \(2, 2\)\)"),
        ({"tokens": [8, 9]}, TypeError, "`tokens` must be one sequence of numbers per point"),
        ({"tokens": [[8, 9], [8]]}, ValueError, "`tokens` must be one sequence .* unequal lengths"),
        ({"tokens": []}, ValueError, "`tokens` must not be empty"),
        ({"correct": [[], []]}, ValueError, "`correct` must not be empty"),
        ({"tokens": [[8, -9], [8, 9]]}, ValueError, "`tokens` must not be negative"),
        ({"tokens": [[0, 0], [8, 9]]}, ValueError, "`tokens` must not be negative, nor 0 in all samples"),
        ({"tokens": [[8, math.nan], [8, 9]]}, ValueError, "`tokens` must be finite"),
        ({"forwards": [[8, 0], [4, 5]]}, ValueError, r"`forwards` must be positive \(got 0\)"),
        ({"forwards": [["8", "0"], ["4", "5"]]}, TypeError, "`forwards` must be one sequence"),
        ({"correct": [[100, 1], [1, 0]]}, ValueError, r"`correct` must be between 0 and 1 .* \(got 100\)"),
        ({"correct": [[-1, 1], [1, 0]]}, ValueError, r"`correct` must be between 0 and 1 .* \(got -1\)"),
        ({"correct": [[0, 0], [0, 0]]}, ValueError, "`y_max` must not be 0"),
        ({"confidence": 95}, ValueError, r"`confidence` must be between 0 and 1 \(got 95\)"),
        ({"confidence": "95 %"}, TypeError, "`confidence` must be a number"),
        ({"num_resamples": 0}, ValueError, r"`num_resamples` must be a positive integer \(got 0\)"),
        ({"num_resamples": True}, ValueError, r"`num_resamples` must be a positive integer \(got True\)"),
        ({"num_resamples": 10.0}, ValueError, r"`num_resamples` must be a positive integer \(got 10.0\)"),
        ({"y_max": 0.8}, ValueError, "`y_max` must be an accuracy in percent"),
        ({"slack": -1}, ValueError, "`slack` must not be negative"),
    ],
)
def test_results_without_a_score_are_refused_by_name(change, error, message):
    with pytest.raises(error, match=message):
        bootstrap_aup(**GOOD | change)
