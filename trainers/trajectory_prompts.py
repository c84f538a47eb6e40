"""The prompts of a data set as fine-tuning would tokenise them, with reference answers where it has some."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from .sft_collator import render_prompt, tokenize_conversations


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
    """

    dataset: Sequence[dict[str, Any]]
    tokenizer: PreTrainedTokenizerBase
    prompt_column: str | None = None
    response_column: str | None = None
    answer_column: str | None = None

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
                text = render_prompt(turns, self.tokenizer)
                prompt, target = self.tokenizer(text, add_special_tokens=False)["input_ids"], None
            else:
                ids = tokenize_conversations({"messages": [[*turns, *response]]}, self.tokenizer)
                prompt, target = ids["prompt_ids"][0], ids["response_ids"][0]
            yield Sample(index, prompt, target, answer)

    def _row(self, index: int) -> tuple[list[dict[str, str]], list[dict[str, str]] | None, str | None]:
        """Turns of the prompt, those of the response, and the reference answer."""
        row = self.dataset[index]
        for name in ("prompt_column", "response_column", "answer_column"):
            column = getattr(self, name)
            if column is not None and column not in row:
                raise ValueError(f"`{name}` must be a column of the data set (got {column!r} of {sorted(row)}).")
        turns, response = self._turns(row)
        if not turns:
            raise ValueError(f"A prompt must hold at least one turn (got none in row {index}). Leave such rows out.")
        answer = row[self.answer_column] if self.answer_column else response and response[-1]["content"]
        return turns, response, None if answer in (None, "") else str(answer)

    def _turns(self, row: dict[str, Any]) -> tuple[list[dict[str, str]], list[dict[str, str]] | None]:
        column = self.prompt_column or ("messages" if "messages" in row else "prompt")
        if column not in row:
            raise ValueError(
                f"A data set must have the column `messages` or `prompt` (got {sorted(row)}). Set `prompt_column`."
            )
        turns = _as_turns(row[column], "user")
        if turns and turns[-1]["role"] == "assistant":  # the conversation with its answer
            return turns[:-1], turns[-1:]
        response = row.get(self.response_column or "completion")
        return turns, None if response is None else _as_turns(response, "assistant")


def _as_turns(value: str | list[dict[str, str]], role: str) -> list[dict[str, str]]:
    return [{"role": role, "content": value}] if isinstance(value, str) else [dict(turn) for turn in value]
