"""Every argument of transformers has a decision here, and every value is checked as soon as it is given."""

import dataclasses
import inspect
import math
import typing

import pytest
import torch
from both_trainers import KINDS, make, make_args
from datasets import Dataset
from distillation import trajectories
from places import GOLDEN
from thin import some_of
from transformers import Trainer, TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from d3llm_hf import ReFusionForCausalLM
from trainers.common.argument_checks import check_inherited
from trainers.common.argument_table import COURSE, FREE, HELD_PARAMETERS, LIMITED, REFUSED, REFUSED_PARAMETERS
from trainers.distill.config import PseudoTrajectoryDistillConfig
from trainers.sft.config import MaskedDiffusionSFTConfig


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
BOTH = pytest.mark.parametrize("kind", some_of(KINDS, every=2))  # what is tested here they share
# Not in every version of transformers that is supported.
OF_SOME_VERSIONS = {"activation_checkpointing", "activation_checkpointing_kwargs"}


# The table


def test_every_argument_of_transformers_has_one_decision():
    """It fails where transformers has an argument that the table does not know: decide, and add it there."""
    tables = [set(REFUSED), COURSE, FREE, LIMITED]
    decided = set().union(*tables)
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert fields - decided == set()
    assert decided - fields <= OF_SOME_VERSIONS
    assert sum(map(len, tables)) == len(decided)


def test_every_parameter_of_the_trainer_has_one_decision():
    parameters = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    assert parameters == set(REFUSED_PARAMETERS) | HELD_PARAMETERS
    assert not set(REFUSED_PARAMETERS) & HELD_PARAMETERS


@BOTH
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor"])
@pytest.mark.parametrize("name", ["optim_args", "optim_target_modules"])
def test_options_that_an_optimizer_does_not_read_are_refused(tmp_path, kind, optim, name):
    with pytest.raises(ValueError, match=rf"`{name}` is not read with `optim='{optim}'` .got 'lr=1'"):
        make_args(kind, tmp_path, optim=optim, **{name: "lr=1"})
    assert make_args(kind, tmp_path, optim="sgd", optim_args="momentum=0.9").optim_args == "momentum=0.9"


@BOTH
def test_options_that_a_schedule_does_not_have_are_refused_before_the_run(tmp_path, kind):
    with pytest.raises(ValueError, match=r"`lr_scheduler_kwargs` must be options of the schedule 'cosine' .*'nope'"):
        make_args(kind, tmp_path, lr_scheduler_type="cosine", lr_scheduler_kwargs={"nope": 1})
    chosen = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-5}}
    assert make_args(kind, tmp_path, **chosen).lr_scheduler_kwargs == {"min_lr": 1e-5}


@BOTH
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("label_smoothing_factor", 0.5),
        ("use_liger_kernel", True),
        ("liger_kernel_config", {"rope": True}),
        ("eval_do_concat_batches", False),
        ("include_for_metrics", ["inputs"]),
        ("batch_eval_metrics", True),
    ],
)
def test_an_argument_without_effect_is_refused(tmp_path, kind, name, value):
    assert name in REFUSED
    with pytest.raises(
        ValueError, match=rf"`{name}` has no effect here and must be left at .* .got .*{REFUSED[name]}"
    ):
        make_args(kind, tmp_path, **{name: value})


def test_the_names_of_labels_may_be_what_they_are(tmp_path):
    make_args("sft", tmp_path, label_names=["labels"])
    with pytest.raises(ValueError, match=r"`label_names` must be .'labels'. or unset .got .'answers'."):
        make_args("sft", tmp_path, label_names=["answers"])


def test_texts_that_are_split_along_their_positions_are_refused(tmp_path):
    args = make_args("sft", tmp_path)
    args.parallelism_config = type("Split", (), {"cp_size": 2, "sp_size": 1})()
    with pytest.raises(ValueError, match=r"`parallelism_config` must not split texts .* .got .'cp_size': 2"):
        check_inherited(args)


@BOTH
@pytest.mark.parametrize("name", REFUSED_PARAMETERS)
def test_a_parameter_without_effect_is_refused_with_the_way_out(tmp_path, kind, name):
    with pytest.raises(ValueError, match=rf"`{name}` has no effect here and must be None .got .*(Pass|Override)"):
        make(kind, tmp_path, given={name: lambda *args, **kwargs: 1 / 0})


