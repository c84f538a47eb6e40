"""Checkpoints that are whole: what damage is found, what a run goes on from, and in which order files are written."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from distillation import make_trainer, student
from foreign_locks import foreign_lock
from official import tiny_tokenizer
from thin import covering
from transformers import Trainer, TrainerCallback

from d3llm_hf.locks import InUseError, lock_file
from trainers.common.loading import resumption
from trainers.common.whole_checkpoints import (
    FILE_LIST,
    CheckpointError,
    UnfinishedCheckpointError,
    UnlistedCheckpointError,
    begin_checkpoint,
    check_checkpoint,
    checkpoint_to_resume,
    finish_checkpoint,
    last_whole_checkpoint,
)


FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer_state.json",
    "training_args.bin",
]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def run(tokenizer, tmp_path_factory):
    """A run of six steps with a checkpoint every two, and the weights it ends with."""
    folder = tmp_path_factory.mktemp("run") / "run"
    trainer = make_trainer(folder, tokenizer, max_steps=6, save_strategy="steps", save_steps=2)
    trainer.train()
    return folder, trainer.model.state_dict()


@pytest.fixture
def folder(run, tmp_path):
    """A copy of the run's folder that a test may damage."""
    return Path(shutil.copytree(run[0], tmp_path / "run"))


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1])


