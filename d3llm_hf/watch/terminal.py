"""Shows a canvas on a terminal while it is being decided."""

import os
import shutil
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from .row_text import decided_runs


MASK_SIGN = "░"
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
CLEAR_BELOW = "\x1b[J"
BORDER = "│"
"""Stands between decided text and draft where nothing may be dimmed."""


def can_redraw(stream: TextIO) -> bool:
    """Whether a stream is a terminal that moves its cursor when told to."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Inside, a line on stderr says what is being waited for, where that is a terminal; afterwards it is gone."""
    shown = can_redraw(sys.stderr)
    if shown:
        line = f"{printable(text)} ..."
        sys.stderr.write(line[: shutil.get_terminal_size().columns - 1])  # one line, or not all of it could be erased
        sys.stderr.flush()
    try:
        yield
    finally:
        if shown:
            sys.stderr.write(f"\r{CLEAR_BELOW}")
            sys.stderr.flush()


class Redrawn:
    """Text on a terminal that is drawn again in place: what is decided, then the canvas behind it, dimmed.

    Where the environment has `NO_COLOR` ([no-color.org](https://no-color.org)) nothing is dimmed, and a line stands
    before the draft. Of a text that is longer than the screen its end is shown.

    Args:
        stream (`TextIO`): a terminal.
    """

    def __init__(self, stream: TextIO):
        self.stream = stream
        self.dims = not os.environ.get("NO_COLOR")
        self.lines_drawn = 0

    def draw(self, decided: str, draft: str) -> None:
        """Puts both in the place of what was drawn before."""
        width, height = shutil.get_terminal_size()
        decided, draft = printable(decided), printable(draft)
        if draft and not self.dims:
            draft = BORDER + draft
        lines, marks = wrap(decided + draft, len(decided), width)
        shown = max(1, height - 1)
        drawn = [
            line if mark >= len(line) or not self.dims else f"{line[:mark]}{DIM}{line[mark:]}{PLAIN}"
            for line, mark in zip(lines[-shown:], marks[-shown:], strict=True)
        ]
        self.stream.write(self._erasure() + "\n".join(drawn))
        self.stream.flush()
        self.lines_drawn = len(drawn)

    def erase(self) -> None:
        """Removes what was drawn."""
        self.stream.write(self._erasure())
        self.stream.flush()
        self.lines_drawn = 0

    def _erasure(self) -> str:
        if not self.lines_drawn:
            return ""
        up = f"\x1b[{self.lines_drawn - 1}A" if self.lines_drawn > 1 else ""
        return f"\r{up}{CLEAR_BELOW}"


class CanvasStreamer:
    """A streamer for `generate` that redraws the answer in place: decided text, then the canvas behind it, dimmed.

    Positions that are still masked show as `░`. Everything drawn is removed again by `end`, so that the caller
    prints the answer once, by itself.

    Args:
        tokenizer: decodes the answer; its mask token marks undecided positions.
        stream (`TextIO`): a terminal; stdout when unset.
    """

    def __init__(self, tokenizer, stream: TextIO | None = None):
        self.tokenizer = tokenizer
        self.screen = Redrawn(sys.stdout if stream is None else stream)
        self.committed: list[int] = []
        self.prompt_seen = False

    def put(self, value) -> None:
        """Takes decided tokens; the first call brings the prompt, which is not shown."""
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.committed += value.reshape(-1).tolist()
        self._draw([])

    def put_draft(self, value, **kwargs) -> None:
        """Takes the tokens of the canvas behind the decided prefix."""
        self._draw(value.reshape(-1).tolist())

    def end(self) -> None:
        """Removes what was drawn."""
        self.screen.erase()

    def _draw(self, draft: list[int]) -> None:
        decided = self.tokenizer.decode(self.committed, skip_special_tokens=True)
        self.screen.draw(decided, self._decode_draft(draft))

    def _decode_draft(self, draft: list[int]) -> str:
        runs = decided_runs(draft, self.tokenizer.mask_token_id)
        return MASK_SIGN.join(self.tokenizer.decode(run, skip_special_tokens=True) for run in runs)


def printable(text: str) -> str:
    """`text` without control characters: what a model writes must not steer the terminal."""
    return "".join(c for c in text.replace("\t", "    ") if c == "\n" or unicodedata.category(c) not in ("Cc", "Cf"))


def wrap(text: str, mark: int, width: int) -> tuple[list[str], list[int]]:
    """Breaks text into terminal lines of at most `width` columns.

    Returns:
        The lines, and for each the number of its characters that come before character `mark` of the text.
    """
    lines, marks = [""], [0]
    columns = 0
    for index, character in enumerate(text):
        size = 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if character == "\n" or columns + size > width:
            lines.append("")
            marks.append(0)
            columns = 0
        if character != "\n":
            lines[-1] += character
            marks[-1] += index < mark
            columns += size
    return lines, marks
