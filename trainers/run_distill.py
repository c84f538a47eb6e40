# /// script
# requires-python = ">=3.10"
# dependencies = ["d3llm-hf", "accelerate", "datasets", "peft", "pyyaml"]
# ///
"""Pseudo-trajectory distillation (d3LLM), and its random-mask and certainty-forcing (dParallel) baselines.

The embedded checkpoint on one CPU core, from a folder of its own trajectories:

    OMP_NUM_THREADS=1 python trainers/run_distill.py --config trainers/recipes/d3llm_llada_tiny.yaml

d3LLM-LLaDA with LoRA on four 80 GB GPUs:

    accelerate launch --num_processes 4 trainers/run_distill.py --config trainers/recipes/d3llm_llada_8b.yaml

Trajectories are a .parquet, .json or .jsonl file, a folder of .parquet files, or a data set of the Hub. Columns:
`prompt_ids`, `response_ids`, `step_map` (the step, from 1, at which the teacher decided each token; -1 where none
did), and optionally `target_ids`, `correct` and `answer`.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from trainers.common.loading import check_processes, float_dtype, load_named, load_rows, resumption


if TYPE_CHECKING:
    from transformers import TrainingArguments


@dataclass
class DistillScriptArguments:
    """What to distil, and on what."""

    model_name_or_path: str = field(
        metadata={"help": "The student to start from, usually the teacher: folder, id, or embedded checkpoint."}
    )
    dataset_name: str = field(
        metadata={"help": "Trajectories: a file, a folder of .parquet files, or a data set of the Hub."}
    )
    extract: str | None = field(  # a mapping when it comes from a recipe
        default=None,
        metadata={
            "help": "Arguments of run_trajectories.py, as JSON or as a section of the recipe: decode the trajectories "
            "into the folder `dataset_name` first, as far as they are not there. Teacher and student are one model "
            "unless it has a `model_name_or_path`."
        },
    )
    dataset_split: str = field(
        default="train", metadata={"help": "Split to train on, also a slice such as `train[:1000]`."}
    )
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Held-out trajectories. If unset, part of the training data is held out."}
    )
    num_eval_samples: int = field(
        default=256, metadata={"help": "Samples to hold out for evaluation where `eval_dataset_name` is unset."}
    )
    tokenizer_name_or_path: str | None = field(default=None, metadata={"help": "Tokenizer; the student's if unset."})
    bidirectional: bool = field(
        default=False, metadata={"help": "Let a student with causal attention attend to all positions."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention backend."})
    torch_dtype: str = field(default="float32", metadata={"help": "Data type of the weights while training."})
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of all weights."})
    lora_r: int = field(default=256, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=256, metadata={"help": "Scale of the adapter, relative to its rank."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout in the adapter."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules that get an adapter. All projections of all layers if unset."}
    )
    merge_adapter: bool = field(
        default=True, metadata={"help": "Merge the adapter into the weights of the final checkpoint."}
    )
    save_dtype: str | None = field(
        default=None, metadata={"help": "Data type of the final checkpoint, e.g. bfloat16. As trained if unset."}
    )


def main(argv: list[str] | None = None) -> None:
    """Distil as the arguments say, and save model, tokenizer and model card to `output_dir`."""
    from transformers import set_seed

    from trainers.common.script_utils import parse_args_with_config
    from trainers.distill.config import PseudoTrajectoryDistillConfig
    from trainers.distill.trainer import PseudoTrajectoryDistillTrainer

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    script_args, args = parse_args_with_config(
        (DistillScriptArguments, PseudoTrajectoryDistillConfig), sys.argv[1:] if argv is None else argv
    )
    check_processes(args.world_size)
    save_dtype = script_args.save_dtype and float_dtype("save_dtype", script_args.save_dtype)
    if script_args.extract is not None:
        extract_first(script_args, args)
    set_seed(args.seed)
    model, tokenizer = load_student(script_args, args.model_init_kwargs)
    args.model_init_kwargs = None  # used up
    with args.main_process_first(local=True, desc="loading the datasets"):
        train_dataset, eval_dataset = load_trajectories(script_args, args.seed, evaluate=args.eval_strategy != "no")

    trainer = PseudoTrajectoryDistillTrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=_peft_config(script_args, model),
    )
    trainer.train(resume_from_checkpoint=resumption(args.resume_from_checkpoint))
    trainer.finish(merge_adapter=script_args.use_peft and script_args.merge_adapter, dtype=save_dtype)
    card = {"finetuned_from": _hub_id(script_args.model_name_or_path), "dataset": _hub_id(script_args.dataset_name)}
    if args.push_to_hub:
        trainer.push_to_hub(**card)  # saves before it pushes
    else:
        trainer.save_model()
        trainer.create_model_card(**card)


def extract_first(script_args: DistillScriptArguments, args: TrainingArguments) -> None:
    """The trajectories, by all processes; a folder that is complete costs a look, one that is not is gone on with.

    Raises:
        ValueError: for an argument that `run_trajectories.py` does not have, or one that is given by another.
        TrajectoryError: for a folder of trajectories of another teacher, other prompts or settings.
    """
    from transformers import HfArgumentParser

    from trainers.common.script_utils import json_value
    from trainers.run_trajectories import TrajectoryScriptArguments, extract
    from trainers.trajectories.extract import TrajectoryConfig

    given = json_value("extract", script_args.extract)
    own = {"output_dir": script_args.dataset_name, "use_cpu": args.use_cpu}
    if not isinstance(given, dict) or own.keys() & given.keys():
        raise ValueError(
            f"`extract` must map arguments of run_trajectories.py other than {sorted(own)}, which `dataset_name` and "
            f"`use_cpu` give (got {given!r}). Write for example {{dataset_name: word_problems, num_problems: 2000}}."
        )
    defaults = {"model_name_or_path": script_args.model_name_or_path}
    parser = HfArgumentParser((TrajectoryScriptArguments, TrajectoryConfig))
    try:
        chosen = parser.parse_dict(defaults | given | own)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`extract` must map arguments of run_trajectories.py, `dataset_name` among them (got {given}: {error}). "
            "Correct the section."
        ) from error
    extract(*chosen, args.distributed_state)
    args.distributed_state.wait_for_everyone()


def load_student(script_args: DistillScriptArguments, model_init_kwargs: dict | None = None):
    """The student and its tokenizer; the name may be that of an embedded checkpoint."""
    return load_named(
        script_args.model_name_or_path,
        script_args.tokenizer_name_or_path,
        torch_dtype=script_args.torch_dtype,
        bidirectional=script_args.bidirectional,
        **({"attn_implementation": script_args.attn_implementation} | (model_init_kwargs or {})),
    )


def load_trajectories(script_args: DistillScriptArguments, seed: int, evaluate: bool):
    """`(train, eval)` datasets; the second one is named, or held out of the first by chance, or `None`.

    Raises:
        ValueError: If there is nothing to load, or nothing is left to train on.
    """
    train = _load(script_args.dataset_name, script_args.dataset_split, "dataset_name")
    if not evaluate:
        return train, None
    if script_args.eval_dataset_name is not None:
        from trainers.common.script_utils import warn_of_idle

        warn_of_idle(script_args, ("num_eval_samples",), "`eval_dataset_name` is given, of which all rows are taken.")
        return train, _load(script_args.eval_dataset_name, script_args.dataset_split, "eval_dataset_name")
    # Numbered before the split, so that a sample's draws do not depend on how many are held out.
    if "sample_id" not in train.column_names:
        train = train.map(lambda row, index: {"sample_id": index}, with_indices=True)
    if not 0 < script_args.num_eval_samples < len(train):
        raise ValueError(
            f"`num_eval_samples` must leave samples on both sides (got {script_args.num_eval_samples} of "
            f"{len(train)}). Lower it, or name an `eval_dataset_name`."
        )
    splits = train.train_test_split(test_size=script_args.num_eval_samples, seed=seed)
    return splits["train"], splits["test"]


def _load(name: str, split: str, argument: str):
    files = None
    if Path(name).is_dir():
        files = sorted(str(file) for file in Path(name).rglob("*.parquet"))
        if not files:
            raise ValueError(
                f"A folder of trajectories must hold .parquet files (got none in {name}). Name another folder."
            )
    return load_rows(name, split, argument, files=files)


def _hub_id(name: str) -> str | None:
    """The name, if it is one of the Hub: a file or folder of this machine says nothing to the readers of a card."""
    return None if Path(name).exists() or "/" not in name else name


def _peft_config(script_args: DistillScriptArguments, model):
    from trainers.common.script_utils import warn_of_idle

    if not script_args.use_peft:
        idle = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
        warn_of_idle(script_args, idle, "all weights are trained. Set `use_peft` for an adapter.")
        return None
    from peft import LoraConfig

    from trainers.common.lora import lora_target_modules

    return LoraConfig(
        r=script_args.lora_r,
        lora_alpha=script_args.lora_alpha,
        lora_dropout=script_args.lora_dropout,
        target_modules=script_args.lora_target_modules or lora_target_modules(model),
    )


if __name__ == "__main__":
    main()
