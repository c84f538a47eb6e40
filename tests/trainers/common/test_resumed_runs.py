"""Runs that are resumed: at their end, beyond it, and with other arguments than they were begun with."""

import json
import logging
import re

import pytest
import torch
from both_trainers import KINDS, make, make_args, same, weights
from distillation import trajectories
from thin import some_of

from trainers.common.resumed_arguments import ARGUMENTS, compare_arguments, course_of, set_again, settings_of


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
BOTH = pytest.mark.parametrize("kind", some_of(reversed(KINDS), every=2))  # what is tested here they share
SAVING = {"save_strategy": "steps", "save_steps": 2}


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def rates(trainer, after=0):
    history = trainer.state.log_history
    return [entry["learning_rate"] for entry in history if "learning_rate" in entry and entry["step"] > after]


# At the end


@BOTH
@pytest.mark.full
def test_a_finished_run_takes_no_more_step(tmp_path, kind):
    first = make(kind, tmp_path, lr_scheduler_type="constant", **SAVING)
    first.train()
    for _ in range(2):
        again = make(kind, tmp_path, lr_scheduler_type="constant", **SAVING)
        again.train(resume_from_checkpoint="last")
        assert again.state.global_step == 4 and same(weights(first), again)
        assert len(losses(again)) == 4
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


@BOTH
@pytest.mark.full
def test_a_run_by_epochs_that_is_finished_takes_no_more_step_and_one_of_more_epochs_goes_on(tmp_path, kind):
    by_epochs = {"max_steps": -1, "save_strategy": "epoch"}
    first = make(kind, tmp_path, num_train_epochs=1, **by_epochs)
    first.train()
    again = make(kind, tmp_path, num_train_epochs=1, **by_epochs)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4 and same(weights(first), again)
    longer = make(kind, tmp_path, num_train_epochs=1.5, **by_epochs)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 6


@BOTH
@pytest.mark.full
def test_a_finished_run_still_ends_with_its_best_model(tmp_path, kind):
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 1.0}
    first = make(kind, tmp_path, held_out=trajectories(4, seed=5), **SAVING, **best)
    first.train()
    again = make(kind, tmp_path, held_out=trajectories(4, seed=5), **SAVING, **best)
    again.train(resume_from_checkpoint="last")
    assert again.state.best_model_checkpoint == first.state.best_model_checkpoint
    assert same(weights(first), again)


@BOTH
@pytest.mark.full
def test_fewer_steps_than_the_checkpoint_has_are_refused_with_both_numbers(tmp_path, kind):
    make(kind, tmp_path, **SAVING).train()
    with pytest.raises(ValueError, match=r"`max_steps` must reach the checkpoint's step .got 2, .* has 4 steps"):
        make(kind, tmp_path, max_steps=2).train(resume_from_checkpoint="last")
    shorter = make(kind, tmp_path, max_steps=-1, num_train_epochs=0.5)
    with pytest.raises(ValueError, match=r"`num_train_epochs` must reach .* .got 0.5, which is 2 steps, .* has 4 "):
        shorter.train(resume_from_checkpoint="last")


@BOTH
@pytest.mark.full
def test_a_run_of_no_steps_takes_none(tmp_path, kind):
    trainer = make(kind, tmp_path, max_steps=0)
    before = weights(trainer)
    trainer.train()
    assert trainer.state.global_step == 0 and same(before, trainer)


# Arguments that have changed


@pytest.mark.full
@BOTH
def test_another_learning_rate_and_schedule_hold_in_a_resumed_run_and_are_named(tmp_path, kind, caplog):
    make(kind, tmp_path, **SAVING).train()
    changed = {"learning_rate": 1e-6, "lr_scheduler_type": "constant", "weight_decay": 0.5, "adam_beta1": 0.5}
    trainer = make(kind, tmp_path, max_steps=5, **changed)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert rates(trainer, after=2) == [1e-6] * 3
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} == {0.5, 0.0}
    assert {group["betas"] for group in trainer.optimizer.param_groups} == {(0.5, 0.999)}
    for name, now, before in [
        ("learning_rate", "1e-06", "0.01"),
        ("lr_scheduler_type", "'constant'", "'linear'"),
        ("weight_decay", "0.5", "0.0"),
        ("adam_beta1", "0.5", "0.9"),
        ("max_steps", "5", "4"),
    ]:
        assert f"`{name}` is {now} and was {before} when" in caplog.text
        assert f"Set it to {before} to go on as begun" in caplog.text


