"""Grids of sweeps: every default is accepted by `generate`, and what makes no curve is refused."""

import pytest

from d3llm_hf.evaluation.sweep.grids import GIVEN, NATURAL, Curve, curves_of
from d3llm_hf.evaluation.sweep.sweep import check_settings, describe
from d3llm_hf.models.methods import METHODS


@pytest.mark.parametrize("method", METHODS)
def test_the_default_grid_of_every_method_is_accepted(method):
    parameter, _ = NATURAL[method]
    points = Curve(method).points(64)
    assert len(points) >= 3
    for name, value, settings in points:
        assert name == parameter and settings == {"decoding_method": method, parameter: value}
        check_settings(settings, 64)
    for _, _, settings in Curve(method).points(1):
        check_settings(settings, 1)


def test_steps_are_fractions_of_the_answer():
    assert [value for _, value, _ in Curve("llada").points(64)] == [64, 32, 16]
    assert [value for _, value, _ in Curve("llada").points(2)] == [2, 1]


def test_a_curve_without_a_grid_is_one_point():
    assert Curve("llada", settings={"steps": 4}, values=()).points(8) == [
        (None, None, {"decoding_method": "llada", "steps": 4})
    ]
    assert describe("a", "llada", None, None) == "a, llada"


def test_equal_values_are_one_point_and_one_is_one_point_zero():
    points = Curve("d3llm", values=(1, 1.0, True)).points(8)
    assert [(value, type(value)) for _, value, _ in points] == [(1.0, float)]
    points = Curve("d3llm", settings={"block_add_threshold": 1}, values=(2,)).points(8)
    assert repr(points[0][2]["block_add_threshold"]) == "1.0"


def test_a_method_of_ones_own_names_what_it_sweeps(monkeypatch):
    monkeypatch.setitem(METHODS, "mine", {"block_length": 32, "confidence_threshold": 0.9})
    curve = Curve("mine", parameter="confidence_threshold", values=(0.9,))
    assert curve.points(8) == [("confidence_threshold", 0.9, {"decoding_method": "mine", "confidence_threshold": 0.9})]
    with pytest.raises(ValueError, match="`parameter` must be given for mine, which has no grid of its own"):
        Curve("mine")


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ({"method": "beam"}, "`methods` must be of .*got 'beam'"),
        (
            {"method": "llada", "parameter": "factor", "values": (1,)},
            "`parameter` must be a setting of llada .got 'fac",
        ),
        ({"method": "llada", "settings": {"seed": 1}}, "`settings` must not hold `seed`: pass the sweep's seed"),
        ({"method": "llada", "parameter": "block_length"}, "`values` must be given for `block_length`"),
        ({"method": "llada", "settings": {"steps": 3}}, "`settings` must not hold `steps`, which is swept"),
    ],
)
def test_what_makes_no_curve_is_refused(arguments, pattern):
    with pytest.raises(ValueError, match=pattern):
        Curve(**arguments)


def test_a_number_that_json_cannot_hold_is_refused():
    with pytest.raises(ValueError, match=r"`entropy_threshold` must be finite in a sweep .got inf"):
        Curve("d3llm", values=(float("inf"),)).points(8)


@pytest.mark.parametrize("name", GIVEN)
def test_what_a_sweep_gives_itself_cannot_be_set(name):
    with pytest.raises(ValueError, match=f"must not hold `{name}`"):
        Curve("d3llm", settings={name: 1})


def grid(*methods: str, **kwargs) -> dict[str, tuple]:
    found = curves_of([(name, name, {}) for name in methods], **kwargs)
    return {curve.name: (curve.swept, curve.values) for curve in found}


def test_thresholds_go_to_the_methods_that_have_one_and_grids_to_those_that_have_the_setting():
    assert grid("d3llm", "fast_dllm", "llada", thresholds=[0.3, 0.9]) == {
        "d3llm": ("entropy_threshold", (0.3, 0.9)),
        "fast_dllm": ("confidence_threshold", (0.3, 0.9)),
        "llada": ("steps", None),
    }
    grids = {"confidence_threshold": [0.9], "steps": [8, 4]}
    assert grid("d3llm", "local_leap", "dream", grids=grids) == {
        "d3llm": ("entropy_threshold", None),
        "local_leap": ("confidence_threshold", (0.9,)),
        "dream": ("steps", (8, 4)),
    }
    assert grid("fast_dllm", grids={"factor": [0.5, 1.0]}) == {"fast_dllm": ("factor", (0.5, 1.0))}
    assert grid("d3llm", no_grid=True) == {"d3llm": ("entropy_threshold", ())}
    own = curves_of([("h", "dinfer", {"decoder": "hierarchy", "kv_cache": "vicinity"})], grids={"cache_window": [4]})
    assert own[0].swept == "cache_window" and own[0].settings["decoder"] == "hierarchy"


@pytest.mark.parametrize(
    ("methods", "kwargs", "pattern"),
    [
        (["d3llm"], {"no_grid": True, "thresholds": [1.0]}, "`no_grid` leaves no room"),
        (["d3llm"], {"grids": {"factor": [1]}}, "`grids` must name a setting of one of the methods .got 'factor'"),
        (
            ["d3llm"],
            {"grids": {"block_length": [1], "early_stop": [True]}},
            "`grids` must leave one parameter for d3l",
        ),
        (["d3llm", "d3llm"], {}, "`methods` must have different labels"),
        (["beam"], {}, "`methods` must be of"),
    ],
)
def test_grids_that_fit_no_method_or_two_ways_are_refused(methods, kwargs, pattern):
    with pytest.raises(ValueError, match=pattern):
        grid(*methods, **kwargs)
