"""`d3llm bench serve` on a handful of requests; no figure of it is judged here."""

import json
import sys

import pytest

from d3llm_hf import cli
from d3llm_hf.bench import serving
from d3llm_hf.evaluation.tables.fill import table
from d3llm_hf.serving.worker import Worker


@pytest.mark.full
def test_both_schedulers_answer_the_same_at_each_load_and_the_picture_lies_beside_the_results(tmp_path, capsys):
    path = tmp_path / "bench_serve.json"
    options = ["--requests", "2", "--slots", "2", "--lengths", "8", "12", "--loads", "2", "--block-length", "4"]
    assert cli.main(["bench", "serve", *options, "-o", str(path)]) == 0
    results, out = json.loads(path.read_text()), capsys.readouterr().out
    assert [(row["load"], row["name"]) for row in results["rows"]] == [(2.0, name) for name in serving.SCHEDULERS]
    assert all(row["equal_answers"] == 100 and row["first_p95"] <= row["last_p95"] for row in results["rows"])
    assert results["rows"][0]["gain"] == results["rows"][0]["wait"] == 1 and results["capacity"] > 0
    assert results["bench"]["settings"] == {"block_length": 4} and results["command"].startswith("d3llm bench serve")
    assert out == table(results)
    assert path.with_suffix(".svg").read_bytes() == serving.draw(results, "svg")
    assert serving.draw(results, "png").startswith(b"\x89PNG")


def test_without_matplotlib_the_picture_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'd3llm-hf\[eval\]'"):
        serving.draw({"rows": []}, "png")


@pytest.mark.parametrize(
    "wrong", [{"requests": 0}, {"slots": -1}, {"lengths": ()}, {"loads": (1.0, 0.0)}, {"repeats": 0}], ids=str
)
def test_what_cannot_be_measured_is_refused(wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(ValueError, match=f"`{name}` must"):
        serving.ServeBench(**{name: value})


def test_a_request_that_is_not_answered_ends_the_bench(monkeypatch):
    monkeypatch.setattr(Worker, "_prepare", lambda self, job: 1 / 0)
    with pytest.raises(RuntimeError, match="status 500"):
        serving.measure_serving(serving.ServeBench(requests=1, loads=(1.0,)))


def test_a_percentile_is_the_least_value_that_so_many_are_at_most():
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [serving.percentile(values, share) for share in (1, 20, 21, 50, 95, 100)] == [1, 1, 2, 3, 5, 5]
