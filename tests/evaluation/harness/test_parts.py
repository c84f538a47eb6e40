"""What the model `d3llm` is made of: stop strings, settings of a request, records, recipes and the command."""

import json
import os
import shlex
import subprocess
import sys
from functools import partial

import pytest
import torch
import yaml
from outcomes import outcome_of


pytest.importorskip("lm_eval")

from d3llm_hf.evaluation.harness import cli as lm_eval_cli
from d3llm_hf.evaluation.harness.generation_stats import GenerationRecord, read_records, totals, write_records
from d3llm_hf.evaluation.harness.processes import Processes
from d3llm_hf.evaluation.harness.recipe_plans import FOLDER, plan, read_recipe, recipe_names
from d3llm_hf.evaluation.harness.request_settings import request_settings
from d3llm_hf.models.generation_config_d3llm import D3LLMGenerationConfig
from d3llm_hf.models.topology import Traits
from d3llm_hf.stops import StopInAnswer, before_stop, tokens_of


LETTERS = "abcdefgh"


def spelled(ids: list[int]) -> str:
    return "".join(LETTERS[i] for i in ids)


# ---- stop strings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two", [], "one two"),
        ("one two", ["three"], "one two"),
        ("one two three", ["three", "two"], "one "),
        ("abc", ["abc", "b"], "a"),  # "b" is complete first
        ("abc", ["bc", "abc"], ""),  # both at the same letter
        ("abab", ["ab"], ""),
    ],
)
def test_a_text_is_cut_before_the_stop_string_that_is_complete_first(text, stops, expected):
    assert before_stop(text, stops) == expected
    ends = [end for end in range(len(text) + 1) if any(stop in text[:end] for stop in stops)]
    if ends:  # the same, for the text as it was when the first stop string was complete
        assert before_stop(text[: ends[0]], stops) == expected


def test_tokens_of_a_prefix_are_as_many_as_it_takes():
    def decode(ids):
        return "".join(["ab", "c", "def"][i] for i in ids)

    assert [tokens_of(decode, [0, 1, 2], "abcdef"[:n]) for n in range(7)] == [0, 1, 1, 2, 3, 3, 3]


def test_the_criterion_ends_rows_at_the_length_at_which_a_stop_string_is_complete_and_reads_no_prompt():
    mask = 7
    criterion = StopInAnswer(spelled, ["bc", "e"], prompt_length=2, mask_token_id=mask)
    rows = [[0, 1, 2, 1, 2, 0], [0, 1, 0, 0, 4, 0], [0, 1, mask, 1, 2, 0]]  # the first prompt ends in "b"
    verdicts = [criterion(torch.tensor(rows)[:, : 2 + n]).tolist() for n in (0, 1, 2, 3, 3, 4, 2)]
    first = [False, False, False, True, True, True, False]
    second = [False, False, False, True, True, True, False]
    assert [verdict[0] for verdict in verdicts] == first
    assert [verdict[1] for verdict in verdicts] == second
    assert not any(verdict[2] for verdict in verdicts)
    rows[2][2] = 0  # decided in the meantime
    assert criterion(torch.tensor(rows)).tolist() == [True, True, True]


# ---- settings of a request -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "own", "length", "generate"),
    [
        ({}, {}, 99, {"do_sample": False}),
        ({"temperature": 0.0}, {}, 99, {"do_sample": False}),
        ({"temperature": 0.0, "do_sample": True}, {}, 99, {"do_sample": False}),
        ({"temperature": 0.5}, {}, 99, {"do_sample": True, "temperature": 0.5}),
        ({"temperature": 0.5, "top_p": 0.9, "do_sample": False}, {}, 99, {"do_sample": False}),
        ({}, {"temperature": 0.5, "steps": 4}, 99, {"do_sample": True, "temperature": 0.5, "steps": 4}),
        ({"do_sample": False}, {"temperature": 0.5}, 99, {"do_sample": False}),
        ({"max_gen_toks": 4, "max_new_tokens": 5}, {"max_gen_toks": 6}, 4, {"do_sample": False}),
        ({"max_tokens": 5}, {}, 5, {"do_sample": False}),
        ({}, {"max_new_tokens": 6}, 6, {"do_sample": False}),
        ({"block_length": 8}, {"block_length": 4}, 99, {"block_length": 8, "do_sample": False}),
    ],
)
def test_a_request_comes_before_the_model_and_the_model_before_the_default(asked, own, length, generate):
    found = request_settings(asked, own, 99)
    assert (found.max_new_tokens, dict(found.generate), found.stops) == (length, generate, ())


@pytest.mark.parametrize(("until", "stops"), [(None, ()), ("a", ("a",)), (["a", "", "b"], ("a", "b"))])
def test_stop_strings_come_as_one_or_as_a_list(until, stops):
    assert request_settings({"until": until}, {}, 99).stops == stops


# ---- records -------------------------------------------------------------------------------------------------------

