"""Holes that may hold only texts of a language, in whatever order, and however many at once, their tokens are decided.

A language is an automaton over tokens ([`TokenAutomaton`]). Over the slots of a hole it is a lattice: what is decided
on the left says which states a slot may be entered in, what is decided on the right says in which it may be left.

1. `banned`: a token is allowed where it leads from a state of the left to one of the right. So whatever single token
   is decided, the hole can still be filled.
2. `compatible`: commits of one forward do not see each other. The surest of a hole stay, as long as some text holds
   them all; the others wait. The surest commit of a row always stays, so every forward still advances.

A model ends a text by what stands behind it: by a quote, a comma, a line feed. So in a hole the end token has the
probability of all tokens with which the given text behind the hole might begin (`ended`).

Nothing is promised of rows that no token can satisfy any more: drafts are such rows, and they are thrown away.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from transformers.generation import LogitsProcessor


@dataclass(frozen=True, eq=False)
class TokenAutomaton:
    """A deterministic automaton whose letters are classes of tokens. S states, K classes, V tokens of the vocabulary.

    Attributes:
        following (`(S, K)` long): the state behind a token of each class. State 0 is where a hole begins, S - 1 is
            dead: nothing leads out of it.
        accepting (`(S,)` bool): states in which the hole may end.
        classes (`(V,)` long): class of each token; what is behind a token of class 0 is always dead.
    """

    following: torch.Tensor
    accepting: torch.Tensor
    classes: torch.Tensor
    pairs: tuple[torch.Tensor, torch.Tensor] = field(init=False, repr=False)

    def __post_init__(self):
        # Pairs of states with some token between them: far fewer than states times classes.
        states, dead = self.following.shape[0], self.following.shape[0] - 1
        source = torch.arange(states, device=self.following.device)[:, None].expand_as(self.following)
        alive = self.following != dead
        pairs = (source[alive] * states + self.following[alive]).unique()
        object.__setattr__(self, "pairs", (pairs // states, pairs % states))

    def to(self, device: torch.device) -> "TokenAutomaton":
        """The same automaton on a device."""
        if self.following.device == device:
            return self
        return TokenAutomaton(self.following.to(device), self.accepting.to(device), self.classes.to(device))

    def _behind(self, tokens: torch.Tensor) -> torch.Tensor:
        """The state behind each state with `(B,)` tokens: `(B, S)`; a mask token may be beyond the tokenizer's."""
        return self.following[:, self.classes[tokens.clamp_max(len(self.classes) - 1)]].T

    def forwards(self, tokens: torch.Tensor, decided: torch.Tensor) -> torch.Tensor:
        """States that each slot, and what is behind the last, may be entered in: `(B, w + 1, S)` bool."""
        states = torch.zeros(len(tokens), len(self.following), dtype=torch.bool, device=tokens.device)
        states[:, 0] = True
        found, (source, target) = [states], self.pairs
        for column in range(tokens.shape[1]):
            free = _gathered(states[:, source], target, len(self.following))
            behind = self._behind(tokens[:, column])
            taken = torch.zeros_like(states, dtype=torch.uint8).scatter_reduce_(1, behind, states.byte(), "amax")
            states = torch.where(decided[:, column, None], taken.bool(), free)
            states[:, -1] = False
            found.append(states)
        return torch.stack(found, dim=1)

    def backwards(self, tokens: torch.Tensor, decided: torch.Tensor) -> torch.Tensor:
        """States in which each slot may be entered for the hole to end well: `(B, w + 1, S)` bool."""
        states = self.accepting.expand(len(tokens), -1)
        found, (source, target) = [states], self.pairs
        for column in range(tokens.shape[1] - 1, -1, -1):
            free = _gathered(states[:, target], source, len(self.following))
            behind = self._behind(tokens[:, column])
            states = torch.where(decided[:, column, None], states.gather(1, behind), free)
            found.append(states)
        return torch.stack(found[::-1], dim=1)

    def allowed(self, tokens: torch.Tensor, decided: torch.Tensor) -> torch.Tensor:
        """Classes of tokens that each slot may hold: `(B, w, K)` bool, all of them where nothing fits any more."""
        entered, left = self.forwards(tokens, decided), self.backwards(tokens, decided)
        table = torch.zeros(*tokens.shape, self.following.shape[1], dtype=torch.bool, device=tokens.device)
        for column in range(tokens.shape[1]):
            through = entered[:, column].any(0).nonzero()[:, 0]  # few states: the others need not be looked at
            fits = left[:, column + 1][:, self.following[through]]  # (B, states, K)
            table[:, column] = (fits & entered[:, column, through, None]).any(1)
        return table | ~entered[:, -1].logical_and(self.accepting).any(1)[:, None, None]

    def can_end(self, tokens: torch.Tensor, decided: torch.Tensor) -> torch.Tensor:
        """Whether some text of the language has what is decided of `(B, w)` tokens at its places: `(B,)` bool."""
        return self.forwards(tokens, decided)[:, -1].logical_and(self.accepting).any(1)


def _gathered(marks: torch.Tensor, at: torch.Tensor, states: int) -> torch.Tensor:
    """`(B, S)` bool: whether any of the `(B, E)` marks of a state is set."""
    sums = torch.zeros(len(marks), states, dtype=torch.int32, device=marks.device)
    return sums.index_add_(1, at, marks.int()) > 0


