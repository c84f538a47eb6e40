"""AUP of a curve against the published code's values, a slow oracle and what must hold for every curve."""

import json
import math
from itertools import pairwise

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, given, settings
from places import GOLDEN

import d3llm_hf
from d3llm_hf.metrics.aup.curve import aup_score


RECORDED = json.loads((GOLDEN / "aup" / "aup.json").read_text())
NUMBERS = {"min_value": 0.1, "max_value": 30.0, "allow_nan": False}
POINTS = st.lists(
    st.tuples(st.floats(**NUMBERS), st.floats(2.0, 100.0)), min_size=1, max_size=8, unique_by=lambda point: point[0]
)
SETTINGS = {
    "y_max": st.none() | st.floats(2.0, 100.0),
    "alpha": st.floats(0.0, 10.0),
    "slack": st.floats(0.0, 100.0),
}
cases = settings(max_examples=100, deadline=None, derandomize=True)


def weight(y: float, y_max: float, alpha: float) -> float:
    return min(math.exp(-alpha * (1 - y / y_max)), 1.0)


def oracle(points, y_max, alpha, slack) -> float:
    """The formula, word for word."""
    points = sorted(points)
    y_max = max(y for _, y in points) if y_max is None else y_max
    points = [(rho, y) for rho, y in points if y >= points[0][1] - slack]
    total = points[0][0] * points[0][1]
    for (rho_before, y_before), (rho, y) in pairwise(points):
        ends = y * weight(y, y_max, alpha) + y_before * weight(y_before, y_max, alpha)
        total += (rho - rho_before) * ends / 2
    return total


def score(points, **settings):
    return aup_score([rho for rho, _ in points], [y for _, y in points], **settings)


@pytest.mark.parametrize(
    "case", [case for case in RECORDED["synthetic"] if "error" not in case], ids=lambda c: str(c["rho"])
)
def test_recorded_values_of_the_published_code_are_reproduced(case):
    options = {{"y_min_offset": "slack"}.get(name, name): value for name, value in case["kwargs"].items()}
    if max(case["y"]) <= 1:  # fractions: the published code warns and goes on
        with pytest.raises(ValueError, match=r"`accuracy` must be in percent, not fractions \(got none above 0.74\)"):
            aup_score(case["rho"], case["y"], y_max=100 * case["y_max"], **options)
        percent = [100 * y for y in case["y"]]
        found = aup_score(case["rho"], percent, y_max=100 * case["y_max"], **options).aup / 100
    else:
        found = aup_score(case["rho"], case["y"], y_max=case["y_max"], **options).aup
    assert found == pytest.approx(case["aup"], rel=1e-12)


def test_recorded_weights_are_reproduced():
    for case in RECORDED["weight_function"]:
        y, y_max, alpha = case["y"], case["y_max"], case["alpha"]
        # A first point at full accuracy, then one step of 2: the area is y_max + y * W(y).
        areas = aup_score([1.0, 3.0], [y_max, y], y_max=y_max, alpha=alpha, slack=100.0).areas
        assert areas[1] == pytest.approx(y_max + y * case["w"], rel=1e-12)


def test_a_curve_by_hand():
    result = aup_score([4.0, 1.0, 2.0, 3.0], [73.0, 74.0, 66.0, 72.0], y_max=74.0)
    w72, w73 = math.exp(-3 * (1 - 72 / 74)), math.exp(-3 * (1 - 73 / 74))
    assert result.used == ((1.0, 74.0), (3.0, 72.0), (4.0, 73.0))
    assert result.dropped == ((2.0, 66.0),)
    assert (result.y_max, result.y_min) == (74.0, 69.0)
    assert result.areas == pytest.approx((74.0, 74.0 + 72 * w72, (72 * w72 + 73 * w73) / 2))
    assert result.aup == pytest.approx(sum(result.areas))


def test_a_point_exactly_on_the_limit_counts():
    assert aup_score([1, 2], [74.0, 69.0]).dropped == ()
    assert aup_score([1, 2], [74.0, 68.99]).dropped == ((2.0, 68.99),)


