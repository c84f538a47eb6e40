"""The prompts of a data set as fine-tuning would tokenise them, with reference answers where it has some."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from d3llm_hf.text import special_tokens

from ..common.conversations import (
    Turns,
    as_turns,
    check_template_columns,
    encode_prompt,
    render_prompt,
    spells_control_tokens,
)
from ..common.rows import RowError, in_row, undecodable
from ..sft.collator import tokenize_conversations


@dataclass(frozen=True)
class Sample:
    """One prompt.

    Attributes:
        sample_id: its index in the data set.
        prompt_ids: as [`tokenize_conversations`] gives them.
        target_ids: the data set's own response, its end-of-turn token included; `None` without one.
        answer: the text that an answer is compared with; `None` without one.
    """

    sample_id: int
    prompt_ids: list[int]
    target_ids: list[int] | None
    answer: str | None


@dataclass(frozen=True)
class Prompts:
    """The prompts of a data set: `messages`, or a prompt and, where there is one, a response.

    Args:
        dataset: rows, by index.
        tokenizer: the teacher's.
        prompt_column: text or turns; `messages` is used where unset and there, else `prompt`.
        response_column: text or turns; `completion` is used where unset and there.
        answer_column: reference answer; the response where unset.
        control_tokens_in_text: see [`tokenize_conversations`].

    Raises:
        RowError: naming the row, for one that is no prompt.
    """

    dataset: Sequence[dict[str, Any]]
    tokenizer: PreTrainedTokenizerBase
    prompt_column: str | None = None
    response_column: str | None = None
    answer_column: str | None = None
    control_tokens_in_text: bool = False

    def __len__(self) -> int:
        return len(self.dataset)

    def fingerprint(self) -> str:
        """SHA-256 of all turns, responses and answers in order."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            digest.update(json.dumps(self._row(index), sort_keys=True).encode() + b"\n")
        return digest.hexdigest()

    def samples(self, indices: Sequence[int]) -> Iterator[Sample]:
        """The samples with these indices, in order."""
        for index in indices:
            turns, response, answer = self._row(index)
            if response is None:
                with in_row(index):
                    prompt, target = self._encode(turns), None
            else:
                ids = tokenize_conversations(
                    {"messages": [[*turns, *response]]},
                    self.tokenizer,
                    control_tokens_in_text=self.control_tokens_in_text,
                    numbers=[index],
                )
                prompt, target = ids["prompt_ids"][0], ids["response_ids"][0]
            yield Sample(index, prompt, target, answer)

    def check_answers(self, score: Callable[[str, str], bool]) -> None:
        """Lets a scorer see every reference answer.

        Raises:
            RowError: for one that it refuses.
        """
        for index in range(len(self)):
            answer = self._row(index)[2]
            if answer is not None:
                with in_row(index):
                    score("", answer)

    def _encode(self, turns: Turns) -> list[int]:
        if not self.control_tokens_in_text and spells_control_tokens(turns, special_tokens(self.tokenizer)):
            return encode_prompt(turns, self.tokenizer)
        return self.tokenizer(render_prompt(turns, self.tokenizer), add_special_tokens=False)["input_ids"]

    def _row(self, index: int) -> tuple[Turns, Turns | None, str | None]:
        """Turns of the prompt, those of the response, and the reference answer."""
        try:
            row = self.dataset[index]
        except UnicodeDecodeError as error:
            raise RowError(undecodable(self.dataset, [index], error)) from None
        with in_row(index):
            return self._read(row)

    def _read(self, row: dict[str, Any]) -> tuple[Turns, Turns | None, str | None]:
        for name in ("prompt_column", "response_column", "answer_column"):
            column = getattr(self, name)
            if column is not None and column not in row:
                raise ValueError(f"`{name}` must be a column of the data set (got {column!r} of {sorted(row)}).")
        turns, response = self._turns(row)
        if not turns:
            raise ValueError("A prompt must hold at least one turn (got none). Leave such rows out.")
        answer = row[self.answer_column] if self.answer_column else response and response[-1]["content"]
        return turns, response, None if answer in (None, "") else str(answer)

    def _turns(self, row: dict[str, Any]) -> tuple[Turns, Turns | None]:
        column = self.prompt_column or ("messages" if "messages" in row else "prompt")
        if column not in row:
            raise ValueError(
                f"A data set must have the column `messages` or `prompt` (got {sorted(row)}). Set `prompt_column`."
            )
        check_template_columns(row)
        template = self.tokenizer.chat_template
        turns = as_turns(row[column], column, "user", template)
        if turns and turns[-1]["role"] == "assistant":  # the conversation with its answer
            return turns[:-1], turns[-1:]
        column = self.response_column or "completion"
        response = row.get(column)
        return turns, None if response is None else as_turns(response, column, "assistant", template)
