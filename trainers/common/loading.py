"""What the training scripts share before a model is trained: loading it, and refusing a launch that would go wrong."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .shards import under_deepspeed


BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}  # of `datasets`, for files


def check_processes(world_size: int) -> None:
    """Refuse processes that would each train a model of their own.

    Without a GPU, accelerate joins the processes of a launcher only under `--use_cpu`; otherwise every one of them
    trains alone, on its own part of the batch, and overwrites the others' checkpoints.

    Raises:
        ValueError: If the launcher started more processes than take part.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != world_size and under_deepspeed():
        raise ValueError(
            f"`ddp_backend` must be 'gloo' to train with DeepSpeed without a GPU (got {started} processes that would "
            f"train {started} separate models). Add `--ddp_backend gloo`, and set DS_ACCELERATOR=cpu."
        )
    if started != world_size:
        raise ValueError(
            f"`use_cpu` must be set to train in several processes without a GPU (got {started} processes that would "
            f"train {started} separate models). Add `--use_cpu`, or start one process."
        )


def resumption(chosen: str | bool | None) -> str | None:
    """What a recipe or command line says of resuming; `true` and `last` are the last whole checkpoint, if any."""
    said = str(chosen).lower()
    return "last" if said in ("true", "last") else None if said in ("false", "none") else chosen


def with_end_of_text(tokenizer: Any) -> Any:
    """The tokenizer; where it has no end of text, as BERT's, its separator ends an answer."""
    if tokenizer.eos_token is None:
        tokenizer.eos_token = tokenizer.sep_token
    return tokenizer


@contextmanager
def reading(name: str, argument: str) -> Iterator[None]:
    """Inside, `datasets` reads what `name` says; errors name the argument, what is wrong, and the way out.

    Raises:
        FileNotFoundError: For the name of a file that does not exist.
        ValueError: For what `datasets` cannot read.
    """
    if Path(name).suffix.lower() in BUILDERS and not Path(name).is_file():
        raise FileNotFoundError(
            f"`{argument}` must name a file that exists, or a data set of the Hub (got {name!r}, seen from "
            f"{str(Path.cwd())!r}). Correct the path."
        )
    try:
        yield
    except Exception as error:  # it has errors of its own, and lets those of its formats pass
        cause = error.__cause__ or error
        said = " ".join(str(cause).split())[:250].rstrip(".") or "no rows"
        line = _unreadable_line(Path(name))
        said += "" if line is None else f", line {line}"
        raise ValueError(
            f"`{argument}` must name data that `datasets` reads: a .jsonl, .json, .csv or .parquet file, or a data "
            f"set of the Hub (got {name!r}: {type(cause).__name__}: {said}). Correct the name, the split or the file."
        ) from error


def split_of(chosen: str) -> str:
    """The split that a slice such as `train[:1000]` is cut from."""
    found = re.match(r"[\w.]+", chosen)
    return chosen if found is None else found[0]


def load_rows(name: str, split: str, argument: str, config: str | None = None, files: list[str] | None = None) -> Any:
    """A split of a file or of a data set of the Hub.

    Args:
        name (`str`): Of the file or the data set.
        split (`str`): Its split, or a slice of one.
        argument (`str`): That gave the name.
        config (`str`, *optional*): Configuration of a data set of the Hub.
        files (`list[str]`, *optional*): .parquet files that make up the data set, in a folder of that name.

    Raises:
        FileNotFoundError: For the name of a file that does not exist.
        ValueError: For what `datasets` cannot read.
    """
    from datasets import load_dataset

    builder = "parquet" if files else BUILDERS.get(Path(name).suffix.lower())
    with reading(name, argument):
        if builder is None:
            return load_dataset(name, config, split=split)
        return load_dataset(builder, data_files={split_of(split): files or [name]}, split=split)


def _unreadable_line(path: Path) -> int | None:
    """Number, from 1, of the first line of a .jsonl file that is no JSON in UTF-8; `None` where there is none."""
    if path.suffix != ".jsonl":
        return None
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                json.loads(line.decode() if line.strip() else "null")
            except ValueError:
                return number
    return None


