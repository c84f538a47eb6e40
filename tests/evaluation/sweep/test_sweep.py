"""Sweeps: figures that can be counted by hand, files that survive every interruption, settings refused beforehand."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from foreign_locks import foreign_lock
from official import tiny_tokenizer
from places import SUPPORT
from sweeping import ANSWER, BOLD, CAREFUL, sure_model, task_of, without_times
from tiny import tiny_model

from d3llm_hf.evaluation.sweep import sweep as module
from d3llm_hf.evaluation.sweep.grids import Curve
from d3llm_hf.evaluation.sweep.points import read_points
from d3llm_hf.evaluation.sweep.sweep import check_settings, commit, model_fingerprint, sweep


def run(output: Path, curves=(CAREFUL, BOLD), *, task=None, model=None, **kwargs) -> list[dict]:
    chosen = {"label": "sure", "batch_size": 2, "chat": False} | kwargs
    return sweep(model or sure_model(), tiny_tokenizer(), task or task_of(), list(curves), output, **chosen)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "results.jsonl"


@pytest.fixture
def decoded(monkeypatch) -> list[int]:
    """Number of the first sample of each batch that was decoded and counted."""
    seen: list[int] = []
    decode = module._decode

    def watched(model, tokenizer, task, rows, settings, start, length):
        if length > 1:
            seen.append(start)
        return decode(model, tokenizer, task, rows, settings, start, length)

    monkeypatch.setattr(module, "_decode", watched)
    return seen


def test_figures_equal_those_counted_by_hand(output):
    careful, bold, bolder = run(output)
    # One token a forward: the seven of the answer and the stop token.
    assert careful["samples"]["tokens"] == [7] * 5
    assert careful["samples"]["forwards"] == [8] * 5
    assert careful["samples"]["correct"] == [1, 1, 0, 1, 1]
    assert (careful["tpf"], careful["tpf_reference"], careful["accuracy"]) == (0.875, 0.875, 80.0)
    # A block of four a forward; the fill behind the stop token ends the row, for which the reference counts one more.
    for point in (bold, bolder):
        assert point["samples"]["forwards"] == [2] * 5
        assert point["samples"]["forwards_reference"] == [3] * 5
        assert (point["tpf"], point["tpf_reference"]) == (3.5, round(7 / 3, 4))
        assert point["tpf_interval"] == [3.5, 3.5]  # all samples are alike
        assert point["accuracy_interval"][0] < 80 < point["accuracy_interval"][1] <= 100
    # The canvas of 3 + 16 slots in every forward.
    assert careful["positions_per_token"] == round(19 * 8 / 7, 2)
    assert (careful["parameter"], careful["value"]) == (None, None)
    assert [(p["method"], p["parameter"], p["value"]) for p in (bold, bolder)] == [
        ("bold", "entropy_threshold", 0.1),
        ("bold", "entropy_threshold", 0.5),
    ]
    assert bold["settings"] == {"decoding_method": "d3llm", "block_length": 4, "entropy_threshold": 0.1}
    assert (bold["model"], bold["task"], bold["num_samples"], bold["seed"]) == ("sure", "letters", 5, 7)
    assert read_points(output) == [careful, bold, bolder]
    assert [file.name for file in output.parent.iterdir()] == [output.name]  # no progress file stays


def test_speed_is_tokens_over_the_time_in_generate(output, monkeypatch):
    class Clock:
        ticks = 0

        def perf_counter(self):
            self.ticks += 1
            return self.ticks / 2

        def process_time(self):
            return self.ticks / 4

    monkeypatch.setattr(module, "time", Clock())
    (point,) = run(output, [CAREFUL])  # three batches of half a second each
    assert (point["seconds"], point["cpu_seconds"], point["tokens_per_second"]) == (1.5, 0.75, round(35 / 1.5, 2))


def test_the_record_says_what_repeats_the_measurement(output):
    point = run(output, [CAREFUL], revision="abc")[0]
    made = point["provenance"]
    assert (made["device"], made["dtype"], made["max_new_tokens"], made["batch_size"]) == ("cpu", "float32", 16, 2)
    assert made["model_revision"] == "abc"
    assert made["torch"] == torch.__version__
    assert made["scored_by"] == "same_text"
    assert set(made) >= {"d3llm_hf", "transformers", "python", "commit", "date", "model_fingerprint", "threads"}


def test_what_is_complete_is_not_measured_again_and_what_is_new_is_added(output, decoded):
    first = run(output, [BOLD])
    before = output.read_bytes()
    decoded.clear()
    assert run(output, [BOLD]) == first
    assert decoded == [] and output.read_bytes() == before
    more = run(output, [BOLD, CAREFUL])
    assert more[:2] == first and decoded == [0, 2, 4]
    assert output.read_bytes().startswith(before)


@pytest.mark.every(6)
@pytest.mark.parametrize(
    "change",
    [
        {"max_new_tokens": 12},
        {"batch_size": 3},
        {"label": "other"},
        {"task": task_of(4)},
        {"task": task_of(scorer=lambda prediction, reference: True)},
        {"curves": [Curve("llada", "another name", {"block_length": 4}, values=())]},
        {"curves": [Curve("llada", settings={"block_length": 8}, values=())]},
        {"chat": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_is_measured_otherwise_is_another_point(output, decoded, change):
    run(output, [CAREFUL])
    decoded.clear()
    run(output, **({"curves": [CAREFUL]} | change))
    assert decoded and len(read_points(output)) == 2


def test_two_sweeps_on_one_file_are_one_sweep_and_a_refusal_before_anything_is_decoded(output, decoded):
    expected = r"`output` must be written by one process at a time .*results.jsonl', which process 1 on elsewhere is"
    with foreign_lock(output), pytest.raises(ValueError, match=expected):
        run(output)
    assert decoded == [] and not output.exists()

    def starting_another(prediction: str, reference: str) -> bool:
        with pytest.raises(ValueError, match=f"process {os.getpid()} on"):
            in_a_thread(run, output)
        return prediction == reference

    points = run(output, [CAREFUL], task=task_of(2, scorer=starting_another))
    assert read_points(output) == points


def in_a_thread(function, *args):
    with ThreadPoolExecutor() as pool:
        return pool.submit(function, *args).result()


def test_an_interrupted_sweep_goes_on_where_it_was(output, tmp_path, decoded):
    whole = [without_times(point) for point in run(tmp_path / "whole.jsonl")]

    def failing_at(sample: int):
        calls = []

        def same_text(prediction: str, reference: str) -> bool:
            calls.append(prediction)
            if len(calls) == sample:
                raise KeyboardInterrupt
            return prediction == reference

        return task_of(scorer=same_text)

    # In the second batch of the first point, then in the second one of the second.
    for interrupted, expected in ((3, [0, 2]), (9, [2, 4, 0, 2, 4, 0])):
        decoded.clear()
        with pytest.raises(KeyboardInterrupt):
            run(output, task=failing_at(interrupted))
        assert decoded == expected
    decoded.clear()
    # The order of the curves has changed: the point that was begun is finished first all the same.
    points = run(output, [BOLD, CAREFUL])
    assert decoded == [0, 2, 4]
    assert [without_times(point) for point in points] == [*whole[1:], whole[0]]


@pytest.mark.full  # a process of its own; an interrupted sweep is among the default tests
def test_a_killed_sweep_loses_at_most_the_open_batch(output, tmp_path, decoded):
    marker = tmp_path / "now"
    script = SUPPORT / "sweeping.py"
    process = subprocess.Popen(
        [sys.executable, str(script), str(output), str(marker)],
        env=os.environ | {"PYTHONPATH": str(script.parents[2])},
        stderr=subprocess.PIPE,
    )
    try:
        deadline = time.monotonic() + 300
        while not marker.exists() and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read().decode()[-2000:]
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not output.exists()
    points = run(output, batch_size=1)
    assert decoded[:2] == [3, 4]
    whole = run(tmp_path / "whole.jsonl", batch_size=1)
    assert list(map(without_times, points)) == list(map(without_times, whole))


def interrupted(output: Path) -> Path:
    """A sweep that stopped in its second batch; returns its progress file."""
    calls = []

    def same_text(prediction: str, reference: str) -> bool:
        calls.append(prediction)
        if len(calls) == 3:
            raise RuntimeError("power cut")
        return prediction == reference

    with pytest.raises(RuntimeError, match="power cut"):
        run(output, [CAREFUL], task=task_of(scorer=same_text))
    return output.with_name(".results.jsonl.progress")


@pytest.mark.every(2)
@pytest.mark.parametrize(
    ("damage", "pattern"),
    [
        (lambda text: text[:-9], "no damaged progress file .* .got JSONDecodeError"),
        (lambda text: text.replace('"tokens": [7, 7]', '"tokens": [7, 8]'), "no damaged .* another checksum"),
        (lambda text: "[]", "no damaged progress file .* .got TypeError"),
        (lambda text: text.replace('"key": "', '"key": "0'), "no foreign .* a point of another sweep, sure, llada"),
    ],
)
def test_damaged_or_foreign_progress_is_refused_by_name(output, damage, pattern):
    progress = interrupted(output)
    damaged = damage(progress.read_text())
    assert damaged != progress.read_text()
    progress.write_text(damaged)
    with pytest.raises(ValueError, match=pattern):
        run(output, [CAREFUL])
    progress.unlink()
    assert run(output, [CAREFUL])[0]["accuracy"] == 80.0


def test_progress_of_a_point_that_is_in_the_results_is_forgotten(output, decoded):
    progress = interrupted(output)
    held = progress.read_bytes()
    run(output, [CAREFUL])
    progress.write_bytes(held)  # as if the process had ended between the two
    decoded.clear()
    run(output, [CAREFUL])
    assert decoded == [] and not progress.exists()


def test_a_sweep_of_several_models_goes_on_with_the_one_that_was_interrupted(output, decoded):
    first = run(output, [CAREFUL], label="first")
    interrupted(output)
    decoded.clear()
    assert run(output, [CAREFUL], label="first") == first
    run(output, [CAREFUL])
    assert decoded == [2, 4]


def test_a_damaged_results_file_is_refused_before_anything_is_decoded(output, decoded):
    run(output, [CAREFUL])
    output.write_bytes(output.read_bytes()[:-20])
    decoded.clear()
    with pytest.raises(ValueError, match=r"results.jsonl, line 1: a line of a results file must be a point"):
        run(output, [BOLD])
    assert decoded == []


def test_settings_that_generate_refuses_are_refused_before_anything_is_decoded(output, decoded):
    bad = Curve("fast_dllm", parameter="confidence_threshold", values=(0.9, 1.5))
    pattern = "sure, fast_dllm, confidence_threshold=1.5: `confidence_threshold` must be a probability"
    with pytest.raises(ValueError, match=pattern):
        run(output, [CAREFUL, bad])
    with pytest.raises(TypeError, match="d3llm, entropy_threshold=high: `entropy_threshold` must be a number"):
        run(output, [Curve("d3llm", values=("high",))])
    with pytest.raises(ValueError, match=r"`entropy_treshold` is not a generation setting. Did you mean"):
        run(output, [Curve("llada", settings={"entropy_treshold": 1}, values=())])
    with pytest.raises(ValueError, match="point: `leap_radius` is not used by"):
        check_settings({"decoding_method": "llada", "leap_radius": 1}, 8)
    assert decoded == [] and not output.exists()


@pytest.mark.parametrize(
    ("kwargs", "pattern"),
    [
        ({"batch_size": 0}, "`batch_size` must be a positive integer .got 0"),
        ({"max_new_tokens": 0}, "`max_new_tokens` must be a positive integer .got 0"),
        ({"max_new_tokens": 2046}, r"leave room for the longest prompt in the model's 2048 positions .got 3 \+ 2046"),
        ({"curves": [BOLD, BOLD]}, "`curves` must have different labels"),
    ],
)
def test_arguments_outside_their_range_are_refused(output, kwargs, pattern):
    with pytest.raises(ValueError, match=pattern):
        run(output, **kwargs)


def test_random_choices_are_those_of_each_sample_whatever_the_batch(output):
    model = tiny_model("llada", vocab_size=512)
    curve = Curve("llada", settings={"remasking": "random", "do_sample": True, "steps": 8}, values=())
    judged: dict[int, list[str]] = {}

    def kept(size):
        def scorer(prediction: str, reference: str) -> bool:
            judged.setdefault(size, []).append(prediction)
            return True

        return task_of(4, scorer)

    for size in (1, 3):
        run(output.with_name(f"{size}.jsonl"), [curve], task=kept(size), model=model, batch_size=size)
    assert judged[1] == judged[3] and len(set(judged[1])) > 1


def test_text_that_ends_an_answer_ends_its_row(output):
    class Cut(type(task_of())):
        stop_strings = ("##",)

    task = task_of()
    cut = Cut(**vars(task))
    (point,) = run(output, [CAREFUL], task=cut)
    assert point["samples"]["forwards"] == [2] * 5 and point["samples"]["tokens"] == [2] * 5


def test_a_bar_is_shown_on_a_terminal_only(output, capsys, monkeypatch):
    run(output, [CAREFUL])
    assert capsys.readouterr().err == ""
    run(output, [BOLD], progress=True)
    shown = capsys.readouterr().err
    assert "sure" in shown and "6/6" in shown and "bold, entropy_threshold=0.5" in shown


def test_the_fingerprint_follows_weights_and_settings(tmp_path):
    model = tiny_model("llada")
    first = model_fingerprint(model)
    assert model_fingerprint(tiny_model("llada")) == first
    model.save_pretrained(tmp_path)
    assert model_fingerprint(type(model).from_pretrained(tmp_path)) == first
    model.generation_config.block_length = 8
    assert model_fingerprint(model) != first
    assert model_fingerprint(tiny_model("llada", seed=1)) != first


def test_the_commit_is_that_of_the_sources_or_none(monkeypatch):
    def absent(*args, **kwargs):
        raise OSError("no git")

    found = commit()
    assert found is None or len(found.removesuffix("-dirty")) >= 40
    monkeypatch.setattr(module.subprocess, "run", absent)
    assert commit() is None


def test_a_results_file_is_json_lines(output):
    points = run(output)
    lines = output.read_text().splitlines()
    assert [json.loads(line) for line in lines] == points
    assert ANSWER not in output.read_text()
