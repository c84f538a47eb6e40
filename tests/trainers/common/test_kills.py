"""Training that is killed at any moment goes on from the last whole checkpoint, to the weights of an unbroken run."""

import json
import multiprocessing
import sys

import killed_runs
import pytest


pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks")


def outcome(folder, moments):
    process = multiprocessing.get_context("spawn").Process(
        target=killed_runs.kill_and_resume, args=(folder, moments, folder / "results.json")
    )
    process.start()
    process.join(1800)
    process.kill()
    assert process.exitcode == 0
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


@pytest.mark.full  # a process and nine runs; a kill during an extraction is among the default tests
def test_a_run_that_is_killed_while_it_saves_is_resumed_to_the_same_weights(tmp_path):
    # Before the optimizer is written, before the list is, and before the older checkpoint goes.
    found = outcome(tmp_path, [("states", 6), ("list", 2), ("rotation", 1)])
    assert (found["failed"], found["kills"]) == ([], 3)
    assert found["resumed"] == [2, 4, 6]
    assert found["finished"] == found["equal"] == 1


@pytest.mark.slow
def test_thirty_kills_at_random_moments_change_nothing(tmp_path):
    found = outcome(tmp_path, 30)
    assert (found["failed"], found["kills"]) == ([], 30)
    assert found["finished"] == found["equal"] >= 1
    assert len(set(found["resumed"])) > 3
