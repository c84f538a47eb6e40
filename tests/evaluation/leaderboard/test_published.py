"""The published figures: complete, consistent, equal to what the metric makes of their pairs."""

import json

import pytest
from places import GOLDEN

from d3llm_hf.evaluation.leaderboard.published import check, contradictions, published, published_points
from d3llm_hf.metrics.aup.curve import aup_score


RECORDED = json.loads((GOLDEN / "aup" / "aup.json").read_text())
NAMES = {
    "Qwen-2.5-7B-it": ("Qwen2.5-7B-Instruct", "autoregressive"),
    "LLaDA": ("LLaDA-8B-Instruct", "LLaDA"),
    "Fast-dLLM-LLaDA": ("LLaDA-8B-Instruct", "Fast-dLLM"),
    "D2F": ("LLaDA-8B-Instruct", "D2F"),
    "dParallel-LLaDA": ("LLaDA-8B-Instruct", "dParallel"),
    "d3LLM-LLaDA": ("LLaDA-8B-Instruct", "d3LLM"),
    "Qwen2.5-Coder-7B": ("Qwen2.5-Coder-7B-Instruct", "autoregressive"),
    "Dream-Coder-7B": ("Dream-Coder-v0-Instruct-7B", "Dream-Coder"),
    "d3LLM-Coder-7B": ("Dream-Coder-v0-Instruct-7B", "d3LLM"),
}


@pytest.mark.parametrize("table", ["llada", "coder"])
def test_published_pairs_and_aups_are_those_of_the_reference(table):
    content = published()
    golden = RECORDED["tables"]["data_llada" if table == "llada" else "data_dream_coder"]
    curves = {(c["model"], c["method"], c["task"]): c for c in content["curves"] if table in c["tables"]}
    assert len(curves) == sum(len(task["methods"]) for task in golden.values())
    for task in content["tables"][table]["tasks"]:
        wanted = golden[task["as_published"]]
        assert task["y_max"] == wanted["y_max"]
        for name, found in wanted["methods"].items():
            curve = curves[(*NAMES[name], task["task"])]
            assert curve["pairs"] == found["pairs"]
            assert curve["aup"] == pytest.approx(found["aup"], abs=0.0501)  # published to one decimal


def test_every_published_aup_follows_from_its_pairs_and_its_y_max():
    curves = {}
    for point in published_points():
        curves.setdefault((point["model"], point["method"], point["task"]), []).append(point)
    assert len(curves) == len(published()["curves"]) == 74 + 16
    without = {key[1] for key, curve in curves.items() if curve[0]["aup"] is None}
    assert without == {"TAD (quality)", "TAD (speed)"}
    for curve in curves.values():
        if curve[0]["aup"] is not None:
            assert score_of(curve) == pytest.approx(curve[0]["aup"], abs=0.0501)


def score_of(curve: list[dict]) -> float:
    return aup_score([p["tpf"] for p in curve], [p["accuracy"] for p in curve], y_max=curve[0]["y_max"]).aup


def test_every_published_average_is_the_mean_of_its_curves():
    content = published()
    for average in content["averages"]:
        key, table = (average["model"], average["method"]), average["table"]
        tasks: dict[str, list[dict]] = {}
        for point in published_points():
            if (point["model"], point["method"]) == key and table in point["tables"]:
                tasks.setdefault(point["task"], []).append(point)
        assert list(tasks) == [task["task"] for task in content["tables"][table]["tasks"]]
        mean = sum(map(score_of, tasks.values())) / len(tasks)
        assert mean == pytest.approx(average["aup"], abs=0.07)


def test_systems_of_the_poster_and_those_after_it_are_there_with_their_sources():
    content = published()
    methods = {curve["method"]: curve["source"] for curve in content["curves"]}
    assert methods["EAGLE-3"] == "yaml_dream" and methods["autoregressive"] == "yaml_coder"
    assert methods["TAD (speed)"] == "yaml_tad_dream"
    assert "not like for like" in content["tables"]["tad_llada"]["note"]
    engines = [row for row in content["throughput"] if row["backend"] == "SGLang"]
    assert len(engines) == 10 and {row["source"] for row in engines} == {"sglang"}


def test_the_ablation_follows_from_one_accuracy_at_one_token_a_forward():
    ablation = published()["ablation"]
    for row in ablation["rows"]:
        score = aup_score([1, row["tpf"]], [ablation["y_1"], row["accuracy"]], y_max=ablation["y_max"])
        assert score.aup == pytest.approx(row["aup"], abs=0.11)


def test_every_contradiction_says_what_where_which_value_and_why():
    ledger = contradictions()
    sources = published()["sources"]
    assert [entry["id"] for entry in ledger] == list(range(1, 22))
    for entry in ledger:
        assert set(entry) == {"id", "about", "differs", "where", "used", "why"}
        assert all(entry.values()) and set(entry["where"]) <= set(sources)


def test_points_look_like_those_of_a_sweep_but_have_no_samples():
    for point in published_points():
        assert point["kind"] == "point" and point["published"] is True
        assert "samples" not in point and "accuracy_interval" not in point
        assert point["tpf"] >= 1 and 1 < point["accuracy"] <= 100


def changed(path: tuple, value) -> dict:
    content = published()
    place = content
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return content


@pytest.mark.parametrize(
    ("path", "value", "pattern"),
    [
        (("schema",), 2, r"`schema` must be 1 \(got 2\)"),
        (("curves", 0, "model"), None, r"`curves\[0\].model` must be str"),
        (("curves", 0, "source"), "hearsay", r"`curves\[0\]` must name sources"),
        (("curves", 0, "pairs"), [[1.0, 0.74]], "must be pairs of tokens per forward and percent"),
        (("curves", 0, "tables"), ["none"], "`curves\\[0\\].tables` must exist"),
        (("tables", "llada", "tasks", 0, "y_max"), 80.0, "`tables.llada`, GSM8K-CoT: y_max must be the best accuracy"),
        (("contradictions", 2, "why"), None, r"`contradictions\[2\].why` must be str"),
    ],
)
def test_an_entry_that_is_incomplete_or_inconsistent_is_refused_by_name(path, value, pattern):
    with pytest.raises(ValueError, match=pattern):
        check(changed(path, value))
