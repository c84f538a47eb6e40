"""A thread that reads and encodes requests, so that the event loop answers everyone else meanwhile."""

import asyncio
import itertools
import threading
from bisect import insort
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from .errors import ApiError, stopped


Result = TypeVar("Result")


@dataclass(order=True)
class _Task:
    size: int
    number: int
    work: Callable[[], Any] = field(compare=False)
    done: Future = field(compare=False, default_factory=Future)

    def finish(self, result: Callable[[], Any]) -> None:
        if self.done.set_running_or_notify_cancel():  # or nobody waits for it any more
            try:
                self.done.set_result(result())
            except BaseException as error:
                self.done.set_exception(error)


class Desk:
    """Does one task after the other, the smallest first: a short request never waits for several long ones.

    Args:
        limit (`int`): tasks that may wait; then the largest is refused.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self._waiting: list[_Task] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._closing = False
        # A daemon: a process that ends does not wait for a long text.
        self._thread = threading.Thread(target=self._work, name="d3llm-admission", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    async def run(self, size: int, work: Callable[[], Result]) -> Result:
        """What `work()` gives in the thread; a task that is cancelled while it waits is forgotten.

        Raises:
            ApiError: 429 for the largest task of too many, 503 when the desk is closed.
        """
        task = _Task(size, next(self._numbers), work)
        with self._changed:
            if self._closing:
                raise stopped()
            self._waiting = [waiting for waiting in self._waiting if not waiting.done.cancelled()]
            insort(self._waiting, task)
            refused = self._waiting.pop() if len(self._waiting) > self.limit else None
            self._changed.notify()
        if refused is not None:
            refused.finish(self._refuse)
        return await asyncio.wrap_future(task.done)

    def close(self) -> None:
        """Refuses all that waits; the task at work is not waited for."""
        with self._changed:
            self._closing = True
            left, self._waiting = self._waiting, []
            self._changed.notify()
        for task in left:
            task.finish(self._stop)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closing:
                    self._changed.wait()
                if self._closing:
                    return
                task = self._waiting.pop(0)
            task.finish(task.work)

    def _refuse(self) -> None:
        raise ApiError(
            429,
            f"The server is busy: {self.limit} shorter requests wait to be read. Try again later.",
            code="queue_full",
            retry_after=1,
        )

    def _stop(self) -> None:
        raise stopped()
