"""Results files of sweeps: what is read is checked, curves are of one kind, intervals agree with a slow bootstrap."""

import copy
import json
import logging
import random
from pathlib import Path

import pytest
from foreign_locks import foreign_lock

from d3llm_hf.evaluation.sweep.points import (
    SAMPLES,
    append_point,
    bootstrap_ratio,
    check_point,
    curve_aup,
    curves,
    digest,
    intervals,
    key_of,
    ratios,
    read_points,
)


def point_of(value: float | None = 0.5, forwards: int = 2, correct=(1, 1, 0, 1), **changes) -> dict:
    count = len(correct)
    samples = {
        "tokens": [6] * count,
        "forwards": [forwards] * count,
        "forwards_reference": [forwards + 1] * count,
        "correct": list(correct),
    }
    made = {"model_fingerprint": "m", "task_fingerprint": "t", "dtype": "float32", "device": "cpu"}
    point = {
        "schema": 1,
        "kind": "point",
        "model": "a",
        "method": "d3llm",
        "parameter": "entropy_threshold",
        "value": value,
        "settings": {"entropy_threshold": value},
        "task": "letters",
        "num_samples": count,
        "seed": 0,
        **ratios(samples),
        **intervals(samples),
        "tokens_per_second": 1.0,
        "positions_per_token": 1.0,
        "seconds": 1,
        "cpu_seconds": 1,
        "samples": samples,
        "provenance": made | {"max_new_tokens": 8, "batch_size": 2},
    }
    return copy.deepcopy(point | changes)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "new" / "results.jsonl"


def test_points_are_read_as_they_were_appended_from_one_file_or_several(output):
    one, other = point_of(0.5), point_of(1.0)
    append_point(output, one)
    output.write_bytes(output.read_bytes().rstrip(b"\n"))  # as some editors leave a file
    append_point(output, other)
    assert read_points(output) == [one, other]
    assert read_points(str(output), output) == [one, other] * 2
    assert [file.name for file in output.parent.iterdir()] == [output.name]


def test_a_point_that_a_file_has_twice_counts_once_and_two_findings_about_one_are_refused(output, caplog):
    one, other = point_of(0.5), point_of(1.0)
    again = one | {"seconds": 9, "note": "of another sweep on the file"}
    for point in (one, other, again):
        append_point(output, point)
    with caplog.at_level(logging.WARNING):
        assert read_points(output) == [one, other]
    assert "results.jsonl, line 3 repeats results.jsonl, line 1, which counts" in caplog.text
    append_point(output, point_of(1.0, correct=(0, 1, 1, 1)))
    with pytest.raises(ValueError, match=r"^results.jsonl, line 4: a point must be measured once .*jsonl, line 2"):
        read_points(output)


def test_a_file_that_another_process_is_writing_gets_no_point(output):
    append_point(output, point_of())
    with foreign_lock(output), pytest.raises(ValueError, match=r"`path` must be written by one process .*results.js"):
        append_point(output, point_of(1.0))
    assert read_points(output) == [point_of()]


