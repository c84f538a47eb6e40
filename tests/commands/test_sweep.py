"""`d3llm sweep`: what is measured on the embedded checkpoint, and that bad input gets one line and exit code 2."""

import json
import re
import shlex
from functools import partial
from pathlib import Path

import pytest
from foreign_locks import foreign_lock
from outcomes import outcome_of

from d3llm_hf import cli
from d3llm_hf.commands import sweep as command
from d3llm_hf.evaluation.sweep.points import curves, read_points
from d3llm_hf.locks import lock_file


@pytest.fixture
def run(capsys):
    """Runs the command in this process: `(exit code, stdout, stderr)`."""
    return partial(outcome_of, cli.main, capsys, "sweep")


def test_a_sweep_measures_the_embedded_checkpoint_and_does_not_repeat_it(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = """
        d3llm-llada --methods d3llm fast_dllm --grid entropy_threshold=0.1,0.3 --grid confidence_threshold=0.9
        --set block_length=16 --task word_problems --num-samples 4 --max-new-tokens 24 --dtype float32 -o results.jsonl
    """
    argv = shlex.split(line)
    code, out, err = run(*argv)
    assert (code, out) == (0, "")
    points = read_points("results.jsonl")
    assert {point["model"] for point in points} == {"d3llm-llada"} and len(curves(points)) == 2
    assert all(point["num_samples"] == 4 and point["settings"]["block_length"] == 16 for point in points)
    assert all(point["tpf"] > 1.5 for point in points)
    lines = err.splitlines()
    assert len(lines) == len(points)
    line = r"d3llm-llada, word_problems, \w+, \w+=[\d.]+: [\d.]+ tokens per forward \([\d.]+ to [\d.]+\), "
    assert all(re.fullmatch(line + r"[\d.]+ % \([\d.]+ to [\d.]+\), \d+ tokens/s", text) for text in lines)
    monkeypatch.setattr("d3llm_hf.evaluation.sweep.sweep._decode", None)  # nothing is decoded again
    assert run(*argv) == (0, "", err)


def test_a_sweep_of_several_models_keeps_its_file_from_the_first_to_the_last(run, tmp_path, monkeypatch):
    output, held = tmp_path / "results.jsonl", []
    monkeypatch.setattr("d3llm_hf.evaluation.sweep.sweep.sweep", lambda *args, **kwargs: [])
    monkeypatch.setattr(command, "load", lambda *args, **kwargs: held.append(lock_file(output).exists()) or (0, 0))
    assert run("a", "b", "-o", output)[0] == 0
    assert held == [True, True] and not lock_file(output).exists()
    with foreign_lock(output):
        code, _, err = run("a", "-o", output)
    assert (code, len(held)) == (2, 2)
    assert "`--output` must be written by one process at a time" in err and "process 1 on elsewhere" in err


def test_arguments_reach_the_sweep(run, tmp_path, monkeypatch):
    calls = []

    def watched(model, tokenizer, task, curves, output, **kwargs):
        calls.append((model, task, curves, output, kwargs))
        return []

    monkeypatch.setattr("d3llm_hf.evaluation.sweep.sweep.sweep", watched)
    monkeypatch.setattr(command, "load", lambda source, **kwargs: (source, kwargs["dtype"]))
    argv = [
        "one=a",
        "two=b",
        "--methods",
        "h=dinfer:decoder=hierarchy,kv-cache=vicinity",
        "d3llm",
        "-o",
        tmp_path / "x",
    ]
    argv += ["--grid", "cache-window=4,8", "--set", "early_stop=False", "--set", "temperature=0.5", "--set", "top_h=x"]
    argv += ["--thresholds", "0.25", "--task", "word_problems", "gsm8k", "--num-samples", 1, "--dtype", "float32"]
    data = tmp_path / "test.jsonl"
    data.write_text(json.dumps({"question": "a", "answer": "#### 1"}) + "\n")
    monkeypatch.setattr("d3llm_hf.evaluation.sweep.sweep.check_settings", lambda *args, **kwargs: None)
    code, _, err = run(*argv, "--data", data, "--no-chat")
    assert (code, err) == (0, "")
    assert [(model, task.name) for model, task, *_ in calls] == [
        ("a", "word_problems"),
        ("a", "gsm8k"),
        ("b", "word_problems"),
        ("b", "gsm8k"),
    ]
    _, _, (hierarchy, plain), output, kwargs = calls[0]
    common = {"early_stop": False, "temperature": 0.5, "top_h": "x"}
    assert hierarchy.settings == common | {"decoder": "hierarchy", "kv_cache": "vicinity"}
    assert (hierarchy.name, hierarchy.swept, hierarchy.values) == ("h", "cache_window", (4, 8))
    assert (plain.name, plain.swept, plain.values) == ("d3llm", "entropy_threshold", (0.25,))
    assert output == tmp_path / "x" and kwargs["label"] == "one" and kwargs["chat"] is False
    assert kwargs["command"] == (
        "d3llm sweep one=a two=b --methods h=dinfer:decoder=hierarchy,kv-cache=vicinity d3llm --thresholds 0.25 "
        "--grid cache-window=4,8 --set early_stop=False --set temperature=0.5 --set top_h=x --task word_problems "
        "gsm8k --num-samples 1 --data test.jsonl --no-chat --dtype float32 --output x"
    )


def test_a_gguf_file_is_of_the_causal_models_alone(run, tmp_path, monkeypatch):
    calls = []
    folder = tmp_path / "causal"
    folder.mkdir()
    (folder / "x.gguf").write_bytes(b"")
    monkeypatch.setattr("d3llm_hf.evaluation.sweep.sweep.sweep", lambda *args, **kwargs: [])
    for name in ("load", "load_causal"):
        monkeypatch.setattr(
            command, name, lambda _, name=name, **given: calls.append((name, given.get("gguf_file"))) or (0, 0)
        )
    words = [f"small={folder}", "d3llm-llada", "--methods", "ar", "d3llm", "-o", tmp_path / "x"]
    code, _, err = run(*words, "--gguf-file", "x.gguf")
    assert (code, err) == (0, "")
    assert calls == [("load_causal", "x.gguf"), ("load", None)]
    monkeypatch.undo()
    code, _, err = run(f"small={folder}", "--methods", "ar", "--gguf-file", "y.gguf", "-o", tmp_path / "x")
    assert code == 2 and "`gguf_file` must be a file of the checkpoint's folder (got 'y.gguf'" in err


@pytest.mark.every(3)
@pytest.mark.parametrize(
    ("argv", "pattern"),
    [
        (["--methods", "beam"], "`methods` must be of .*got 'beam'"),
        (["--grid", "factor"], "`--grid` must be NAME=X,Y,..., each name once"),
        (["--grid", "factor=1,x"], "`--grid` must give factor a value of type float .got 'x'"),
        (["--set", "factor"], "`--set` must have the form NAME=VALUE"),
        (["--thresholds", "0.3", "nan"], "`entropy_threshold` must be finite"),
        (["--methods", "fast_dllm", "--thresholds", "1.5"], "fast_dllm, confidence_threshold=1.5: `confidence_thresh"),
        (["--set", "max_new_tokens=3"], "`settings` must not hold `max_new_tokens`: pass `max_new_tokens`"),
        (["--gguf-file", "x.gguf"], r"`--gguf-file` is of causal models \(got 'x.gguf' with \['d3llm'\]"),
        (["--task", "gsm8k"], "`data` must name a file with GSM8K"),
        (["--num-samples", "0"], "`num_samples` must be a positive integer"),
        (["--batch-size", "0"], "`batch_size` must be a positive integer"),
        (["x=d3llm-llada", "x=d3llm-llada"], "`models` must have different labels"),
    ],
)
def test_bad_input_is_answered_in_one_line_before_anything_is_decoded(argv, pattern, run, tmp_path, monkeypatch):
    monkeypatch.setattr("d3llm_hf.evaluation.sweep.sweep._decode", None)
    models = [] if "=d3llm" in argv[0] else ["d3llm-llada"]
    code, out, err = run(*models, *argv, "-o", tmp_path / "results.jsonl")
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"d3llm: error: .*{pattern}.*\n", err), err
    assert not (tmp_path / "results.jsonl").exists()


def test_a_path_that_exists_is_no_label(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a=b").mkdir()
    assert command._models(["a=b", "c=a=b"]) == {"a=b": "a=b", "c": "a=b"}
