"""Tasks of sweeps: prompts as a chat and as text, verdicts by hand, data files and names that are refused."""

import builtins
import json
from pathlib import Path

import pytest
from official import tiny_tokenizer

from d3llm_hf import encode_chat
from d3llm_hf.evaluation.tasks.load import final_number, load_tasks, same_final_number, word_problems
from d3llm_hf.evaluation.tasks.word_problems import generate_problems


ROWS = [{"question": f"What is {n} * 600?", "answer": f"{n} * 600 = <<>>\n#### {600 * n:,}"} for n in range(1, 7)]


@pytest.fixture
def gsm8k_file(tmp_path: Path) -> Path:
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    return path


def test_word_problems_are_those_of_the_seed_and_judged_by_the_number_behind_the_mark():
    (task,) = load_tasks("word_problems", num_samples=3, seed=5)
    problems = generate_problems(3, split="test", seed=5)
    assert (task.name, task.seed, task.max_new_tokens, task.scored_by) == ("word_problems", 5, 64, "exact_match")
    assert task.questions == [problem.question for problem in problems]
    assert [task.judge(index, f"so #### {problem.result}") for index, problem in enumerate(problems)] == [True] * 3
    assert not task.judge(0, f"{problems[0].result}")
    assert len(word_problems().questions) == 300


def test_prompts_are_encoded_as_a_chat_or_as_text_and_hold_no_control_token():
    tokenizer = tiny_tokenizer()
    (task,) = load_tasks("word_problems", num_samples=1)
    message = [{"role": "user", "content": task.questions[0]}]
    assert task.encode(tokenizer, True) == [encode_chat(tokenizer, message)["input_ids"][0].tolist()]
    assert task.encode(tokenizer, False) == [tokenizer(task.questions[0])["input_ids"]]
    task.questions = ["a<|mask|>b"]
    assert tokenizer.mask_token_id not in task.encode(tokenizer, True)[0]


def test_gsm8k_is_read_from_json_lines_and_parquet_alike(gsm8k_file, tmp_path):
    (task,) = load_tasks("gsm8k", data=gsm8k_file)
    assert (task.name, task.max_new_tokens, len(task.questions)) == ("gsm8k", 256, 6)
    assert task.judge(1, "#### 1200") and task.judge(1, "The answer is 1,200.") and not task.judge(1, "#### 120")
    parquet = pytest.importorskip("pyarrow.parquet")
    from pyarrow import Table

    parquet.write_table(Table.from_pylist(ROWS), tmp_path / "test.parquet")
    (same,) = load_tasks("gsm8k", data=tmp_path / "test.parquet")
    assert (same.questions, same.about) == (task.questions, task.about)


def test_of_gsm8k_some_are_drawn_with_the_seed_in_the_order_of_the_file(gsm8k_file):
    drawn = {seed: load_tasks("gsm8k", data=gsm8k_file, num_samples=3, seed=seed)[0].questions for seed in range(5)}
    order = [row["question"] for row in ROWS]
    assert all(sorted(questions, key=order.index) == questions for questions in drawn.values())
    assert len(set(map(tuple, drawn.values()))) > 1
    assert load_tasks("gsm8k", data=gsm8k_file, num_samples=3, seed=0)[0].questions == drawn[0]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 18", "18"),
        ("7 eggs\n#### 1,800.50 of 9", "1800.50"),
        ("#### 3\n#### -4", "-4"),
        ("####\n$5", "5"),
        ("first 3, then 4.", "4"),
        (r"\boxed{12}", "12"),
        ("none", None),
        ("####", None),
    ],
)
def test_the_final_number_is_the_marked_one_or_else_the_last(text, number):
    found = final_number(text)
    assert (found is None) if number is None else (str(found) == number)


def test_numbers_are_compared_by_value():
    assert same_final_number("18.0", "#### 18")
    assert not same_final_number("none", "#### 18")


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        ("{\n", r"must hold one JSON object a line .got .* in line 1"),
        ("3\n", "must hold one JSON object a line"),
        ('{"question": "a"}\n', "got no text for 'answer' in row 1"),
        ('{"question": "a", "answer": "b"}\n', "got an answer without a number after `####` in row 1"),
        ("", "`num_samples` must be at most the 0 rows"),
    ],
)
def test_a_file_that_is_not_gsm8k_is_refused(tmp_path, content, pattern):
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=pattern):
        load_tasks("gsm8k", data=path)


def test_options_that_a_task_does_not_take_are_refused(gsm8k_file, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"`data` must name a file with GSM8K .*`--data FILE`.*`lm_eval:gsm8k`"):
        load_tasks("gsm8k")
    with pytest.raises(FileNotFoundError, match=r"`data` must name a file .got '.*none.jsonl'"):
        load_tasks("gsm8k", data=tmp_path / "none.jsonl")
    (tmp_path / "x.csv").touch()
    with pytest.raises(ValueError, match=r"`data` must end in .jsonl or .parquet .got 'x.csv'"):
        load_tasks("gsm8k", data=tmp_path / "x.csv")
    with pytest.raises(ValueError, match="`data` is read by the task gsm8k only"):
        load_tasks("word_problems", data=gsm8k_file)
    with pytest.raises(ValueError, match=r"`num_samples` must be at most the 6 rows of .* .got 7"):
        load_tasks("gsm8k", data=gsm8k_file, num_samples=7)
    with pytest.raises(ValueError, match=r"`num_samples` must be a positive integer .got 0"):
        load_tasks("word_problems", num_samples=0)
    with pytest.raises(ValueError, match=r"`metric` applies to tasks of lm-eval .got it with 'gsm8k'"):
        load_tasks("gsm8k", data=gsm8k_file, metric="exact_match")

    (tmp_path / "x.parquet").write_bytes(b"no")
    pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match="`data` must be Parquet"):
        load_tasks("gsm8k", data=tmp_path / "x.parquet")
    hide(monkeypatch, "pyarrow")
    with pytest.raises(ImportError, match="needs pyarrow"):
        load_tasks("gsm8k", data=tmp_path / "x.parquet")


def test_without_lm_eval_its_tasks_are_refused_with_the_way_to_install_it(monkeypatch):
    hide(monkeypatch, "lm_eval")
    with pytest.raises(ImportError, match=r"without lm-eval .got 'arc'.*pip install 'd3llm-hf\[eval\]'"):
        load_tasks("arc")


def hide(monkeypatch, package: str) -> None:
    """Makes a package one that is not installed."""
    found = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
