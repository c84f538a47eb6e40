"""Every published AUP, with the y_max of its own table and with one y_max for the tables of a task."""

import json

import pytest
from places import GOLDEN

from d3llm_hf.metrics.aup.curve import aup_score


FOLDER = GOLDEN / "aup"
RECORDED = json.loads((FOLDER / "aup.json").read_text())
TABLES = RECORDED["tables"] | json.loads((FOLDER / "dream.json").read_text())["tables"]
TASKS = ("GSM8K-CoT", "MATH", "MBPP", "HumanEval", "Long-GSM8K")
ENTRIES = [
    pytest.param(entry["pairs"], task["y_max"], entry["aup"], id=f"{table}-{name}-{method}")
    for table, tasks in TABLES.items()
    for name, task in tasks.items()
    for method, entry in task["methods"].items()
]


def score(pairs, y_max: float) -> float:
    return aup_score([rho for rho, _ in pairs], [y for _, y in pairs], y_max=y_max).aup


def averages(*, common: bool) -> dict[str, float]:
    """Of the methods on LLaDA and Dream over the five tasks."""
    totals: dict[str, float] = {}
    for table in ("data_llada", "data_dream"):
        for name in TASKS:
            tables = (table,) if not common else ("data_llada", "data_dream")
            y_max = max(TABLES[each][name]["y_max"] for each in tables)
            for method, entry in TABLES[table][name]["methods"].items():
                totals[method] = totals.get(method, 0.0) + score(entry["pairs"], y_max) / len(TASKS)
    return totals


@pytest.mark.parametrize("pairs, y_max, published", ENTRIES)
def test_a_published_score_is_reproduced_with_the_published_y_max(pairs, y_max, published):
    # 0.05: those of the tables of methods on Dream are published to one decimal.
    assert score(pairs, y_max) == pytest.approx(published, abs=0.0501)


def test_there_are_as_many_entries_as_published():
    assert len(ENTRIES) == 6 * 5 + 3 * 4 + 6 * 5


def test_averages_over_the_tasks_equal_those_of_the_published_code():
    published = RECORDED["leaderboard_average_main_py"]
    found = averages(common=False)
    del found["Qwen-2.5-7B-it"]  # which the published code sums over the tasks of two tables
    assert found == pytest.approx({method: published[method] for method in found}, rel=1e-9)


def test_with_one_y_max_for_both_tables_two_methods_change_places():
    own, one = averages(common=False), averages(common=True)
    assert own["dParallel-LLaDA"] == pytest.approx(175.2, abs=0.05)
    assert own["dParallel-Dream"] == pytest.approx(158.6, abs=0.05)
    assert one["dParallel-LLaDA"] == pytest.approx(156.8, abs=0.05)
    assert one["dParallel-Dream"] == pytest.approx(158.6, abs=0.05)
    assert one["d3LLM-LLaDA"] == pytest.approx(237.7, abs=0.05)
    assert score([[1.0, 74.02], [9.11, 73.09]], 83.94) == pytest.approx(485.7, abs=0.05)
