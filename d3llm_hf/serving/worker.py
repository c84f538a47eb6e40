"""The thread that owns the model: it decodes waiting jobs in batches, and outlives what goes wrong in one."""

import copy
import logging
import math
import threading
import time
from collections.abc import Sequence
from functools import partial

import torch

from ..forms.filling import Filled, fill_laid_out
from ..models.text_config import text_setting
from ..stops import StopInAnswer
from .errors import ApiError, stopped
from .follower import Abandoned, Follower, FormFollower
from .jobs import Job
from .metrics import Metrics


logger = logging.getLogger(__name__)


class Worker:
    """Decodes jobs in the order in which they came, together with later ones of the same settings.

    Args:
        model: with this library's `generate`; nobody else may use it while the worker lives.
        tokenizer: decodes answers; copied, since tokenizers are not made for several threads.
        max_batch_size (`int`): rows of a batch.
        max_wait (`float`): seconds for which the oldest job waits for others, unless they fill a batch before.
        max_queue (`int`): jobs that may wait.
        metrics: counts of the server.
    """

    def __init__(
        self, model, tokenizer, *, max_batch_size: int, max_wait: float, max_queue: int, metrics: Metrics | None = None
    ):
        self.model, self.tokenizer = model, copy.deepcopy(tokenizer)
        self.max_batch_size, self.max_wait, self.max_queue = max_batch_size, max_wait, max_queue
        self.metrics = metrics or Metrics()
        self.running = 0  # rows of the batch at work
        self._pending: list[Job] = []
        self._changed = threading.Condition()
        self._closing = False
        self._seconds = 1.0  # that a batch takes, of late
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
    def waiting(self) -> int:
        """Jobs that wait for a batch."""
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
        """Ends the batch at its next forward, refuses all that waits, and waits for the thread.

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
        jobs: list[Job] = []
        try:
            while jobs := self._next_batch():
                self.running, began = len(jobs), time.monotonic()
                self._decode(jobs)
                self.running = 0
                self._seconds += 0.3 * (time.monotonic() - began - self._seconds)
        finally:
            with self._changed:
                self._closing = True
                left, self._pending = self._pending, []
            for job in [*jobs, *left]:
                job.tell(stopped())

    def _next_batch(self) -> list[Job]:
        """The oldest job and those that can be decoded with it; none when the worker is closed."""
        with self._changed:
            until = None
            while not self._closing:
                self._pending = [job for job in self._pending if not job.has_left]
                if not self._pending:
                    until = None
                    self._changed.wait()
                    continue
                until = time.monotonic() + self.max_wait if until is None else until
                key = self._pending[0].key
                jobs = [job for job in self._pending if job.key == key][: self.max_batch_size]
                left = until - time.monotonic()
                if len(jobs) == self.max_batch_size or left <= 0:
                    self._pending = [job for job in self._pending if job not in jobs]
                    return jobs
                self._changed.wait(left)
        return []

    def _decode(self, jobs: Sequence[Job]) -> None:
        """Decodes a batch; where that fails each of its rows alone, so that no request suffers from its neighbour's.

        A row draws and decides the same alone, so what readers of a stream have got stays true.
        """
        follower = self._follower(jobs)
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
            if row not in follower.answered:
                job.tell(stopped() if self._closing else ApiError(500, "Decoding failed, see the server's log."))

    def _follower(self, jobs: Sequence[Job]) -> Follower | FormFollower:
        if jobs[0].layout is not None:
            return FormFollower(jobs, lambda: self._closing)
        own = self.model.generation_config
        eos = own.eos_token_id
        return Follower(
            self.tokenizer,
            jobs,
            self._mask_token_id(),
            set() if eos is None else set(eos) if isinstance(eos, list | tuple) else {eos},
            lambda: self._closing,
        )

    def _mask_token_id(self) -> int:
        own = getattr(self.model.generation_config, "mask_token_id", None)
        return text_setting(self.model.config, "mask_token_id") if own is None else own

    def _generate(self, jobs: Sequence[Job], follower: Follower | FormFollower) -> None:
        """Calls `generate` on prompts that are padded on the left, or fills the forms behind them."""
        if isinstance(follower, FormFollower):
            follower.answer(self._fill(jobs, follower))
            return
        first, width = jobs[0], max(len(job.prompt) for job in jobs)
        pad = self.tokenizer.pad_token_id or 0  # any token: what is padded is not attended to
        ids = torch.tensor([[pad] * (width - len(job.prompt)) + job.prompt for job in jobs])
        mask = torch.tensor([[0] * (width - len(job.prompt)) + [1] * len(job.prompt) for job in jobs])
        more = {} if self.model.generation_config.pad_token_id is not None else {"pad_token_id": pad}
        if first.stops:
            decode = partial(self.tokenizer.decode, skip_special_tokens=True)
            more["stopping_criteria"] = [StopInAnswer(decode, first.stops, width, self._mask_token_id())]
        self.model.generate(
            input_ids=ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            max_new_tokens=first.max_new_tokens,
            seed=[job.seed for job in jobs],
            streamer=follower,
            **first.settings,
            **more,
        )

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