@BOTH
def test_arguments_of_another_class_and_no_model_are_refused(tmp_path, kind):
    config = KINDS[kind][0].__name__
    with pytest.raises(TypeError, match=rf"`args` must be a `{config}` .got TrainingArguments"):
        make(kind, tmp_path, args=TrainingArguments(str(tmp_path), use_cpu=True))
    other = make_args("sft" if kind == "distillation" else "distillation", tmp_path)
    with pytest.raises(TypeError, match=rf"`args` must be a `{config}`"):
        make(kind, tmp_path, args=other)
    with pytest.raises(ValueError, match=r"`model` must be a masked diffusion language model .got None"):
        make(kind, tmp_path, given={"model": None})


@BOTH
def test_a_collator_and_an_optimizer_of_ones_own_are_used_and_none_is_the_default(tmp_path, kind):
    default = make(kind, tmp_path, given={"data_collator": None})
    calls = []

    def collate(rows):
        calls.append(len(rows))
        return default.data_collator(rows)

    own = {"data_collator": collate, "optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})}
    trainer = make(kind, tmp_path, max_steps=1, given=own)
    trainer.train()
    assert calls and isinstance(trainer.optimizer.optimizer, torch.optim.SGD)


@pytest.mark.full
@BOTH
def test_noise_in_the_embeddings_reaches_the_loss(tmp_path, kind):
    def loss(**arguments):
        trainer = make(kind, tmp_path, max_steps=1, **arguments)
        trainer.train()
        return trainer.state.log_history[0]["loss"]

    assert loss() != loss(neftune_noise_alpha=5.0)


@BOTH
def test_an_order_by_length_needs_lengths_and_uses_them(tmp_path, kind):
    with pytest.raises(ValueError, match=r"`train_sampling_strategy='group_by_length'` needs a column `length`"):
        make(kind, tmp_path, train_sampling_strategy="group_by_length")
    rows = trajectories(16).map(lambda row: {"length": len(row["prompt_ids"])})
    trainer = make(kind, tmp_path, max_steps=1, train=rows, train_sampling_strategy="group_by_length")
    assert trainer._get_train_sampler().lengths == rows["length"]
    trainer.train()


def test_text_keeps_its_lengths_when_it_is_tokenised(tmp_path):
    rows = Dataset.from_list([{"prompt": "abc", "completion": "d", "length": 3}] * 4)
    sizes = {"max_prompt_length": 48, "response_length": 16}
    trainer = make("sft", tmp_path, train=rows, train_sampling_strategy="batch_rebalance", **sizes)
    assert set(trainer.train_dataset.column_names) == {"prompt_ids", "response_ids", "length"}


# Muon


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"use_muon": True, "optim": "adafactor"}, r"`optim` must be .* with `use_muon`, .* .got 'adafactor'"),
        ({"use_muon": True, "optim_args": "a=1"}, r"`optim_args` is not read with `use_muon` .got 'a=1'"),
        ({"use_muon": True, "optim_target_modules": "all-linear"}, "`optim_target_modules` is not read with"),
        ({"muon_learning_rate": 0.1}, r"`muon_learning_rate` needs `use_muon=True` .got 0.1 and False"),
        ({"use_muon": True, "muon_momentum": 2.0}, "`muon_momentum` must be between 0 and 1 .got 2.0"),
        ({"use_muon": True, "muon_learning_rate": -0.1}, "`muon_learning_rate` must be at least 0 .got -0.1"),
    ],
)
def test_muon_stands_alone_and_its_settings_with_it(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_args("sft", tmp_path, **arguments)


@pytest.mark.parametrize(
    "given",
    [
        {"optimizers": (torch.optim.SGD([torch.zeros(1)], lr=0.1), None)},
        {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})},
    ],
    ids=["optimizers", "optimizer_cls_and_kwargs"],
)
def test_muon_and_an_optimizer_of_ones_own_exclude_each_other(tmp_path, given):
    (name,) = given
    with pytest.raises(ValueError, match=rf"`use_muon` must be False where `{name}` gives an optimizer"):
        make("sft", tmp_path, use_muon=True, given=given)


# Kinds and ranges


def kinds(config_class):
    """Each number and switch of a config, by the kind that its annotation says (parsers overwrite `field.type`)."""
    for name, annotation in typing.get_type_hints(config_class).items():
        for kind in (int, float, bool):
            if annotation in (kind, kind | None):
                yield name, kind


WRONG = {int: [1.5, "8", True, math.nan], float: ["1e-4", math.nan, True, [1.0]], bool: ["no", 2]}


