"""The distillation trainer: curricula, logs, resumption, evaluation, the model card, and what it refuses."""

import dataclasses
import math
import re

import pytest
import torch
from datasets import Dataset, IterableDataset
from distillation import ARGUMENTS, make_trainer, rows, student, trajectories
from official import tiny_tokenizer
from peft import LoraConfig
from thin import covering, some_of
from transformers import TrainerCallback, TrainingArguments, set_seed

from d3llm_hf import LLaDAModelLM
from trainers.common.lora import lora_target_modules
from trainers.distill.callbacks import NoiseCurriculumCallback, WindowCurriculumCallback
from trainers.distill.config import PseudoTrajectoryDistillConfig
from trainers.distill.evaluation import same_answer
from trainers.distill.trainer import PseudoTrajectoryDistillTrainer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def lora(model):
    return LoraConfig(r=2, lora_alpha=4, target_modules=lora_target_modules(model))


# Curricula


@pytest.mark.parametrize(
    ("max_steps", "epochs", "table"),
    [
        (8, 1, {0: (0.0, 4), 2: (0.2, 6), 4: (0.4, 8), 6: (0.6, 8)}),
        (-1, 4, {0: (0.0, 4), 2: (0.1, 6), 4: (0.2, 8), 8: (0.4, 8), 12: (0.6, 8)}),  # 4 steps an epoch
    ],
    ids=["by steps", "by epochs"],
)
@pytest.mark.full
def test_noise_and_window_follow_the_run_and_are_logged(tmp_path, tokenizer, max_steps, epochs, table):
    trainer = make_trainer(
        tmp_path, tokenizer, max_steps=max_steps, num_train_epochs=epochs, window_sizes=[4, 8], noise_end=0.8
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "window" in entry]
    assert len(logs) == trainer.state.max_steps
    for step, (floor, window) in table.items():
        assert (logs[step]["noise_floor"], logs[step]["window"]) == (pytest.approx(floor), window)
    assert all(entry["noise_floor"] <= entry["noise_level"] <= 0.8 for entry in logs)


@pytest.mark.full
def test_without_the_noise_curriculum_the_whole_range_of_levels_is_drawn_to_the_end(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer, max_steps=8, noise_start=0.1, noise_end=0.8, noise_curriculum=False)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "window" in entry]
    assert [entry["noise_floor"] for entry in logs] == [0.1] * 8
    trainer.create_model_card()
    assert "| 100 % | 0.10 to 0.80 |" in (tmp_path / "README.md").read_text()


@pytest.mark.full
def test_a_run_that_ends_before_its_last_window_is_warned_of(tmp_path, tokenizer, caplog):
    make_trainer(tmp_path, tokenizer, max_steps=-1, num_train_epochs=1).train()
    assert "window_sizes=[4, 6] has one entry per epoch, but there are num_train_epochs=1" in caplog.text


def test_a_curriculum_can_be_replaced(tmp_path, tokenizer):
    class Constant(TrainerCallback):
        def __init__(self, trainer):
            self.trainer = trainer

        def on_step_begin(self, args, state, control, **kwargs):
            self.trainer.window = 3

    trainer = make_trainer(tmp_path, tokenizer)
    trainer.remove_callback(WindowCurriculumCallback)
    trainer.add_callback(Constant(trainer))
    trainer.train()
    assert {entry["window"] for entry in trainer.state.log_history if "window" in entry} == {3}


# Training


