"""The ablation: its plan, its summary against hand-computed figures, and one run from trajectories to the summary."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from distillation import rows

from d3llm_hf.evaluation.tables import fill as tables
from d3llm_hf.metrics.aup.curve import aup_score
from trainers import run_ablation
from trainers.distill.ablation import summarise, tpf_at
from trainers.distill.config import PseudoTrajectoryDistillConfig
from trainers.run_ablation import Plan, read_part, read_plan, student_folder


PLANS = sorted((Path(run_ablation.__file__).parent / "recipes").glob("ablation_*.yaml"))


def point(correct, tokens, forwards, value=None):
    samples = {"correct": correct, "tokens": tokens, "forwards": forwards}
    parameter = None if value is None else "entropy_threshold"
    return {"parameter": parameter, "value": value, "num_samples": len(correct), "samples": samples}


def curve(*points):
    """`(right of 4, forwards)` of each point; answers of 12 tokens."""
    return [
        point([1] * right + [0] * (4 - right), [12] * 4, [forwards] * 4, value=float(value))
        for value, (right, forwards) in enumerate(points)
    ]


ONE_TOKEN = point([1, 1, 1, 1], [12] * 4, [12] * 4)


@pytest.mark.parametrize(
    ("accuracy", "tpf", "floor", "expected"),
    [
        ([100, 98, 90], [2, 4, 6], 98, 4),
        ([100, 98, 90], [2, 4, 6], 94, 5),  # half-way between the last two points
        ([100, 98, 90], [2, 4, 6], 80, 6),
        ([90, 99], [4, 3], 98, 3.0 + 1 / 9),  # a curve may come back
        ([99, 97, 99], [2, 4, 5], 98, 5),
        ([90, 80], [2, 4], 95, float("nan")),
    ],
)
def test_the_speed_at_an_accuracy_lies_on_the_curve(accuracy, tpf, floor, expected):
    assert tpf_at(accuracy, tpf, floor) == pytest.approx(expected, nan_ok=True)


def test_the_summary_equals_figures_made_by_hand():
    teacher = {"plain": curve((4, 6), (3, 4))}
    arms = {
        "twin": {"plain": [curve((4, 5), (3, 3)), curve((4, 4), (2, 3))]},
        "ours": {"plain": [curve((4, 3), (3, 2)), curve((3, 3), (3, 2))]},
    }
    base, twin, ours = summarise(arms, teacher, ONE_TOKEN, twin="twin", slack=25.0, num_resamples=50)
    assert [base["arm"], twin["arm"], ours["arm"]] == ["teacher", "twin", "ours"]
    assert (base["seeds"], twin["seeds"]) == (1, 2)
    # At 75 %: the teacher's second point; the twin's second point, and half-way between 3 and 4 tokens a forward.
    assert base["tpf"] == 3.0 and ours["tpf"] == 6.0
    assert twin["tpf"] == pytest.approx((4 + 3.5) / 2)
    assert twin["over_teacher"] == pytest.approx(1.25) and ours["over_twin"] == pytest.approx(1.6)
    assert "over_twin" not in twin and "over_teacher" not in base
    scores = [aup_score([3, 4], [100, 50], y_max=100).aup, aup_score([12 / 5, 4], [100, 75], y_max=100).aup]
    assert twin["aup"] == pytest.approx(np.mean(scores), abs=1e-3)
    assert twin["curve"][1] == {
        "value": 1.0,
        "accuracy": 62.5,
        "tpf": 4.0,
        "accuracy_range": [50.0, 75.0],
        "tpf_range": [4.0, 4.0],
    }
    for row in (base, twin, ours):
        low, high = row["tpf_interval"]
        assert low <= row["tpf"] <= high


def test_a_curve_that_is_never_right_enough_has_no_speed():
    rows = summarise(
        {"twin": {"plain": [curve((1, 2), (0, 1))]}}, {"plain": curve((4, 6), (4, 4))}, ONE_TOKEN, twin="twin"
    )
    assert rows[1]["tpf"] is None and rows[1]["over_teacher_interval"] is None


def test_an_interval_is_paired_where_the_models_answer_alike():
    # Both are right on the same samples and equally slow: their ratio is 1 in every resample.
    rows = summarise(
        {"twin": {"plain": [curve((4, 6), (3, 4))]}}, {"plain": curve((4, 6), (3, 4))}, ONE_TOKEN, twin="twin"
    )
    assert rows[1]["over_teacher_interval"] == [1.0, 1.0]


def test_seeds_with_other_grids_are_refused():
    with pytest.raises(ValueError, match="must be decoded with the same grid"):
        summarise({"twin": {"plain": [curve((4, 6)), curve((4, 6), (3, 4))]}}, {}, ONE_TOKEN, twin="twin")


def test_a_teacher_that_is_never_right_is_refused():
    with pytest.raises(ValueError, match=r"must answer some of the problems right \(got none of 2"):
        summarise({}, {}, point([0, 0], [12] * 2, [12] * 2), twin="twin")


PLAN = {
    "recipe": "recipe.yaml",
    "teacher": "d3llm-llada",
    "arms": {"random masks": {"objective": "random"}, "+ trajectory": {"objective": "trajectory"}},
    "twin": "random masks",
    "seeds": [0],
    "one_token": {"decoding_method": "llada", "block_length": 6},
    "decodings": {"block by block": {"decoding_method": "dparallel", "block_length": 6}},
    "thresholds": [0.1, 1.0],
    "num_problems": 3,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"twin": "none"}, "`twin` must be one of the arms"),
        ({"arms": {"teacher": {}, "random masks": {}}}, "`arms` must not hold 'teacher'"),
        ({"armz": {}}, "`--config` must map .*armz"),
    ],
)
def test_a_plan_that_cannot_be_carried_out_is_refused(tmp_path, change, message):
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(PLAN | change))
    with pytest.raises(ValueError, match=message):
        read_plan(tmp_path / "plan.yaml")


@pytest.mark.parametrize("text", ["1", "2/2", "a/b", "-1/2"])
def test_a_part_that_does_not_exist_is_refused(text):
    with pytest.raises(ValueError, match="`--part` must be I/N"):
        read_part(text)


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_a_committed_plan_is_read_and_its_arms_are_taken_and_differ(path, tmp_path):
    plan = read_plan(path)
    assert isinstance(plan, Plan) and len(plan.seeds) >= 3 and plan.num_problems >= 1000
    assert len({json.dumps(arguments) for arguments in plan.arms.values()}) == len(plan.arms)
    recipe = yaml.safe_load(Path(plan.recipe).read_text())
    known = {field.name for field in dataclasses.fields(PseudoTrajectoryDistillConfig)}
    for arm in plan.arms.values():
        given = recipe | plan.common | arm | {"output_dir": str(tmp_path)}
        PseudoTrajectoryDistillConfig(**{name: value for name, value in given.items() if name in known})


@pytest.mark.full
def test_an_ablation_is_trained_decoded_and_summarised_once(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows(8)))
    recipe = {
        "model_name_or_path": "d3llm-llada",
        "dataset_name": str(tmp_path / "rows.jsonl"),
        "max_prompt_length": 8,
        "response_length": 12,
        "max_steps": 2,
        "learning_rate": 1e-6,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "extract": {"dataset_name": "not here"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    plan = PLAN | {"common": {"window_sizes": [4, 6], "extract": None}}  # a null takes the recipe's away
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    out, arguments = tmp_path / "out", ["--config", str(tmp_path / "plan.yaml"), "--output_dir", str(tmp_path / "out")]

    run_ablation.main([*arguments, "--part", "1/2"])
    assert student_folder(out, "+ trajectory", 0).name == "with-trajectory-0"
    assert not (out / "ablation.json").exists() and "no summary" in caplog.text
    used = yaml.safe_load((out / "with-trajectory-0" / "recipe.yaml").read_text())
    assert used["window_sizes"] == [4, 6] and used["objective"] == "trajectory" and "extract" not in used
    run_ablation.main([*arguments, "--part", "0/2"])
    found = json.loads((out / "ablation.json").read_text())
    assert [row["arm"] for row in found["rows"]] == ["teacher", *PLAN["arms"]]
    assert all(len(row["curve"]) == 2 for row in found["rows"])
    assert found["one_token"]["num_samples"] == 3 and found["plan"]["recipe"] == "recipe.yaml"

    table = tables.table(found)
    assert table.count("| random masks |") == 1 and f"{found['rows'][1]['curve'][0]['tpf']:.2f}" in table
    assert "`python trainers/run_ablation.py --config plan.yaml --output_dir out`" in table

    before = (out / "ablation.json").read_bytes()
    monkeypatch.setattr("trainers.run_distill.main", lambda argv: pytest.fail("trained again"))
    run_ablation.main(arguments)
    assert (out / "ablation.json").read_bytes() == before
