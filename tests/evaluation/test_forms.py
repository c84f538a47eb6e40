"""Forms are measured against free text, and the table says what was measured."""

import json

import pytest

from d3llm_hf.evaluation import forms
from d3llm_hf.evaluation.tables.fill import table


ROW = {
    "model": "m",
    "name": "free text",
    "accuracy": 99.26,
    "valid": 100.0,
    "forwards": 8.04,
    "positions": 512.3,
    "seconds": 6.6,
}


def test_the_table_says_what_was_measured_and_how_to_repeat_it():
    made = {"m": {"torch": "2.13.0", "transformers": "5.24.0"}}
    settings = {"decoding_method": "d3llm"}
    results = {
        "suite": "forms",
        "rows": [ROW],
        "settings": settings,
        "provenance": made,
        "problems": 5,
        "command": "c",
    }
    lines = table(results).splitlines()
    assert lines[2] == "| m | free text | 99.3 % | 100.0 % | 8.0 | 512 | 7 |"
    assert lines[4].startswith("5 held-out word problems of 2-5 steps, `decoding_method='d3llm'`")
    assert lines[4].endswith("torch 2.13.0, transformers 5.24.0. Regenerate: `c`.")


@pytest.mark.full
def test_every_way_of_answering_is_a_row_for_each_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(forms, "WAYS", dict(list(forms.WAYS.items())[:3]))
    forms.main(["-o", str(tmp_path / "forms.json"), "--num-problems", "2", "--seed", "3"])
    results = json.loads((tmp_path / "forms.json").read_text())
    assert results["command"] == "python -m d3llm_hf.evaluation.forms --num-problems 2 --seed 3 -o forms.json"
    assert {(row["model"], row["name"]) for row in results["rows"]} == {
        (model, way) for model in ("d3llm-llada", "d3llm-llada-teacher") for way in forms.WAYS
    }
    assert all(row["valid"] == 100 for row in results["rows"] if row["name"] != "free text")
    lines = table(results).splitlines()
    assert lines[2].startswith("| d3llm-llada") and "| free text |" in lines[2] and len(lines) == 10
    assert lines[-1].startswith("2 held-out word problems") and results["command"] in lines[-1]


@pytest.mark.full
def test_json_is_one_of_the_ways():
    from d3llm_hf.hub.loading import load

    rows = forms.measure(*load("d3llm-llada", device="cpu", dtype="float32"), forms.generate_problems(2, seed=1))
    assert [row["valid"] for row in rows[1:]] == [100.0] * 3


def test_a_number_of_problems_below_one_is_refused(capsys):
    with pytest.raises(SystemExit):
        forms.main(["-o", "x.json", "--num-problems", "0"])
    assert "--num-problems must be at least 1 (got 0)" in capsys.readouterr().err
