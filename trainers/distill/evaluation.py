"""Decoding of held-out prompts while a student is trained: tokens per forward, and exact match where it is known."""

from __future__ import annotations

import re
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from d3llm_hf.evaluation.tasks.word_problems import extract_answer
from d3llm_hf.models.wrappers import base_of
from d3llm_hf.progress import progress_bar

from ..common.rows import position_limit


if TYPE_CHECKING:
    from .config import PseudoTrajectoryDistillConfig

DECODING_METRICS = frozenset({"tpf", "exact_match"})
_GIVEN = ("input_ids", "inputs", "inputs_embeds", "attention_mask", "return_dict_in_generate")


def check_decoding(model: PreTrainedModel, eval_dataset: Any, args: PseudoTrajectoryDistillConfig) -> None:
    """Refuse, before a run starts, what the first evaluation could not decode.

    Args:
        model ([`~transformers.PreTrainedModel`]): The student.
        eval_dataset ([`~datasets.Dataset`] or `dict`, *optional*): Held-out samples; of a stream, no row is read.
        args ([`PseudoTrajectoryDistillConfig`]): With `eval_generate_samples`.

    Raises:
        ValueError: For settings that `generate` refuses, or prompts and answers that do not fit the model.
    """
    base = base_of(model)
    if not hasattr(base, "check_settings"):
        raise ValueError(
            "`eval_generate_samples` must be 0 for a model without diffusion decoding (got "
            f"{args.eval_generate_samples} and {type(base).__name__}). Unset it, or wrap the model with "
            "`as_diffusion_lm`."
        )
    settings = _settings(args)
    length = settings["max_new_tokens"]
    try:
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            raise ValueError(f"`max_new_tokens` must be a positive integer (got {length!r}). Correct it.")
        for name in _GIVEN:
            if name in settings:
                raise ValueError(f"`{name}` is given by the evaluation (got {settings[name]!r}). Leave it out.")
        base.check_settings(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`eval_generate_kwargs` must hold settings of `generate`: {error}") from error
    sets = list(eval_dataset.values()) if isinstance(eval_dataset, dict) else [eval_dataset]
    sets = [list(islice(iter(each), args.eval_generate_samples)) for each in sets if isinstance(each, Dataset)]
    for rows in sets:
        _check_answers(rows, args.eval_answer_column)
    longest = position_limit(model)
    width = max((len(row["prompt_ids"]) for rows in sets for row in rows), default=0)
    if longest is not None and width + length > longest:
        raise ValueError(
            f"Prompts and `max_new_tokens` must fit into the model's {longest} positions (got "
            f"{width} + {length} in the samples to decode). Lower `max_new_tokens` in `eval_generate_kwargs`, or "
            "`response_length`, its default."
        )


def _check_answers(rows: list[dict[str, Any]], column: str) -> None:
    if column != "answer" and column not in rows[0]:
        raise ValueError(
            f"`eval_answer_column` must be a column of the held-out samples (got {column!r}, and they have "
            f"{sorted(rows[0])}). Correct it."
        )
    for index, row in enumerate(rows):
        if not isinstance(row.get(column, ""), str):
            raise ValueError(f"`{column}` must be text in each sample to decode (got {row[column]!r} in row {index}).")


def _settings(args: PseudoTrajectoryDistillConfig) -> dict[str, Any]:
    return {"max_new_tokens": args.response_length, "do_sample": False} | args.eval_generate_kwargs


def decode_and_score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Any,
    args: PseudoTrajectoryDistillConfig,
    accelerator: Any,
) -> dict[str, float]:
    """Decode the first `eval_generate_samples` prompts, shared out over the processes.

    Returns:
        `tpf`: answer tokens before the stop tokens over forwards, both summed over the prompts; and, if the data set
        has the column `eval_answer_column`, `exact_match` between 0 and 1.
    """
    rows = list(islice(iter(dataset), args.eval_generate_samples))
    has_answers = bool(rows) and args.eval_answer_column in rows[0]
    own = rows[args.process_index :: args.world_size]
    tokens, forwards, matches = 0.0, 0.0, 0.0
    training = model.training
    model.eval()
    never = args.disable_tqdm or args.process_index > 0
    with progress_bar(len(own), "answer", "decoding", shown=False if never else None) as bar:
        for start in range(0, len(own), args.per_device_eval_batch_size):
            batch = own[start : start + args.per_device_eval_batch_size]
            inputs = _left_padded([row["prompt_ids"] for row in batch], tokenizer, args.device)
            output = model.generate(
                **inputs,
                **_settings(args),
                return_dict_in_generate=True,
            )
            tokens += output.num_tokens.sum().item()
            forwards += output.num_forwards.sum().item()
            if has_answers:
                answers = output.sequences[:, inputs["input_ids"].shape[1] :]
                texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
                wanted = [row[args.eval_answer_column] for row in batch]
                matches += sum(map(same_answer, texts, wanted))
            bar.update(len(batch))
    model.train(training)
    sums = torch.tensor([[tokens, forwards, matches]], dtype=torch.float32, device=args.device)
    tokens, forwards, matches = accelerator.gather(sums).sum(0).tolist()
    found = {"tpf": round(tokens / max(forwards, 1.0), 4)}
    return found | ({"exact_match": round(matches / len(rows), 4)} if has_answers else {})


def same_answer(prediction: str, reference: str) -> bool:
    """Whether a text gives the reference answer.

    It does if both are the same text, white space at both ends aside, or if the reference is an integer or ends in
    `#### <integer>` and the text has the same integer behind its last `####`.
    """
    if prediction.strip() == reference.strip():
        return True
    bare = re.fullmatch(r"-?\d[\d,]*", reference.strip())
    wanted = extract_answer(f"#### {bare[0]}" if bare else reference)
    return wanted is not None and extract_answer(prediction) == wanted


def _left_padded(
    prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> dict[str, torch.Tensor]:
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    width = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[pad_token_id] * (width - len(p)) + p for p in prompts], device=device),
        "attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device),
    }