def test_a_last_point_that_falls_too_far_is_left_out_where_the_published_code_stops():
    whole, cut = aup_score([1, 2, 9], [74.0, 73.0, 60.0]), aup_score([1, 2], [74.0, 73.0])
    assert whole.dropped == ((9.0, 60.0),)
    assert (whole.aup, whole.used, whole.areas) == (cut.aup, cut.used, cut.areas)


def test_y_max_is_the_best_of_the_curve_unless_given():
    assert aup_score([1, 4], [70.0, 72.0]).y_max == 72.0
    assert aup_score([1, 4], [70.0, 72.0], y_max=80).y_max == 80.0
    assert d3llm_hf.aup_score is aup_score


def test_arrays_and_integers_are_numbers_too():
    expected = aup_score([1.0, 2.0], [74.0, 73.0])
    assert aup_score(np.array([1, 2]), np.array([74.0, 73.0], dtype=np.float32)) == expected
    assert aup_score([1, 2], (74, np.int64(73)), y_max=np.float32(74)) == expected


@cases
@given(points=POINTS, **SETTINGS)
def test_the_score_is_that_of_the_formula_and_says_what_it_was_made_of(points, y_max, alpha, slack):
    result = score(points, y_max=y_max, alpha=alpha, slack=slack)
    assert result.aup == pytest.approx(oracle(points, y_max, alpha, slack), rel=1e-9)
    assert result.aup == pytest.approx(math.fsum(result.areas), rel=1e-9)
    assert sorted(result.used + result.dropped) == sorted(points)
    assert len(result.areas) == len(result.used)
    assert all(y >= result.y_min for _, y in result.used) and all(y < result.y_min for _, y in result.dropped)
    assert 0 <= result.aup <= max(rho for rho, _ in points) * max(y for _, y in points) * (1 + 1e-12)


@cases
@given(data=st.data(), points=st.lists(st.tuples(st.sampled_from([1.0, 2.0, 3.0]), st.floats(2.0, 100.0)), min_size=1))
def test_the_order_of_points_does_not_matter_even_where_some_are_equally_fast(data, points):
    assert score(data.draw(st.permutations(points))) == score(points)


@cases
@given(points=POINTS, part=st.floats(0.0, 1.0), **SETTINGS)
def test_a_point_between_two_of_equal_weight_changes_nothing(points, part, y_max, alpha, slack):
    flat = [(rho, points[0][1]) for rho, _ in points]
    full = [(rho, min(100.0, 90.0 + y / 10)) for rho, y in points]  # over y_max: all weights are 1
    for curve, best in ((flat, y_max), (full, 90.0)):
        result = score(curve, y_max=best, alpha=alpha, slack=slack)
        assume(len(result.used) > 1)
        (rho, y), (rho_next, y_next) = result.used[-2:]
        between = (rho + part * (rho_next - rho), y + part * (y_next - y))
        again = score([*result.used, between], y_max=result.y_max, alpha=alpha, slack=slack + 1e-6)
        assert again.aup == pytest.approx(result.aup, rel=1e-9)


@cases
@given(points=POINTS, step=st.floats(0.001, 50.0), fall=st.floats(0.001, 100.0), **SETTINGS)
def test_a_point_under_the_limit_is_never_rewarded(points, step, fall, y_max, alpha, slack):
    before = score(points, y_max=y_max, alpha=alpha, slack=slack)
    worse = before.y_min - fall
    assume(worse >= 0)
    after = score([*points, (before.used[0][0] + step, worse)], y_max=y_max, alpha=alpha, slack=slack)
    assert (after.aup, after.used) == (before.aup, before.used)


@cases
@given(rho=st.floats(**NUMBERS), y=st.floats(2.0, 100.0), **SETTINGS)
def test_one_point_gives_tokens_per_forward_times_accuracy(rho, y, y_max, alpha, slack):
    assert aup_score([rho], [y], y_max=y_max, alpha=alpha, slack=slack).aup == rho * y


