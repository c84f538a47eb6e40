"""One row to decode, and what its reader is told of it."""

import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..forms.form import LaidOut
from .errors import ApiError


@dataclass(frozen=True)
class Piece:
    """What a forward has brought: text that is final, and how the rest looks now if that was asked for."""

    text: str
    draft: str | None = None


@dataclass(frozen=True)
class Answer:
    """The end of a row.

    Attributes:
        text: the whole answer.
        rest: what of it no [`Piece`] held.
        finish_reason: `"stop"` at a stop token or string, `"length"` at the end of the canvas.
        prompt_tokens, completion_tokens: of the prompt; of the answer, without stop token and stop string.
        forwards: that the row took part in.
    """

    text: str
    rest: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    forwards: int


Event = Piece | Answer | ApiError


@dataclass(eq=False)
class Job:
    """A row to decode.

    Args:
        prompt: token ids.
        max_new_tokens: length of the canvas.
        settings: further arguments of `generate`.
        stops: strings that end the answer.
        seed: of this row.
        streamed: tell pieces before the answer.
        drafts: with the canvas as it looks.
        layout: the form that the answer is, in place of text of any kind.
        tell: takes events in the worker's thread; must not block.
    """

    prompt: list[int]
    max_new_tokens: int
    settings: Mapping[str, Any]
    stops: tuple[str, ...]
    seed: int
    tell: Callable[[Event], None]
    streamed: bool = False
    drafts: bool = False
    layout: LaidOut | None = None
    began: float = 0.0  # when it was let in, by the monotonic clock
    given: int = 0  # characters that pieces have held, so that a second try does not repeat them
    _left: threading.Event = field(default_factory=threading.Event)

    @property
    def key(self) -> Hashable:
        """Jobs of one key can be rows of one batch: `generate` takes these settings for all rows alike."""
        length = self.max_new_tokens if self.layout is None else None  # forms of all lengths are one batch
        return length, self.stops, repr(sorted(self.settings.items()))

    @property
    def has_left(self) -> bool:
        """Whether nobody waits for this row any more."""
        return self._left.is_set()

    def leave(self) -> None:
        """Says that nobody waits for this row any more."""
        self._left.set()
