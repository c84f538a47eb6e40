# /// script
# requires-python = ">=3.10"
# dependencies = ["d3llm-hf", "accelerate", "datasets", "pyyaml"]
# ///
"""Masked-diffusion supervised fine-tuning (the objective of LLaDA).

The embedded checkpoint, from scratch on two CPU cores (one process a core; hours, not minutes):

    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 trainers/run_sft.py --config trainers/recipes/sft_llada_tiny.yaml

A published model on your own data, with LoRA on one 80 GB GPU:

    accelerate launch trainers/run_sft.py --model_name_or_path GSAI-ML/LLaDA-8B-Base --dataset_name train.jsonl \
        --output_dir llada-sft --bf16 --gradient_checkpointing --use_peft --learning_rate 1e-4

Any other model of transformers that has a mask token, an encoder or a decoder made bidirectional:

    accelerate launch trainers/run_sft.py --model_name_or_path answerdotai/ModernBERT-base --dataset_name train.jsonl \
        --output_dir modernbert-sft --bf16
    accelerate launch trainers/run_sft.py --model_name_or_path qwen3-with-a-mask-token --bidirectional \
        --dataset_name train.jsonl --output_dir qwen3-sft --bf16

A block-causal model, with several texts in each row:

    accelerate launch trainers/run_sft.py --model_name_or_path JetLM/SDAR-4B-Chat --dataset_name train.jsonl \
        --output_dir sdar-sft --bf16 --gradient_checkpointing --packing --use_peft --learning_rate 1e-4

LLaDA made block-causal, blocks beginning behind the prompt:

    OMP_NUM_THREADS=1 python trainers/run_sft.py --config trainers/recipes/sft_llada_block_tiny.yaml

A causal model that becomes a block-causal one: Fast-dLLM v2 (rows of logits as they were) or SDAR (unshifted); its
tokenizer gets a mask token where it has none:

    accelerate launch trainers/run_sft.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --into fast_dllm_v2 \
        --block_length 32 --dataset_name train.jsonl --output_dir qwen-blocks --bf16 --packing

An adapter with which LLaDA or Dream sees blocks (D2F), learnt from the model without it:

    accelerate launch trainers/run_sft.py --model_name_or_path GSAI-ML/LLaDA-8B-Instruct --dataset_name train.jsonl \
        --output_dir llada-d2f --objective d2f --bf16 --use_peft --learning_rate 1e-5

A causal model of transformers on the same rows, to compare with:

    python trainers/run_sft.py --config trainers/recipes/sft_llama_tiny.yaml

A data set has the columns `prompt` and `completion`, or `messages`.
"""

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainers.common.loading import (
    BUILDERS,
    check_processes,
    float_dtype,
    from_pretrained,
    load_checkpoint,
    load_rows,
    named_tokenizer,
    reading,
    resumption,
    split_of,
)


# What describes generated word problems, and nothing else.
GENERATED = ("num_problems", "num_eval_problems", "problem_seed", "min_problem_steps", "max_problem_steps")


