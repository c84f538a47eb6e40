"""From a language over bytes to an automaton over the tokens of a vocabulary.

1. The expression becomes an automaton that guesses (Thompson 1968), and that one a deterministic one, over classes of
   bytes that no part of the expression tells apart.
2. Each token is a string of such classes; those that are equal are looked at once. Walked from every state at the same
   time, a string is a column of states, and tokens with equal columns are one class of tokens.
3. The end token closes the hole from every state in which it may end; nothing but itself comes behind it.
"""

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import torch

from ..models.lattices import TokenAutomaton
from .languages import Either, Language, OneOf, Repeated, Sequence
from .vocabulary import Vocabulary


MOST_STATES = 10_000


class _Guessing:
    """A nondeterministic automaton: state -> `(set of bytes, next state)`, and states that are reached for free."""

    def __init__(self):
        self.letters: list[list[tuple[frozenset[int], int]]] = []
        self.free: list[list[int]] = []

    def state(self) -> int:
        self.letters.append([])
        self.free.append([])
        if len(self.free) > 8 * MOST_STATES:
            raise _too_large()
        return len(self.free) - 1

    def add(self, language: Language, start: int) -> int:
        """Appends an expression behind a state; returns the state behind it."""
        if isinstance(language, OneOf):
            end = self.state()
            self.letters[start].append((language.bytes, end))
        elif isinstance(language, Sequence):
            end = start
            for part in language.parts:
                end = self.add(part, end)
        elif isinstance(language, Either):
            end = self.state()
            for part in language.parts:
                first = self.state()
                self.free[start].append(first)
                self.free[self.add(part, first)].append(end)
        else:
            end = self._repeat(language, start)
        return end

    def _repeat(self, language: Repeated, start: int) -> int:
        for _ in range(language.least):
            start = self.add(language.part, start)
        end = self.state()
        if language.most is None:
            loop = self.state()
            self.free[start].append(loop)
            self.free[loop].append(end)
            self.free[self.add(language.part, loop)].append(loop)
            return end
        for _ in range(language.most - language.least):
            self.free[start].append(end)
            first = self.state()
            self.free[start].append(first)
            start = self.add(language.part, first)
        self.free[start].append(end)
        return end

    def closure(self, states: Iterable[int], end: int) -> frozenset[int]:
        """All that is reached from some states for free; of these the ones from which letters lead on, and the end."""
        found = set(states)
        waiting = list(found)
        while waiting:
            for state in self.free[waiting.pop()]:
                if state not in found:
                    found.add(state)
                    waiting.append(state)
        return frozenset(state for state in found if self.letters[state] or state == end)


def _too_large() -> ValueError:
    return ValueError(
        f"`form` must have holes whose languages need at most {MOST_STATES} states (got one with more). Lower the "
        "maximum of a string's or array's length, or leave a string's maximum out and give it slots."
    )


def byte_automaton(language: Language) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A deterministic automaton over classes of bytes. D states, the first the start, the last dead; C classes.

    Returns:
        `(D, C)` next states, `(D,)` whether a text may end there, `(256,)` class of each byte.
    """
    # 1. The automaton that guesses, and the bytes that it tells apart
    guessing = _Guessing()
    end = guessing.add(language, guessing.state())
    sets = sorted({bytes_ for edges in guessing.letters for bytes_, _ in edges}, key=sorted)
    member = np.zeros((256, len(sets)), dtype=bool)
    for column, bytes_ in enumerate(sets):
        member[list(bytes_), column] = True
    kinds, class_of_byte = np.unique(member, axis=0, return_inverse=True)
    classes_of = {bytes_: np.flatnonzero(kinds[:, column]).tolist() for column, bytes_ in enumerate(sets)}

    # 2. Sets of its states are the states
    first = guessing.closure([0], end)
    number, waiting = {first: 0}, [first]
    rows: list[dict[int, int]] = []
    while len(rows) < len(waiting):
        targets: dict[int, set[int]] = {}
        for state in waiting[len(rows)]:
            for bytes_, target in guessing.letters[state]:
                for kind in classes_of[bytes_]:
                    targets.setdefault(kind, set()).add(target)
        row = {}
        for kind, found in targets.items():
            closed = guessing.closure(found, end)
            if closed not in number:
                number[closed] = len(number)
                waiting.append(closed)
            row[kind] = number[closed]
        rows.append(row)
        if len(number) > MOST_STATES:
            raise _too_large()
    following = np.full((len(rows) + 1, len(kinds)), len(rows), dtype=np.int32)
    for state, row in enumerate(rows):
        following[state, list(row)] = list(row.values())
    return following, np.array([end in states for states in waiting] + [False]), class_of_byte.reshape(-1)


@lru_cache(maxsize=128)
def token_automaton(language: Language, vocabulary: Vocabulary) -> TokenAutomaton:
    """The automaton over a vocabulary's tokens for texts of a language, and end tokens behind each."""
    following, accepting, class_of_byte = byte_automaton(language)
    dead = len(following) - 1

    # 1. Tokens as strings of classes of bytes, each string once
    strings: dict[bytes, list[int]] = {}
    for token, text in vocabulary.texts:
        strings.setdefault(class_of_byte[np.frombuffer(text, np.uint8)].astype(np.uint8).tobytes(), []).append(token)
    by_length: dict[int, list[bytes]] = {}
    for string in strings:
        by_length.setdefault(len(string), []).append(string)

    # 2. Walked from every state; equal columns are one class
    columns: dict[bytes, int] = {np.full(dead + 1, dead, np.int32).tobytes(): 0}
    class_of = torch.zeros(vocabulary.size, dtype=torch.long)
    for length, group in by_length.items():
        letters = np.frombuffer(b"".join(group), np.uint8).reshape(-1, length)
        size = max(1, (1 << 22) // (dead + 1))  # bounds the memory
        for begin in range(0, len(group), size):
            states = np.broadcast_to(
                np.arange(dead + 1, dtype=np.int32), (len(letters[begin : begin + size]), dead + 1)
            )
            for column in range(length):
                states = following[states, letters[begin : begin + size, column, None]]
            for string, walked in zip(group[begin : begin + size], states, strict=True):
                class_of[strings[string]] = columns.setdefault(np.ascontiguousarray(walked).tobytes(), len(columns))

    # 3. The end token, and the state behind it
    table = np.stack([np.frombuffer(column, np.int32) for column in columns], axis=1).astype(np.int64)
    ended = len(table)  # the dead state moves one up: what was there is the state behind an end token
    table[table == dead] = ended
    table = np.concatenate([table[:dead], np.full((2, table.shape[1]), ended)])
    closing = np.where(accepting, dead, ended)
    table = np.concatenate([table, np.append(np.append(closing[:dead], dead), ended)[:, None]], axis=1)
    class_of[vocabulary.end_token_id] = len(columns)
    ends = np.append(np.append(accepting[:dead], True), False)
    return TokenAutomaton(torch.from_numpy(table), torch.from_numpy(ends), class_of)