def alter(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {"deleted": Path.unlink, "cut short": cut_short, "altered": alter}


def as_of_plain_trainer(folder):
    for path in folder.glob(f"*/{FILE_LIST}"):
        path.unlink()


# Damage


def test_every_file_of_a_checkpoint_is_listed(run):
    checkpoint = run[0] / "checkpoint-4"
    listed = json.loads((checkpoint / FILE_LIST).read_text(encoding="utf-8"))
    present = {path.name for path in checkpoint.iterdir()} - {FILE_LIST}
    assert set(listed["files"]) == present and set(FILES) <= present
    assert all(listed["files"][name]["size"] == (checkpoint / name).stat().st_size for name in present)
    check_checkpoint(checkpoint)


@pytest.mark.every(4)
@pytest.mark.parametrize("name, damage", covering(FILES, DAMAGE, strength=1))
def test_a_damaged_file_is_named_and_its_checkpoint_skipped(folder, caplog, name, damage):
    path = folder / "checkpoint-6" / name
    DAMAGE[damage](path)
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-4")
    (warning,) = (record.getMessage() for record in caplog.records)
    assert f"`{path}` must" in warning
    assert f"is skipped; the run goes on from {folder / 'checkpoint-4'}" in warning
    with pytest.raises(CheckpointError, match=f"{name}` must"):
        checkpoint_to_resume(str(folder / "checkpoint-6"), folder)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_checkpoint_whose_list_is_damaged_is_skipped_too(folder, caplog, damage):
    DAMAGE[damage](folder / "checkpoint-6" / FILE_LIST)
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-4")
    assert FILE_LIST in caplog.text


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{", b"\xff", b'{"complete": true}', b"[" * 100_000])
def test_a_list_that_is_something_else_is_damage(folder, content):
    (folder / "checkpoint-6" / FILE_LIST).write_bytes(content)
    with pytest.raises(CheckpointError, match="must agree with its own checksum"):
        check_checkpoint(folder / "checkpoint-6")


def test_all_damaged_checkpoints_are_named_down_to_the_last_whole_one(folder, caplog):
    cut_short(folder / "checkpoint-6" / "optimizer.pt")
    (folder / "checkpoint-4" / "scheduler.pt").unlink()
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-2")
    assert "checkpoint-6/optimizer.pt" in caplog.text and "checkpoint-4/scheduler.pt" in caplog.text


def test_where_no_checkpoint_is_whole_each_problem_is_named(folder):
    for step in (2, 4, 6):
        (folder / f"checkpoint-{step}" / "optimizer.pt").unlink()
    for chosen in ("last", True):
        with pytest.raises(CheckpointError, match=r"must hold a whole checkpoint .* Delete these") as error:
            checkpoint_to_resume(chosen, folder)
        assert all(f"checkpoint-{step}/optimizer.pt" in str(error.value) for step in (2, 4, 6))


# What a run goes on from


def test_the_last_is_the_highest_number_and_other_folders_are_no_checkpoints(folder):
    shutil.copytree(folder / "checkpoint-6", folder / "checkpoint-10")
    (folder / "checkpoint-best").mkdir()
    (folder / "checkpoint-99").write_text("a file", encoding="utf-8")
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-10")


def test_without_any_checkpoint_a_run_starts_anew_unless_one_is_asked_for(tmp_path):
    for place in (tmp_path, tmp_path / "absent"):
        assert checkpoint_to_resume("last", place) is None
        with pytest.raises(CheckpointError, match=r"`resume_from_checkpoint` must find a checkpoint in"):
            checkpoint_to_resume(True, place)
    assert checkpoint_to_resume(None, tmp_path) is None and checkpoint_to_resume(False, tmp_path) is None
    with pytest.raises(CheckpointError, match=r"must be the folder of a checkpoint .got none"):
        checkpoint_to_resume(str(tmp_path / "absent"), tmp_path)


def test_a_save_that_was_cut_off_is_told_from_damage_and_does_not_stop_a_new_run(tmp_path, caplog):
    begin_checkpoint(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "checkpoint-4").mkdir()  # killed before its list was written
    (tmp_path / "checkpoint-4" / f".{FILE_LIST}.0.partial").write_bytes(b"{")
    for step in (2, 4):
        with pytest.raises(UnfinishedCheckpointError, match=r"must be complete .got one whose saving was cut off"):
            check_checkpoint(tmp_path / f"checkpoint-{step}")
    assert checkpoint_to_resume("last", tmp_path) is None
    assert "checkpoint-2" in caplog.text and "checkpoint-4" in caplog.text
    with pytest.raises(UnfinishedCheckpointError):
        checkpoint_to_resume(str(tmp_path / "checkpoint-2"), tmp_path)


def test_a_checkpoint_without_a_list_is_used_only_if_it_is_named(folder, caplog):
    as_of_plain_trainer(folder)
    with pytest.raises(UnlistedCheckpointError, match=f"must have a list of its files, {FILE_LIST}"):
        check_checkpoint(folder / "checkpoint-6")
    with pytest.raises(CheckpointError, match="or name one that has no list of files"):
        checkpoint_to_resume("last", folder)
    assert checkpoint_to_resume(str(folder / "checkpoint-6"), folder) == str(folder / "checkpoint-6")
    assert "Whether it is whole cannot be told" in caplog.text


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "trainer_state.json"])
def test_a_checkpoint_without_a_list_and_without_a_state_is_refused(folder, name):
    as_of_plain_trainer(folder)
    (folder / "checkpoint-6" / name).unlink()
    with pytest.raises(CheckpointError, match=rf"must hold a file `{name.partition('.')[0]}\.\*`"):
        checkpoint_to_resume(str(folder / "checkpoint-6"), folder)


def test_deepspeed_keeps_its_states_in_a_folder_of_its_own(folder):
    as_of_plain_trainer(folder)
    checkpoint = folder / "checkpoint-6"
    (checkpoint / "global_step6").mkdir()
    (checkpoint / "optimizer.pt").rename(checkpoint / "global_step6" / "optimizer_states.pt")
    assert checkpoint_to_resume(str(checkpoint), folder) == str(checkpoint)


def test_a_checkpoint_of_the_model_alone_does_not_start_the_optimizer_anew(tmp_path, tokenizer):
    saving = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    make_trainer(tmp_path, tokenizer, **saving).train()
    with pytest.raises(CheckpointError, match=r"must hold the state of the optimizer .got a model alone"):
        make_trainer(tmp_path, tokenizer, **saving).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize(
    ("said", "meant"),
    [(True, "last"), ("true", "last"), ("last", "last"), (None, None), (False, None), ("False", None), ("a/b", "a/b")],
)
def test_scripts_take_true_and_last_for_the_last_whole_checkpoint(said, meant):
    assert resumption(said) == meant


# The trainer


def test_a_run_goes_on_from_the_last_whole_checkpoint_and_ends_with_the_same_weights(run, folder, tokenizer, caplog):
    cut_short(folder / "checkpoint-6" / "model.safetensors")
    (folder / "checkpoint-4" / "optimizer.pt").unlink()
    caplog.set_level(logging.WARNING)
    trainer = make_trainer(folder, tokenizer, max_steps=6, save_strategy="steps", save_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert f"goes on from {folder / 'checkpoint-2'}" in caplog.text
    assert all(torch.equal(weight, run[1][name]) for name, weight in trainer.model.state_dict().items())
    for step in (2, 4, 6):  # those that were damaged are written anew
        check_checkpoint(folder / f"checkpoint-{step}")


def test_a_damaged_checkpoint_that_is_named_is_refused_by_the_trainer(folder, tokenizer):
    (folder / "checkpoint-6" / "optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-6/optimizer.pt` must exist"):
        make_trainer(folder, tokenizer).train(resume_from_checkpoint=str(folder / "checkpoint-6"))


def test_a_checkpoint_is_listed_before_an_older_one_goes_and_after_all_its_files(tmp_path, tokenizer, monkeypatch):
    events = []
    for name in ("finish_checkpoint", "rotate_checkpoints"):
        function = getattr(__import__("trainers.common.canvas_trainer", fromlist=[name]), name)
        monkeypatch.setattr(
            f"trainers.common.canvas_trainer.{name}",
            lambda *args, name=name, function=function, **kw: events.append(name) or function(*args, **kw),
        )
    save = Trainer._save_checkpoint
    monkeypatch.setattr(Trainer, "_save_checkpoint", lambda *args: (save(*args), events.append("saved"))[0])
    trainer = make_trainer(tmp_path, tokenizer, save_strategy="steps", save_steps=1, save_total_limit=2)
    trainer.train()
    assert events == ["saved", "finish_checkpoint", "rotate_checkpoints"] * 4
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4"}
    assert trainer.args.save_total_limit == 2
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


@pytest.mark.full
def test_the_best_checkpoint_is_kept_and_loaded_and_all_that_is_left_is_whole(tmp_path, tokenizer):
    from distillation import trajectories

    trainer = make_trainer(
        tmp_path,
        tokenizer,
        learning_rate=1.0,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=1,
        eval_steps=1,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        trainer_kwargs={"eval_dataset": trajectories(4, seed=5)},
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    left = sorted(tmp_path.glob("checkpoint-*"))
    assert best in left and len(left) <= 2
    for folder in left:
        check_checkpoint(folder)
    saved = type(trainer.model).from_pretrained(best).state_dict()
    assert all(torch.equal(weight, saved[name]) for name, weight in trainer.model.state_dict().items())


def test_a_checkpoint_is_listed_before_it_is_pushed(tmp_path, tokenizer, monkeypatch):
    pushed = []

    def push(self, folder):
        check_checkpoint(folder)
        pushed.append(Path(folder).name)

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", push)
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, **kwargs: None)
    trainer = make_trainer(
        tmp_path, tokenizer, save_strategy="steps", save_steps=2, push_to_hub=True, hub_strategy="checkpoint"
    )
    trainer.train()
    assert pushed == ["checkpoint-2", "checkpoint-4"]
    for name in pushed:
        check_checkpoint(tmp_path / name)


def test_a_folder_that_is_saved_again_holds_nothing_of_before(tmp_path):
    folder = tmp_path / "checkpoint-2"
    (folder / "pytorch_model_fsdp_0").mkdir(parents=True)
    (folder / "pytorch_model_fsdp_0" / "old").write_text("old", encoding="utf-8")
    (folder / "old.bin").write_text("old", encoding="utf-8")
    begin_checkpoint(folder)
    assert [path.name for path in folder.iterdir()] == [FILE_LIST]
    (folder / "parts").mkdir()
    (folder / "parts" / "0.bin").write_text("new", encoding="utf-8")
    finish_checkpoint(folder)
    assert list(json.loads((folder / FILE_LIST).read_text())["files"]) == ["parts/0.bin"]


@pytest.mark.full
def test_an_adapter_is_listed_as_a_model_is(tmp_path, tokenizer):
    from peft import LoraConfig

    from trainers.common.lora import lora_target_modules

    model = student(tokenizer)
    adapter = LoraConfig(r=2, target_modules=lora_target_modules(model))
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        model=model,
        max_steps=2,
        save_strategy="steps",
        save_steps=1,
        trainer_kwargs={"peft_config": adapter},
    )
    trainer.train()
    os.truncate(tmp_path / "checkpoint-2" / "adapter_model.safetensors", 100)
    assert last_whole_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")


# Two runs


def test_a_second_run_into_a_folder_is_refused_while_the_first_one_trains(tmp_path, tokenizer):
    folder = tmp_path / "run"
    trainer = make_trainer(folder, tokenizer, max_steps=1)
    with (
        foreign_lock(folder),
        pytest.raises(InUseError, match=r"`output_dir` must be .*run', which process 1 on else"),
    ):
        trainer.train()
    assert trainer.state.global_step == 0
    held = []
    trainer.add_callback(Watching(lambda: held.append(lock_file(folder).exists())))
    trainer.train()
    assert held == [True] and not lock_file(folder).exists()


class Watching(TrainerCallback):
    def __init__(self, look):
        self.look = look

    def on_step_end(self, args, state, control, **kwargs):
        self.look()
