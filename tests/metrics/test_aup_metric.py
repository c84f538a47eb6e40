"""`evaluate.load("aup")`: in a fresh process, from some folder, without a network, and without this package."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from places import REPOSITORY, SUPPORT

from d3llm_hf.metrics import registration
from d3llm_hf.metrics.aup.curve import aup_score, bootstrap_aup


pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("evaluate") is None, reason="evaluate is not installed"),
    pytest.mark.full,  # two processes, one of which imports evaluate and all that it needs
]


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> dict:
    """What `tests/support/metric_process.py` says after another process has imported the package."""
    work = tmp_path_factory.mktemp("metric")
    (work / "somewhere").mkdir()
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in (registration.OPT_OUT, "HF_MODULES_CACHE", "HF_EVALUATE_OFFLINE", "HF_METRICS_CACHE")
    } | {"HF_HOME": str(work / "home"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", "import d3llm_hf"], cwd=REPOSITORY, env=environment, check=True)
    script = SUPPORT / "metric_process.py"
    done = subprocess.run(
        [sys.executable, str(script), registration.METRIC_FOLDER, str(REPOSITORY / "docs" / "measuring.md")],
        cwd=work / "somewhere",
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert list((work / "somewhere").iterdir()) == []
    return json.loads(done.stdout.splitlines()[-1]) | {"home": str(work / "home")}


def test_the_name_is_found_without_importing_the_package(facts):
    assert facts["name"] == "aup"
    assert not facts["package loaded"]
    assert facts["file"].startswith(facts["home"])


def test_points_give_the_score_and_what_it_was_made_of(facts):
    score = aup_score([9.11, 1.0], [73.09, 74.02], y_max=74.98)
    assert facts["points"] == {
        "aup": score.aup,
        "y_max": 74.98,
        "y_min": 69.02,
        "used": [[1.0, 74.02], [9.11, 73.09]],
        "dropped": [],
        "areas": list(score.areas),
    }


def test_results_of_samples_give_the_interval_too(facts):
    samples = ([[8, 9]] * 2, [[8, 9], [4, 5]], [[1, 1], [1, 0]])
    expected = bootstrap_aup(*samples, slack=60, seed=1, num_resamples=50, confidence=0.9)
    found = facts["samples"]
    assert (found["aup"], found["low"], found["high"]) == (expected.aup, expected.low, expected.high)
    assert (found["tpf"], found["accuracy"]) == (list(expected.tpf), [100.0, 50.0])
    assert found["used"] == [[1.0, 100.0], [17 / 9, 50.0]]


def test_points_can_be_added_one_by_one_and_the_metric_combined(facts):
    assert facts["added"]["aup"] == aup_score([1.0, 9.11], [74.02, 73.09], y_max=74.98, alpha=1.0).aup
    assert facts["added"]["dropped"] == [[3.0, 60.0]]
    assert facts["combined"]["aup"] == aup_score([1.0, 9.11], [74.02, 73.09]).aup


def test_input_without_a_score_is_refused_and_the_metric_goes_on(facts):
    expected = {
        "nothing": "ValueError: `tpf` and `accuracy` must be given or added before",
        "half": "ValueError: `tpf` and `accuracy` must be given or added before",
        "predictions": "ValueError: `predictions` must not be given",
        "some samples": "ValueError: `tokens`, `forwards` and `correct` must be given together (got tokens, forwards)",
        "points and samples": "ValueError: `tokens`, `forwards` and `correct` must not be given with `tpf`",
        "fractions": "ValueError: `accuracy` must be in percent, not fractions",
        "no tokens": "ValueError: `tpf` must be positive (got 0)",
        "NaN": "ValueError: `accuracy` must be finite",
        "empty": "ValueError: `tpf` must not be empty",
        "unknown option": "TypeError: ",
    }
    assert set(facts["errors"]) == set(expected)
    for name, start in expected.items():
        assert facts["errors"][name].startswith(start), name
    assert facts["both kinds"].startswith("ValueError: `tokens`, `forwards` and `correct` must not be given with")
    assert facts["after errors"] == facts["points"]["aup"]


def test_the_folder_loads_by_its_path(facts):
    assert facts["by path"] == facts["points"]["aup"]


def test_examples_of_the_card_and_of_the_usage_text_give_what_they_say(facts):
    assert facts["card"] == [0, 9]
    assert facts["usage"] == [0, 4]