def test_a_line_appears_whole_or_not_at_all(output, monkeypatch):
    append_point(output, point_of())
    before = output.read_bytes()

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr("d3llm_hf.evaluation.sweep.points.os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        append_point(output, point_of(1.0))
    assert output.read_bytes() == before
    assert [file.name for file in output.parent.iterdir()] == [output.name]


def test_ratios_are_sums_over_sums():
    samples = {"tokens": [4, 2], "forwards": [1, 2], "forwards_reference": [2, 2], "correct": [1, 0]}
    assert ratios(samples) == {"accuracy": 50.0, "tpf": 2.0, "tpf_reference": 1.5}


def changed(**changes) -> dict:
    return point_of(**changes)


@pytest.mark.parametrize(
    ("point", "found"),
    [
        ([], r"no point, '\[\]'"),
        (point_of(kind="row"), "no point"),
        ({n: v for n, v in point_of().items() if n != "task"}, "task='None'"),
        (point_of(seed=True), "seed='True'"),
        (point_of(tpf="fast"), "tpf='fast'"),
        (point_of(seconds=float("nan")), "seconds=nan"),
        (point_of(num_samples=5), "samples of tokens that are not num_samples=5 numbers"),
        (
            point_of(samples={name: [1] * 4 for name in SAMPLES if name != "correct"}),
            "samples of correct that are not",
        ),
        (point_of(samples=point_of()["samples"] | {"forwards": [0] * 4}), "samples of forwards below 1"),
        (point_of(samples=point_of()["samples"] | {"tokens": [1.5] * 4}), "samples of tokens below 0 or no integers"),
        (point_of(samples=point_of()["samples"] | {"correct": [2] * 4}), "samples of correct other than 0 and 1"),
        (point_of(accuracy=76.0), "accuracy=76.0, where the samples give 75.0"),
        (point_of(tpf=3.1), "tpf=3.1, where the samples give 3.0"),
    ],
)
def test_a_damaged_line_is_named_with_what_is_wrong(point, found):
    with pytest.raises(ValueError, match=f"^here: a line of a results file must be a point .*{found}"):
        check_point(point, "here")


def test_a_file_that_is_no_results_file_is_refused_by_name(output):
    with pytest.raises(FileNotFoundError, match=r"`paths` must name results files .got .*results.jsonl"):
        read_points(output)
    append_point(output, point_of())
    for line in ("{", "\xff", ""):
        output.write_bytes(output.read_bytes().split(b"\n")[0] + b"\n" + line.encode("latin-1") + b"\n")
        with pytest.raises(ValueError, match=r"results.jsonl, line 2: .*no JSON"):
            read_points(output)
    with pytest.raises(ValueError, match=r"`schema` must be 1 .got 2"):
        check_point(point_of(schema=2))
    output.write_text(json.dumps({"suite": "caches", "rows": []}, indent=1))
    with pytest.raises(
        ValueError, match=r"`paths` must name results of `d3llm sweep`.*results.jsonl', one object over"
    ):
        read_points(output)


def test_further_fields_are_kept_and_change_nothing():
    assert check_point(point_of(note="x"))["note"] == "x"
    assert key_of(point_of(note="x")) == key_of(point_of())


def test_the_key_follows_what_is_measured_and_not_what_was_found():
    key = key_of(point_of())
    assert key_of(point_of(seconds=9.0, correct=(0, 0, 0, 1))) == key
    changes = [{"model": "b"}, {"seed": 1}, {"settings": {}}, {"value": 2}]
    changes += [
        {"provenance": point_of()["provenance"] | {name: "other"}}
        for name in ("model_fingerprint", "task_fingerprint", "dtype", "device", "max_new_tokens", "batch_size")
    ]
    assert len({key, *(key_of(point_of(**change)) for change in changes)}) == len(changes) + 1
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest({"entropy_threshold": float("inf")})


def test_points_of_one_model_method_and_task_make_a_curve_by_rising_speed():
    slow, fast, other = point_of(0.1, forwards=6), point_of(0.5), point_of(method="llada")
    found = curves([fast, other, slow])
    assert found == {("a", "d3llm", "letters"): [slow, fast], ("a", "llada", "letters"): [other]}
    assert curves([]) == {}


@pytest.mark.parametrize(
    ("other", "pattern"),
    [
        (point_of(1.0, correct=(1, 1)), "must have the same `num_samples` .got 4 and 2"),
        (point_of(1.0, seed=1), "must have the same `seed`"),
        (point_of(1.0, provenance=point_of()["provenance"] | {"dtype": "bfloat16"}), "must have the same `dtype`"),
        (point_of(), "settings of the points of a curve must differ .got some twice in the curve a, d3llm, letters"),
    ],
)
def test_points_that_were_not_measured_alike_make_no_curve(other, pattern):
    with pytest.raises(ValueError, match=pattern):
        curves([point_of(), other])


def test_an_interval_is_what_a_slow_bootstrap_gives():
    rng = random.Random(0)
    tokens, forwards = [rng.randint(1, 60) for _ in range(40)], [rng.randint(1, 20) for _ in range(40)]
    drawn = []
    for _ in range(4000):
        chosen = [rng.randrange(40) for _ in range(40)]
        drawn.append(sum(tokens[i] for i in chosen) / sum(forwards[i] for i in chosen))
    drawn.sort()
    low, high = bootstrap_ratio(tokens, forwards, num_resamples=4000)
    assert low == pytest.approx(drawn[100], rel=0.02) and high == pytest.approx(drawn[3900], rel=0.02)
    assert bootstrap_ratio(tokens, forwards) == bootstrap_ratio(tokens, forwards)
    narrow = bootstrap_ratio(tokens, forwards, confidence=0.5)
    assert low < narrow[0] < sum(tokens) / sum(forwards) < narrow[1] < high
    assert bootstrap_ratio([2, 4], [1, 2]) == (2.0, 2.0)


@pytest.mark.parametrize(
    ("kwargs", "pattern"), [({"confidence": 1}, "`confidence`"), ({"num_resamples": 0}, "`num_resamples`")]
)
def test_an_interval_without_meaning_is_refused(kwargs, pattern):
    with pytest.raises(ValueError, match=pattern):
        bootstrap_ratio([1], [1], **kwargs)


def test_the_area_of_a_curve_is_that_of_its_points():
    from d3llm_hf.metrics.aup.curve import aup_score

    curve = [point_of(0.1, forwards=6), point_of(0.5)]
    found = curve_aup(curve, y_max=90.0, num_resamples=50)
    assert found.aup == pytest.approx(aup_score([1.0, 3.0], [75.0, 75.0], y_max=90.0).aup)
    assert found.low <= found.aup <= found.high
    with pytest.raises(ValueError, match="`points` must hold at least one point"):
        curve_aup([])
    with pytest.raises(ValueError, match="Points of one curve must have the same `seed`"):
        curve_aup([point_of(), point_of(1.0, seed=1)])


def test_a_line_is_strict_json(output):
    append_point(output, point_of())
    json.loads(output.read_text(), parse_constant=pytest.fail)
