"""The cost of a doubled forward beside two plain ones: what is measured, and refused."""

import json

import pytest

from d3llm_hf.evaluation.tables import fill as tables
from trainers.bench import doubled_step
from trainers.bench.doubled_step import DoubledBench


def test_both_ways_are_timed_over_as_many_positions(capsys, tmp_path):
    sizes = {"vocab_size": 32, "d_model": 16, "layers": 1, "block_length": 4, "repeats": 2}
    options = [part for name, value in sizes.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    options += ["--lengths", "12", "8"]
    path = tmp_path / "results.json"
    doubled_step.main([*options, "-o", str(path)])
    results = json.loads(path.read_text())
    assert capsys.readouterr().out == tables.table(results)
    assert [row["length"] for row in results["rows"]] == [12, 8]
    assert all(row[name] > 0 for row in results["rows"] for name in ("doubled", "two_plain", "ratio"))
    assert results["shape"] == {"batch_size": 1, "lengths": [12, 8], "device": "cpu", "threads": 1, **sizes}
    assert results["command"] == " ".join(["python -m trainers.bench.doubled_step", *options, "-o results.json"])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"repeats": 0}, r"`repeats` must be at least 1 \(got 0\)"),
        ({"lengths": ()}, r"`lengths` must be positive integers, at least one \(got \(\)\)"),
        ({"lengths": (8, 0)}, r"`lengths` must be positive integers, at least one \(got \(8, 0\)\)"),
    ],
)
def test_a_shape_that_cannot_be_measured_is_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        DoubledBench(**sizes)
