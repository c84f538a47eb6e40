"""Text of tokens that arrive in pieces: what later tokens cannot change, and a draft of the rest.

A tokenizer has no text for half a character, and some rewrite the space before a punctuation mark. What is given out
here is never taken back: joined, the pieces of a row are its decoded text.
"""

import functools
import unicodedata
from typing import Any


UNFINISHED = "\ufffd"
"""What tokenizers decode the first bytes of a character to."""


class RowText:
    """The text of one row in final pieces.

    Args:
        by_word: give out whole words only, since spaces may yet be taken back or a line be broken behind a piece.
    """

    def __init__(self, tokenizer, decode_kwargs: dict[str, Any], *, by_word: bool):
        self.decode = functools.partial(tokenizer.decode, **decode_kwargs)
        self.by_word = by_word
        self.tokens: list[int] = []
        self.given = ""

    def add(self, tokens: list[int]) -> str:
        """Takes tokens, gives the text that has become final by them."""
        self.tokens += tokens
        text = self.decode(self.tokens).rstrip(UNFINISHED)
        if self.by_word:
            text = text[: end_of_words(text)]
        if not text.startswith(self.given):  # some decoders show the bytes of a whole run until it is valid
            return ""
        return self._give(text)

    def finish(self) -> str:
        """Gives what was held back."""
        return self._give(self.decode(self.tokens))

    def draft(self, tokens: list[int], mask_token_id: int, mask_text: str) -> str:
        """What would follow the given text if the canvas stayed as it is."""
        first, *others = decided_runs(tokens, mask_token_id)
        text = self.decode(self.tokens + first)
        start = text[len(self.given) :] if text.startswith(self.given) else self.decode(first)
        return mask_text.join([start, *map(self.decode, others)])

    def _give(self, text: str) -> str:
        piece, self.given = text[len(self.given) :], text
        return piece


def end_of_words(text: str) -> int:
    """Length of the text without its last word, which may go on, and the space before that.

    A line ends with its newline, and in scripts that are written without spaces every letter is a word.
    """
    for index in range(len(text) - 1, -1, -1):
        character = text[index]
        if character == "\n" or (
            unicodedata.category(character) == "Lo" and unicodedata.east_asian_width(character) in "WF"
        ):
            return index + 1
        if character.isspace():
            return index
    return 0


def decided_runs(draft: list[int], mask_token_id: int) -> list[list[int]]:
    """The tokens between the masks, one run more than there are masks; decoded at once, their bytes would merge."""
    runs: list[list[int]] = [[]]
    for token in draft:
        if token == mask_token_id:
            runs.append([])
        else:
            runs[-1].append(token)
    return runs
