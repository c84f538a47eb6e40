"""A form: text with typed holes, and how it lies on a canvas."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from ..models.lattices import TokenAutomaton
from ..text import check_text, encode_infill
from .automata import token_automaton
from .holes import Hole
from .vocabulary import Vocabulary, closing


@dataclass(frozen=True)
class Form:
    """Given text and typed holes in their order.

    Args:
        parts: strings and [`Hole`]s, of which there is at least one. Special tokens in the text are ordinary
            characters. Each piece is cut into tokens as it is beside an example of its holes.

    Raises:
        TypeError, ValueError: for other parts, without a hole, or with a line feed behind a text of several lines.
    """

    parts: tuple[str | Hole, ...]

    def __init__(self, parts: Sequence[str | Hole]):
        if isinstance(parts, str | Hole) or not isinstance(parts, Sequence):
            raise TypeError(
                f"`form` must be a sequence of texts and holes (got {type(parts).__name__}). Pass "
                '["Age: ", integer(0, 120)].'
            )
        for part in parts:
            if isinstance(part, str):
                check_text(part, "form")
            elif not isinstance(part, Hole):
                raise TypeError(
                    f"`form` must hold texts and holes only (got {type(part).__name__}). Make a hole with `text`, "
                    "`string`, `integer`, `number` or `one_of` of `d3llm_hf.forms.holes`."
                )
        if not any(isinstance(part, Hole) for part in parts):
            raise ValueError(f"`form` must have at least one hole (got {len(parts)} texts). Nothing is to be filled.")
        kept = tuple(part for part in parts if part != "")
        for part, behind in pairwise(kept):
            if isinstance(part, Hole) and part.lines and isinstance(behind, str) and behind.startswith("\n"):
                raise ValueError(
                    "`form` must not go on with a line feed behind a text of several lines, which would end at its "
                    f"first one (got {behind[:20]!r}). Begin with what follows it: the text ends with a line feed of "
                    "its own."
                )
        object.__setattr__(self, "parts", kept)

    @property
    def holes(self) -> list[Hole]:
        """The holes in their order."""
        return [part for part in self.parts if isinstance(part, Hole)]

    def written(self, texts: Sequence[str]) -> str:
        """The form with a text in each hole."""
        left = iter(texts)
        return "".join(part if isinstance(part, str) else next(left) for part in self.parts)


@dataclass(frozen=True, eq=False)
class LaidOut:
    """A form as tokens. L positions.

    Attributes:
        form, vocabulary: what was laid out, and for which tokens.
        ids: `(L,)`, the mask token in the holes.
        spans: first position and length of each hole.
        automata: language of each.
        closings: for each the tokens `(V,)` with which the text behind it may begin.
    """

    form: Form
    vocabulary: Vocabulary
    ids: list[int]
    spans: list[tuple[int, int]]
    automata: list[TokenAutomaton]
    closings: list[torch.Tensor]


def lay_out(form: Form, tokenizer, vocabulary: Vocabulary, mask_token_id: int) -> LaidOut:
    """Puts a form on the positions that it needs.

    Raises:
        ValueError: for a hole that is too narrow for every text that it might hold.
    """
    ids: list[int] = []
    spans, automata, closings = [], [], []
    for number, part in enumerate(form.parts):
        if isinstance(part, str):
            around = [form.parts[at] if 0 <= at < len(form.parts) else "" for at in (number - 1, number + 1)]
            left, right = (other.sample if isinstance(other, Hole) else other for other in around)
            ids += tokens_of_text(tokenizer, part, mask_token_id, left=left, right=right)
            continue
        width, automaton = part.width(tokenizer), token_automaton(part.language, vocabulary)
        nothing = automaton.following.new_zeros(1, width)
        if not automaton.can_end(nothing, nothing.bool())[0]:
            raise ValueError(
                f"`form` must have holes with room for one of their texts (got {width} positions for part {number}, "
                "of which none fits). Raise its `slots`."
            )
        spans.append((len(ids), width))
        automata.append(automaton)
        behind = next(iter(form.parts[number + 1 :]), "")
        closings.append(closing(vocabulary, behind if isinstance(behind, str) else ""))
        ids += [mask_token_id] * width
    return LaidOut(form, vocabulary, ids, spans, automata, closings)


def tokens_of_text(tokenizer, text: str, mask_token_id: int, *, left: str = "", right: str = "") -> list[int]:
    """Tokens of a piece of given text, in which special tokens are ordinary characters.

    Args:
        left, right (`str`): what may stand beside it. Many tokenizers give a space to what is before or behind it; the
            piece is cut as it is between these, where tokens end at both of its ends.
    """

    def encoded(piece: str) -> list[int]:
        parts: list[str | int] = [piece, 1]
        found = encode_infill(tokenizer, parts, mask_token_id, add_special_tokens=False)["input_ids"]
        return found[0, :-1].tolist()

    whole, before, behind = encoded(left + text + right), encoded(left), encoded(right)
    inner = whole[len(before) : len(whole) - len(behind)]
    if inner and whole == [*before, *inner, *behind]:
        return inner
    return encoded(text)