@cases
@given(points=POINTS, low=st.floats(2.0, 100.0), high=st.floats(2.0, 100.0))
def test_a_higher_y_max_never_gives_a_higher_score(points, low, high):
    low, high = sorted((low, high))
    assert score(points, y_max=high).aup <= score(points, y_max=low).aup * (1 + 1e-12)


@pytest.mark.parametrize(
    "tpf, accuracy, options, error, message",
    [
        ([], [], {}, ValueError, "`tpf` must not be empty"),
        ([1, 2], [50.0], {}, ValueError, r"must have the same length \(got 2 and 1\)"),
        ([0.0, 2.0], [74.0, 70.0], {}, ValueError, r"`tpf` must be positive \(got 0\)"),
        ([-1.0], [74.0], {}, ValueError, r"`tpf` must be positive \(got -1\)"),
        ([1.0, math.nan], [74.0, 70.0], {}, ValueError, "`tpf` must be finite"),
        ([1.0, 2.0], [74.0, math.nan], {}, ValueError, "`accuracy` must be finite"),
        ([1.0, math.inf], [74.0, 70.0], {}, ValueError, "`tpf` must be finite"),
        ([1.0, 2.0], [0.74, 0.73], {}, ValueError, "`accuracy` must be in percent, not fractions"),
        ([1.0, 2.0], [0.74, 0.73], {"y_max": 74.0}, ValueError, "`accuracy` must be in percent, not fractions"),
        ([1.0], [101.0], {}, ValueError, r"between 0 and 100 \(got 101\)"),
        ([1.0], [-1.0], {}, ValueError, r"between 0 and 100 \(got -1\)"),
        ([1.0, 2.0], [0.0, 0.0], {}, ValueError, "`y_max` must not be 0, which is this curve's best accuracy"),
        ([1.0], [74.0], {"y_max": 0.0}, ValueError, r"`y_max` must be an accuracy in percent.* \(got 0\)"),
        ([1.0], [74.0], {"y_max": 0.75}, ValueError, r"`y_max` must be an accuracy in percent.* \(got 0.75\)"),
        ([1.0], [74.0], {"y_max": 100.5}, ValueError, r"`y_max` must be an accuracy in percent.* \(got 100.5\)"),
        ([1.0], [74.0], {"y_max": math.nan}, ValueError, "`y_max` must be finite"),
        ([1.0], [74.0], {"y_max": "74"}, TypeError, "`y_max` must be a number"),
        ([1.0], [74.0], {"alpha": -1.0}, ValueError, r"`alpha` must not be negative \(got -1.0\)"),
        ([1.0], [74.0], {"alpha": True}, TypeError, r"`alpha` must be a number \(got True\)"),
        ([1.0], [74.0], {"slack": -0.5}, ValueError, r"`slack` must not be negative \(got -0.5\)"),
        ([1.0], [74.0], {"slack": math.inf}, ValueError, "`slack` must be finite"),
        (1.0, 74.0, {}, TypeError, "`tpf` must be a sequence of numbers, one per point"),
        ([1.0], "74", {}, TypeError, "`accuracy` must be a sequence of numbers"),
        ([1.0], ["74"], {}, TypeError, "`accuracy` must be a sequence of numbers"),
        ([1.0], [True], {}, TypeError, "`accuracy` must be a sequence of numbers .got booleans"),
        ([1.0], None, {}, TypeError, "`accuracy` must be a sequence of numbers"),
        ([[1.0]], [[74.0]], {}, TypeError, "`tpf` must be a sequence of numbers"),
        ([[1.0], [1.0, 2.0]], [74.0], {}, ValueError, "`tpf` must be a sequence .* unequal lengths"),
    ],
)  # fmt: skip
def test_input_without_a_score_is_refused_by_name(tpf, accuracy, options, error, message):
    with pytest.raises(error, match=message):
        aup_score(tpf, accuracy, **options)
