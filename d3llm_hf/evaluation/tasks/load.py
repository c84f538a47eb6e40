"""What a sweep asks of a model: prompts, and whether an answer is right.

word_problems   the embedded word problems, generated from the seed
gsm8k           GSM8K from a file in the Hub's format, JSON lines or Parquet with `question` and `answer`
any other name  a task of lm-eval that generates text (see `harness.py`); `lm_eval:gsm8k` is the harness's own
"""

import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol

from ...text import encode_chat, encode_text
from .word_problems import exact_match, extract_answer, generate_problems


DEFAULT_WORD_PROBLEMS = 300


class Task(Protocol):
    """Prompts with a judge.

    Attributes:
        name: of the task, in results files.
        seed: the prompts were drawn with it, and what the decoding draws at random comes from it.
        max_new_tokens: length of an answer where nothing else is asked for.
        about: what tells this task from another of its name, besides the prompts; JSON.
        scored_by: what says that an answer is right.
        stop_strings: text that ends an answer, besides the model's stop tokens.
    """

    name: str
    seed: int
    max_new_tokens: int

    @property
    def about(self) -> Any: ...

    @property
    def scored_by(self) -> str: ...

    @property
    def stop_strings(self) -> Sequence[str]: ...

    def encode(self, tokenizer: Any, chat: bool) -> list[list[int]]:
        """Token ids of every prompt, in the tokenizer's chat template with `chat`."""

    def judge(self, index: int, text: str) -> bool:
        """Whether `text`, without special tokens, answers prompt `index`."""


@dataclass
class QuestionTask:
    """Questions with reference answers; the attributes are those of [`Task`].

    Args:
        questions: the prompts; with a chat template each is the user's message.
        references: what the judge compares an answer with.
        scorer: whether an answer agrees with a reference.
    """

    name: str
    seed: int
    max_new_tokens: int
    questions: Sequence[str]
    references: Sequence[str]
    scorer: Callable[[str, str], bool]

    stop_strings = ()

    @property
    def about(self) -> Any:
        return [self.scored_by, list(self.references)]

    @property
    def scored_by(self) -> str:
        return self.scorer.__name__

    def encode(self, tokenizer: Any, chat: bool) -> list[list[int]]:
        def row(question: str):
            message = [{"role": "user", "content": question}]
            return encode_chat(tokenizer, message) if chat else encode_text(tokenizer, question)

        return [row(question)["input_ids"][0].tolist() for question in self.questions]

    def judge(self, index: int, text: str) -> bool:
        return self.scorer(text, self.references[index])


def load_tasks(
    name: str, *, num_samples: int | None = None, seed: int = 4242, data: str | Path | None = None, **harness: Any
) -> list[Task]:
    """The task of a name; several where lm-eval has a group of that name.

    Args:
        name: `"word_problems"`, `"gsm8k"`, or a task of lm-eval.
        num_samples: how many prompts; 300 word problems or all of another task where nothing is given. Of `gsm8k` a
            smaller number is drawn with the seed, of lm-eval's tasks the first are taken, as the harness does.
        seed: draws the prompts.
        data: file of `gsm8k`.
        harness: further arguments of [`~d3llm_hf.evaluation.tasks.harness.load_lm_eval_tasks`].

    Raises:
        ValueError: for an unknown name, a number of samples that the task does not have, or options that it does not
            take.
        FileNotFoundError: for a data file that does not exist.
        ImportError: for a task of lm-eval, or a Parquet file, without the package that reads it.
    """
    if num_samples is not None and (isinstance(num_samples, bool) or num_samples < 1):
        raise ValueError(f"`num_samples` must be a positive integer (got {num_samples!r}). Leave it out for all.")
    if data is not None and name != "gsm8k":
        raise ValueError(f"`data` is read by the task gsm8k only (got {str(data)!r} with {name!r}). Leave it out.")
    given = [option for option, value in harness.items() if value]
    if given and name in ("word_problems", "gsm8k"):
        raise ValueError(f"`{given[0]}` applies to tasks of lm-eval (got it with {name!r}). Leave it out.")
    if name == "word_problems":
        return [word_problems(DEFAULT_WORD_PROBLEMS if num_samples is None else num_samples, seed)]
    if name == "gsm8k":
        return [gsm8k(data, num_samples, seed)]
    from .harness import load_lm_eval_tasks

    return [*load_lm_eval_tasks(name.removeprefix("lm_eval:"), num_samples=num_samples, seed=seed, **harness)]


