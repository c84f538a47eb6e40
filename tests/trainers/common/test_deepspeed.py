"""DeepSpeed: two processes without a GPU against one, what is saved in the end, and what is refused."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import joined_runs
import pytest
import torch
from distillation import make_trainer, student
from joined_runs import arguments, logged
from official import tiny_tokenizer
from peft import LoraConfig
from places import REPOSITORY
from safetensors.torch import load_file
from transformers import Trainer
from transformers.integrations import deepspeed as integration

from d3llm_hf import LLaDAModelLM
from trainers.common import canvas_trainer
from trainers.common.argument_checks import check_inherited
from trainers.common.loading import check_processes
from trainers.common.shards import loaded_whole, whole_weights, zero_stage
from trainers.common.whole_checkpoints import check_checkpoint
from trainers.distill.config import PseudoTrajectoryDistillConfig


CONFIGS = REPOSITORY / "trainers" / "accelerate_configs"
STEPS = 10
# Losses of two processes and of one are means of the same terms in another order.
LOSS_TOLERANCE = 1e-5
ON_CPU = {"use_cpu": None, "ddp_backend": "gloo"}
needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs deepspeed")
forks = pytest.mark.skipif(sys.platform == "win32", reason="forks")
STAGES = pytest.mark.parametrize("stage", [2, 3])
# Whatever a position's entropy is, it is decided: no rounding that depends on the layout says when.
ROLLOUT = {"objective": "rollout", "rollout_block_length": 4, "rollout_threshold": [9, 9]}
SELF = {"target": "self", "teacher_reveal": 0.5}
ADAPTER = {"use_peft": True, "lora_r": 4, "lora_alpha": 4, "save_dtype": "bfloat16"}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 5, "num_eval_samples": 4}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What runs of one process and of two with DeepSpeed's stages have told, and where they lie."""
    folder = tmp_path_factory.mktemp("deepspeed")
    joined_runs.write_teacher(folder)
    kinds = {"plain": EVALUATED, "rollout": ROLLOUT, "self": SELF, "adapter": ADAPTER}
    # Another model than the student, of which it would learn nothing but rounding, and text beside distributions.
    student(tiny_tokenizer(), n_layers=1).save_pretrained(folder / "teacher")
    asked = {"target": "teacher", "teacher_model_name_or_path": folder / "teacher", "teacher_reveal": 0.5}
    kinds["teacher"] = asked
    runs = {}
    for kind, more in kinds.items():
        steps = {"max_steps": STEPS, "save_steps": STEPS // 2} | more
        name = f"one {kind}"
        runs[name] = {"processes": 1, "arguments": arguments(folder, folder / name, 4, **steps)}
        for stage in (2, 3):
            if stage == 3 or kind in ("plain", "adapter"):
                runs[f"{stage} {kind}"] = divided(folder, f"{stage} {kind}", stage, steps)
            if kind == "plain":
                resume = {"resume_from_checkpoint": folder / f"{stage} plain" / f"checkpoint-{STEPS // 2}"}
                runs[f"{stage} resumed"] = divided(folder, f"{stage} resumed", stage, steps | resume)
    for name, run in runs.items():
        run["told"] = str(folder / f"{name}.json")
    joined_runs.run_in_process(list(runs.values()))
    found = {name: json.loads(Path(run["told"]).read_text(encoding="utf-8")) for name, run in runs.items()}
    return found | {"folder": folder}


def divided(folder, name, stage, more):
    environment = joined_runs.environment_of(CONFIGS / f"deepspeed_zero{stage}.yaml")
    return {
        "processes": 2,
        "arguments": arguments(folder, folder / name, 2, **(more | ON_CPU)),
        "environment": environment | {"ACCELERATE_MIXED_PRECISION": "no"},
    }


def weights(told, name):
    return load_file(told["folder"] / name / "model.safetensors")


def assert_near(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.allclose(found[name].float(), tensor.float(), rtol=1e-2, atol=1e-3), name


@pytest.mark.slow
@needs_deepspeed
@forks
@STAGES
@pytest.mark.parametrize("kind", ["plain", "rollout", "self", "teacher", "adapter"])
def test_two_processes_have_the_losses_of_one_for_ten_steps(told, stage, kind):
    name, one = f"{stage} {kind}", told[f"one {kind}"]
    if name not in told:
        pytest.skip("the weights are whole with ZeRO-2, as with any copy")
    assert told[name]["processes"] == 2 and told[name]["sharded"] == (stage == 3)
    assert len(logged(one)) == STEPS
    assert logged(told[name]) == pytest.approx(logged(one), abs=LOSS_TOLERANCE)
    assert logged(told[name], "grad_norm") == pytest.approx(logged(one, "grad_norm"), rel=1e-4)


@pytest.mark.slow
@needs_deepspeed
@forks
@STAGES
def test_evaluations_agree_with_those_of_one_process(told, stage):
    expected, found = (
        [entry["eval_loss"] for entry in told[name]["log"] if "eval_loss" in entry]
        for name in ("one plain", f"{stage} plain")
    )
    assert len(expected) == 2 and found == pytest.approx(expected, abs=LOSS_TOLERANCE)


@pytest.mark.slow
@needs_deepspeed
@forks
@STAGES
def test_a_checkpoint_is_whole_and_loads_and_a_run_that_goes_on_from_it_ends_alike(told, stage):
    for folder in (told["folder"] / f"{stage} plain", told["folder"] / f"{stage} plain" / f"checkpoint-{STEPS}"):
        model = LLaDAModelLM.from_pretrained(folder)
        assert model.dtype == torch.float32 and model.lm_head.weight.numel() > 0
    check_checkpoint(told["folder"] / f"{stage} plain" / f"checkpoint-{STEPS}")
    assert logged(told[f"{stage} resumed"]) == logged(told[f"{stage} plain"])
    whole, resumed = weights(told, f"{stage} plain"), weights(told, f"{stage} resumed")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
    assert_near(whole, weights(told, "one plain"))


@pytest.mark.slow
@needs_deepspeed
@forks
@STAGES
def test_an_adapter_is_merged_and_cast_as_in_one_process(told, stage):
    found = weights(told, f"{stage} adapter")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert_near(found, weights(told, "one adapter"))
    assert LLaDAModelLM.from_pretrained(told["folder"] / f"{stage} adapter").dtype == torch.bfloat16


@pytest.mark.slow
@needs_deepspeed
def test_accelerate_launches_the_script_in_two_processes_of_zero_3(tmp_path):
    joined_runs.write_teacher(tmp_path)
    config = ["--config_file", str(CONFIGS / "deepspeed_zero3.yaml"), "--num_processes", "2"]
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *config, "--mixed_precision", "no"]
    script = str(REPOSITORY / "trainers" / "run_distill.py")
    run = subprocess.run(
        [*launch, script, *arguments(tmp_path, tmp_path / "two", 2, **ON_CPU)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu"},
        stderr=subprocess.PIPE,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    check_checkpoint(tmp_path / "two" / "checkpoint-4")
    assert LLaDAModelLM.from_pretrained(tmp_path / "two").lm_head.weight.numel() > 0


@needs_deepspeed
@STAGES
def test_a_configuration_becomes_a_plugin_of_its_stage(stage, monkeypatch):
    from accelerate import DeepSpeedPlugin

    for name, value in joined_runs.environment_of(CONFIGS / f"deepspeed_zero{stage}.yaml").items():
        monkeypatch.setenv(name, value)
    plugin = DeepSpeedPlugin()
    assert plugin.zero_stage == stage
    zero = plugin.deepspeed_config["zero_optimization"]
    assert zero["stage"] == stage
    assert zero["stage3_gather_16bit_weights_on_model_save"] is (stage == 3)


# Without DeepSpeed


def plugged(stage):
    return SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage)))


