"""Runs of a training script in several processes that are joined as a launcher joins them, without its imports.

As in `killed_runs`, [`run_all`] is meant for a process of its own, which imports everything once and forks.
"""

import json
import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import torch
from accelerate import DeepSpeedPlugin, PartialState
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from distillation import ARGUMENTS, student, trajectories
from official import tiny_tokenizer

from trainers import run_distill, run_sft
from trainers.common.canvas_trainer import CanvasTrainer


SCRIPTS = {"distillation": run_distill, "sft": run_sft}


def environment_of(config: Path) -> dict[str, str]:
    """What `accelerate launch --config_file` adds to the environment of the processes that it starts."""
    arguments = launch_command_parser().parse_args(["--config_file", str(config), "run_distill.py"])
    arguments, defaults, _ = _validate_launch_command(arguments)
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        environment = prepare_deepspeed_cmd_env(arguments)[1]
    else:
        environment = prepare_multi_gpu_env(arguments)
    added = environment.items() - os.environ.items()
    return {name: value for name, value in added if name.startswith(("ACCELERATE_", "FSDP_"))}


def run_all(runs: list[dict[str, Any]]) -> None:
    """Starts each run of a `script` with its `arguments`, in `processes`, with an `environment`, one after another."""
    for run in runs:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        fork = multiprocessing.get_context("fork")
        children = [fork.Process(target=_as_rank, args=(rank, port, run)) for rank in range(run["processes"])]
        for child in children:
            child.start()
        for child in children:
            child.join(240)
            child.kill()
        if any(child.exitcode for child in children):
            raise SystemExit(f"{run['arguments']} ended with {[child.exitcode for child in children]}")


def run_in_process(runs: list[dict[str, Any]]) -> None:
    """[`run_all`] in a process of its own: torch refuses to train in a fork of one that has trained."""
    process = multiprocessing.get_context("spawn").Process(target=run_all, args=(runs,))
    process.start()
    process.join(900)
    process.kill()
    if process.exitcode:
        raise RuntimeError(f"The runs ended with {process.exitcode}.")


def write_teacher(folder: Path) -> None:
    """A tiny `model` with its tokenizer and 16 trajectories, `rows.parquet`."""
    tokenizer = tiny_tokenizer()
    student(tokenizer, n_layers=2).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    trajectories(16).to_parquet(folder / "rows.parquet")


def arguments(teacher: Path, output: Path, batch_size: int, **more: Any) -> list[str]:
    """Of the distillation script: four steps with a checkpoint every two; `None` leaves an argument out."""
    values = ARGUMENTS | {"model_name_or_path": teacher / "model", "dataset_name": teacher / "rows.parquet"}
    values |= {"per_device_train_batch_size": batch_size, "output_dir": output, "loss_reduction": "sample"}
    values |= {"save_strategy": "steps", "save_steps": 2} | more
    return [
        part
        for name, value in values.items()
        if value is not None
        for part in (f"--{name}", *map(str, value if isinstance(value, list) else [value]))
    ]


def logged(run: dict[str, Any], name: str = "loss") -> list[float]:
    """A quantity of each step."""
    return [entry[name] for entry in run["log"] if "loss" in entry]


def _as_rank(rank: int, port: int, run: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    PartialState._reset_state()
    if run["processes"] > 1:
        counts = {"WORLD_SIZE": run["processes"], "LOCAL_WORLD_SIZE": run["processes"]}
        launched = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} | counts
        os.environ.update({name: str(value) for name, value in launched.items()})
    os.environ.update(run.get("environment", {}))
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        os.environ["DS_ACCELERATOR"] = "cpu"
        _divide_small_weights()
    else:
        os.environ["ACCELERATE_USE_CPU"] = "true"
        _shard_on_cpu()
    train = CanvasTrainer.train

    def train_and_tell(trainer, *args, **kwargs):
        train(trainer, *args, **kwargs)
        told = {
            "sharded": any(map(_is_shard, trainer.model.parameters())),
            "log": trainer.state.log_history,
            "processes": trainer.args.world_size,
        }
        if rank == 0:
            Path(run["told"]).write_text(json.dumps(told), encoding="utf-8")

    CanvasTrainer.train = train_and_tell
    SCRIPTS[run.get("script", "distillation")].main(run["arguments"])


def _is_shard(weight: torch.Tensor) -> bool:
    return type(weight).__name__ == "DTensor" or (hasattr(weight, "ds_tensor") and weight.numel() == 0)


def _divide_small_weights() -> None:
    """ZeRO-3 leaves tensors of less than 100,000 values whole in each process: all that a tiny model has."""
    make = DeepSpeedPlugin.__post_init__

    def make_dividing(self):
        make(self)
        self.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0

    DeepSpeedPlugin.__post_init__ = make_dividing


def _shard_on_cpu() -> None:
    """Accelerate shards on accelerators alone, and trains with whole copies where it is asked to shard on a CPU."""
    make = AcceleratorState.__init__

    def make_sharded(self, *args, **kwargs):
        make(self, *args, **kwargs)  # which sets the type anew each time, and the plugin the first time
        plugin = kwargs.get("fsdp_plugin") or vars(self).get("fsdp_plugin")
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, plugin

    AcceleratorState.__init__ = make_sharded
