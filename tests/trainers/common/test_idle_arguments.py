"""Arguments of the scripts that have no effect beside others are named in a warning, and only where they were set."""

from dataclasses import replace

import pytest
from datasets import Dataset

from trainers import run_distill, run_sft, run_trajectories


ROWS = [{"prompt": f"{index} and one", "completion": f"{index + 1}"} for index in range(4)]


@pytest.fixture
def file(tmp_path) -> str:
    path = tmp_path / "rows.jsonl"
    Dataset.from_list(ROWS).to_json(str(path))
    return str(path)


def sft(file: str) -> run_sft.SFTScriptArguments:
    return run_sft.SFTScriptArguments(dataset_name=file)


def test_settings_of_an_adapter_without_one_are_named(file, caplog):
    arguments = replace(sft(file), lora_r=8, lora_target_modules=["q_proj"])
    assert run_sft._peft_config(arguments) is None
    assert "`lora_r`, `lora_target_modules` are without effect: all weights are trained." in caplog.text
    caplog.clear()
    assert run_sft._peft_config(replace(arguments, use_peft=True)).r == 8 and not caplog.records
    distil = run_distill.DistillScriptArguments(model_name_or_path="m", dataset_name="d", lora_dropout=0.1)
    assert run_distill._peft_config(distil, None) is None
    assert "`lora_dropout` is without effect" in caplog.text


def test_the_number_of_generated_problems_beside_a_data_set_is_named(file, caplog):
    run_sft.load_datasets(replace(sft(file), num_problems=7, max_problem_steps=3), evaluate=False)
    assert "`num_problems`, `max_problem_steps` are without effect: `dataset_name` is given." in caplog.text
    caplog.clear()
    arguments = run_trajectories.TrajectoryScriptArguments("m", "out", file, problem_seed=3)
    assert len(run_trajectories.load_prompts(arguments)) == len(ROWS)
    assert "`problem_seed` is without effect: `dataset_name` names no word problems." in caplog.text


def test_samples_to_hold_out_beside_held_out_ones_are_named(file, caplog):
    arguments = run_distill.DistillScriptArguments("m", file, eval_dataset_name=file, num_eval_samples=2)
    assert [len(rows) for rows in run_distill.load_trajectories(arguments, seed=0, evaluate=True)] == [4, 4]
    assert "`num_eval_samples` is without effect" in caplog.text


def test_what_was_not_set_is_not_named(file, caplog):
    run_sft.load_datasets(sft(file), evaluate=False)
    run_sft._peft_config(sft(file))
    run_trajectories.load_prompts(run_trajectories.TrajectoryScriptArguments("m", "out", file))
    assert not caplog.records
