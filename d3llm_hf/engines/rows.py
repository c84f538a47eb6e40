"""The requests of an engine as rows of tensors: they come and go, and those with equal rules are one batch.

An engine's step is, for all requests that it scheduled,

    plan (open_blocks, candidates: which logits are wanted) -> the engine's forward -> decide (score, choose, commit)

with the rules of `models/`, which `generate` follows as well. Nothing here knows an engine; there is no loop over rows
or positions, only one over the different sets of rules in a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from transformers.generation import LogitsProcessorList

from ..models.canvas import Canvas
from ..models.decoding import (
    Rules,
    State,
    candidates,
    commit,
    fill_after_stop,
    finished,
    open_blocks,
)
from ..models.processors import Processors
from ..models.scoring import NOT_FINITE, Sampler, Scorer
from ..models.selection import choose
from .requests import Decoding


@dataclass
class Group:
    """The requests with one way of decoding.

    Attributes:
        decoding: theirs.
        scorer: with what it remembers of each row.
        seeds: of each row, by its number in the group.
        free: numbers of rows that have left.
        members: rows that are there.
    """

    decoding: Decoding
    scorer: Scorer
    seeds: list[int]
    free: list[int] = field(default_factory=list)
    members: int = 0


@dataclass
class Part:
    """The rows of a plan that are decoded by one group's rules. b rows, N positions of the longest, n candidates.

    Attributes:
        group: theirs.
        slots (`(b,)` long): where their states are kept.
        places (`(b,)` long): which of the engine's rows they are.
        state: before the forward, with its blocks opened.
        among (`(b, N)` bool): the candidates.
        where: rows and columns `(n,)` of the candidates.
    """

    group: Group
    slots: torch.Tensor
    places: torch.Tensor
    state: State
    among: torch.Tensor
    where: tuple[torch.Tensor, torch.Tensor]


@dataclass
class Plan:
    """What a step's forward is asked for.

    Attributes:
        parts: of each set of rules.
        wanted (`(n,)` long): rows of the engine's logits that are needed, part by part, in the order of `where`.
    """

    parts: list[Part]
    wanted: torch.Tensor


@dataclass
class Decided:
    """What a step has brought, for each of the engine's rows. B rows, C positions of a canvas.

    Attributes:
        tokens (`(B, C)` long): the answer of each row that has ended, 0 elsewhere and behind it.
        counts (`(B,)` long): tokens of it: up to the first stop token, which is one of them; 0 where none has ended.
    """

    tokens: torch.Tensor
    counts: torch.Tensor


class Rows:
    """The states of all requests that an engine holds.

    Args:
        capacity: requests at a time.
        canvas_length: positions of a request, prompt and answer, at most.
        mask_token_id: of an undecided position.
        shift: logits row i predicts the token of position i + shift.
        device: of the tensors.
    """

    def __init__(self, capacity: int, canvas_length: int, mask_token_id: int, shift: int, device: torch.device | str):
        self.mask_token_id, self.shift = mask_token_id, shift
        self.device = torch.device(device)
        nothing = torch.zeros(capacity, canvas_length, dtype=torch.bool, device=self.device)
        masks = torch.full((capacity, canvas_length), mask_token_id, dtype=torch.long, device=self.device)
        # With blocks of one position the tables of blocks are as wide as any.
        self.states = State.start(masks, nothing, Rules(block_length=1, score="entropy", select="threshold"))
        self.states.slots = self.states.slots.clone()
        self.nothing = _empty_canvas(mask_token_id, self.device)
        self.prompts = masks.clone()
        self.given = torch.zeros(capacity, dtype=torch.long, device=self.device)
        self.told = torch.zeros(capacity, dtype=torch.bool, device=self.device)
        self.groups: dict[int, Group] = {}
        # What is known without asking the device: of each slot its group, -1 where it is free, its number there, and
        # the length of its answer.
        self._group = np.full(capacity, -1)
        self._number = np.zeros(capacity, dtype=np.int64)
        self._length = np.zeros(capacity, dtype=np.int64)

    @property
    def canvas_length(self) -> int:
        """C."""
        return self.prompts.shape[1]

    def add(self, slot: int, prompt: Sequence[int], length: int, decoding: Decoding, seed: int = 0) -> None:
        """A request takes a slot, whoever had it before.

        Args:
            slot: from 0 to the capacity.
            prompt: its tokens.
            length: positions to decide.
            decoding: how.
            seed: of its random numbers.

        Raises:
            ValueError: for a prompt and an answer that do not fit the canvas.
        """
        if not prompt or length < 1 or len(prompt) + length > self.canvas_length:
            raise ValueError(
                f"`prompt` and `length` must be positive and fit a canvas of {self.canvas_length} positions (got "
                f"{len(prompt)} + {length}). Shorten them, or serve a longer canvas."
            )
        self.remove(slot)
        # 1. The group, and a number in it
        key, group = next(
            ((key, group) for key, group in self.groups.items() if group.decoding == decoding),
            (max(self.groups, default=-1) + 1, None),
        )
        if group is None:
            group = self.groups[key] = self._new_group(decoding)
        if not group.free:
            group.free.append(len(group.seeds))
            group.seeds.append(seed)
        number = group.free.pop()
        group.seeds[number] = seed
        group.members += 1
        if group.scorer.credit is not None:
            group.scorer.credit.forget(torch.tensor([number], device=self.device))
        self._group[slot], self._number[slot], self._length[slot] = key, number, length

        # 2. Prompt and state
        self.prompts[slot, : len(prompt)] = torch.tensor([*prompt], device=self.device)
        self.given[slot], self.told[slot] = len(prompt), False
        masks = torch.full((1, self.canvas_length), self.mask_token_id, dtype=torch.long, device=self.device)
        inside = torch.arange(self.canvas_length, device=self.device)[None] < length
        begun = State.start(masks, inside, decoding.rules)
        begun.rows.fill_(number)
        self._put(torch.tensor([slot], device=self.device), begun)

    def remove(self, slot: int) -> None:
        """The request of a slot is gone; nothing happens where there is none."""
        key = int(self._group[slot])
        if key < 0:
            return
        self._group[slot] = -1
        group = self.groups[key]
        group.free.append(int(self._number[slot]))
        group.members -= 1
        if not group.members:
            del self.groups[key]

    def canvases(self, slots: torch.Tensor) -> torch.Tensor:
        """Prompt and answer so far of `(b,)` slots, `(b, C)`; what lies behind is undecided."""
        column = torch.arange(self.canvas_length, device=self.device)
        behind = column - self.given[slots][:, None]
        answers = self.states.tokens[slots].gather(1, behind.clamp_min(0))
        return torch.where(behind < 0, self.prompts[slots], answers)

    def plan(self, slots: np.ndarray, first: torch.Tensor) -> Plan:
        """Opens blocks, and says of which positions the logits are wanted.

        Args:
            slots (`(B,)` int): of the engine's rows, -1 where one is not decoded in this step; free ones are passed
                over.
            first (`(B,)` long): the row of the engine's logits that belongs to the first position of each canvas.
        """
        parts, wanted = [], [first.new_zeros(0)]
        keys = np.where(slots >= 0, self._group[slots], -1)
        for key in np.unique(keys[keys >= 0]).tolist():
            places = np.flatnonzero(keys == key)
            part = self._part(self.groups[key], slots[places], places)
            row, column = part.where
            position = (self.given[part.slots][row] + column - self.shift).clamp_min(0)
            wanted.append(first[part.places][row] + position)
            parts.append(part)
        return Plan(parts, torch.cat(wanted))

    def decide(self, plan: Plan, logits: torch.Tensor, batch: int) -> Decided:
        """Scores the candidates, commits what the rules choose, and hands out the answers that are complete.

        Args:
            plan: of this step.
            logits (`(n, V)`): those that the plan wants.
            batch: B, the engine's rows.

        Raises:
            ValueError: for logits that are not finite.
        """
        tokens = torch.zeros(batch, self.canvas_length, dtype=torch.long, device=self.device)
        counts = torch.zeros(batch, dtype=torch.long, device=self.device)
        sizes = [len(part.where[0]) for part in plan.parts]
        for part, own in zip(plan.parts, logits.split(sizes) if sizes else (), strict=True):
            state = self._step(part, own)
            self._put(part.slots, state)
            ended, length = self._ended(part, state)
            counts[part.places] = length
            tokens[part.places, : state.tokens.shape[1]] = torch.where(
                torch.arange(state.tokens.shape[1], device=self.device) < length[:, None], state.tokens, 0
            )
            self.told[part.slots] |= ended
        return Decided(tokens, counts)

    def forwards(self, slot: int) -> int:
        """Forwards that the request of a slot has had."""
        return int(self.states.step[slot])

    # ---- one group's rows ----------------------------------------------------------------------------------------

    def _new_group(self, decoding: Decoding) -> Group:
        seeds: list[int] = []
        scorer = Scorer(
            decoding.rules,
            self.mask_token_id,
            sampler=Sampler(seeds),
            sampling=False,
            processors=_no_processors(decoding.rules, self.nothing),
        )
        return Group(decoding, scorer, seeds)

    def _part(self, group: Group, slots: np.ndarray, places: np.ndarray) -> Part:
        rules = group.decoding.rules
        index = torch.as_tensor(slots.astype(np.int64), device=self.device)
        state = self._take(index, int(self._length[slots].max()), rules)
        open_blocks(state, rules, self._stop(state, group.decoding))
        # Of what has ended nothing is asked: an engine that runs ahead schedules it once more.
        among = candidates(state, rules) & ~self.told[index][:, None]
        row, column = among.nonzero(as_tuple=True)  # a host sync, as in `generate`
        return Part(group, index, torch.as_tensor(places, device=self.device), state, among, (row, column))

    def _step(self, part: Part, logits: torch.Tensor) -> State:
        """The state after the forward, as `generate` goes on from it."""
        state, rules, decoding = part.state, part.group.decoding.rules, part.group.decoding
        if len(part.where[0]) == 0:
            return state
        moving = part.among.any(1)
        scores = part.group.scorer(logits, state, self.nothing, part.where)
        self._refuse_broken(scores.broken)
        commits, forced = choose(scores.cost, scores.force_cost, part.among, state, rules)
        tokens = torch.where(forced, scores.best_tokens, scores.tokens)
        # Rows have come at different times, and what has ended may be there once more: each counts its own forwards.
        state.forward = state.forward + moving
        commit(state, commits, tokens)
        state.step = state.forward
        if rules.eos_fill and decoding.stop_ids and decoding.fill_token_id is not None:
            fill_after_stop(state, self._stop(state, decoding), decoding.fill_token_id)
        return state

    def _ended(self, part: Part, state: State) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows `(b,)` that have ended and were not handed out yet, and the tokens `(b,)` of their answers, else 0."""
        stop = self._stop(state, part.group.decoding)
        ended = finished(state, part.group.decoding.rules, stop) & ~self.told[part.slots]
        return ended, torch.where(ended, torch.minimum(stop + 1, state.length), 0)

    def _stop(self, state: State, decoding: Decoding) -> torch.Tensor:
        column = torch.arange(state.tokens.shape[1], device=self.device)
        ids = torch.tensor(decoding.stop_ids, device=self.device) if decoding.stop_ids else None
        return state.stop(ids, column < state.length[:, None])

    def _refuse_broken(self, broken: torch.Tensor) -> None:
        if bool((broken == NOT_FINITE).any()):  # a host sync
            raise ValueError(
                "The model's logits must be finite (got NaN or inf). Check the weights and the dtype: `--dtype "
                "float32` tells whether it is too narrow."
            )

    def _take(self, slots: torch.Tensor, length: int, rules: Rules) -> State:
        """The states of `(b,)` slots, as wide as `length` positions need."""
        blocks = -(-length // rules.block_length)
        return self.states.select(slots).moved(self.states.slots[slots, :length], blocks, self.mask_token_id)

    def _put(self, slots: torch.Tensor, state: State) -> None:
        """Keeps the states of `(b,)` slots, which may be narrower than the tables."""
        wide = state.moved(self.states.slots[slots], self.states.active.shape[1], self.mask_token_id)
        for f in fields(State):
            getattr(self.states, f.name)[slots] = getattr(wide, f.name)


def _empty_canvas(mask_token_id: int, device: torch.device) -> Canvas:
    """A canvas of nothing, for what looks at a text only where processors are given."""
    nothing = torch.zeros(1, 0, dtype=torch.long, device=device)
    return Canvas(nothing, nothing, 0, None, nothing, nothing[0], mask_token_id, None)


def _no_processors(rules: Rules, canvas: Canvas) -> Processors:
    prompt = canvas.base
    return Processors(
        LogitsProcessorList(), rules, prompt=prompt, canvas=canvas, tokens=prompt, stop_ids=None, vocab_size=None
    )


__all__ = ["Decided", "Plan", "Rows"]