def test_weights_are_divided_by_stage_three_alone(tmp_path, monkeypatch):
    assert zero_stage(SimpleNamespace(state=SimpleNamespace())) == 0
    trainer = make_trainer(tmp_path)
    assert not trainer.holds_shards
    for stage in (2, 3):
        monkeypatch.setattr(trainer, "accelerator", plugged(stage))
        assert trainer.holds_shards == (stage == 3)


def test_whole_weights_are_gathered_from_what_has_been_divided(monkeypatch):
    gathered = []

    @contextmanager
    def gather(divided, modifier_rank):
        gathered.append((divided, modifier_rank))
        yield

    library = ModuleType("deepspeed")
    library.zero = SimpleNamespace(GatheredParameters=gather)  # which is no module of its own
    monkeypatch.setitem(sys.modules, "deepspeed", library)
    model = torch.nn.Linear(2, 2)
    with whole_weights(model):
        assert not gathered
    model.weight.ds_id = 0
    with whole_weights(model):
        ((divided, writer),) = gathered
    assert divided == [model.weight] and writer == 0


def test_a_teacher_is_loaded_whole_and_one_that_is_divided_is_refused(tmp_path):
    class Divided:  # as transformers asks it
        def is_zero3(self):
            return True

    config = Divided()
    integration.set_hf_deepspeed_config(config)
    try:
        with loaded_whole():
            assert not integration.is_deepspeed_zero3_enabled()
        assert integration.is_deepspeed_zero3_enabled()
    finally:
        integration.unset_hf_deepspeed_config()
    tokenizer = tiny_tokenizer()
    teacher = student(tokenizer)
    teacher.lm_head.weight.ds_id = 0
    with pytest.raises(
        ValueError, match=r"`teacher` must be whole in each process .got LLaDAModelLM divided by ZeRO-3"
    ):
        make_trainer(tmp_path, tokenizer, target="teacher", trainer_kwargs={"teacher": teacher})


