"""Both embedded students in one run: what is counted, and what the committed file holds."""

import json

import pytest
import torch
from places import REPOSITORY
from transformers import AutoModelForCausalLM, AutoTokenizer

from d3llm_hf.evaluation import students
from d3llm_hf.evaluation.tables.fill import table
from d3llm_hf.hub.sources import embedded_checkpoints


@pytest.fixture
def one_thread():
    """`main` chooses the number of threads for the whole process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_committed_file_has_every_row_and_what_it_shows():
    path = REPOSITORY / "d3llm_hf" / "evaluation" / "results" / "students.json"
    results = json.loads(path.read_text())
    assert results["command"] == "python -m d3llm_hf.evaluation.students -o d3llm_hf/evaluation/results/students.json"
    found = [(row["batch"], row["model"], row["way"], row["settings"]) for row in results["rows"]]
    assert found == [(size, *rival) for size in students.BATCHES for rival in students.contestants()]
    assert table(results).count("\n| ") == len(found)


@pytest.mark.full
def test_a_run_counts_what_generate_says(tmp_path, monkeypatch, one_thread):
    monkeypatch.setattr(students, "BATCHES", (2,))
    monkeypatch.setattr(students, "THRESHOLDS", (0.3,))
    students.main(["-o", str(tmp_path / "out.json"), "--num-problems", "3"])
    results = json.loads((tmp_path / "out.json").read_text())
    assert results["command"] == "python -m d3llm_hf.evaluation.students --num-problems 3 -o out.json"
    rows = results["rows"]
    assert [row["model"] for row in rows] == [students.WHOLE] * 2 + [students.BLOCKS] * 2
    folder = embedded_checkpoints()[students.BLOCKS]
    models = {
        name: (AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
        for name in students.WAYS
    }
    with pytest.raises(ValueError, match="kv_cache"):  # no approximate cache in blocks
        students.measure_students(models, 1, (1,))
    assert all(row["tpf"] > 1 and row["tokens_per_second"] > 0 for row in rows)


def test_what_cannot_be_measured_is_refused(tmp_path, capsys):
    for argv in (["-o", str(tmp_path / "a.json"), "--num-problems", "0"], ["-o", str(tmp_path)]):
        with pytest.raises(SystemExit):
            students.main(argv)
    assert "--num-problems must be at least 1 (got 0)" in capsys.readouterr().err