@dataclass
class SFTScriptArguments:
    """What to train, and on what."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to start from. Without it, a new model of `model_config`."}
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a checkpoint on the Hub."}
    )
    model_config: str | None = field(  # a mapping when it comes from a recipe
        default=None,
        metadata={
            "help": "Shape of a new model: a JSON file or string, or a section of the recipe, with `model_type`. "
            "Vocabulary and token ids come from the tokenizer."
        },
    )
    tokenizer_name_or_path: str | None = field(
        default=None, metadata={"help": "Tokenizer; the checkpoint's, or for a new model a newly built one, if unset."}
    )
    gguf_file: str | None = field(
        default=None,
        metadata={"help": "GGUF file in the checkpoint's folder that holds model and tokenizer; it is dequantised."},
    )
    into: str | None = field(
        default=None,
        metadata={
            "help": "Make a causal checkpoint block-causal: `fast_dllm_v2` (logits row i predicts token i + 1, blocks "
            "of 32) or `sdar` (token i, blocks of 4); `block_length` sets others."
        },
    )
    block_alignment: str | None = field(
        default=None,
        metadata={
            "help": "Make a checkpoint of LLaDA block-causal: blocks of `block_length` tokens begin behind the "
            "`prompt` or with the `text`."
        },
    )
    bidirectional: bool = field(
        default=False,
        metadata={
            "help": "Let a checkpoint with causal attention attend to all positions (`config.is_causal=False`)."
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention backend. On a CPU `eager` trains twice as fast as `sdpa`."}
    )
    torch_dtype: str = field(default="float32", metadata={"help": "Data type of the weights while training."})
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "A .json, .jsonl, .csv or .parquet file, or a data set of the Hub. Word problems if unset."},
    )
    dataset_split: str = field(
        default="train", metadata={"help": "Split to train on, also a slice such as `train[:1000]`."}
    )
    num_problems: int = field(default=10_000, metadata={"help": "Generated word problems to train on."})
    num_eval_problems: int = field(default=256, metadata={"help": "Generated held-out problems to evaluate on."})
    problem_seed: int = field(default=0, metadata={"help": "Seed of the generated problems."})
    min_problem_steps: int = field(default=2, metadata={"help": "Fewest arithmetic steps of a generated problem."})
    max_problem_steps: int = field(default=5, metadata={"help": "Most arithmetic steps of a generated problem."})
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter instead of all weights."})
    lora_r: int = field(default=64, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=64, metadata={"help": "Scale of the adapter, relative to its rank."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Modules that get an adapter."}
    )
    save_dtype: str | None = field(
        default=None, metadata={"help": "Data type of the final checkpoint, e.g. bfloat16. As trained if unset."}
    )


def main(argv: list[str] | None = None) -> None:
    """Train as the arguments say and save model and tokenizer to `output_dir`."""
    from transformers import set_seed

    from trainers.common.script_utils import parse_args_with_config
    from trainers.sft.config import CAUSAL, MaskedDiffusionSFTConfig
    from trainers.sft.trainer import MaskedDiffusionSFTTrainer

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    script_args, args = parse_args_with_config(
        (SFTScriptArguments, MaskedDiffusionSFTConfig), sys.argv[1:] if argv is None else argv
    )
    check_processes(args.world_size)
    check_conversion(script_args, args)
    save_dtype = script_args.save_dtype and float_dtype("save_dtype", script_args.save_dtype)
    set_seed(args.seed)  # before the model: its initial weights are part of the run
    tokenizer = load_tokenizer(script_args)
    if args.objective == CAUSAL:
        model = load_causal_model(script_args, tokenizer)
    else:
        model = load_model(script_args, tokenizer, args.block_length)
    train_as_its_family(args, script_args.into)
    with args.main_process_first(local=True, desc="loading the datasets"):
        train_dataset, eval_dataset = load_datasets(script_args, evaluate=args.eval_strategy != "no")

    trainer = MaskedDiffusionSFTTrainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=_peft_config(script_args),
    )
    trainer.train(resume_from_checkpoint=resumption(args.resume_from_checkpoint))
    # What an adapter of a converted model is for is saved nowhere else.
    trainer.finish(merge_adapter=script_args.into is not None and script_args.use_peft, dtype=save_dtype)
    trainer.save_model()


def check_conversion(script_args: SFTScriptArguments, args) -> None:
    """Refuse what has no effect beside `into` or without a checkpoint, and an adapter that could not be merged.

    Raises:
        ValueError: Naming the argument.
    """
    from trainers.sft.config import CAUSAL

    name = script_args.model_name_or_path
    if name is not None and name.endswith(".gguf") and Path(name).is_file():
        folder, file = Path(name).parent, Path(name).name
        raise ValueError(
            f"`model_name_or_path` must be a folder (got the file {name!r}). Pass `--model_name_or_path {folder} "
            f"--gguf_file {file}`."
        )
    for argument in ("gguf_file", "into", "block_alignment"):
        value = getattr(script_args, argument)
        if name is None and value is not None:
            raise ValueError(
                f"`{argument}` must be unset without `model_name_or_path` (got {value!r}): a new model has its own "
                "architecture. Name a checkpoint, or leave it out."
            )
    if script_args.block_alignment is not None:
        _check_alignment(script_args, args.block_length)
    for argument in ("into", "bidirectional"):
        value = getattr(script_args, argument)
        if value and args.objective == CAUSAL:
            raise ValueError(
                f"`{argument}` must be unset with `objective={CAUSAL!r}` (got {value!r}), which trains a causal model "
                "as it is. Unset one of them."
            )
    if script_args.into is None:
        return
    if script_args.bidirectional:
        raise ValueError(
            f"`bidirectional` must be unset beside `into` (got True with {script_args.into!r}): a token of the result "
            "sees its block and all earlier ones. Unset one of them."
        )
    if script_args.use_peft and (args.fsdp or args.deepspeed):
        raise ValueError(
            f"`use_peft` must be unset beside `into` where weights are sharded (got {script_args.into!r}): the "
            "adapter is merged in the end. Save what `d3llm_hf.block_causal_lm` makes, and train that folder."
        )


def _check_alignment(script_args: SFTScriptArguments, block_length: int | None) -> None:
    if script_args.into is not None:
        raise ValueError(
            f"`block_alignment` must be unset beside `into` (got {script_args.block_alignment!r} and "
            f"{script_args.into!r}), whose forms have blocks of their own. Unset one of them."
        )
    if block_length is None:
        raise ValueError(
            f"`block_length` must be set beside `block_alignment` (got None and {script_args.block_alignment!r}). Set "
            "it, for example to 16."
        )


def train_as_its_family(args, into: str | None) -> None:
    """Views and mask ratios that are unset are those of the form, whatever class the model has."""
    from trainers.sft.block_masking import OBJECTIVES

    if into == "fast_dllm_v2":
        family = OBJECTIVES["Fast_dLLM_Qwen"]
        if args.complementary_masks is None:
            args.complementary_masks = family.complementary
        if args.mask_ratio_per_block is None:
            args.mask_ratio_per_block = family.per_block


def load_tokenizer(script_args: SFTScriptArguments):
    """The named tokenizer, the checkpoint's, or a new one of the word problems.

    Where it has no end of text, as BERT's, its separator ends an answer.
    """
    from trainers.common.build_tokenizer import build_tokenizer

    if script_args.tokenizer_name_or_path is None and script_args.model_name_or_path is None:
        return build_tokenizer()
    return named_tokenizer(
        script_args.model_name_or_path or "",
        script_args.tokenizer_name_or_path,
        script_args.model_revision,
        script_args.gguf_file,
    )


def load_model(script_args: SFTScriptArguments, tokenizer, block_length: int | None = None):
    """The checkpoint, or a new model of the given shape with the tokenizer's vocabulary and token ids.

    With `into`, a causal checkpoint as a block-causal model, in blocks of `block_length` tokens.

    Raises:
        ValueError: If neither or both are given, the shape names no known family, or the checkpoint cannot be decoded
            by diffusion (see [`as_diffusion_lm`]).
    """
    from d3llm_hf import DreamConfig, DreamModel, LLaDAConfig, LLaDAModelLM, SDARConfig, SDARForCausalLM
    from d3llm_hf.hub.sources import checkpoint_source

    dtype = float_dtype("torch_dtype", script_args.torch_dtype)
    _check_one_source(script_args)
    if script_args.model_name_or_path is not None:
        more: dict[str, Any] = {}
        if script_args.into is not None:
            more = {"into": script_args.into, "block_length": block_length}
        elif script_args.block_alignment is not None:
            more = {"blocks": {"block_length": block_length, "block_alignment": script_args.block_alignment}}
        if script_args.gguf_file is not None:
            more["gguf_file"] = script_args.gguf_file
        return load_checkpoint(
            checkpoint_source(script_args.model_name_or_path),
            tokenizer,
            bidirectional=script_args.bidirectional,
            **more,
            revision=script_args.model_revision,
            dtype=dtype,
            attn_implementation=script_args.attn_implementation,
        )
    shape = _model_shape(script_args.model_config)
    families = {
        "llada": (LLaDAConfig, LLaDAModelLM),
        "Dream": (DreamConfig, DreamModel),
        "sdar": (SDARConfig, SDARForCausalLM),
    }
    family = shape.pop("model_type", None)
    if family not in families:
        raise ValueError(
            f"`model_config` must name one of the model types {sorted(families)} (got {family!r}). Add `model_type`, "
            "or set `objective: causal` for a causal model of transformers."
        )
    config_class, model_class = families[family]
    config = config_class(mask_token_id=tokenizer.mask_token_id, **_tokens_of(tokenizer), **shape)
    config._attn_implementation = script_args.attn_implementation
    return model_class(config).to(dtype)


def load_causal_model(script_args: SFTScriptArguments, tokenizer):
    """A causal model of transformers: the checkpoint, or a new one; it stops where its answers end.

    Raises:
        ValueError: If neither or both are given, or the shape names no causal model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from d3llm_hf.hub.sources import checkpoint_source

    dtype = float_dtype("torch_dtype", script_args.torch_dtype)
    _check_one_source(script_args)
    if script_args.model_name_or_path is not None:
        more = {} if script_args.gguf_file is None else {"gguf_file": script_args.gguf_file}
        model = from_pretrained(
            checkpoint_source(script_args.model_name_or_path),
            AutoModelForCausalLM,
            **more,
            revision=script_args.model_revision,
            dtype=dtype,
            attn_implementation=script_args.attn_implementation,
        )
        return _stopping_at_its_turns(model, tokenizer)
    shape = _model_shape(script_args.model_config)
    family = shape.pop("model_type", None)
    try:
        config = AutoConfig.for_model(family, **_tokens_of(tokenizer), **shape)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=script_args.attn_implementation)
    except ValueError as error:
        said = " ".join(str(error).split())[:150]
        raise ValueError(
            f"`model_config` must name a model type of which transformers makes a causal model (got {family!r}: "
            f"{said}...). Write for example `model_type: llama`."
        ) from error
    return _stopping_at_its_turns(model.to(dtype), tokenizer)


