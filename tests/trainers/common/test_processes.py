"""Distillation in several processes: the losses of one process, sharded weights, and the files that launch it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import joined_runs
import pytest
import torch
import yaml
from joined_runs import arguments, logged
from places import REPOSITORY
from safetensors.torch import load_file

from d3llm_hf import LLaDAModelLM
from trainers.common.whole_checkpoints import check_checkpoint, last_whole_checkpoint


CONFIGS = REPOSITORY / "trainers" / "accelerate_configs"
# Losses of two processes and of one are means of the same terms in another order.
LOSS_TOLERANCE = 1e-5
forks = pytest.mark.skipif(sys.platform == "win32", reason="forks")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    joined_runs.write_teacher(folder)
    return folder


@pytest.fixture(scope="module")
def told(teacher, tmp_path_factory):
    """What was trained by one process, by two, by two with a shard each, and by these resumed; rollouts likewise."""
    folder = tmp_path_factory.mktemp("joined")
    sharding = joined_runs.environment_of(CONFIGS / "fsdp.yaml") | {"ACCELERATE_MIXED_PRECISION": "no"}
    resume = {"resume_from_checkpoint": folder / "sharded" / "checkpoint-2"}
    # Whatever a position's entropy is, it is decided: no rounding that depends on the layout says when.
    rollout = {"objective": "rollout", "rollout_block_length": 4, "rollout_threshold": [9, 9]}
    runs = {
        "one": {"processes": 1, "arguments": arguments(teacher, folder / "one", 4)},
        "two": {"processes": 2, "arguments": arguments(teacher, folder / "two", 2)},
        "sharded": {
            "processes": 2,
            "arguments": arguments(teacher, folder / "sharded", 2),
            "environment": sharding,
        },
        "resumed": {
            "processes": 2,
            "arguments": arguments(teacher, folder / "resumed", 2, **resume),
            "environment": sharding,
        },
        "rollouts of one": {"processes": 1, "arguments": arguments(teacher, folder / "r1", 4, **rollout)},
        "rollouts of two": {"processes": 2, "arguments": arguments(teacher, folder / "r2", 2, **rollout)},
        "sharded rollouts": {
            "processes": 2,
            "arguments": arguments(teacher, folder / "rs", 2, **rollout),
            "environment": sharding,
        },
    }
    for name, run in runs.items():
        run["told"] = str(folder / f"{name}.json")
    joined_runs.run_in_process(list(runs.values()))
    found = {name: json.loads(Path(run["told"]).read_text(encoding="utf-8")) for name, run in runs.items()}
    return found | {"folder": folder}


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.full  # of one launch of all runs
@forks
@pytest.mark.parametrize("name", ["two", "sharded"])
def test_two_processes_have_the_losses_of_one_with_twice_the_batch(told, name):
    assert (told["one"]["processes"], told[name]["processes"]) == (1, 2)
    for quantity in ("loss", "cross_entropy", "complementary_cross_entropy", "masked_fraction", "noise_level"):
        expected = logged(told["one"], quantity)
        assert len(expected) == 4 and logged(told[name], quantity) == pytest.approx(expected, abs=LOSS_TOLERANCE)
    assert logged(told[name], "grad_norm") == pytest.approx(logged(told["one"], "grad_norm"), rel=1e-4)
    one, other = (weights(told["folder"] / run) for run in ("one", name))
    assert one.keys() == other.keys()
    assert all(torch.allclose(tensor, other[key], atol=1e-4) for key, tensor in one.items())


@pytest.mark.full  # of one launch of all runs
@forks
@pytest.mark.parametrize("name", ["rollouts of two", "sharded rollouts"])
def test_two_processes_roll_out_what_one_does(told, name):
    """Rows are done after one forward to three, so that processes have different numbers of them to make."""
    assert told[name]["processes"] == 2 and told[name]["sharded"] == (name == "sharded rollouts")
    for quantity in ("loss", "cross_entropy", "masked_fraction", "rollout_forwards"):
        expected = logged(told["rollouts of one"], quantity)
        assert len(expected) == 4 and logged(told[name], quantity) == pytest.approx(expected, abs=LOSS_TOLERANCE)
    assert logged(told[name], "grad_norm") == pytest.approx(logged(told["rollouts of one"], "grad_norm"), rel=1e-4)


@pytest.mark.full  # of one launch of all runs
@forks
def test_sharded_weights_are_saved_whole_and_load_with_from_pretrained(told):
    assert told["sharded"]["sharded"] and not told["two"]["sharded"]
    for folder in (told["folder"] / "sharded", told["folder"] / "sharded" / "checkpoint-4"):
        model = LLaDAModelLM.from_pretrained(folder)
        assert type(model.lm_head.weight) is torch.nn.Parameter
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        assert config["architectures"] == ["LLaDAModelLM"]


@pytest.mark.full  # of one launch of all runs
@forks
def test_sharded_training_resumes_to_the_same_weights(told):
    assert told["resumed"]["sharded"]
    assert logged(told["resumed"]) == logged(told["sharded"])
    whole, resumed = (weights(told["folder"] / name) for name in ("sharded", "resumed"))
    assert all(torch.equal(tensor, resumed[key]) for key, tensor in whole.items())


@pytest.mark.full  # of one launch of all runs
@forks
@pytest.mark.parametrize("name", ["two", "sharded"])
def test_a_checkpoint_of_several_processes_lists_the_files_of_all(told, name):
    checkpoint = told["folder"] / name / "checkpoint-4"
    check_checkpoint(checkpoint)
    listed = json.loads((checkpoint / "checkpoint_files.json").read_text(encoding="utf-8"))["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth", "model.safetensors"} <= set(listed)
    assert any(file.startswith("optimizer") for file in listed)
    (checkpoint / "rng_state_1.pth").unlink()
    assert last_whole_checkpoint(told["folder"] / name).endswith("checkpoint-2")


@pytest.mark.slow
def test_accelerate_launches_the_script_in_two_processes(teacher, tmp_path):
    config = ["--config_file", str(CONFIGS / "ddp.yaml"), "--num_processes", "2", "--mixed_precision", "no"]
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *config]
    script = str(REPOSITORY / "trainers" / "run_distill.py")
    run = subprocess.run(
        [*launch, script, *arguments(teacher, tmp_path / "two", 2)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.PIPE,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    joined_runs.run_in_process(
        [{"processes": 1, "arguments": arguments(teacher, tmp_path / "one", 4), "told": str(tmp_path / "one.json")}]
    )
    state = tmp_path / "two" / "checkpoint-4" / "trainer_state.json"
    two = {"log": json.loads(state.read_text(encoding="utf-8"))["log_history"]}
    one = json.loads((tmp_path / "one.json").read_text(encoding="utf-8"))
    assert logged(two) == pytest.approx(logged(one), abs=LOSS_TOLERANCE)


# The files


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_configuration_says_how_it_is_launched_and_what_was_not_tested(path):
    text = path.read_text(encoding="utf-8")
    comments = " ".join(line.strip("# ") for line in text.splitlines() if line.startswith("#"))
    assert f"accelerate launch --config_file trainers/accelerate_configs/{path.name} trainers/run_" in comments
    assert "Not tested on GPUs" in comments
    assert yaml.safe_load(text)["num_processes"] == 4


def test_the_configurations_mean_what_they_say(monkeypatch):
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.commands.config.config_args import load_config_from_file

    kinds = {path.stem: load_config_from_file(str(path)).distributed_type.value for path in CONFIGS.glob("*.yaml")}
    deepspeed = dict.fromkeys(["deepspeed_zero2", "deepspeed_zero3"], "DEEPSPEED")
    assert kinds == {"ddp": "MULTI_GPU", "fsdp": "FSDP"} | deepspeed
    for name, value in joined_runs.environment_of(CONFIGS / "fsdp.yaml").items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert "FULL_STATE_DICT" in str(plugin.state_dict_type)
