# /// script
# requires-python = ">=3.10"
# dependencies = ["d3llm-hf", "accelerate", "datasets", "pyyaml"]
# ///
"""Trajectories of a teacher: in which order it decides the tokens of its answers. The data of d3LLM's distillation.

The embedded checkpoint on generated word problems, on a laptop's CPU in half a minute:

    python trainers/run_trajectories.py --model_name_or_path d3llm-llada-teacher --dataset_name word_problems \
        --num_problems 64 --scorer number --max_new_tokens 64 --block_length 16 --output_dir trajectories

A published teacher on your own data, on eight 80 GB GPUs (every process decodes shards of its own):

    accelerate launch --num_processes 8 trainers/run_trajectories.py --model_name_or_path GSAI-ML/LLaDA-8B-Instruct \
        --torch_dtype bfloat16 --dataset_name openai/gsm8k --dataset_config main --prompt_column question \
        --response_column answer --scorer number --batch_size 16 --output_dir trajectories

The same on the GPUs of a Ray cluster, from one of its machines: one task a shard, and one process that writes them
(`pip install 'd3llm-hf[ray]'`; without `--ray_address` the workers share this machine):

    python trainers/run_trajectories.py --ray --ray_address auto --num_gpus 1 --model_name_or_path ... --output_dir ...

Killed at any moment and started again with the same arguments, it goes on with the shards that are not complete, and
the result is that of an unbroken run. `trainers.read_trajectories("trajectories")` reads and verifies it.
"""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from accelerate import PartialState

    from trainers.trajectories.extract import Extraction, TrajectoryConfig


