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

Killed at any moment and started again with the same arguments, it goes on with the shards that are not complete, and
the result is that of an unbroken run. `trainers.read_trajectories("trajectories")` reads and verifies it.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from accelerate import PartialState

    from trainers.trajectories.extract import TrajectoryConfig


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
    # On a CPU accelerate counts the processes of a launcher only when told that this is meant.
    state = PartialState(cpu=script_args.use_cpu or not torch.accelerator.is_available())
    extract(script_args, args, state)
    state.destroy_process_group()


def extract(script_args: TrajectoryScriptArguments, args: TrajectoryConfig, state: PartialState) -> None:
    """This process' share of the trajectories, into the folder `output_dir`."""
    from d3llm_hf.files import check_writable_folder
    from trainers.common.loading import load_named
    from trainers.trajectories.extract import extract_trajectories

    check_writable_folder(Path(script_args.output_dir).absolute(), "output_dir")
    with state.main_process_first():
        dataset = load_prompts(script_args)
    if len(dataset) == 0:
        raise ValueError(
            f"`dataset_name` must have at least one row (got none in {script_args.dataset_name!r}). Correct it, "
            "`dataset_split` or `num_problems`."
        )
    model, tokenizer = load_named(
        script_args.model_name_or_path,
        script_args.tokenizer_name_or_path,
        torch_dtype=script_args.torch_dtype,
        bidirectional=script_args.bidirectional,
        revision=script_args.model_revision,
        attn_implementation=script_args.attn_implementation,
    )
    extract_trajectories(
        model.to(state.device),
        tokenizer,
        dataset,
        script_args.output_dir,
        args,
        dataset_name=f"{script_args.dataset_name} {script_args.dataset_split}",
        process_index=state.process_index,
        num_processes=state.num_processes,
        progress=state.is_main_process,
    )


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