RECORDS = [
    GenerationRecord("a", 0, 0, 0, 3, 8, tokens=6, forwards=2, forwards_reference=3, positions=22, seconds=0.5),
    GenerationRecord("b", None, 0, 1, 3, 8, tokens=3, forwards=4, forwards_reference=3, positions=44, seconds=1.0),
]


def test_totals_are_ratios_of_sums():
    found = totals(RECORDS)
    assert found["requests"] == 2
    assert (found["tpf"], found["tpf_reference"]) == (9 / 6, 9 / 6)
    assert (found["positions_per_token"], found["tokens_per_second"]) == (66 / 9, 6.0)
    assert totals([])["tpf"] is None


def test_records_are_read_as_they_were_written(tmp_path):
    file = tmp_path / "folder" / "stats.jsonl"
    write_records(file, RECORDS)
    assert read_records(file) == RECORDS
    assert [path.name for path in file.parent.iterdir()] == ["stats.jsonl"]
    for line in ("{", '{"tokens": 1}'):
        file.write_text(json.dumps(vars(RECORDS[0])) + "\n" + line + "\n")
        with pytest.raises(ValueError, match=r"`path` must hold one record a line .*line 2"):
            read_records(file)


def test_a_process_alone_gathers_what_it_has():
    processes = Processes()
    processes.barrier()
    assert (processes.rank, processes.count, processes.device) == (0, 1, None)
    assert processes.gather_object("a") == ["a"]
    assert processes.all_gather(torch.ones(2)).tolist() == [1, 1]


@pytest.mark.full  # two processes of their own
def test_two_processes_gather_what_each_has(tmp_path):
    script = tmp_path / "gather.py"
    script.write_text(
        "import torch\n"
        "from d3llm_hf.evaluation.harness.processes import Processes\n"
        "processes = Processes()\n"
        "objects = processes.gather_object('ab'[processes.rank])\n"
        "ranks = processes.all_gather(torch.tensor([processes.rank])).tolist()\n"
        "processes.barrier()\n"
        f"with open(r'{tmp_path}/' + str(processes.rank), 'w') as file:\n"
        "    file.write(f'{processes.count} {objects} {ranks}')\n"
        "torch.distributed.destroy_process_group()\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(launch, check=True, capture_output=True, timeout=300, env=environment)
    assert (tmp_path / "0").read_text() == "2 ['a', 'b'] [0, 1]"
    assert (tmp_path / "1").read_text() == "2 None [0, 1]"


# ---- recipes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_names_tasks_that_lm_eval_has_and_settings_that_generate_takes(name):
    from pathlib import Path

    import lm_eval

    recipe = read_recipe(name)
    folder = Path(lm_eval.__path__[0]) / "tasks"
    known = "\n".join(
        file.read_text()
        for part in ("gsm8k", "benchmarks", "mbpp", "humaneval")
        for file in folder.glob(f"{part}/*.yaml")
    )
    for task in recipe["tasks"]:
        assert f"task: {task}\n" in known or f"group: {task}\n" in known
    for settings in recipe["models"]:
        for cached in (False, True):
            chosen = plan(recipe, settings=settings, cached=cached)
            own = {k: v for k, v in chosen.model_args.items() if k not in ("pretrained", "dtype", "end_at_until")}
            asked = request_settings(chosen.gen_kwargs, own, 1)
            D3LLMGenerationConfig(**asked.generate).rules(asked.max_new_tokens, Traits(int("dream" in settings)))
            assert asked.max_new_tokens in (256, 512)
            assert chosen.model_args.get("kv_cache", "none") == ("delayed" if cached else "none")
            assert "--confirm_run_unsafe_code" not in chosen.arguments([])
            if asked.generate["do_sample"]:
                assert asked.generate["temperature"] == 0.1


def test_the_published_settings_are_these():
    found = {
        (name, settings): (model["model_args"]["entropy_threshold"], recipe["num_fewshot"])
        for name in recipe_names()
        for recipe in [read_recipe(name)]
        for settings, model in recipe["models"].items()
    }
    assert found == {
        ("gsm8k_cot", "d3llm-llada"): (0.5, 0),
        ("gsm8k_cot", "d3llm-dream"): (0.4, 0),
        ("math", "d3llm-llada"): (0.5, 4),
        ("math", "d3llm-dream"): (0.4, 4),
        ("mbpp", "d3llm-llada"): (0.4, 3),
        ("mbpp", "d3llm-dream"): (0.4, 3),
        ("mbpp", "d3llm-dream-coder"): (0.5, 3),
        ("humaneval", "d3llm-llada"): (0.5, 0),
        ("humaneval", "d3llm-dream"): (0.5, 0),
        ("humaneval", "d3llm-dream-coder"): (0.5, 0),
        ("long_gsm8k", "d3llm-llada"): (0.4, 5),
        ("long_gsm8k", "d3llm-dream"): (0.4, 5),
    }


def test_a_recipe_of_ones_own_is_read_and_a_wrong_one_is_refused(tmp_path):
    file = tmp_path / "mine.yaml"
    mine = {"tasks": ["a"], "models": {"me": {"pretrained": "x", "model_args": {"steps": 4}}}}
    file.write_text(yaml.safe_dump(mine))
    found = plan(read_recipe(str(file)), pretrained="x")
    assert (found.tasks, found.num_fewshot, found.model_args) == (["a"], None, {"pretrained": "x", "steps": 4})
    for text, message in (
        ("a: [", "`recipe` must be YAML"),
        ("a", "`recipe` must have the keys"),
        ("{tasks: [a], models: {}, task: b}", "`recipe` must have the keys"),
        ("{tasks: [a], models: {me: {pretrained: x, gen_kwarg: {}}}}", "`recipe` must have under `models`"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_recipe(str(file))
    assert FOLDER.is_dir()


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def run(capsys):
    return partial(outcome_of, lm_eval_cli.main, capsys)


def test_show_prints_lm_evals_command_with_the_users_arguments_last(run):
    code, out, _ = run(
        "--recipe", "gsm8k_cot", "--pretrained", "d3llm-llada", "--cached", "--stats", "s.jsonl", "--show",
        "--model_args", "entropy_threshold=0.3", "--limit", 5,
    )  # fmt: skip
    words = shlex.split(out)
    assert code == 0
    assert words[:4] == ["d3llm-eval", "run", "--model", "d3llm"]
    assert words[-4:] == ["--model_args", "entropy_threshold=0.3", "--limit", "5"]
    args = json.loads(words[words.index("--model_args") + 1])
    assert args["pretrained"] == "d3llm-llada"
    assert args["stats_path"] == "s.jsonl"
    assert (args["entropy_threshold"], args["kv_cache"], args["cache_delay"]) == (0.5, "delayed", 2)
    assert words[words.index("--tasks") + 1] == "gsm8k_cot_zeroshot"


@pytest.mark.full  # lm-eval reads all of its tasks, twice
def test_what_lm_eval_refuses_is_said_in_one_line(run, monkeypatch):
    words = ("--pretrained", "d3llm-llada", "--tasks", "nonsense")
    code, _, errors = run(*words)
    assert code == 2
    assert errors.splitlines()[-1] == (
        "d3llm-eval: error: Tasks not found: nonsense. `d3llm-eval ls tasks` lists those there are. "
        "(LMEVAL_LOG_LEVEL=DEBUG shows where.)"
    )
    monkeypatch.setenv("LMEVAL_LOG_LEVEL", "DEBUG")
    with pytest.raises(ValueError, match="nonsense"):
        run(*words)


def test_the_users_task_and_model_take_the_place_of_the_recipes(run):
    words = shlex.split(
        run("run", "--recipe", "mbpp", "--settings", "d3llm-dream", "--show", "--tasks=x", "-M", "hf")[1]
    )
    assert "mbpp_instruct" not in words
    assert "d3llm" not in words
    assert words.count("--apply_chat_template") == 1
    assert words[words.index("--fewshot_as_multiturn") + 1] == "false"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "gsm8k_co"], "got 'gsm8k_co'). Did you mean 'gsm8k_cot'"),
        (["--recipe", "zzz"], "`recipe` must be one of"),
        (["--recipe", "math", "--settings", "d3llm-dream-coder"], "`settings` must say whose settings"),
        (["--recipe", "math", "--pretrained", "mine"], "`settings` must say whose settings"),
        (["--cached"], "`--cached` belongs to a recipe"),
        (["--settings", "a"], "`--settings` belongs to a recipe"),
    ],
)
def test_wrong_arguments_end_with_a_message(run, words, message):
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert message in err