@pytest.mark.full
def test_the_settings_of_muon_hold_in_a_resumed_run(tmp_path):
    make("sft", tmp_path, use_muon=True, **SAVING).train()
    changed = {"muon_learning_rate": 1e-4, "muon_momentum": 0.5, "muon_weight_decay": 0.2}
    trainer = make("sft", tmp_path, use_muon=True, lr_scheduler_type="constant", **changed)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    hidden, others = trainer.optimizer.param_groups
    assert (hidden["lr"], hidden["momentum"], hidden["weight_decay"]) == (1e-4, 0.5, 0.2)
    assert others["lr"] == 1e-2


@BOTH
@pytest.mark.full
def test_a_resumed_run_logs_and_saves_as_its_arguments_say(tmp_path, kind):
    make(kind, tmp_path, logging_steps=2, **SAVING).train()
    trainer = make(kind, tmp_path, max_steps=6, logging_steps=1, save_strategy="steps", save_steps=5)
    trainer.train(resume_from_checkpoint="last")
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [2, 4, 5, 6]
    assert (tmp_path / "checkpoint-5").is_dir()


@BOTH
def test_an_unchanged_run_is_resumed_without_a_word(tmp_path, kind, caplog):
    make(kind, tmp_path, **SAVING).train()
    with caplog.at_level(logging.WARNING):
        trainer = make(kind, tmp_path / "other", logging_steps=2, dataloader_num_workers=1, num_train_epochs=7)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "when" not in caplog.text


@pytest.mark.parametrize(
    ("kind", "begun", "changed", "text"),
    [
        ("sft", {}, {"seed": 7}, r"`seed` is 7 and was 42 when .* samples of the present epoch may be seen twice"),
        ("sft", {}, {"data_seed": 7}, "`data_seed` is 7 and was None"),
        ("sft", {}, {"per_device_train_batch_size": 2}, "`per_device_train_batch_size` is 2 and was 4"),
        ("sft", {}, {"gradient_accumulation_steps": 2}, "`gradient_accumulation_steps` is 2 and was 1"),
        ("sft", {}, {"suffix_mask_fraction": 0.5}, "`suffix_mask_fraction` is 0.5 and was 0.0"),
        ("sft", {}, {"warmup_steps": 3}, r"`warmup_steps` is 3 and was 0"),
        ("sft", {}, {"neftune_noise_alpha": 5.0}, "`neftune_noise_alpha` is 5.0 and was None"),
        ("distillation", {}, {"window_sizes": [3]}, r"`window_sizes` is .3. and was .4, 6."),
        ("distillation", {}, {"objective": "random"}, "`objective` is 'random' and was 'trajectory'"),
        ("distillation", {}, {"entropy_weight": 0.0}, "`entropy_weight` is 0.0 and was 2.0"),
        ("distillation", {"sft_weight": 0.5}, {}, "`sft_weight` is 0.0 and was 0.5"),
    ],
)
def test_each_argument_that_has_changed_is_named_with_both_values(tmp_path, caplog, kind, begun, changed, text):
    keep(tmp_path, make_args(kind, tmp_path, **begun))
    with caplog.at_level(logging.WARNING):
        compare_arguments(make_args(kind, tmp_path, **changed), str(tmp_path))
    (record,) = caplog.records
    assert re.search(text, record.getMessage())


@pytest.mark.parametrize(
    ("begun", "changed", "message"),
    [
        ({}, {"use_muon": True}, r"`use_muon` must be False, as in .* .got True.: the state of one optimizer"),
        ({"use_muon": True}, {}, "`use_muon` must be True, as in"),
        ({}, {"optim": "adafactor"}, r"`optim` must be 'adamw_torch\w*', as in .* .got 'adafactor'"),
        ({"optim": "sgd"}, {"optim": "sgd", "optim_args": "momentum=0.9"}, "`optim_args` must be None, as in"),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"},
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "learning_rate": 1e-5},
            r"`learning_rate` must be 0.01, as in .* .got 1e-05.: the learning rate depends on the evaluations",
        ),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"},
            {},
            "`lr_scheduler_type` must be 'reduce_lr_on_plateau', as in",
        ),
    ],
)
def test_what_cannot_change_within_a_run_is_refused(tmp_path, begun, changed, message):
    keep(tmp_path, arguments(tmp_path, **begun))
    with pytest.raises(ValueError, match=message):
        compare_arguments(arguments(tmp_path, **changed), str(tmp_path))


