"""Promises about the text that hold in whatever order, and however many at once, its positions are decided.

A constraint forbids *spans*: a bad word, or an n-gram that stands elsewhere already. Left-to-right decoding checks a
span where it ends. Here any of its positions may be the last to be decided, and several may be decided in one forward:

1. `banned`: before a token is chosen, each token that would complete a forbidden span with what is decided on both
   sides of its position is banned. A single commit thus never breaks a promise.
2. `compatible`: of the commits of one forward, which do not see each other, the dearest of each forbidden span that
   they complete together is undone. The cheapest commit of a row is never undone, so every forward still advances.

What lies behind the first stop token is no output, so nothing is promised about it.
"""

from collections.abc import Iterator

import torch

from .decoding import State, stop_position


UNKNOWN = -1  # in place of a token that is undecided, padding, or behind the stop token; equal to no token
AT_ONCE = 1 << 22  # entries of a table of pairs of positions, which bounds the memory
SHORT = 8  # n-grams up to here are compared token by token


def visible_text(
    prompt: torch.Tensor, tokens: torch.Tensor, decided: torch.Tensor, stop_ids: torch.Tensor | None
) -> torch.Tensor:
    """`(B, P)` prompt and `(B, N)` answer as one table, `UNKNOWN` where undecided or behind the first stop token."""
    column = torch.arange(tokens.shape[1], device=tokens.device)
    shown = decided & (column <= stop_position(tokens, decided, stop_ids)[:, None])
    return torch.cat([prompt, torch.where(shown, tokens, UNKNOWN)], dim=1)


def _around(text: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, reach: int) -> torch.Tensor:
    """The tokens up to `reach` slots before and behind `(n,)` slots: `(n, 2 reach + 1)`."""
    padded = torch.nn.functional.pad(text, (reach, reach), value=UNKNOWN)
    return padded[rows[:, None], slots[:, None] + torch.arange(2 * reach + 1, device=text.device)]