@pytest.mark.parametrize("objective", some_of(["trajectory", "random", "certainty"], every=3))
def test_training_lowers_the_loss_and_logs_its_parts(tmp_path, tokenizer, objective):
    trainer = make_trainer(
        tmp_path, tokenizer, objective=objective, max_steps=30, sft_weight=0.5, noise_start=0.6, loss_scale=0.25
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    # Not the loss: its entropy term is 0 as long as nothing is predicted right.
    assert logs[-1]["cross_entropy"] < 0.8 * logs[0]["cross_entropy"]
    names = {"cross_entropy", "complementary_cross_entropy", "sft_loss", "certainty", "masked_fraction", "noise_level"}
    assert all(names <= set(entry) for entry in logs)
    assert all(0 < entry["masked_fraction"] < 1 and 0 < entry["certainty"] < 1 for entry in logs)
    entropy = logs[0].get("entropy", 0.0) + trainer.entropy_on_complement * logs[0].get("complementary_entropy", 0.0)
    loss = 0.25 * (logs[0]["cross_entropy"] + logs[0]["complementary_cross_entropy"] + 2 * entropy)
    assert logs[0]["loss"] == pytest.approx(loss + 0.5 * logs[0]["sft_loss"], abs=1e-3)


@pytest.mark.parametrize("accumulation, adapter", covering([1, 2], [False, True], strength=1, every=2))
def test_a_resumed_run_is_equal_to_an_unbroken_one_for_any_number_of_workers(
    tmp_path, tokenizer, accumulation, adapter
):
    def run(folder, **changed):
        model = student(tokenizer)
        return make_trainer(
            tmp_path / folder,
            tokenizer,
            model=model,
            dataset=trajectories(20),  # 5 batches an epoch: step 3 is in the middle of one
            max_steps=6,
            objective="random",
            sft_weight=0.1,
            gradient_accumulation_steps=accumulation,
            trainer_kwargs={"peft_config": lora(model)} if adapter else None,
            **changed,
        )

    unbroken = run("a", save_strategy="steps", save_steps=3)
    before = {name: weight.clone() for name, weight in unbroken.model.state_dict().items()}
    unbroken.train()
    resumed = run("b", dataloader_num_workers=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    after = resumed.model.state_dict()
    for name, weight in unbroken.model.state_dict().items():
        assert torch.equal(weight, after[name]), name
    assert any(not torch.equal(weight, before[name]) for name, weight in after.items())
    ignored = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos"}
    histories = [
        [{key: value for key, value in entry.items() if key not in ignored} for entry in trainer.state.log_history]
        for trainer in (unbroken, resumed)
    ]
    assert histories[0] == histories[1]
    assert resumed.resumed_max_steps == 6


@pytest.mark.full
def test_another_length_of_a_resumed_run_is_warned_of(tmp_path, tokenizer, caplog):
    make_trainer(tmp_path, tokenizer, max_steps=2, save_strategy="steps", save_steps=1).train()
    make_trainer(tmp_path, tokenizer, max_steps=3).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert "resumed with max_steps=3, but was begun with 2" in caplog.text


@pytest.mark.full  # several runs of fifty steps
def test_with_means_per_sample_fifty_steps_do_not_depend_on_the_batch_layout(tmp_path, tokenizer):
    """Within 1e-3 at each step; 1e-5 on average, where a micro-batch that is dropped or weighted wrongly shows."""
    runs = []
    for size, accumulation, checkpointing in [(4, 1, False), (1, 4, False), (4, 1, True)]:
        trainer = make_trainer(
            tmp_path,
            tokenizer,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            gradient_checkpointing=checkpointing,
            loss_reduction="sample",
            learning_rate=1e-3,
            max_steps=50,
        )
        trainer.train()
        runs.append([entry for entry in trainer.state.log_history if "grad_norm" in entry])
    losses, *others = ([entry["loss"] for entry in run] for run in runs)
    assert len(losses) == 50 and losses[-1] != losses[0]
    for other in others:
        assert other == pytest.approx(losses, abs=1e-3)
        assert sum(other) / 50 == pytest.approx(sum(losses) / 50, abs=1e-5)
    norms, *others = ([entry["grad_norm"] for entry in run] for run in runs)
    assert all(other == pytest.approx(norms, rel=1e-3) for other in others)


@pytest.mark.full
def test_batches_and_masks_are_the_same_for_any_number_of_workers(tmp_path, tokenizer):
    found = []
    for workers in (0, 2, 4):
        trainer = make_trainer(tmp_path, tokenizer, objective="random", sft_weight=0.1, dataloader_num_workers=workers)
        set_seed(0)
        batches = list(trainer.get_train_dataloader())
        views = [trainer._draw(batch, training=True) for batch in batches]
        found.append([[*batch.values(), view.hidden, view.learnt] for batch, view in zip(batches, views, strict=True)])
    assert len(found[0]) == 4 and any(view.any() for *_, view in found[0])
    for batches in found[1:]:
        for batch, expected in zip(batches, found[0], strict=True):
            assert all(torch.equal(tensor, other) for tensor, other in zip(batch, expected, strict=True))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_samples(tmp_path, tokenizer):
    model = student(tokenizer)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    samples = Dataset.from_list(rows(4, sample_id=lambda index: 70 + index))
    trainer = make_trainer(tmp_path, tokenizer, model=model, dataset=samples)
    with pytest.raises(FloatingPointError, match=r"The loss must be finite .got nan at step 0, samples .7\d, 7\d"):
        trainer.train()
    assert not any("loss" in entry for entry in trainer.state.log_history)


def test_a_gradient_that_is_not_finite_stops_the_run_before_it_spoils_the_weights(tmp_path, tokenizer):
    trainer = make_trainer(tmp_path, tokenizer)
    weight = trainer.model.lm_head.weight
    before = weight.detach().clone()
    weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(FloatingPointError, match=r"The gradient must be finite .its norm is inf at step 0"):
        trainer.train()
    assert torch.equal(weight, before)


def test_a_stream_of_samples_trains(tmp_path, tokenizer):
    stream = IterableDataset.from_generator(lambda: iter(rows(16)))
    trainer = make_trainer(tmp_path, tokenizer, dataset=stream, max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2


def test_samples_that_are_wrong_or_too_long_are_left_out(tmp_path, tokenizer, caplog):
    samples = trajectories(8, correct=lambda index: [True, False, None][index % 3])
    trainer = make_trainer(tmp_path, tokenizer, dataset=samples, only_correct=True)
    assert trainer.train_dataset["sample_id"] == [0, 3, 6]
    long = trajectories(3, target_ids=lambda index: [7] * (4 + 8 * index))
    assert len(make_trainer(tmp_path, tokenizer, dataset=long, use_target_ids=True).train_dataset) == 2
    assert "1 of 3 examples do not fit" in caplog.text


# The model


@pytest.mark.parametrize("family", ["llada", "Dream"])
def test_every_projection_gets_an_adapter(tokenizer, family):
    from peft import get_peft_model

    model = student(tokenizer, family)
    names = lora_target_modules(model)
    assert names == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    adapted = {
        name for name, module in get_peft_model(model, lora(model)).named_modules() if hasattr(module, "lora_A")
    }
    assert len(adapted) == 7 and not any("lm_head" in name for name in adapted)


def test_names_that_mean_something_outside_the_layers_too_are_given_in_full():
    from others import ENCODERS

    bert = ENCODERS[0].tiny()
    names = lora_target_modules(bert)
    assert names and all(".layer." in name for name in names)
    assert not any("predictions" in name for name in names)
    with pytest.raises(ValueError, match=r"`model` must have linear projections in its layers .got Linear with none"):
        lora_target_modules(torch.nn.Linear(2, 2))


def test_a_student_may_be_named_and_brings_its_tokenizer(tmp_path, tokenizer, monkeypatch):
    student(tokenizer).bfloat16().save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    trainer = PseudoTrajectoryDistillTrainer(str(tmp_path / "tiny"))
    assert trainer.args.output_dir == "tiny-distilled" and isinstance(trainer.model, LLaDAModelLM)
    assert trainer.processing_class.mask_token_id == trainer.mask_token_id
    assert trainer.model.dtype == torch.float32
    args = PseudoTrajectoryDistillConfig(str(tmp_path), model_init_kwargs='{"dtype": "bfloat16"}', use_cpu=True)
    assert PseudoTrajectoryDistillTrainer(str(tmp_path / "tiny"), args).model.dtype == torch.bfloat16


# Evaluation and the card


def test_evaluations_draw_the_same_at_any_time_and_decode_when_due(tmp_path, tokenizer):
    held_out = Dataset.from_list(rows(6, seed=5, answer=lambda index: "never"))
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        learning_rate=0.0,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        eval_generate_samples=5,
        eval_generate_steps=2,
        eval_generate_kwargs={"decoding_method": "d3llm", "block_length": 4, "entropy_threshold": 100.0},
        trainer_kwargs={"eval_dataset": held_out},
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(logs) == 3 and len({entry["eval_loss"] for entry in logs}) == 1
    assert len({entry["eval_cross_entropy"] for entry in logs}) == 1
    assert ["eval_tpf" in entry for entry in logs] == [False, True, False]
    assert logs[1]["eval_tpf"] > 1 and logs[1]["eval_exact_match"] == 0.0
    assert trainer.evaluate()["eval_loss"] == logs[0]["eval_loss"]


def test_held_out_sets_of_several_names_are_reported_apart(tmp_path, tokenizer):
    held_out = {"a": trajectories(4, seed=5), "b": trajectories(4, seed=6)}
    trainer = make_trainer(tmp_path, tokenizer, eval_generate_samples=2, trainer_kwargs={"eval_dataset": held_out})
    found = trainer.evaluate()
    assert found["eval_a_loss"] != found["eval_b_loss"]
    assert {"eval_a_tpf", "eval_b_tpf", "eval_a_certainty"} <= set(found) and "eval_a_exact_match" not in found


def test_decoding_with_shards_of_a_model_is_refused(tmp_path, tokenizer):
    trainer = make_trainer(
        tmp_path, tokenizer, eval_generate_samples=1, trainer_kwargs={"eval_dataset": trajectories(4)}
    )
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match=r"`eval_generate_samples` must be 0 with FSDP or ZeRO-3 .got 1"):
        trainer.evaluation_loop(trainer.get_eval_dataloader(), "Evaluation")


@pytest.mark.parametrize(
    ("prediction", "reference", "same"),
    [
        ("Tom has 7.\n#### 7", "7", True),
        ("Tom has 7.\n#### 7", "5 + 2 = 7\n#### 7", True),
        ("#### 1,000", "1000", True),
        ("7", "7 ", True),
        ("It is Paris.", "Paris", False),
        (" Paris\n", "Paris", True),
        ("no number", "7", False),
        ("#### 3", "3 apples", False),
    ],
)
def test_answers_match_by_number_or_by_text(prediction, reference, same):
    assert same_answer(prediction, reference) == same


def test_the_card_tells_recipe_curriculum_and_results(tmp_path, tokenizer):
    from huggingface_hub import ModelCard

    model = student(tokenizer)
    trainer = make_trainer(
        tmp_path / "my-student",
        tokenizer,
        model=model,
        save_strategy="steps",
        save_steps=4,
        eval_generate_samples=4,
        window_sizes=[4, 8],
        trainer_kwargs={"eval_dataset": trajectories(4, seed=5), "peft_config": lora(model)},
    )
    trainer.train()
    card = ModelCard.load(tmp_path / "my-student" / "README.md")
    assert "Not evaluated during training" in card.text
    trainer.evaluate()
    trainer.create_model_card(license="mit", tags="mine", dataset="me/my-data", finetuned_from="me/my-teacher")
    card = ModelCard.load(tmp_path / "my-student" / "README.md")
    assert {"d3llm", "distillation", "diffusion", "mine"} <= set(card.data.tags)
    assert (card.data.license, card.data.base_model) == ("mit", "me/my-teacher")
    assert (card.data.datasets, card.data.library_name) == ("me/my-data", "peft")
    for expected in [
        "# my-student",
        "distilled from me/my-teacher with pseudo-trajectory distillation",
        "After 4 of 4 optimizer steps",
        "| Tokens per forward |",
        "| Objective | `trajectory` |",
        "| LORA adapter | r=2, alpha=4, on down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj |",
        "| Learning rate | 0.01, linear, ",
        "| 0 % | 0.00 to 0.80 | 4 |",
        "| 25 % | 0.20 to 0.80 | 6 |",
        "| 100 % | 0.80 to 0.80 | 8 |",
        'PeftModel.from_pretrained(model, "my-student")',
    ]:
        assert expected in card.text, expected
    trainer.is_world_process_zero = lambda: False
    (tmp_path / "my-student" / "README.md").unlink()
    trainer.create_model_card()
    assert not (tmp_path / "my-student" / "README.md").exists()


def test_a_push_uploads_model_and_card(tmp_path, tokenizer, monkeypatch):
    trainer = make_trainer(tmp_path / "out", tokenizer, max_steps=1)
    trainer.train()
    uploads = []

    class Api:
        def upload_folder(self, **kwargs):
            uploads.append(kwargs)

    monkeypatch.setattr("transformers.trainer.hf_api", Api)
    trainer.hub_model_id = "me/my-student"
    trainer.push_to_hub(tags=["extra"], dataset="me/my-data")
    (upload,) = uploads
    assert upload["repo_id"] == "me/my-student"
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "- extra" in card and "- distillation" in card and "me/my-data" in card
    assert (tmp_path / "out" / "model.safetensors").is_file()


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective": "naive"}, "`objective` must be one of .* .got 'naive'"),
        ({"loss_reduction": "batch"}, "`loss_reduction` must be one of"),
        ({"state_region": "canvas"}, "`state_region` must be one of .* .got 'canvas'"),
        ({"state_region": "blocks", "objective": "rollout"}, "`state_region` needs `blockwise` windows with"),
        ({"state_region": "blocks", "objective": "certainty"}, "`state_region` needs `blockwise` windows with"),
        ({"state_region": "blocks", "blockwise": False}, "`state_region` needs `blockwise` windows with"),
        ({"label_shift": 2}, "`label_shift` must be 0 or 1 .got 2"),
        ({"remove_unused_columns": True}, "`remove_unused_columns` must be False"),
        ({"response_length": 0}, "`response_length` must be at least 1 .got 0"),
        ({"sft_weight": -1.0}, "`sft_weight` must be at least 0"),
        ({"noise_start": 1.5}, "`noise_start` must be between 0 and 1 .got 1.5"),
        ({"noise_start": 0.5, "noise_end": 0.4}, "`noise_end` must be between 0.5 and 1 .got 0.4"),
        ({"entropy_temperature": 0.0}, "`entropy_temperature` must be positive .got 0.0"),
        ({"eval_generate_steps": 0}, "`eval_generate_steps` must be at least 1 .got 0"),
        ({"window_sizes": []}, "`window_sizes` must hold positive window lengths"),
        ({"window_sizes": [16, 0]}, "`window_sizes` must hold positive window lengths"),
    ],
)
def test_a_bad_training_argument_is_refused_by_name(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        PseudoTrajectoryDistillConfig(str(tmp_path), use_cpu=True, **arguments)


def test_every_argument_is_explained_and_the_objectives_have_defaults_of_their_own(tmp_path):
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    own = [field for field in dataclasses.fields(PseudoTrajectoryDistillConfig) if field.name not in inherited]
    assert len(own) > 25 and all(field.metadata["help"] for field in own)
    explained = set(re.findall(r"\w+", PseudoTrajectoryDistillConfig.__doc__))
    assert {field.name for field in own} <= explained
    ours, certainty = (
        PseudoTrajectoryDistillConfig(str(tmp_path), use_cpu=True, objective=name)
        for name in ("trajectory", "certainty")
    )
    assert (ours.window_sizes, ours.loss_scale) == ([16, 16, 24, 24, 32, 32], 0.25)
    assert (certainty.window_sizes, certainty.loss_scale) == ([32], 1.0)


@pytest.mark.parametrize(
    ("changed", "arguments", "message"),
    [
        ({"sample_id": "a"}, {}, r"`sample_id` must be an integer .got 'a'"),
        ({"step_map": None}, {}, r"must have the columns .* .got .'prompt_ids', 'response_ids'"),
        (
            {},
            {"use_target_ids": True},
            r"must have the columns .'prompt_ids', 'response_ids', 'step_map', 'target_ids'",
        ),
        ({}, {"only_correct": True}, r"must have the columns .'correct'"),
        ({"correct": False}, {"only_correct": True}, r"`only_correct` must leave at least one sample .got none of 16"),
        ({}, {"response_length": 1}, r"At least one example must fit `max_prompt_length` and `response_length`"),
    ],
)
def test_a_data_set_that_cannot_be_used_is_refused(tmp_path, tokenizer, changed, arguments, message):
    samples = [{k: v for k, v in (row | changed).items() if v is not None} for row in rows(16)]
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, tokenizer, dataset=Dataset.from_list(samples), **arguments)


def test_a_model_in_memory_needs_its_tokenizer_and_no_arguments_of_loading(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"`processing_class` must be given for a model that was not loaded"):
        PseudoTrajectoryDistillTrainer(student(tokenizer), PseudoTrajectoryDistillConfig(str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match=r"`model_init_kwargs` must be unset where `model` is an object"):
        make_trainer(tmp_path, tokenizer, model_init_kwargs={"dtype": "float32"})


def test_the_package_names_the_classes():
    import trainers

    assert trainers.PseudoTrajectoryDistillTrainer is PseudoTrajectoryDistillTrainer
    assert trainers.NoiseCurriculumCallback is NoiseCurriculumCallback
    assert trainers.lora_target_modules is lora_target_modules
    assert ARGUMENTS["use_cpu"]