def test_one_adamw_may_follow_another(tmp_path, caplog):
    keep(tmp_path, arguments(tmp_path, optim="adamw_torch"))
    compare_arguments(arguments(tmp_path, optim="adamw_torch_fused"), str(tmp_path))
    assert "`optim` is 'adamw_torch_fused' and was 'adamw_torch'" in caplog.text


def test_what_deepspeed_restores_cannot_change(tmp_path):
    keep(tmp_path, arguments(tmp_path))
    changed = arguments(tmp_path, learning_rate=1.0)
    with pytest.raises(ValueError, match=r"`learning_rate` must be 0.01, .*: DeepSpeed restores optimizer"):
        compare_arguments(changed, str(tmp_path), deepspeed=True)


def test_a_refused_argument_ends_the_run_before_it_begins(tmp_path):
    make("sft", tmp_path, **SAVING).train()
    trainer = make("sft", tmp_path, use_muon=True)
    with pytest.raises(ValueError, match="`use_muon` must be False, as in"):
        trainer.train(resume_from_checkpoint="last")
    assert trainer.state.global_step == 0


def test_a_checkpoint_keeps_the_arguments_that_count_and_no_token(tmp_path):
    make("distillation", tmp_path, max_steps=2, hub_token="hf_secret", **SAVING).train()
    content = (tmp_path / "checkpoint-2" / ARGUMENTS).read_text(encoding="utf-8")
    kept = json.loads(content)
    assert {"learning_rate", "seed", "window_sizes", "objective", "world_size"} <= set(kept)
    assert not {"output_dir", "logging_steps", "eval_generate_kwargs"} & set(kept) and "secret" not in content


@pytest.mark.full
def test_a_checkpoint_without_its_arguments_is_resumed_with_those_given(tmp_path):
    make("sft", tmp_path, **SAVING).train()
    checkpoint = tmp_path / "checkpoint-2"
    (checkpoint / ARGUMENTS).unlink()
    (checkpoint / "checkpoint_files.json").unlink()
    trainer = make("sft", tmp_path, learning_rate=1e-5, lr_scheduler_type="constant")
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert rates(trainer, after=2) == [1e-5] * 2


def test_a_schedule_of_ones_own_that_changes_settings_is_left_as_it_was_restored():
    def parts():
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)

    optimizer, schedule = parts()
    asked = settings_of(optimizer)
    optimizer.step()
    schedule.step()
    restored = dict(optimizer.param_groups[0], params=None)
    set_again(optimizer, schedule, asked, own_schedule=True)
    assert dict(optimizer.param_groups[0], params=None) == restored


def test_a_rate_that_depends_on_the_evaluations_stays_and_other_settings_hold():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.1, weight_decay=0.5)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    asked = settings_of(optimizer)
    optimizer.param_groups[0].update(lr=0.01, weight_decay=0.1)  # as restored
    set_again(optimizer, schedule, asked, own_schedule=False)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (0.01, 0.5)


def test_a_run_goes_on_without_the_loss_scaler_of_its_checkpoint(tmp_path):
    trainer = make("sft", tmp_path)
    torch.save({"scale": 1.0}, tmp_path / "scaler.pt")
    trainer._load_scaler(str(tmp_path))
    loaded = []
    trainer.accelerator.scaler = type("Scaler", (), {"load_state_dict": lambda self, state: loaded.append(state)})()
    trainer._load_scaler(str(tmp_path))
    assert loaded == [{"scale": 1.0}]


def keep(folder, args):
    (folder / ARGUMENTS).write_text(json.dumps(course_of(args)), encoding="utf-8")


def arguments(folder, **changed):
    return make_args("sft", folder, **changed)