@dataclass(frozen=True, eq=False)
class Hole:
    """Slots of some rows that hold a text of one language.

    Attributes:
        rows: of the batch.
        behind: slots from its first one to the end of the text, which padding on the left does not change.
        length: its slots.
        automaton: the language.
        closing (`(V,)` bool): tokens whose probability is the end token's, itself among them.
        end_token_id: fills what the text leaves of the hole.
    """

    rows: tuple[int, ...]
    behind: int
    length: int
    automaton: TokenAutomaton
    closing: torch.Tensor
    end_token_id: int

    def to(self, device: torch.device) -> "Hole":
        """The same hole on a device."""
        return replace(self, automaton=self.automaton.to(device), closing=self.closing.to(device))

    def span(self, width: int) -> slice:
        """Its slots in a text of so many."""
        return slice(width - self.behind, width - self.behind + self.length)


class HoleLanguages(LogitsProcessor):
    """The languages of the holes of a batch, as a logits processor of `generate(infill_mask=...)`.

    Args:
        holes: that do not overlap.
    """

    def __init__(self, holes: Sequence[Hole]):
        self.holes = list(holes)
        self._found: list[tuple[Hole, slice, torch.Tensor, torch.Tensor]] = []
        self._known: dict[Hole, tuple[torch.Tensor, ...]] = {}  # what a hole held when it was looked at last

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Refused: left-to-right decoding asks like this, and shows nothing of what stands behind a hole."""
        raise ValueError(
            f"`logits_processor` must fit the decoding (got {type(self).__name__}, which needs the whole canvas, with "
            "a model that decodes from left to right). Fill forms with LLaDA or Dream."
        )

    def _of_rows(self, owners: torch.Tensor) -> Iterator[tuple[Hole, torch.Tensor]]:
        """Each hole with the rows `(R,)` of a table that have it; `(B,)` owners are their rows of the batch."""
        for number, hole in enumerate(self.holes):
            mine = torch.isin(owners, owners.new_tensor(hole.rows)).nonzero()[:, 0]
            if len(mine):
                if hole.closing.device != owners.device:
                    hole = self.holes[number] = hole.to(owners.device)
                yield hole, mine

    def look(self, text: torch.Tensor, decided: torch.Tensor, owners: torch.Tensor) -> None:
        """Shows `(B, L)` whole texts, and which of their tokens are decided."""
        self._found = []
        for hole, mine in self._of_rows(owners):
            span = hole.span(text.shape[1])
            tokens, known = text[mine, span], decided[mine, span]
            before = self._known.get(hole)
            if before is None or not (torch.equal(tokens, before[0]) and torch.equal(known, before[1])):
                before = self._known[hole] = tokens, known, hole.automaton.allowed(tokens, known)
            self._found.append((hole, span, mine, before[2]))

    def ended(self, scores: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """`(n, V)` scores of candidates at `(n,)` rows and slots, in which end tokens stand for what closes a hole."""
        scores = scores.clone()
        for hole, here, _ in self._candidates(rows, slots):
            closing = scores[here][:, : len(hole.closing)][:, hole.closing]
            most = closing.amax(1)  # a hole that may hold such a token ends with it all the same: no tie of rounding
            above = torch.where(most.isfinite(), most.nextafter(torch.full_like(most, float("inf"))), most)
            scores[here, hole.end_token_id] = torch.maximum(closing.logsumexp(1), above)
        return scores

    def _candidates(
        self, rows: torch.Tensor, slots: torch.Tensor
    ) -> Iterator[tuple[Hole, torch.Tensor, torch.Tensor]]:
        """Each hole with its candidates `(m,)`, and the classes `(m, K)` of tokens that they may be."""
        for hole, span, mine, allowed in self._found:
            inside = torch.isin(rows, mine) & (slots >= span.start) & (slots < span.stop)
            here = inside.nonzero()[:, 0]
            yield hole, here, allowed[torch.searchsorted(mine, rows[here]), slots[here] - span.start]

    def banned(self, rows: torch.Tensor, slots: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """Tokens that no text of its hole has at each of `(n,)` rows and slots: `(n, V)` bool."""
        banned = torch.zeros(len(rows), vocab_size, dtype=torch.bool, device=rows.device)
        for hole, here, allowed in self._candidates(rows, slots):
            known = allowed[:, hole.automaton.classes]  # (m, tokens)
            rest = torch.zeros(len(known), vocab_size - known.shape[1], dtype=torch.bool, device=rows.device)
            banned[here] = ~torch.cat([known, rest], dim=1)
        return banned

    def compatible(
        self,
        commits: torch.Tensor,
        text: torch.Tensor,
        decided: torch.Tensor,
        cost: torch.Tensor,
        owners: torch.Tensor,
    ) -> torch.Tensor:
        """The commits `(B, L)` of one forward that some filling of every hole holds together.

        Args:
            text (`(B, L)` long): the whole texts with all that was committed.
            decided (`(B, L)` bool): before this forward.
            cost (`(B, L)` float): the surest of a hole are looked at first, the leftmost of equals.
        """
        kept = commits.clone()
        for hole, mine in self._of_rows(owners):
            span = hole.span(text.shape[1])
            tokens, before, wanted = text[mine, span], decided[mine, span], commits[mine, span]
            wrong = ~hole.automaton.can_end(tokens, before | wanted)
            for row in wrong.nonzero()[:, 0].tolist():
                place = slice(row, row + 1)
                chosen, columns = before[place].clone(), wanted[row].nonzero()[:, 0]
                order = cost[mine[row], span][columns].argsort(stable=True)
                for column in columns[order].tolist():
                    chosen[0, column] = True
                    if not hole.automaton.can_end(tokens[place], chosen):
                        chosen[0, column] = False
                kept[mine[row], span] = chosen[0] & wanted[row]
        return kept


__all__ = ["Hole", "HoleLanguages", "TokenAutomaton"]
