"""Rows of a data set, checked before a model is trained on them: errors name data set, row and column."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, IterableDataset

from d3llm_hf.models.text_config import text_setting
from d3llm_hf.models.wrappers import base_of, virtual_tokens


logger = logging.getLogger(__name__)


class RowError(ValueError):
    """A row that nothing can be learnt from."""


@contextmanager
def in_row(number: int) -> Iterator[None]:
    """Inside, errors are those of a row, which they name.

    Raises:
        RowError: for a `TypeError` or `ValueError`.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        raise RowError(f"Row {number}: {error}") from error


@dataclass(frozen=True)
class Canvas:
    """What prompts and answers have to fit.

    Args:
        prompt_length (`int`): Longest prompt; examples with a longer one are left out.
        response_length (`int`): Length of the answer canvas; examples with a longer answer are left out.
        vocab_size (`int`): Of the model.
        positions (`int`, *optional*): Of the model; `None` where it has no limit.
        pads_prompts (`bool`): Whether every prompt is padded to `prompt_length`.
    """

    prompt_length: int
    response_length: int
    vocab_size: int
    positions: int | None
    pads_prompts: bool = False

    def check(self, prompt_length: int, setting: str = "The prompt") -> None:
        """Refuse what goes beyond the model's positions.

        Raises:
            ValueError: with both numbers.
        """
        total = prompt_length + self.response_length
        if self.positions is not None and total > self.positions:
            raise ValueError(
                f"{setting} and `response_length` must fit into the model's {self.positions} positions (got "
                f"{prompt_length} + {self.response_length} = {total}). Lower `response_length`, or "
                "`max_prompt_length`, which leaves longer prompts out."
            )


def canvas_of(model: torch.nn.Module, args: Any) -> Canvas:
    """What the arguments of a trainer and the model have room for."""
    base = base_of(model)
    embeddings = getattr(base.get_input_embeddings(), "num_embeddings", None)
    return Canvas(
        args.max_prompt_length,
        args.response_length,
        text_setting(base.config, "vocab_size") if embeddings is None else embeddings,
        position_limit(model),
        getattr(args, "pad_prompt_to_max", False),
    )


def position_limit(model: torch.nn.Module) -> int | None:
    """Positions of a model that text can take, behind a learnt prompt if it has one; `None` where it has no limit."""
    limit = text_setting(base_of(model).config, "max_position_embeddings")
    if limit is None or limit < 1:  # some configs say -1 for none
        return None
    return limit - getattr(base_of(model), "position_offset", 0) - virtual_tokens(model)


def prepare_each(dataset: Any, prepare: Callable[[Any], Any], name: str = "eval_dataset") -> Any:
    """A data set prepared, each of a dictionary of them, or `None` where there is none.

    Args:
        dataset: what a trainer was given.
        prepare: takes a data set that is one.
        name (`str`): of the argument.

    Raises:
        TypeError: for something else than data sets.
        ValueError: for one without rows, or with one that cannot be used.
    """
    if dataset is None:
        return None
    if isinstance(dataset, dict) and name.startswith("eval_dataset"):
        check_named(dataset, name)
        return {key: prepare_each(each, prepare, f"{name}[{key!r}]") for key, each in dataset.items()}
    if not isinstance(dataset, Dataset | IterableDataset):
        splits = f" with the splits {sorted(dataset)}" if isinstance(dataset, dict) else ""
        way_out = "Choose one of them" if splits else "Make one with `Dataset.from_list`"
        raise TypeError(
            f"`{name}` must be a `datasets.Dataset` or `IterableDataset` (got {type(dataset).__name__}{splits}). "
            f"{way_out}."
        )
    try:
        if len(dataset) == 0 if isinstance(dataset, Dataset) else _is_empty_stream(dataset):
            raise ValueError(f"`{name}` must hold at least one row (got none). Check the file, split or filter.")
        return prepare(dataset)
    except RowError as error:
        raise RowError(f"`{name}`: {error}") from None
    except UnicodeDecodeError as error:
        numbers = range(len(dataset)) if isinstance(dataset, Dataset) else ()
        raise RowError(f"`{name}`: {undecodable(dataset, numbers, error)}") from None


def check_named(datasets: dict[str, Any], name: str = "eval_dataset") -> None:
    """Refuse no data sets, and one that is missing: these would be evaluated as nothing, or as other data.

    Raises:
        ValueError: naming it.
    """
    missing = [key for key, each in datasets.items() if each is None]
    if missing or not datasets:
        raise ValueError(
            f"`{name}` must map names to data sets (got {f'None as {missing[0]!r}' if missing else 'no names'}). Add "
            "the data, or leave it out."
        )