def test_deepspeed_saves_what_was_made_of_the_model_and_not_what_its_engine_holds(tmp_path, monkeypatch):
    tokenizer = tiny_tokenizer()
    model = student(tokenizer)
    adapter = LoraConfig(r=2, target_modules=["q_proj"])
    trainer = make_trainer(tmp_path, tokenizer, model, trainer_kwargs={"peft_config": adapter})
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    monkeypatch.setattr(Trainer, "save_model", lambda *args: pytest.fail("the engine's weights were saved"))
    trainer.finish(merge_adapter=True, dtype=torch.bfloat16)
    trainer.save_model()
    saved = LLaDAModelLM.from_pretrained(tmp_path)
    assert saved.dtype == torch.bfloat16
    assert torch.equal(saved.lm_head.weight, model.lm_head.weight.to(torch.bfloat16))


def test_a_gradient_whose_norm_deepspeed_does_not_tell_is_let_pass(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(Trainer, "_get_grad_norm", lambda self, model, grad_norm=None: grad_norm)
    assert trainer._get_grad_norm(trainer.model) is None
    with pytest.raises(FloatingPointError, match="The gradient must be finite"):
        trainer._get_grad_norm(trainer.model, float("inf"))


def test_scripts_of_deepspeed_in_a_checkpoint_are_not_pushed(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "out")
    (tmp_path / "out").mkdir(exist_ok=True)
    checkpoint = tmp_path / "checkpoint-1"
    checkpoint.mkdir()
    for name in ("modeling.py", "zero_to_fp32.py", "zero_to_torch.py"):
        (checkpoint / name).write_text("", encoding="utf-8")
    monkeypatch.setattr(canvas_trainer.CanvasTrainer, "_finish", lambda *args: None)
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", lambda *args: None)
    trainer._push_from_checkpoint(str(checkpoint))
    assert {path.name for path in (tmp_path / "out").glob("*.py")} == {"modeling.py"}


def test_a_processor_is_not_asked_for_where_accelerate_would_leave_deepspeed_out(tmp_path, monkeypatch):
    arguments = PseudoTrajectoryDistillConfig(str(tmp_path), use_cpu=True, report_to="none")
    monkeypatch.setattr(arguments, "deepspeed", {"zero_optimization": {"stage": 3}})
    with pytest.raises(
        ValueError, match=r"`use_cpu` must be unset with DeepSpeed .got True.: .* `ddp_backend='gloo'`"
    ):
        check_inherited(arguments)


def test_processes_that_deepspeed_would_train_apart_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    check_processes(2)
    with pytest.raises(ValueError, match=r"`ddp_backend` must be 'gloo' to train with DeepSpeed without a GPU .got 2"):
        check_processes(1)
