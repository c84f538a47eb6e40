"""The rows at work of a server: groups of requests that share their forwards, each in its turn."""

from collections.abc import Callable
from dataclasses import dataclass, field

from ..models.at_work import RowsAtWork
from ..models.call import Call
from .jobs import Job


GROUPS = 4
"""Groups at most: with more of them each would have its turn too seldom."""


@dataclass(eq=False)
class Group:
    """Requests of one kind, whatever each of them is about; see [`Call.kind`]."""

    rows: RowsAtWork
    jobs: dict[Call, Job] = field(default_factory=dict)


class Groups:
    """At most `slots` rows of all groups together, and GROUPS groups.

    Args:
        slots (`int`): rows.
        new_rows: where a call of a new kind is decoded.
    """

    def __init__(self, slots: int, new_rows: Callable[[Call], RowsAtWork]):
        self.slots, self._new_rows = slots, new_rows
        self._groups: list[Group] = []  # the first has the next turn

    @property
    def size(self) -> int:
        """Rows at work."""
        return sum(group.rows.size for group in self._groups)

    def __len__(self) -> int:
        """Groups."""
        return len(self._groups)

    def admit(self, call: Call, job: Job) -> bool | None:
        """Lets a call of one row in: to those of its kind, else to a group of its own.

        Returns:
            whether its group is a new one; `None` where it has to wait.
        """
        if self.size >= self.slots:
            return None
        group = next((group for group in self._groups if group.rows.takes(call)), None)
        is_new = group is None
        if group is None:
            if len(self._groups) >= GROUPS:
                return None
            group = Group(self._new_rows(call))
            self._groups.append(group)
        try:
            group.rows.admit(call)
        except Exception:
            if is_new:
                self._groups.remove(group)
            raise
        group.jobs[call] = job
        return is_new

    def next(self) -> Group | None:
        """The group whose turn it is, which goes to the end of the line; `None` where nobody is at work."""
        if not self._groups:
            return None
        self._groups.append(self._groups.pop(0))
        return self._groups[-1]

    def ended(self, group: Group) -> list[tuple[Call, Job]]:
        """The calls of a group that are over, taken out of it; a group without any goes."""
        over = [(call, job) for call, job in group.jobs.items() if not call.left]
        for call, _ in over:
            del group.jobs[call]
        if not group.jobs:
            self.drop(group, None)
        return over

    def drop(self, group: Group, error: BaseException | None) -> list[Job]:
        """Takes a group out, because of `error` if there is one; returns the jobs that it had."""
        self._groups.remove(group)
        left, group.jobs = list(group.jobs.values()), {}
        group.rows.__exit__(None if error is None else type(error), error, None)
        return left

    def drop_all(self) -> list[Job]:
        """Takes all groups out; returns their jobs."""
        return [job for group in list(self._groups) for job in self.drop(group, None)]