def _agreements(text: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Where `(T, L)` text repeats itself. The work is that of L squared, however long the n-grams that are asked for.

    Yields:
        `(D,)` shifts, and two `(T, D, L)` tables: positions in a row, up to each slot and from it on, that hold the
        token which stands a shift further on.
    """
    rows, length = text.shape
    slot = torch.arange(length, dtype=torch.int32, device=text.device)
    further = torch.nn.functional.pad(text, (0, length), value=UNKNOWN)
    for shifts in torch.arange(1, length, device=text.device).split(max(1, AT_ONCE // max(1, rows * length))):
        other = further[:, shifts[:, None] + slot]  # (T, D, L)
        differs = (text[:, None] != other) | (other == UNKNOWN)
        last = torch.where(differs, slot, -1).cummax(-1).values
        first = torch.where(differs, slot, length).flip(-1).cummin(-1).values.flip(-1)
        yield shifts, slot - last, first - slot


Around = Iterator[tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]]


def _around_candidates(text: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, size: int) -> Around:
    """How far the text around `(n,)` candidates agrees with that around the slots to their left and right.

    Yields:
        `(D,)` shifts; for the slots so far to the left, `(n, D)` positions before and behind that agree; the same for
        those to the right. Short n-grams need no more than `size - 1` of them, so no more are counted.
    """
    length = text.shape[1]
    if size <= SHORT:  # step by step is quicker
        centre = length + size
        near = _around(text, rows, slots, centre)

        def count(first: int, step: int) -> torch.Tensor:  # (n, L - 1), of partners from `first` on
            agree, found = torch.ones_like(near[:, 1:length], dtype=torch.bool), torch.zeros_like(near[:, 1:length])
            for offset in range(step, size * step, step):
                own, start = near[:, centre + offset, None], first + offset
                agree = agree & (own == near[:, start : start + length - 1]) & (own != UNKNOWN)
                found = found + agree
            return found

        left = [count(centre - length + 1, step).flip(1) for step in (-1, 1)]
        right = [count(centre + 1, step) for step in (-1, 1)]
        yield torch.arange(1, length, device=text.device), (left[0], left[1]), (right[0], right[1])
        return
    rows, slots = rows[:, None], slots[:, None]
    for shifts, ending, starting in _agreements(text):
        index = torch.arange(shifts.shape[0], device=text.device)

        def run(table: torch.Tensor, at: torch.Tensor, index: torch.Tensor = index) -> torch.Tensor:  # (n, D)
            return torch.where((at >= 0) & (at < length), table[rows, index, at.clamp(0, length - 1)], 0)

        yield (
            shifts,
            (run(ending, slots - shifts - 1), run(starting, slots - shifts + 1)),
            (run(ending, slots - 1), run(starting, slots + 1)),
        )


class Sequences:
    """Token sequences with a bias each, matched wherever their tokens lie around a position.

    Args:
        biases: sequence -> what is added to the logit of a token that completes it.
        stop_ids: with one of them a token completes only what ends there, for the rest is no output.
    """

    def __init__(self, biases: dict[tuple[int, ...], float], stop_ids: torch.Tensor | None, device: torch.device):
        stops = set() if stop_ids is None else set(stop_ids.tolist())
        groups: dict[int, list[tuple[tuple[int, ...], list[float]]]] = {}
        for tokens, bias in biases.items():
            here = [0.0 if token in stops else bias for token in tokens[:-1]] + [bias]
            groups.setdefault(len(tokens), []).append((tokens, here))
        self.longest = max(groups, default=0)
        self.groups = [
            (
                torch.tensor([tokens for tokens, _ in group], device=device),  # (sequences, length)
                torch.tensor([here for _, here in group], dtype=torch.float32, device=device),  # by the token's place
            )
            for group in groups.values()
        ]

    def bias(self, text: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """Sum of the biases of what each token would complete at `(n,)` rows and slots of `text`: `(n, V)` float."""
        total = torch.zeros(rows.shape[0], vocab_size, dtype=torch.float32, device=text.device)
        near = _around(text, rows, slots, max(self.longest - 1, 0))
        for sequences, biases in self.groups:
            length = sequences.shape[1]
            for offset in range(length):  # of the candidate within the sequence
                first = self.longest - 1 - offset
                match = torch.ones(rows.shape[0], sequences.shape[0], dtype=torch.bool, device=text.device)
                for index in set(range(length)) - {offset}:
                    match &= near[:, first + index, None] == sequences[:, index]
                total.index_add_(1, sequences[:, offset], torch.where(match, biases[:, offset], 0.0))
        return total

    def standing(self, text: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
        """For each length, the first slots of the sequences that stand in `(B, L)` text: `(B, L - length + 1)`."""
        found = []
        for sequences, _ in self.groups:
            length = sequences.shape[1]
            windows = text.shape[1] - length + 1
            if windows < 1:
                continue
            match = torch.ones(text.shape[0], windows, sequences.shape[0], dtype=torch.bool, device=text.device)
            for index in range(length):
                match &= text[:, index : index + windows, None] == sequences[:, index]
            found.append((length, match.any(-1)))
        return found


class Constraints:
    """Spans that the answer may not hold; falsy, and free, where there are none.

    Args:
        prompt (`(B, P)` long): of the whole batch, `UNKNOWN` on padding.
        words: sequences that may not occur; they may begin in the prompt.
        ngram_size: no n-gram of this size may occur twice in prompt and answer; 0 for no such rule, which is also what
            a size larger than the whole text means.
        stop_ids (`(S,)`, *optional*): the stop tokens.
    """

    def __init__(self, prompt: torch.Tensor, words: Sequences, ngram_size: int, stop_ids: torch.Tensor | None):
        reach = prompt.shape[1] if ngram_size else max(words.longest - 1, 0)
        self.prompt = prompt[:, max(prompt.shape[1] - reach, 0) :]
        self.words, self.ngram_size, self.stop_ids = words, ngram_size, stop_ids

    def __bool__(self) -> bool:
        return self.ngram_size > 0 or bool(self.words.groups)

    def banned(
        self,
        tokens: torch.Tensor,
        decided: torch.Tensor,
        rows: torch.Tensor,
        columns: torch.Tensor,
        vocab_size: int,
        owners: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Tokens that would complete a forbidden span at `(n,)` candidates: `(n, V)` bool.

        Args:
            tokens, decided (`(B, N)`): the answers.
            rows, columns (`(n,)`): of the candidates among these.
            owners (`(B,)`, *optional*): row of the prompt that each belongs to, the same one when unset.
        """
        prompt = self.prompt if owners is None else self.prompt[owners]
        text = visible_text(prompt, tokens, decided, self.stop_ids)
        slots = self.prompt.shape[1] + columns
        if not self.ngram_size:
            return self.words.bias(text, rows, slots, vocab_size) < 0
        banned = self._repeating(text, rows, slots, vocab_size)
        return banned | (self.words.bias(text, rows, slots, vocab_size) < 0) if self.words.groups else banned

    def _repeating(self, text: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, vocab_size: int) -> torch.Tensor:
        """Tokens with which some n-gram through a candidate would stand twice: `(n, V)` bool."""
        size, length = self.ngram_size, text.shape[1]
        banned = torch.zeros(rows.shape[0], vocab_size + 1, dtype=torch.bool, device=text.device)
        if size > length:
            return banned[:, :vocab_size]

        def stands(at: torch.Tensor) -> torch.Tensor:  # (n, D)
            inside = (at >= 0) & (at < length)
            return torch.where(inside, text[rows[:, None], at.clamp(0, length - 1)], UNKNOWN)

        def ban(token: torch.Tensor, twice: torch.Tensor) -> None:
            banned.scatter_(1, torch.where(twice & (token != UNKNOWN), token, vocab_size), True)

        agreements = _around_candidates(text, rows, slots, size)
        for shifts, (left_before, left_behind), (right_before, right_behind) in agreements:
            left, right = stands(slots[:, None] - shifts), stands(slots[:, None] + shifts)
            # 1. n-grams that stand elsewhere and that the candidate is the only undecided token of. With a stop token
            #    only those that end there are output, and it hides what stands behind it.
            elsewhere = left_before + 1 + left_behind >= size
            behind = right_before + 1 + right_behind >= size
            # 2. n-grams that share the candidate, so that its token must equal two neighbours.
            shared = (left == right) & (right_before >= shifts - 1) & (left_before + shifts + 1 + right_behind >= size)
            if self.stop_ids is not None:
                is_stop = torch.isin(left, self.stop_ids)
                elsewhere = torch.where(is_stop, left_before >= size - 1, elsewhere)
                behind, shared = behind & ~torch.isin(right, self.stop_ids), shared & ~is_stop
            ban(left, elsewhere | shared)
            ban(right, behind)
        return banned[:, :vocab_size]

    def compatible(
        self, commits: torch.Tensor, tokens: torch.Tensor, cost: torch.Tensor, state: State
    ) -> torch.Tensor:
        """The commits of one forward without those that complete a forbidden span together with others.

        Args:
            commits (`(B, N)` bool): what the rules chose, with tokens that `banned` allows.
            tokens (`(B, N)` long): the tokens to commit.
            cost (`(B, N)` float): the dearest commit of a span is undone, the rightmost of equals.

        Returns:
            `(B, N)` bool, with at least one commit in each row that had one.
        """
        reopened = bool(self)
        while reopened:
            undone = self._undone(commits, tokens, cost, state)
            stop = self._stops(commits, tokens, state)
            commits = commits & ~undone
            # Without its stop token the text goes on, and what lay behind it must be looked at too.
            reopened = self.stop_ids is not None and bool((self._stops(commits, tokens, state) != stop).any())
        return commits

    def _stops(self, commits: torch.Tensor, tokens: torch.Tensor, state: State) -> torch.Tensor:
        """`(B,)` columns of the first stop tokens as they would be."""
        tokens = torch.where(commits, tokens, state.tokens)
        return stop_position(tokens, ~state.undecided | commits, self.stop_ids)

    def _undone(self, commits: torch.Tensor, tokens: torch.Tensor, cost: torch.Tensor, state: State) -> torch.Tensor:
        """The dearest commits of the forbidden spans in the text as it would be: `(B, N)` bool."""
        # 1. The text, and the commits ranked: 1 for the cheapest of a row, 0 where nothing is committed
        tokens = torch.where(commits, tokens, state.tokens)
        text = visible_text(self.prompt[state.rows], tokens, ~state.undecided | commits, self.stop_ids)
        rank = cost.masked_fill(~commits, float("inf")).argsort(dim=1, stable=True).argsort(dim=1) + 1
        rank = torch.where(commits, rank, 0)
        ranks = torch.nn.functional.pad(rank, (self.prompt.shape[1], 0))

        # 2. The dearest commit of each forbidden span, by rank; column 0 takes what needs no undoing
        undone = torch.zeros(rank.shape[0], rank.shape[1] + 1, dtype=torch.bool, device=rank.device)
        for length, standing in self.words.standing(text):
            dearest = ranks.unfold(1, length, 1).amax(-1)
            undone.scatter_(1, torch.where(standing, dearest, 0), True)
        if 0 < self.ngram_size <= text.shape[1]:
            self._undo_repeats(text, ranks, undone)
        return undone.gather(1, rank) & commits

    def _undo_repeats(self, text: torch.Tensor, ranks: torch.Tensor, undone: torch.Tensor) -> None:
        """Marks the dearest commit of each pair of equal n-grams in `(B, N + 1)` `undone`."""
        dearest = ranks.unfold(1, self.ngram_size, 1).amax(-1)  # (B, W)
        windows = dearest.shape[1]
        further = torch.nn.functional.pad(dearest, (0, text.shape[1]))
        for shifts, _, starting in _agreements(text):
            other = further[:, torch.arange(windows, device=text.device) + shifts[:, None]]  # (B, D, W)
            pair = torch.maximum(dearest[:, None], other)
            equal = starting[:, :, :windows] >= self.ngram_size
            undone.scatter_(1, torch.where(equal, pair, 0).flatten(1), True)