@dataclass
class TrajectoryScriptArguments:
    """Which teacher, on what."""

    model_name_or_path: str = field(
        metadata={"help": "The teacher: a folder, an id on the Hub, or the name of an embedded checkpoint."}
    )
    output_dir: str = field(metadata={"help": "Folder of the shards; one that is there is resumed."})
    dataset_name: str = field(
        metadata={"help": "`word_problems`, a .json, .jsonl, .csv or .parquet file, or a data set of the Hub."}
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a teacher on the Hub."}
    )
    tokenizer_name_or_path: str | None = field(default=None, metadata={"help": "The teacher's own if unset."})
    bidirectional: bool = field(
        default=False,
        metadata={"help": "Let a checkpoint with causal attention attend to all positions."},
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention backend."})
    torch_dtype: str = field(default="float32", metadata={"help": "Data type of the weights."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set of the Hub."})
    dataset_split: str = field(default="train", metadata={"help": "Split, also a slice such as `train[:1000]`."})
    num_problems: int = field(default=1000, metadata={"help": "Generated word problems."})
    problem_seed: int = field(default=0, metadata={"help": "Seed of the generated problems."})
    min_problem_steps: int = field(default=2, metadata={"help": "Fewest arithmetic steps of a generated problem."})
    max_problem_steps: int = field(default=5, metadata={"help": "Most arithmetic steps of a generated problem."})
    use_cpu: bool = field(default=False, metadata={"help": "Stay on the CPU where there is an accelerator."})
    ray: bool = field(default=False, metadata={"help": "Decode shards as tasks of a Ray cluster."})
    ray_address: str | None = field(
        default=None,
        metadata={"help": "Of a cluster: auto, or HOST:PORT of its head; one of this machine alone when unset."},
    )
    num_workers: int | None = field(
        default=None, metadata={"help": "Teachers on the cluster; as many as it has room for when unset."}
    )
    num_cpus: float | None = field(
        default=None, metadata={"help": "CPU cores that each of them asks for; 1 if unset."}
    )
    num_gpus: float | None = field(
        default=None, metadata={"help": "Part of a GPU that each of them asks for; it stays on the CPU if unset."}
    )


def main(argv: list[str] | None = None) -> None:
    """Extract as the arguments say."""
    import torch
    from accelerate import PartialState

    from trainers.common.script_utils import parse_args_with_config
    from trainers.trajectories.extract import TrajectoryConfig

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    script_args, args = parse_args_with_config(
        (TrajectoryScriptArguments, TrajectoryConfig), sys.argv[1:] if argv is None else argv
    )
    check_ray(script_args)
    if script_args.ray:
        extract_with_ray(script_args, args)
        return
    # On a CPU accelerate counts the processes of a launcher only when told that this is meant.
    state = PartialState(cpu=script_args.use_cpu or not torch.accelerator.is_available())
    extract(script_args, args, state)
    state.destroy_process_group()


def check_ray(script_args: TrajectoryScriptArguments) -> None:
    """Refuses options of a cluster without `--ray`, and with it what a cluster decides itself.

    Raises:
        ValueError: naming the option.
    """
    for name in ("ray_address", "num_workers", "num_cpus", "num_gpus"):
        value = getattr(script_args, name)
        if value is not None and not script_args.ray:
            raise ValueError(f"`{name}` needs `ray` (got {value!r} without it). Add `--ray`, or leave it out.")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if script_args.ray and processes > 1:
        raise ValueError(
            f"`ray` must be started as one process: it places workers itself (got {processes} of a launcher). Leave "
            "the launcher out, or `--ray`."
        )
    if script_args.use_cpu and script_args.num_gpus:
        raise ValueError(
            f"`num_gpus` must be unset with `use_cpu` (got {script_args.num_gpus:g}). Leave one of them out."
        )


def extract_with_ray(script_args: TrajectoryScriptArguments, args: TrajectoryConfig) -> None:
    """All trajectories, decoded by workers of a Ray cluster, into the folder `output_dir`."""
    from d3llm_hf.cluster import Share, joined
    from d3llm_hf.files import check_writable_folder
    from trainers.trajectories.on_ray import extract_on_ray

    check_writable_folder(Path(script_args.output_dir).absolute(), "output_dir")
    names = {"count": "num_workers", "num_cpus": "num_cpus", "num_gpus": "num_gpus", "address": "ray_address"}
    asked = {name: getattr(script_args, name) for name in ("num_cpus", "num_gpus")}
    asked = {name: value for name, value in asked.items() if value is not None}
    count = script_args.num_workers
    share = Share(1 if count is None else count, **asked, names=names)
    with joined(script_args.ray_address, "`run_trajectories.py --ray`", "ray_address") as ray:
        resources = ray.cluster_resources()
        share = share.filling(resources) if count is None else share
        share.check_room(resources)
        extract_on_ray(ray, partial(make_extraction, script_args, args), script_args.output_dir, share)


def make_extraction(script_args: TrajectoryScriptArguments, args: TrajectoryConfig, device: str) -> Extraction:
    """Teacher and prompts as the arguments say, on a device."""
    from trainers.trajectories.extract import Extraction

    dataset = checked_prompts(script_args)
    model, tokenizer = load_teacher(script_args)
    return Extraction(model.to(device), tokenizer, dataset, args, dataset_name=dataset_name_of(script_args))


def extract(script_args: TrajectoryScriptArguments, args: TrajectoryConfig, state: PartialState) -> None:
    """This process' share of the trajectories, into the folder `output_dir`."""
    from d3llm_hf.files import check_writable_folder
    from trainers.trajectories.extract import extract_trajectories

    check_writable_folder(Path(script_args.output_dir).absolute(), "output_dir")
    with state.main_process_first():
        dataset = checked_prompts(script_args)
    model, tokenizer = load_teacher(script_args)
    extract_trajectories(
        model.to(state.device),
        tokenizer,
        dataset,
        script_args.output_dir,
        args,
        dataset_name=dataset_name_of(script_args),
        process_index=state.process_index,
        num_processes=state.num_processes,
        progress=state.is_main_process,
    )


def load_teacher(script_args: TrajectoryScriptArguments):
    """The teacher and its tokenizer."""
    from trainers.common.loading import load_named

    return load_named(
        script_args.model_name_or_path,
        script_args.tokenizer_name_or_path,
        torch_dtype=script_args.torch_dtype,
        bidirectional=script_args.bidirectional,
        revision=script_args.model_revision,
        attn_implementation=script_args.attn_implementation,
    )


def dataset_name_of(script_args: TrajectoryScriptArguments) -> str:
    """What the manifest calls the data set."""
    return f"{script_args.dataset_name} {script_args.dataset_split}"


def checked_prompts(script_args: TrajectoryScriptArguments):
    """The data set, which has rows.

    Raises:
        ValueError: for one without.
    """
    dataset = load_prompts(script_args)
    if len(dataset) == 0:
        raise ValueError(
            f"`dataset_name` must have at least one row (got none in {script_args.dataset_name!r}). Correct it, "
            "`dataset_split` or `num_problems`."
        )
    return dataset


def load_prompts(script_args: TrajectoryScriptArguments):
    """The data set: generated word problems, a file, or one of the Hub."""
    from datasets import Dataset

    from trainers.common.loading import load_rows
    from trainers.common.script_utils import warn_of_idle
    from trainers.run_sft import word_problem_rows

    name, split = script_args.dataset_name, script_args.dataset_split
    if name == "word_problems":
        if split not in ("train", "test"):
            raise ValueError(
                f"`dataset_split` must be train or test for generated problems (got {split!r}). Set `num_problems` "
                "for fewer of them."
            )
        rows = word_problem_rows(
            script_args.num_problems,
            split,
            script_args.problem_seed,
            script_args.min_problem_steps,
            script_args.max_problem_steps,
        )
        return Dataset.from_list(list(rows))
    idle = ("num_problems", "problem_seed", "min_problem_steps", "max_problem_steps")
    warn_of_idle(script_args, idle, "`dataset_name` names no word problems. `dataset_split` can be a slice.")
    return load_rows(name, split, "dataset_name", script_args.dataset_config)


if __name__ == "__main__":
    main()
