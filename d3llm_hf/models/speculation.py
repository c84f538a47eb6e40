"""Lossless decoding: later canvases are drafted from the present logits and verified in one batched forward.

One token a forward is slow because a forward decides so little, not because it could not run over more canvases at
once. Auto-speculation (Spiffy, arXiv:2509.18085; FreeDave, arXiv:2510.00294) drafts, with the rules of the method and
the logits at hand, the canvases that the next steps would leave. The next forward runs over the decided canvas and all
drafts together. A draft that equals what the true step before it left has had its own forward, so the step after it
can be taken as well, and so on until one differs. The tokens are those of decoding step by step, whatever the drafts.
"""

from dataclasses import replace

import torch

from .canvas import Canvas
from .decoding import Rules, State, candidates, commit, finished, open_blocks
from .scoring import Sampler, Scores
from .selection import choose


class Speculation:
    """Drafts before a forward and verification after it; without `draft_length` both hand on what they are given.

    Args:
        rules: of the method.
        stop_ids (`(S,)`, *optional*): the stop tokens.
        sampler: gives the costs of random remasking, which are known before the forward.
    """

    def __init__(self, rules: Rules, stop_ids: torch.Tensor | None, sampler: Sampler):
        self.rules, self.stop_ids, self.sampler = rules, stop_ids, sampler
        self.scores: Scores | None = None  # of the forward that decided the present canvases

    def extend(self, state: State, canvas: Canvas) -> tuple[State, Canvas]:
        """The decided canvases of R rows, followed by drafts of the canvases that their next steps may leave.

        Args:
            state, canvas: R rows.

        Returns:
            both for T >= R canvases, the R decided ones first.
        """
        if self.scores is None:
            return state, canvas
        index = torch.arange(state.rows.shape[0], device=state.rows.device)
        states, owners, parents, last = [state], [index], [index], state
        owner, may_stop = index, canvas.may_stop
        for _ in range(self.rules.draft_length):
            drafted, known = self._step(self.scores, last, owner, may_stop[owner])
            stop = drafted.stop(self.stop_ids, may_stop[owner])
            # A finished canvas needs no forward, and one of which nothing is known has no successor. (A step that
            # decides nothing by its schedule has one: the same canvas a step later.)
            kept = (known & ~finished(drafted, self.rules, stop)).nonzero()[:, 0]
            if not len(kept):
                break
            last, owner = drafted.select(kept), owner[kept]
            parents.append(index[kept])
            index = torch.arange(len(kept), device=owner.device) + sum(map(len, owners))
            states.append(last)
            owners.append(owner)
        trial, self.owner, self.parent = State.cat(states), torch.cat(owners), torch.cat(parents)
        self.before = trial.tokens, trial.undecided
        return trial, canvas.select(self.owner)

    def _step(
        self, scores: Scores, state: State, owner: torch.Tensor, may_stop: torch.Tensor
    ) -> tuple[State, torch.Tensor]:
        """The states after the step that the present scores suggest, and whether these say anything."""
        scores, rules = scores.select(owner), self.rules
        state = state.select(torch.arange(len(owner), device=owner.device))  # a copy
        open_blocks(state, rules, state.stop(self.stop_ids, may_stop))
        among = candidates(state, rules) & scores.cost.isfinite()
        cost = scores.cost
        if rules.score == "noise":
            where = among.nonzero(as_tuple=True)
            noise = self.sampler.noise(state.rows[where[0]], state.step[where[0]], where[1])
            cost = cost.index_put(where, noise)
        commits, forced = choose(cost, scores.force_cost, among, state, rules)
        forward, state.forward = state.forward, state.forward + 1  # the forward that verifies the draft
        commit(state, commits, torch.where(forced, scores.best_tokens, scores.tokens))
        state.forward = forward
        return state, among.any(1)

    def settle(self, trial: State, scores: Scores) -> tuple[State, Scores]:
        """The state of the R rows as far as true steps lead, and the scores that the last of these rested on.

        Args:
            trial: T canvases of which each has taken its step.
            scores: of their forward.
        """
        if not self.rules.draft_length:
            return trial, scores
        if self.scores is not None:
            # 1. A draft is true if it is what the step of a true canvas left
            tokens, undecided = self.before
            same = (trial.tokens[self.parent] == tokens) & (trial.undecided[self.parent] == undecided)
            node = torch.arange(len(self.owner), device=self.owner.device)
            decided = self.parent == node
            true, broken = same.all(1) | decided, scores.broken
            for _ in range(self.rules.draft_length):
                true, broken = true & true[self.parent], torch.maximum(broken, broken[self.parent])
            # 2. Later drafts have higher indices: of a row's true canvases the last has taken the most steps
            last = torch.zeros_like(node).scatter_reduce(0, self.owner, node.where(true, 0), "amax")
            last = last[: int(decided.sum())]
            # Of what a draft's forward gave, only what the row rests on may be held against it.
            trial, scores = trial.select(last), replace(scores, broken=broken).select(last)
        self.scores = scores
        return trial, scores

    def admit(self, more: int, columns: int) -> None:
        """Adds `more` rows, of which nothing is known; the longest answer has so many columns."""
        if self.scores is not None:
            self.scores = self.scores.moved(columns, more)

    def select(self, index: torch.Tensor) -> None:
        """Keeps the rows with the `(R',)` indices `index`."""
        if self.scores is not None:
            self.scores = self.scores.select(index)