def word_problems(num_samples: int = DEFAULT_WORD_PROBLEMS, seed: int = 4242) -> QuestionTask:
    """Held-out word problems of two to five steps; right is the number after `####`."""
    problems = generate_problems(num_samples, split="test", seed=seed)
    return QuestionTask(
        name="word_problems",
        seed=seed,
        max_new_tokens=64,
        questions=[problem.question for problem in problems],
        references=[problem.answer for problem in problems],
        scorer=exact_match,
    )


def gsm8k(data: str | Path | None, num_samples: int | None = None, seed: int = 4242) -> QuestionTask:
    """GSM8K from a local file; right is the number after `####`, or the last one of an answer without that mark.

    Raises:
        ValueError, FileNotFoundError, ImportError: see [`load_tasks`].
    """
    if data is None:
        raise ValueError(
            "`data` must name a file with GSM8K in the Hub's format, JSON lines or Parquet (got None). Pass "
            "`--data FILE`; for the harness's own task of this name, which fetches its data, pass `lm_eval:gsm8k`."
        )
    rows = read_rows(Path(data))
    for number, row in enumerate(rows, 1):
        wrong = [name for name in ("question", "answer") if not isinstance(row.get(name), str) or not row[name]]
        if wrong or extract_answer(row["answer"]) is None:
            what = f"no text for {wrong[0]!r}" if wrong else "an answer without a number after `####`"
            raise ValueError(
                f"`data` must hold `question` and `answer` as GSM8K does (got {what} in row {number} of "
                f"{str(data)!r}). Choose the file of its `main` configuration."
            )
    count = len(rows) if num_samples is None else num_samples
    if count > len(rows) or not rows:
        raise ValueError(
            f"`num_samples` must be at most the {len(rows)} rows of {str(data)!r} (got {count}). Lower it."
        )
    chosen = [rows[index] for index in sorted(random.Random(seed).sample(range(len(rows)), count))]
    return QuestionTask(
        name="gsm8k",
        seed=seed,
        max_new_tokens=256,
        questions=[row["question"] for row in chosen],
        references=[row["answer"] for row in chosen],
        scorer=same_final_number,
    )


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines or Parquet file.

    Raises:
        ValueError, FileNotFoundError, ImportError: see [`load_tasks`].
    """
    if not file.is_file():
        raise FileNotFoundError(f"`data` must name a file (got {str(file)!r}, which is none). Correct the path.")
    if file.suffix == ".parquet":
        try:
            from pyarrow import ArrowInvalid, parquet
        except ImportError as error:
            raise ImportError("A Parquet file needs pyarrow: `pip install 'd3llm-hf[eval]'`.") from error
        try:
            return parquet.read_table(file).to_pylist()
        except ArrowInvalid as error:
            raise ValueError(
                f"`data` must be Parquet (got {error} in {str(file)!r}). Fetch the file again."
            ) from error
    if file.suffix not in (".jsonl", ".json"):
        raise ValueError(f"`data` must end in .jsonl or .parquet (got {file.name!r}). Convert or rename the file.")
    rows = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"`data` must hold one JSON object a line (got {error} in line {number} of {str(file)!r}). Fetch the "
                "file again."
            ) from error
    return rows


_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def final_number(text: str) -> Decimal | None:
    """The number after the last `####`, or else the last number of the text."""
    marked = re.search(rf"####\D*?({_NUMBER.pattern})(?!.*####)", text, re.DOTALL)
    found = [marked[1]] if marked else _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def same_final_number(prediction: str, reference: str) -> bool:
    """Whether both texts come to the same number; see [`final_number`]."""
    number = final_number(prediction)
    return number is not None and number == final_number(reference)