def load_checkpoint(
    name: str,
    tokenizer: Any,
    *,
    bidirectional: bool = False,
    into: str | None = None,
    block_length: int | None = None,
    blocks: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """A masked language model where the architecture has one, else its decoder; ours, or given our decoder.

    Args:
        name (`str`): Folder or id of the checkpoint.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Names the mask token where the config does not.
        bidirectional (`bool`, defaults to `False`): Let causal attention attend to all positions.
        into (`str`, *optional*): Make a causal model block-causal, in this form (see [`block_causal_lm`]). The
            tokenizer gets a mask token where it has none.
        block_length (`int`, *optional*): Tokens of a block of that form.
        blocks (`dict`, *optional*): `block_length` and `block_alignment` of a LLaDA that becomes block-causal, in
            place of its config's.
        kwargs: Further arguments of `from_pretrained`, such as `dtype`.

    Raises:
        ValueError: If the checkpoint cannot be decoded by diffusion (see [`as_diffusion_lm`]), or is not LLaDA's where
            `blocks` are given.
    """
    from d3llm_hf import D3LLMGenerationMixin, as_diffusion_lm, block_causal_lm

    model = from_pretrained(name, blocks=blocks, **kwargs)
    if into is not None:
        return block_causal_lm(model, tokenizer, into, block_length=block_length)
    if isinstance(model, D3LLMGenerationMixin):
        return model
    mask_token_id = getattr(model.config, "mask_token_id", None)
    return as_diffusion_lm(
        model,
        mask_token_id=tokenizer.mask_token_id if mask_token_id is None else mask_token_id,
        bidirectional=bidirectional,
    )


def from_pretrained(name: str, auto: Any = None, blocks: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    """A checkpoint as an Auto class makes it, its weights plain ones.

    Args:
        name (`str`): Folder or id of the checkpoint.
        auto (class, *optional*): The Auto class. When unset that of masked language models where the architecture has
            one, else that of decoders.
        blocks (`dict`, *optional*): Where blocks lie, of a model whose config has fields for it.
        kwargs: Of its `from_pretrained`.

    Raises:
        OSError: If there is no such checkpoint.
        ValueError: For `blocks` of a model whose config has no such fields.
    """
    from transformers import AutoConfig

    from d3llm_hf.hub.loading import auto_class, hub_arguments
    from d3llm_hf.hub.sources import loading

    if kwargs.get("gguf_file") is not None:
        kwargs = _dequantised() | kwargs
    with loading(name, "model_name_or_path", kwargs.get("gguf_file")):
        if auto is None or blocks is not None:
            config = AutoConfig.from_pretrained(name, **hub_arguments(kwargs))
            auto = auto_class(config) if auto is None else auto
        if blocks is not None and not hasattr(config, "block_alignment"):
            raise ValueError(
                f"`block_alignment` must be unset for {config.model_type} (got {blocks['block_alignment']!r}): only "
                "LLaDA's config says where blocks begin. A causal checkpoint becomes block-causal with `into`."
            )
        return auto.from_pretrained(name, **kwargs, **(blocks or {}))


def _dequantised() -> dict[str, Any]:
    """Arguments of `from_pretrained` for plain weights out of a GGUF file: packed ones cannot be trained or saved.

    Versions of transformers without such a setting always unpack them.
    """
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def load_named(
    name: str, tokenizer_name: str | None, *, torch_dtype: str, bidirectional: bool = False, **kwargs: Any
) -> tuple[Any, Any]:
    """`(model, tokenizer)` of a folder, an embedded checkpoint or a Hub id, for decoding and training alike.

    Args:
        name (`str`): Of the checkpoint.
        tokenizer_name (`str`, *optional*): Of another one whose tokenizer is taken.
        torch_dtype (`str`): Floating-point type of the weights.
        bidirectional (`bool`, defaults to `False`): See [`load_checkpoint`].
        kwargs: Further arguments of `from_pretrained`, such as `revision`, or a `dtype` instead of the one named.

    Raises:
        ValueError: If the type is none of floating point, or the checkpoint cannot be decoded by diffusion.
    """
    from d3llm_hf.hub.sources import checkpoint_source

    dtype = float_dtype("torch_dtype", torch_dtype)
    tokenizer = named_tokenizer(name, tokenizer_name, kwargs.get("revision"))
    kwargs = {"dtype": dtype} | kwargs
    return load_checkpoint(checkpoint_source(name), tokenizer, bidirectional=bidirectional, **kwargs), tokenizer


def named_tokenizer(
    name: str, tokenizer_name: str | None, revision: str | None = None, gguf_file: str | None = None
) -> Any:
    """The checkpoint's tokenizer, or the one that is named; see [`with_end_of_text`].

    Raises:
        OSError: If there is no such checkpoint.
        ValueError: If it has no tokenizer.
    """
    from d3llm_hf.hub.sources import checkpoint_source, load_tokenizer, loading

    if tokenizer_name:
        return with_end_of_text(
            load_tokenizer(checkpoint_source(tokenizer_name), tokenizer_name, "tokenizer_name_or_path")
        )
    more = {} if gguf_file is None else {"gguf_file": gguf_file}
    with loading(name, "model_name_or_path", gguf_file):
        tokenizer = load_tokenizer(checkpoint_source(name), name, "model_name_or_path", revision=revision, **more)
    return with_end_of_text(tokenizer)


def float_dtype(name: str, value: str) -> Any:
    """The torch dtype of that name.

    Raises:
        ValueError: If it is none, or not of floating point; `name` is the argument it came from.
    """
    import torch

    dtype = getattr(torch, value, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"`{name}` must be a floating-point type of torch (got {value!r}). Pass float32 or bfloat16.")
    return dtype