def in_rows(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """The data set with all of its columns, and rows of Python's own values; a transform of the user's is kept."""
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom":
        return dataset
    return dataset.with_format(None)


def columns_of(dataset: Dataset | IterableDataset) -> list[str]:
    """Names of the columns; a stream that does not know them has those of its first row."""
    return dataset.column_names or list(next(iter(dataset)))


def keep_fitting(dataset, canvas: Canvas, response_column: str = "response_ids"):
    """Leave out the examples that do not fit the canvas, and say how many.

    Of a stream, rows are checked when they are drawn, and here as far as the first one that fits.

    Raises:
        RowError: For ids that are none of the model's, or more of them than it has positions.
        ValueError: If none fits.
    """
    if isinstance(dataset, IterableDataset) or canvas.pads_prompts:
        canvas.check(canvas.prompt_length, "`max_prompt_length`")
    fitting = dataset.filter(
        _fits,
        input_columns=["prompt_ids", response_column],
        with_indices=True,
        fn_kwargs={"canvas": canvas, "column": response_column},
    )
    is_stream = isinstance(fitting, IterableDataset)
    if next(iter(fitting), None) is None if is_stream else len(fitting) == 0:
        raise ValueError(
            f"At least one example must fit `max_prompt_length` and `response_length` (got {canvas.prompt_length} and "
            f"{canvas.response_length}, and none of {'the stream' if is_stream else len(dataset)} does). Raise them."
        )
    if not is_stream and len(fitting) < len(dataset):
        logger.warning(
            "%d of %d examples do not fit max_prompt_length=%d and response_length=%d and are left out; raise these "
            "to keep them.",
            len(dataset) - len(fitting),
            len(dataset),
            canvas.prompt_length,
            canvas.response_length,
        )
    return fitting


def _fits(prompt_ids: Any, response_ids: Any, number: int, canvas: Canvas, column: str) -> bool:
    with in_row(number):
        prompt = token_ids(prompt_ids, "prompt_ids", canvas.vocab_size)
        response = token_ids(response_ids, column, canvas.vocab_size)
        if not response:
            raise ValueError(f"`{column}` must hold at least one token (got none). Leave such rows out.")
        if len(prompt) > canvas.prompt_length or len(response) > canvas.response_length:
            return False
        canvas.check(len(prompt))
    return True


def token_ids(value: Any, name: str, vocab_size: int) -> list[int]:
    """A list of token ids of the model.

    Raises:
        ValueError: for anything else.
    """
    ids = integers(value, name)
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        wrong = next(token for token in ids if not 0 <= token < vocab_size)
        raise ValueError(
            f"`{name}` must hold ids of the model's vocabulary of {vocab_size} (got {wrong}). Tokenise with the "
            "model's tokenizer, and leave padding such as -100 out."
        )
    return ids


def integers(value: Any, name: str) -> list[int]:
    """A list of integers.

    Raises:
        ValueError: for anything else.
    """
    found = plain(value)
    if not isinstance(found, list | tuple) or not all(type(each) is int for each in found):
        text = repr(found)
        raise ValueError(
            f"`{name}` must be a list of integers (got {text if len(text) <= 80 else f'{text[:77]}...'}). Leave such "
            "rows out, or make them again."
        )
    return list(found)


def plain(value: Any) -> Any:
    """A value of a column as Python's own, also where the data set gives arrays or tensors."""
    return value.tolist() if hasattr(value, "tolist") else value


def _is_empty_stream(dataset: IterableDataset) -> bool:
    """Whether a stream that does not know its columns has no rows; others are looked at once they are prepared."""
    return dataset.column_names is None and next(iter(dataset), None) is None


def undecodable(dataset: Any, numbers: Iterable[int], error: UnicodeDecodeError) -> str:
    """What is wrong with bytes that are no text, and which of these rows has them."""
    found = ((number, column) for number in numbers for column in dataset.column_names)
    row = next((f"Row {number}, `{column}`: " for number, column in found if not _reads(dataset, number, column)), "")
    return f"{row}text must be UTF-8 (got {error}). Convert or correct its source."


def _reads(dataset: Dataset, number: int, column: str) -> bool:
    try:
        dataset.select([number]).select_columns([column])[0]
    except UnicodeDecodeError:
        return False
    return True