def test_without_arguments_the_help_is_shown_and_lm_evals_is_a_subcommand_away(run):
    code, out, _ = run()
    assert code == 0
    assert "--recipe" in out
    assert "--gen_kwargs" in run("run", "--help")[1]
    assert "--recipe" in run("--help")[1]


def test_the_command_evaluates_the_embedded_checkpoint_on_word_problems(run, tmp_path, monkeypatch):
    import functools
    import sys

    import lm_eval.tasks

    # Its own tasks are thousands of files to read.
    quick = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", quick)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # asks pip and the compiler
    before = list(sys.argv)
    code, out, _ = run(
        "--pretrained", "d3llm-llada", "--stats", tmp_path / "stats.jsonl", "--tasks", "word_problems",
        "--apply_chat_template", "--limit", 4, "--batch_size", 4, "--model_args", "dtype=float32", "--device", "cpu",
        "--output_path", tmp_path / "out", "--log_samples",
    )  # fmt: skip
    assert code == 0
    assert sys.argv == before
    assert "word_problems" in out
    results = json.loads(next((tmp_path / "out").glob("*/results_*.json")).read_text())
    assert results["results"]["word_problems"]["exact_match,number"] >= 0.75
    records = read_records(tmp_path / "stats.jsonl")
    assert results["config"]["generation_stats"]["tpf"] == totals(records)["tpf"] > 2
    samples = [
        json.loads(line) for line in next((tmp_path / "out").glob("*/samples_*.jsonl")).read_text().splitlines()
    ]
    assert sorted(sample["doc_id"] for sample in samples) == [record.doc_id for record in records]
