"""Memory and time of the large recipes: the formulas by hand, and the committed figures."""

import json

import pytest
import torch
from places import REPOSITORY

from d3llm_hf import LLaDAConfig, LLaDAModelLM
from d3llm_hf.evaluation.tables.fill import table
from trainers.bench import estimate
from trainers.bench.estimate import GPU, GPUS, Sizes, Step


COMMITTED = REPOSITORY / "d3llm_hf" / "evaluation" / "results" / "training_estimate.json"
SIZES = Sizes(parameters=1000, in_layers=800, adapter=0, width=10, layers=2, vocabulary=10)
STEP = Step(texts=2, length=5, answer=3, positions=20, learnt=4)


def test_k_is_what_is_left_of_the_measured_step():
    measured = {"parameters": 10, "positions": 5, "learnt": 2, "width": 3, "layers": 2, "vocabulary": 7}
    step_bytes = 4 * 10 + 8 * 2 * 7 + 4 * 5 * 3 * 2 * 16
    assert estimate.kept_by_a_layer(measured | {"step_bytes": step_bytes}) == 16


def test_memory_is_the_sum_that_the_formulas_say():
    found = estimate.memory_of(SIZES, STEP, "zero3", 3.0)
    assert found == {"weights": 16000 / GPUS, "teacher": 0, "activations": 2 * 20 * 10 * (2 + 3), "logits": 8 * 4 * 10}
    assert estimate.memory_of(SIZES, STEP, "zero2", 3.0)["weights"] == 2000 + 14000 / GPUS
    adapted = Sizes(**vars(SIZES) | {"adapter": 50})
    assert estimate.memory_of(adapted, STEP, "copies", 3.0)["weights"] == 2000 + 1000
    taught = Step(**vars(STEP) | {"asks_teacher": True, "own_teacher": True})
    found = estimate.memory_of(SIZES, taught, "zero3", 3.0)
    assert (found["teacher"], found["logits"]) == (4000, 12 * 4 * 10)


def test_operations_are_the_sum_that_the_formulas_say():
    plain = 20 * (8 * 800 + 16 * 2 * 10 * 5) + 6 * 4 * 10 * 10
    assert estimate.operations_of(SIZES, STEP) == plain
    adapted = Sizes(**vars(SIZES) | {"adapter": 50})
    assert estimate.operations_of(adapted, STEP) == plain - 20 * 2 * 800 + 20 * 8 * 50
    rolled = Step(**vars(STEP) | {"rollout_forwards": 3})
    forward = 5 * (2 * 800 + 4 * 2 * 10 * 5) + 2 * 3 * 10 * 10
    assert estimate.operations_of(SIZES, rolled) == plain + 3 * 2 * forward
    taught = Step(**vars(STEP) | {"asks_teacher": True})
    assert estimate.operations_of(SIZES, taught) == plain + 20 * (2 * 800 + 4 * 2 * 10 * 5) + 2 * 4 * 10 * 10


def test_sizes_are_read_off_the_model():
    config = LLaDAConfig(vocab_size=50, d_model=8, n_layers=2, n_heads=2, mlp_hidden_size=12, mask_token_id=1)
    found = estimate.sizes_of(LLaDAModelLM, config, rank=3)
    with torch.device("meta"):
        assert found.parameters == LLaDAModelLM(config).num_parameters()
    assert (found.in_layers, found.width, found.layers, found.vocabulary) == (2 * (4 * 64 + 3 * 96), 8, 2, 50)
    assert found.adapter == 3 * 2 * (4 * 16 + 3 * 20)


def test_the_committed_estimate_is_what_the_formulas_give_and_its_table_says_that_it_is_one():
    committed = json.loads(COMMITTED.read_text(encoding="utf-8"))
    assert committed["rows"] == estimate.estimate(committed["measured"]) and committed["gpu"] == GPU
    text = table(committed)
    assert text.startswith("Estimated, not measured:") and text.count("\n| `d3llm_") == len(committed["rows"]) == 12
    sizes = {row["recipe"]: row["bytes"]["weights"] for row in committed["rows"]}
    assert sizes["d3llm_llada_8b"] == pytest.approx(2 * 8.02e9 + 20 * 0.671e9, rel=1e-2)


def test_the_command_reads_what_the_bench_has_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "MODELS", {})
    measured = {"step_bytes": 1000.0, "parameters": 10, "positions": {"all": 5, "learnt": 2}}
    shape = {"d_model": 3, "layers": 2, "vocab_size": 7}
    rows = [{"step_bytes": 0}, {"step_bytes": 0}, {"step_bytes": measured.pop("step_bytes")}]
    (tmp_path / "bench.json").write_text(json.dumps(measured | {"shape": shape, "rows": rows}), encoding="utf-8")
    estimate.main(["--measured", str(tmp_path / "bench.json"), "-o", str(tmp_path / "estimate.json")])
    found = json.loads((tmp_path / "estimate.json").read_text(encoding="utf-8"))
    assert found["kept"] == round((1000 - 40 - 112) / 120, 2) and found["rows"] == []