def _check_one_source(script_args: SFTScriptArguments) -> None:
    if (script_args.model_name_or_path is None) == (script_args.model_config is None):
        raise ValueError(
            "Exactly one of `model_name_or_path` and `model_config` must be set (got both or neither). "
            "Name a checkpoint to continue from, or the shape of a new model."
        )


def _tokens_of(tokenizer) -> dict[str, Any]:
    """What the config of a new model says of tokens."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {"vocab_size": len(tokenizer), **{name: getattr(tokenizer, name) for name in names}}


def _stopping_at_its_turns(model, tokenizer):
    """The model, whose generation config stops at the special token that ends an answer as well.

    A masked model fills what follows with the end of text, and stops there; this one would go on with another turn.
    """
    from trainers.common.conversations import encode_answer

    answer = encode_answer([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], tokenizer)
    ends = [token for token in answer if token in tokenizer.all_special_ids][-1:]
    known = model.generation_config.eos_token_id
    known = known if isinstance(known, list) else [] if known is None else [known]
    stops = list(dict.fromkeys([*known, *ends]))
    model.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0] if stops else None
    return model


def _model_shape(value: str | dict) -> dict:
    from trainers.common.script_utils import json_value

    if isinstance(value, str) and Path(value).suffix == ".json":
        if not Path(value).is_file():
            raise FileNotFoundError(f"`model_config` must name a file that exists (got {value!r}). Correct the path.")
        value = Path(value).read_text(encoding="utf-8")
    shape = json_value("model_config", value)
    if not isinstance(shape, dict):
        raise ValueError(f"`model_config` must map names to sizes (got {shape!r}). Write {{model_type: llada, ...}}.")
    return dict(shape)


def load_datasets(script_args: SFTScriptArguments, evaluate: bool):
    """`(train, eval)` datasets; for a data set of your own the second is its `test` split, if it has one."""
    from trainers.common.script_utils import warn_of_idle

    name, split = script_args.dataset_name, script_args.dataset_split
    if name is None:
        return _word_problems(script_args, "train"), _word_problems(script_args, "test") if evaluate else None
    warn_of_idle(script_args, GENERATED, "`dataset_name` is given. Leave it out to train on word problems.")
    whole = split_of(split)
    if Path(name).suffix.lower() in BUILDERS:
        splits = {whole: load_rows(name, whole, "dataset_name")}
    else:
        splits = _all_splits(name)
    if whole not in splits:
        raise ValueError(
            f"`dataset_split` must be a split of the data set, one of {sorted(splits)} (got {split!r}). Correct it."
        )
    if evaluate and "test" not in splits:
        raise ValueError(
            f"`eval_strategy` must be `no` for a data set without a `test` split (got {sorted(splits)}). Unset it."
        )
    train = splits[whole] if split == whole else load_rows(name, split, "dataset_name")
    return train, splits["test"] if evaluate else None


def _all_splits(name: str):
    from datasets import load_dataset

    with reading(name, "dataset_name"):
        return load_dataset(name)


def _word_problems(script_args: SFTScriptArguments, split: str):
    """Generated problems to train on, or held out of these.

    Raises:
        ValueError: For none of them, or a split of what has none.
    """
    from datasets import Dataset

    argument = "num_problems" if split == "train" else "num_eval_problems"
    count = getattr(script_args, argument)
    if count < 1:
        raise ValueError(f"`{argument}` must be at least 1 (got {count}). Raise it, or name a `dataset_name`.")
    if script_args.dataset_split != "train":
        raise ValueError(
            f"`dataset_split` must be train for generated problems (got {script_args.dataset_split!r}). Set "
            "`num_problems` for fewer of them."
        )
    return Dataset.from_generator(
        word_problem_rows,
        gen_kwargs={
            "count": count,
            "problem_split": split,
            "seed": script_args.problem_seed,
            "min_steps": script_args.min_problem_steps,
            "max_steps": script_args.max_problem_steps,
        },
    )


def word_problem_rows(count: int, problem_split: str, seed: int, min_steps: int, max_steps: int):
    """Rows `{"prompt", "completion"}` of generated word problems."""
    from d3llm_hf.evaluation.tasks.word_problems import generate_problems

    for problem in generate_problems(count, split=problem_split, seed=seed, min_steps=min_steps, max_steps=max_steps):
        yield {"prompt": problem.question, "completion": problem.answer}


def _peft_config(script_args: SFTScriptArguments):
    from trainers.common.script_utils import warn_of_idle

    if not script_args.use_peft:
        idle = ("lora_r", "lora_alpha", "lora_target_modules")
        warn_of_idle(script_args, idle, "all weights are trained. Set `use_peft` for an adapter.")
        return None
    from peft import LoraConfig

    targets = script_args.lora_target_modules
    return LoraConfig(
        r=script_args.lora_r,
        lora_alpha=script_args.lora_alpha,
        target_modules=targets[0] if targets == ["all-linear"] else targets,
    )


if __name__ == "__main__":
    main()
