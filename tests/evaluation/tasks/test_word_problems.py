"""The generated word problems are correct, reproducible, and split by wording and by numbers."""

import os
import random
import re
import subprocess
import sys
import zlib

import pytest

from d3llm_hf.evaluation.tasks.word_problems import (
    MAX_OPERAND,
    MAX_VALUE,
    MIN_VALUE,
    exact_match,
    extract_answer,
    generate_problems,
)


def held_out(key):
    return zlib.crc32(key.encode()) % 10 == 0


@pytest.fixture(scope="module", params=["train", "test"])
def split_and_problems(request):
    return request.param, generate_problems(400, split=request.param, seed=3)


def test_problems_of_a_split_keep_to_its_side_in_wording_and_in_numbers(split_and_problems):
    split, problems = split_and_problems
    for problem in problems:
        assert held_out(problem.skeleton) == held_out(problem.numbers) == (split == "test")


def test_every_equation_is_right_and_the_chain_leads_to_the_result(split_and_problems):
    for problem in split_and_problems[1]:
        value = int(re.match(r"\d+", problem.numbers).group())
        steps = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", problem.answer)
        assert "".join([str(value), *(sign + right for _, sign, right, _ in steps)]) == problem.numbers
        for left, sign, right, result in steps:
            assert int(left) == value
            assert MIN_VALUE <= int(result) <= MAX_VALUE and 1 <= int(right) <= MAX_OPERAND
            value = {"+": value + int(right), "-": value - int(right), "*": value * int(right)}.get(sign)
            value = int(left) // int(right) if sign == "/" else value
            assert value == int(result) and (sign != "/" or int(left) % int(right) == 0)
        assert value == problem.result
        assert problem.answer.splitlines()[-1] == f"#### {value}"


def test_every_number_of_the_chain_is_told_in_the_question_or_said_in_words(split_and_problems):
    words = {"*2": ("doubles", "as many again"), "*3": ("triples", "three times"), "/2": ("half",)}
    for problem in split_and_problems[1]:
        for kind, operand in re.findall(r"([-+*/])(\d+)", problem.numbers):
            if kind in "+-":
                assert re.search(rf"\b{operand}\b", problem.question)
            else:
                assert any(word in problem.question for word in words[kind + operand])


def test_the_number_of_steps_is_as_asked_and_covers_the_range():
    problems = generate_problems(200, seed=1, min_steps=1, max_steps=3)
    assert {problem.answer.count(" = ") for problem in problems} == {1, 2, 3}


def test_the_same_seed_gives_the_same_problems_and_another_seed_others():
    assert generate_problems(20, seed=5) == generate_problems(30, seed=5)[:20]
    assert generate_problems(20, seed=5) != generate_problems(20, seed=6)


def test_the_global_random_state_neither_matters_nor_changes():
    random.seed(1)
    before = random.getstate()
    first = generate_problems(5, seed=0)
    assert random.getstate() == before
    random.seed(2)
    assert generate_problems(5, seed=0) == first


def test_problems_do_not_depend_on_the_hash_seed_of_the_process():
    code = (
        "import sys, zlib; from d3llm_hf.evaluation.tasks.word_problems import generate_problems;"
        "sys.stdout.write(str(zlib.crc32(repr(generate_problems(50, split='test', seed=9)).encode())))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert outputs == {str(zlib.crc32(repr(generate_problems(50, split="test", seed=9)).encode()))}


def test_zero_problems_is_an_empty_list():
    assert generate_problems(0, seed=0) == []


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("1 + 2 = 3\n#### 3", "3"),
        ("#### 3\n#### 14 and more", "14"),
        ("####-7", "-7"),
        ("#### 1,024", "1024"),
        ("#### 007", "7"),
        ("no marker 5", None),
        ("#### five", None),
        ("#### 3\n####", None),
    ],
)
def test_the_answer_is_the_integer_after_the_last_marker(text, answer):
    assert extract_answer(text) == answer


def test_exact_match_compares_the_answers_and_is_false_without_one():
    assert exact_match("so #### 5", "thus\n#### 5")
    assert not exact_match("#### 5", "#### 6")
    assert not exact_match("5", "5")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": -1}, "`n` must be an integer of at least 0 .got -1"),
        ({"n": True}, "`n` must be an integer"),
        ({"split": "dev"}, '`split` must be "train" or "test" .got \'dev\''),
        ({"seed": 1.5}, "`seed` must be an integer .got 1.5"),
        ({"min_steps": 0}, "`min_steps` must be an integer of at least 1"),
        ({"max_steps": 0}, "`max_steps` must be an integer of at least 1"),
        ({"min_steps": 4, "max_steps": 3}, "`max_steps` must be at least `min_steps`"),
    ],
)
def test_a_bad_argument_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate_problems(**{"n": 1, "seed": 0} | arguments)
