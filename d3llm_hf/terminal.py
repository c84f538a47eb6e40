"""Shows a canvas on a terminal while it is being decided."""

import shutil
import sys
import unicodedata
from typing import TextIO

from .row_text import decided_runs


MASK_SIGN = "░"
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
CLEAR_BELOW = "\x1b[J"


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
        self.stream = sys.stdout if stream is None else stream
        self.committed: list[int] = []
        self.lines_drawn = 0
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
        self.stream.write(self._erase())
        self.stream.flush()
        self.lines_drawn = 0

    def _draw(self, draft: list[int]) -> None:
        width, height = shutil.get_terminal_size()
        decided = printable(self.tokenizer.decode(self.committed, skip_special_tokens=True))
        pending = printable(self._decode_draft(draft))
        lines, marks = wrap(decided + pending, len(decided), width)
        lines, marks = lines[-(height - 1) :], marks[-(height - 1) :]
        drawn = [
            line if mark >= len(line) else f"{line[:mark]}{DIM}{line[mark:]}{PLAIN}"
            for line, mark in zip(lines, marks, strict=True)
        ]
        self.stream.write(self._erase() + "\n".join(drawn))
        self.stream.flush()
        self.lines_drawn = len(drawn)

    def _erase(self) -> str:
        if not self.lines_drawn:
            return ""
        up = f"\x1b[{self.lines_drawn - 1}A" if self.lines_drawn > 1 else ""
        return f"\r{up}{CLEAR_BELOW}"

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