@BOTH
def test_a_value_of_another_kind_is_refused_by_name_in_every_field(tmp_path, kind):
    names = []
    for name, expected in kinds(KINDS[kind][0]):
        for value in WRONG[expected]:
            with pytest.raises(
                TypeError, match=rf"`{name}` must be .* .got .*. Set it in `{KINDS[kind][0].__name__}`"
            ):
                make_args(kind, tmp_path, **{name: value})
        names.append(name)
    assert {"learning_rate", "response_length", "seed", "label_shift", "bf16", "logging_steps"} <= set(names)


def test_text_and_mappings_are_checked_as_well(tmp_path):
    for name, value in [("objective", 3), ("eval_answer_column", 3), ("loss_reduction", None)]:
        with pytest.raises(TypeError, match=rf"`{name}` must be text .got {value}"):
            make_args("distillation", tmp_path, **{name: value})
    for name in ("eval_generate_kwargs", "model_init_kwargs"):
        for value in ([1], 3, "steps=3"):
            with pytest.raises(TypeError, match=rf"`{name}` must map names to values .got "):
                make_args("distillation", tmp_path, **{name: value})
    for name in ("eval_generate_kwargs", "lr_scheduler_kwargs"):
        with pytest.raises(ValueError, match=rf"`{name}` must be JSON .got .*Write for example"):
            make_args("distillation", tmp_path, **{name: "{steps"})
    for sizes in ([16.5], ["16"], [True], 16, [16, None], {}):
        with pytest.raises(ValueError, match=r"`window_sizes` must hold positive window lengths .got "):
            make_args("distillation", tmp_path, window_sizes=sizes)


def test_what_is_a_number_or_a_mapping_in_another_way_is_taken(tmp_path):
    import numpy

    args = make_args(
        "distillation",
        tmp_path,
        learning_rate=numpy.float32(1e-4),
        max_steps=numpy.int64(3),
        noise_start=0,
        max_grad_norm=math.inf,
        bf16=0,
        window_sizes=(4, numpy.int64(6)),
        accelerator_config=AcceleratorConfig(),
        eval_generate_kwargs='{"steps": 3}',
        lr_scheduler_kwargs="{}",
    )
    assert args.eval_generate_kwargs == {"steps": 3} and args.max_steps == 3


@BOTH
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"per_device_train_batch_size": 0}, "`per_device_train_batch_size` must be at least 1 .got 0"),
        ({"per_device_eval_batch_size": -1}, "`per_device_eval_batch_size` must be at least 1"),
        ({"gradient_accumulation_steps": 0}, "`gradient_accumulation_steps` must be at least 1"),
        ({"num_train_epochs": -1.0}, "`num_train_epochs` must be at least 0"),
        ({"learning_rate": -1e-4}, "`learning_rate` must be at least 0"),
        ({"adam_beta1": 1.5}, "`adam_beta1` must be between 0 and 1"),
        ({"seed": -1}, "`seed` must be between 0 and 4294967295 .got -1"),
        ({"data_seed": 2**32}, "`data_seed` must be between 0 and 4294967295"),
        ({"logging_steps": -1}, "`logging_steps` must be at least 0"),
    ],
)
def test_a_number_out_of_range_is_refused_by_name(tmp_path, kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_args(kind, tmp_path, **arguments)


def test_values_are_checked_after_a_command_line_was_read(tmp_path):
    """`HfArgumentParser` changes the fields of a dataclass that it reads."""
    from transformers import HfArgumentParser

    for config_class in (MaskedDiffusionSFTConfig, PseudoTrajectoryDistillConfig):
        HfArgumentParser(config_class).parse_args_into_dataclasses(
            ["--output_dir", str(tmp_path), "--use_cpu", "--learning_rate", "1e-4", "--warmup_steps", "2"]
        )
        config_class(str(tmp_path), use_cpu=True)
        with pytest.raises(TypeError, match=r"`label_shift` must be an integer .got 'a'"):
            config_class(str(tmp_path), use_cpu=True, label_shift="a")


def test_a_model_that_decides_slots_is_not_distilled(tmp_path):
    model = ReFusionForCausalLM.from_pretrained(GOLDEN / "refusion-tiny-a")
    with pytest.raises(ValueError, match=r"`model` must see the whole canvas \(got ReFusionForCausalLM"):
        make("distillation", tmp_path, given={"model": model})
