"""The thread that owns the model: it decodes waiting jobs together, and outlives what goes wrong with one."""

import copy
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from ..forms.filling import Filled, fill_laid_out
from ..models.call import Call
from ..models.text_config import text_setting
from ..models.wrappers import learnt_prompt
from ..stops import StopInAnswer
from .errors import ApiError, stopped
from .follower import Abandoned, Follower, FormFollower
from .groups import Groups
from .jobs import Job
from .metrics import Metrics


logger = logging.getLogger(__name__)

PATTERNS = 64
"""Combinations of settings and length whose preparation is kept."""


class Worker:
    """Decodes jobs in the order in which they came; later ones join those at work before any forward.

    A job joins those of its kind, whatever their lengths are; jobs of another kind are a group of their own, and the
    groups take turns, a forward each. What cannot join anybody, such as a form, is decoded with those of equal
    settings that wait at the same time, as a batch in which nobody joins, one such batch after the other; the groups
    have their turns between its forwards.

    Args:
        model: with this library's `generate`; nobody else may use it while the worker lives.
        tokenizer: decodes answers; copied, since tokenizers are not made for several threads.
        max_batch_size (`int`): rows at work.
        max_wait (`float`): seconds for which the first job waits for others where nobody is at work, unless they fill
            a batch before.
        max_queue (`int`): jobs that may wait.
        metrics: counts of the server.
        joining (`bool`): whether anybody joins. Without, jobs of equal settings and lengths are let in together when
            nobody is at work.
    """

    def __init__(
        self,
        model,
        tokenizer,
        *,
        max_batch_size: int,
        max_wait: float,
        max_queue: int,
        metrics: Metrics | None = None,
        joining: bool = True,
    ):
        self.model, self.tokenizer = model, copy.deepcopy(tokenizer)
        self.max_batch_size, self.max_wait, self.max_queue = max_batch_size, max_wait, max_queue
        self.metrics, self.joining = metrics or Metrics(), joining
        self._groups = Groups(max_batch_size, model.rows_at_work)
        self._prepared: dict[Job, Call | None] = {}  # of jobs that wait; `None` of one that cannot join
        self._patterns: dict[tuple[int, str], Call] = {}  # by length and settings, of jobs that came before
        self._again: list[Job] = []  # to be decoded alone
        self._batch = 0  # rows of the batch at work in which nobody joins
        self._pending: list[Job] = []
        self._changed = threading.Condition()
        self._closing = False
        self._seconds = 1.0  # that a job takes, of late
        self._thread = threading.Thread(target=self._work, name="d3llm-serve", daemon=True)

    # ---- for any thread ------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether jobs that are submitted now will be decoded."""
        return self._thread.is_alive() and not self._closing

    @property
    def is_stuck(self) -> bool:
        """Whether the thread works on although it was told to end."""
        return self._thread.is_alive() and self._closing

    @property
    def running(self) -> int:
        """Rows at work."""
        return self._groups.size + self._batch

    @property
    def waiting(self) -> int:
        """Jobs that wait to be let in."""
        with self._changed:
            return sum(not job.has_left for job in self._pending)

    def submit(self, job: Job) -> None:
        """Queues a job, whose `tell` will get an answer or an error, unless it leaves.

        Raises:
            ApiError: 429 when the queue is full, 503 when the worker has ended.
        """
        with self._changed:
            if not self.alive:
                raise stopped()
            self._pending = [waiting for waiting in self._pending if not waiting.has_left]
            if len(self._pending) >= self.max_queue:
                batches = math.ceil((len(self._pending) + 1) / self.max_batch_size)
                raise ApiError(
                    429,
                    f"The server is busy: {len(self._pending)} requests wait already. Try again later.",
                    code="queue_full",
                    retry_after=max(1, math.ceil(batches * self._seconds)),
                )
            self._pending.append(job)
            self._changed.notify_all()

    def close(self, seconds: float | None = None) -> bool:
        """Ends the work at its next forward, refuses all that waits, and waits for the thread.

        Args:
            seconds (`float`, *optional*): to wait at most; a forward cannot be interrupted.

        Returns:
            whether the thread has ended.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(seconds)
        if not self._thread.is_alive():
            return True
        logger.warning("a forward has not ended within %s s, and is left", seconds)
        return False

    # ---- the thread ----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while self._await_work():
                self._let_in()
                if batch := self._next_batch():
                    self._decode_batch(batch)
                else:
                    self._take_turn()
        finally:
            with self._changed:
                self._closing = True
                left, self._pending = self._pending, []
            for job in [*self._groups.drop_all(), *self._again, *left]:
                job.tell(stopped())

    def _await_work(self) -> bool:
        """Waits until there is something to do, and for more of it; whether the worker goes on."""
        with self._changed:
            until = None
            while not self._closing:
                self._forget_left()
                if len(self._groups) or self._again:
                    return True
                if not self._pending:
                    until = None
                    self._changed.wait()
                    continue
                until = time.monotonic() + self.max_wait if until is None else until
                left = until - time.monotonic()
                if len(self._pending) >= self.max_batch_size or left <= 0:
                    return True
                self._changed.wait(left)
        return False

    def _forget_left(self) -> None:
        self._pending = [job for job in self._pending if not job.has_left]
        self._prepared = {job: call for job, call in self._prepared.items() if not job.has_left}

    def _let_in(self) -> None:
        """Lets jobs in, the oldest first, as long as there is room.

        Who has to wait is not overtaken: nobody waits for ever. But while a batch is at work in which nobody joins,
        the next such batch is, by those that can join.
        """
        with self._changed:
            self._forget_left()
            waiting = list(self._pending)
        for job in waiting:
            if self.running >= self.max_batch_size:
                return
            try:
                call = self._prepare(job)
                if call is None and self._batch:
                    continue
                is_new = None if call is None else self._groups.admit(call, job)
            except Exception as error:
                self._fail(job, error)
                self._take(job)
                continue
            if is_new is None:
                return
            job.began = time.monotonic()
            self.metrics.add(batches=int(is_new), batch_rows=1)
            self._take(job)

    def _take(self, job: Job) -> None:
        self._prepared.pop(job, None)
        with self._changed:
            self._pending = [waiting for waiting in self._pending if waiting is not job]

    def _prepare(self, job: Job) -> Call | None:
        """The job as a call of one row; `None` for one that cannot join anybody."""
        if job not in self._prepared:
            self._prepared[job] = self._call_of(job) if self.joining and job.layout is None else None
        return self._prepared[job]

    def _call_of(self, job: Job) -> Call | None:
        """A call like the last one of the same settings and length, else one that `generate` would make."""
        key = job.max_new_tokens, repr(sorted(job.settings.items()))
        follower = self._follower([job])
        if key in self._patterns:
            criteria = self._criteria(job.stops, len(job.prompt))
            return self._patterns[key].like(self.model, job.prompt, job.seed, criteria, follower)
        if learnt_prompt(self.model) is not None:
            return None
        call = self.model.prepare(**self._arguments([job], follower))
        if call.kind is not None and not call.criteria:
            self._patterns |= {key: call}
            while len(self._patterns) > PATTERNS:  # the oldest goes
                del self._patterns[next(iter(self._patterns))]
        return call if call.kind is not None else None

    def _next_batch(self) -> list[Job]:
        """Jobs to be decoded by themselves: one that failed beside others, or the oldest, and its like.

        None where the oldest can, or where there is no room.
        """
        room = self.max_batch_size - self.running
        if room <= 0:
            return []
        if self._again:
            return [self._again.pop(0)]
        with self._changed:
            self._forget_left()
            first = self._pending[0] if self._pending else None
            if first is None or self._prepared.get(first, first) is not None:
                return []
            jobs = [job for job in self._pending if job.key == first.key][:room]
        for job in jobs:
            job.began = time.monotonic()
            self._take(job)
        return jobs

    def _decode_batch(self, jobs: list[Job]) -> None:
        self._batch = len(jobs)
        try:
            self._decode(jobs)
        except BaseException:
            for job in jobs:
                job.tell(stopped())
            raise
        finally:
            self._batch = 0

    def _take_turn(self) -> None:
        """One forward of the group whose turn it is. Where that fails its rows are decoded alone later."""
        group = self._groups.next()
        if group is None:
            return
        for call, job in group.jobs.items():
            if job.has_left and call.left:
                group.rows.leave(call, Abandoned())
        self.metrics.add(steps=int(group.rows.size > 0), step_rows=group.rows.size)
        try:
            if group.rows.size:
                group.rows.step()
        except Exception as error:
            logger.exception("a forward of %d rows failed", group.rows.size)
            over = self._groups.ended(group) if group.jobs else []
            self._again += [job for job in self._groups.drop(group, error) if not job.has_left] if group.jobs else []
        else:
            over = self._groups.ended(group)
        for call, job in over:
            self._conclude(job, call.error)

    def _conclude(self, job: Job, error: Exception | None) -> None:
        """Takes note that a job has ended; its follower has told the answer, if there is one."""
        self._seconds += 0.3 * (time.monotonic() - job.began - self._seconds)
        if isinstance(error, Abandoned):
            logger.info("left a row that nobody waits for")
            job.tell(stopped())
        elif error is not None:
            self._fail(job, error)

    def _fail(self, job: Job, error: Exception) -> None:
        logger.error("a request failed", exc_info=error)
        job.tell(ApiError(500, "Decoding failed, see the server's log."))

    def _decode(self, jobs: Sequence[Job]) -> None:
        """Decodes a batch; where that fails each of its rows alone, so that no request suffers from its neighbour's.

        A row draws and decides the same alone, so what readers of a stream have got stays true.
        """
        follower = self._follower(jobs, self._let_others_have_their_turns)
        try:
            self.metrics.add(batches=1, batch_rows=len(jobs))
            self._generate(jobs, follower)
        except Abandoned:
            logger.info("left a batch of %d rows that nobody waits for", len(jobs))
        except Exception:
            logger.exception("a batch of %d rows failed", len(jobs))
            unanswered = [job for row, job in enumerate(jobs) if row not in follower.answered and not job.has_left]
            if len(jobs) > 1:
                for job in unanswered:
                    self._decode([job])
                return
        for row, job in enumerate(jobs):
            self._seconds += 0.3 * (time.monotonic() - job.began - self._seconds)
            if row not in follower.answered:
                job.tell(stopped() if self._closing else ApiError(500, "Decoding failed, see the server's log."))

    def _let_others_have_their_turns(self) -> None:
        """Between two forwards of a batch in which nobody joins."""
        self.metrics.add(steps=1, step_rows=self._batch)
        if self._closing:
            return
        self._let_in()
        for _ in range(len(self._groups)):
            self._take_turn()

    def _follower(self, jobs: Sequence[Job], between: Callable[[], None] | None = None) -> Follower | FormFollower:
        if jobs[0].layout is not None:
            return FormFollower(jobs, lambda: self._closing, between)
        own = self.model.generation_config
        eos = own.eos_token_id
        return Follower(
            self.tokenizer,
            jobs,
            self._mask_token_id(),
            set() if eos is None else set(eos) if isinstance(eos, list | tuple) else {eos},
            lambda: self._closing,
            between,
        )

    def _mask_token_id(self) -> int:
        own = getattr(self.model.generation_config, "mask_token_id", None)
        return text_setting(self.model.config, "mask_token_id") if own is None else own

    def _generate(self, jobs: Sequence[Job], follower: Follower | FormFollower) -> None:
        """Calls `generate` on prompts that are padded on the left, or fills the forms behind them."""
        if isinstance(follower, FormFollower):
            follower.answer(self._fill(jobs, follower))
            return
        self.model.generate(**self._arguments(jobs, follower))

    def _arguments(self, jobs: Sequence[Job], follower: Follower | FormFollower) -> dict[str, Any]:
        first, width = jobs[0], max(len(job.prompt) for job in jobs)
        pad = self.tokenizer.pad_token_id or 0  # any token: what is padded is not attended to
        ids = torch.tensor([[pad] * (width - len(job.prompt)) + job.prompt for job in jobs])
        mask = torch.tensor([[0] * (width - len(job.prompt)) + [1] * len(job.prompt) for job in jobs])
        more: dict[str, Any] = {} if self.model.generation_config.pad_token_id is not None else {"pad_token_id": pad}
        if first.stops:
            more["stopping_criteria"] = self._criteria(first.stops, width)
        return {
            "input_ids": ids.to(self.model.device),
            "attention_mask": mask.to(self.model.device),
            "max_new_tokens": first.max_new_tokens,
            "seed": [job.seed for job in jobs],
            "streamer": follower,
            **first.settings,
            **more,
        }

    def _criteria(self, stops: tuple[str, ...], prompt_length: int) -> list[StopInAnswer]:
        decode = partial(self.tokenizer.decode, skip_special_tokens=True)
        return [StopInAnswer(decode, stops, prompt_length, self._mask_token_id())] if stops else []

    def _fill(self, jobs: Sequence[Job], follower: FormFollower) -> list[Filled]:
        return fill_laid_out(
            self.model,
            [job.prompt for job in jobs],
            [job.layout for job in jobs if job.layout is not None],
            pad_token_id=self.tokenizer.pad_token_id or 0,
            mask_token_id=self._mask_token_id(),
            seed=[job.seed for job in jobs],
            streamer=follower,
            **jobs[0].settings,
        )
