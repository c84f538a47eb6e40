"""The cost of a doubled forward beside two plain ones: what is measured, and refused."""

import json

import pytest

from trainers.bench import doubled_step
from trainers.bench.doubled_step import DoubledBench


def test_both_ways_are_timed_over_as_many_positions(capsys):
    sizes = {"vocab_size": 32, "d_model": 16, "layers": 1, "length": 12, "block_length": 4, "repeats": 2}
    doubled_step.main([part for name, value in sizes.items() for part in (f"--{name}", str(value))])
    found = json.loads(capsys.readouterr().out)
    assert found["doubled"] > 0 and found["two_plain"] > 0 and found["ratio"] > 0
    assert found["shape"] == {"batch_size": 1, "device": "cpu", "threads": 1, **sizes}


def test_a_shape_that_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match=r"`repeats` must be at least 1 \(got 0\)"):
        DoubledBench(repeats=0)
