"""Lookahead decoding: canvases of one more token each run beside the decided one, and a row goes on with the surest.

LoPA (arXiv:2512.16229) tries, beside what the method decided, one further token a canvas, and forwards all of them
together. The canvas whose undecided positions look surest wins, and what its logits say is committed. Unlike drafts of
`speculation.py`, a lookahead is not verified: the text changes, and so does what a forward decides.

As published, every undecided position of the open blocks counts. Writing any token makes the others look surer, and a
canvas that fills its block has nothing unsure left, so that an unsure token goes in at nearly every forward. Here two
things prevent it: the positions that count slide with the first undecided one, so that a canvas which fills their
front shows new ones; and a token that is looked ahead with may have to be sure enough itself. In blocks it has to:
what may be looked ahead with ends with the block, whose last positions are its least sure ones.
"""

import torch

from .canvas import Canvas
from .decoding import Rules, State, candidates, finished, open_blocks, window_end
from .processors import Processors
from .scoring import Scores
from .selection import ranks


class Lookahead:
    """More canvases before a forward, and after it the surest one of each row; the two verbs of [`Speculation`].

    Args:
        rules: of the method.
        stop_ids (`(S,)`, *optional*): the stop tokens.
        processors: whose promises about the text hold for the further tokens too.
    """

    def __init__(self, rules: Rules, stop_ids: torch.Tensor | None, processors: Processors):
        self.rules, self.stop_ids, self.processors = rules, stop_ids, processors
        self.scores: Scores | None = None  # of the forward that decided the present canvases
        self.commits = torch.empty(0)  # (R, N) bool: what that forward committed

    def extend(self, state: State, canvas: Canvas) -> tuple[State, Canvas]:
        """The decided canvases of R rows, followed by those of one more token: the first of all rows, the second, ...

        Args:
            state, canvas: R rows.

        Returns:
            both for T >= R canvases.
        """
        index = torch.arange(state.rows.shape[0], device=state.rows.device)
        states, owners, scores = [state], [index], self.scores
        if scores is not None:
            # 1. The undecided positions that may be decided next, the surest first
            ahead = state.select(index)  # a copy with the blocks open that the forward will open
            open_blocks(ahead, self.rules, ahead.stop(self.stop_ids, canvas.may_stop))
            among = candidates(ahead, self.rules) & (scores.surprise <= self.rules.lookahead_threshold)
            place = ranks(scores.entropy, among & scores.entropy.isfinite())

            # 2. A canvas for each, of which a finished one would be believed without a forward
            for number in range(self.rules.lookahead):
                further = among & (place == number) & scores.entropy.isfinite()
                further = self._allowed(further, scores, state.select(index), canvas)
                draft = _with(further, scores.tokens, ahead.select(index))
                stop = draft.stop(self.stop_ids, canvas.may_stop)
                kept = (further.any(1) & ~finished(draft, self.rules, stop)).nonzero()[:, 0]
                states.append(draft.select(kept))
                owners.append(kept)
        trial, self.owner = State.cat(states), torch.cat(owners)
        self.rows, self.undecided = len(index), trial.undecided
        return trial, canvas.select(self.owner)

    def _allowed(self, further: torch.Tensor, scores: Scores, state: State, canvas: Canvas) -> torch.Tensor:
        """The further tokens `(R, N)` that break no promise together with what the same logits committed."""
        dearest = scores.cost.masked_fill(further, torch.finfo(scores.cost.dtype).max)  # so that it is the one undone
        tokens = torch.where(self.commits, state.tokens, scores.tokens)
        state.undecided = state.undecided | self.commits
        return further & self.processors.compatible(self.commits | further, tokens, dearest, state, canvas)

    def settle(self, trial: State, scores: Scores) -> tuple[State, Scores]:
        """The surest canvas of each of the R rows, and the scores of its forward.

        Args:
            trial: T canvases of which each has taken its step.
            scores: of their forward.
        """
        # 1. How sure a canvas looks: minus the mean entropy of what was undecided in its span
        length = self.rules.window_length or self.rules.block_length
        span = self.rules.window_span if self.rules.window_length else length
        column = torch.arange(self.undecided.shape[1], device=self.undecided.device)
        counted = self.undecided & (column < window_end(self.undecided, length, span)[:, None])
        counted &= scores.entropy.isfinite()
        total = scores.entropy.double().masked_fill(~counted, 0.0).sum(1)
        number = counted.sum(1)
        sure = torch.where(number > 0, -total / number.clamp_min(1), float("-inf"))

        # 2. The highest of each row; of equals the lookahead of the surest token, the decided canvas last
        highest = sure.new_full((self.rows,), float("-inf")).scatter_reduce(0, self.owner, sure, "amax")
        node = torch.arange(len(sure), device=column.device)
        last = len(sure) + node[: self.rows]
        place = torch.cat([last, node[self.rows :]]).masked_fill(sure < highest[self.owner], 2 * len(sure))
        winner = last.scatter_reduce(0, self.owner, place, "amin") % len(sure)

        # 3. What its forward committed, which stays known until the next one
        decided = trial.select(winner)
        self.commits = self.undecided[winner] & ~decided.undecided
        self.scores = scores.select(winner)
        return decided, self.scores

    def admit(self, more: int, columns: int) -> None:
        """Adds `more` rows, of which nothing is known; the longest answer has so many columns."""
        if self.scores is not None:
            further = columns - self.commits.shape[1]
            self.scores = self.scores.moved(columns, more)
            self.commits = torch.nn.functional.pad(self.commits, (0, further, 0, more))

    def select(self, index: torch.Tensor) -> None:
        """Keeps the rows with the `(R',)` indices `index`."""
        if self.scores is not None:
            self.scores, self.commits = self.scores.select(index), self.commits[index]


def _with(further: torch.Tensor, tokens: torch.Tensor, state: State) -> State:
    """The canvases `state` with the `further` tokens, which the forward decides that will have chosen them."""
    state.tokens = torch.where(further, tokens, state.tokens)
    state.step_map = torch.where(further, state.forward[:, None] + 1, state.step_map)
    state.undecided = state.undecided & ~further
    return state
