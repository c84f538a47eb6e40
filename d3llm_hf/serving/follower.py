"""The streamer of a batch: tells every row's reader what is final, and the batch when nobody waits for it."""

from collections.abc import Callable, Sequence

import torch

from ..forms.filling import Filled
from ..stops import before_stop, tokens_of
from ..watch.row_text import RowText
from ..watch.terminal import MASK_SIGN
from .jobs import Answer, Job, Piece


class Abandoned(Exception):
    """Raised within `generate` when nobody waits for any of its rows, or the server stops."""


class Follower:
    """A streamer for one call of `generate` whose rows are `jobs`; a row is answered as soon as it has ended.

    Args:
        tokenizer: decodes the answers.
        jobs: one for each row.
        mask_token_id (`int`): of the model.
        stop_ids: stop tokens, which are no text.
        is_stopping: whether the server stops.
        between (*optional*): is called between any two forwards.
    """

    supports_batch = True

    def __init__(
        self,
        tokenizer,
        jobs: Sequence[Job],
        mask_token_id: int,
        stop_ids: set[int],
        is_stopping: Callable[[], bool],
        between: Callable[[], None] | None = None,
    ):
        self.tokenizer, self.jobs, self.mask_token_id, self.stop_ids = tokenizer, jobs, mask_token_id, stop_ids
        self.is_stopping, self.between = is_stopping, between
        by_word = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))  # may take back a space
        self._texts = [RowText(tokenizer, {"skip_special_tokens": True}, by_word=by_word) for _ in jobs]
        self._seen = [""] * len(jobs)  # final text of each row, stop strings included
        self._tokens: list[list[int]] = [[] for _ in jobs]
        self._moved: set[int] = set()
        self._drafts: dict[int, list[int]] = {}
        self._ended: list[int] = []
        self._forwards = 0
        self.answered: set[int] = set()

    # ---- for `generate` ------------------------------------------------------------------------------------------

    def put(self, value: torch.Tensor, row: int | None = None) -> None:
        """Takes the prompts, which nobody waits for, and then newly decided tokens of a row."""
        if row is None:
            return
        tokens = [token for token in value.tolist() if token not in self.stop_ids]
        self._tokens[row] += tokens
        if self.jobs[row].streamed:
            self._seen[row] += self._texts[row].add(tokens)
            self._moved.add(row)

    def put_draft(self, value: torch.Tensor, row: int) -> None:
        """Takes the canvas of a row behind its decided prefix."""
        if self.jobs[row].drafts:
            self._drafts[row] = value.tolist()

    def end_row(self, row: int) -> None:
        """Takes note that a row has ended."""
        self._ended.append(row)

    def end_step(self) -> None:
        """Tells the readers what this forward has brought.

        Raises:
            Abandoned: when all that is left to decide is nobody's.
        """
        self._forwards += 1
        for row in self._ended:
            self.jobs[row].tell(self._answer(row))
            self.answered.add(row)
        for row in sorted(self._moved.union(self._drafts) - self.answered):
            self._tell_piece(row)
        self._moved, self._drafts, self._ended = set(), {}, []
        waiting = [job for row, job in enumerate(self.jobs) if row not in self.answered]
        if waiting and (self.is_stopping() or all(job.has_left for job in waiting)):
            raise Abandoned
        if waiting and self.between is not None:
            self.between()

    def end(self) -> None:
        """Nothing is left to tell: rows that have ended are answered."""

    # ---- for the readers -----------------------------------------------------------------------------------------

    def _tell_piece(self, row: int) -> None:
        job, seen = self.jobs[row], self._seen[row]
        text = seen[job.given : free_of_stops(seen, job.stops)]
        job.given += len(text)
        draft = None
        if row in self._drafts:
            behind = self._texts[row].draft(self._drafts[row], self.mask_token_id, MASK_SIGN)
            draft = (seen + behind)[job.given :]
        if text or draft is not None:
            job.tell(Piece(text, draft))

    def _answer(self, row: int) -> Answer:
        job, tokens = self.jobs[row], self._tokens[row]
        whole = self._decode(tokens)
        text = before_stop(whole, job.stops)
        count, is_cut = len(tokens), len(text) < len(whole)
        is_whole = not is_cut and count == job.max_new_tokens
        if is_cut:
            count = tokens_of(self._decode, tokens, text)
        return Answer(
            text=text,
            rest=text[job.given :],
            finish_reason="length" if is_whole else "stop",
            prompt_tokens=len(job.prompt),
            completion_tokens=count,
            forwards=self._forwards,
        )

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


class FormFollower:
    """A streamer for the filling of forms, whose rows are answered together: a hole's text is known when all of it is.

    Args:
        jobs: one for each row.
        is_stopping: whether the server stops.
        between (*optional*): is called between any two forwards.
    """

    supports_batch = True

    def __init__(
        self, jobs: Sequence[Job], is_stopping: Callable[[], bool], between: Callable[[], None] | None = None
    ):
        self.jobs, self.is_stopping, self.between = jobs, is_stopping, between
        self.answered: set[int] = set()

    def put(self, value: torch.Tensor, row: int | None = None) -> None:
        """Takes tokens that are told at the end."""

    def end_step(self) -> None:
        """Ends a filling that nobody waits for.

        Raises:
            Abandoned: when it is nobody's, or the server stops.
        """
        if self.is_stopping() or all(job.has_left for job in self.jobs):
            raise Abandoned
        if self.between is not None:
            self.between()

    def end(self) -> None:
        """Nothing is told before the fillings are read."""

    def answer(self, found: Sequence[Filled]) -> None:
        """Tells every reader its form."""
        for row, (job, filled) in enumerate(zip(self.jobs, found, strict=True)):
            job.tell(
                Answer(
                    text=filled.text,
                    rest=filled.text,
                    finish_reason="stop",
                    prompt_tokens=filled.prompt_tokens,
                    completion_tokens=filled.num_tokens,
                    forwards=filled.num_forwards,
                )
            )
            self.answered.add(row)


def free_of_stops(text: str, stops: Sequence[str]) -> int:
    """Length of the text without a stop string, and without an end that may yet become one."""
    cut = before_stop(text, stops)
    if len(cut) < len(text):
        return len(cut)
    held = (n for stop in stops for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n]))
    return len(text) - max(held, default=0)
