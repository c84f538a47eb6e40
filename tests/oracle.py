"""A slow, obvious decoder of one unpadded prompt, written apart from the library, which must reproduce it.

Everything is a Python loop over positions. Undecided positions are tracked by position, never by token id. The rules
are those of the reference implementations with their defects corrected:

* after the tail behind an EOS is filled, the filled positions are no candidates any more;
* a length that is no multiple of the block ends in one shorter block;
* the mask token is never committed, yet entropies and confidences come from the softmax over the whole vocabulary;
* a cache holds one key and value per position; a forward of the window `[w, L)` overwrites what it forwards;
* where logits row i predicts token i + 1, a window starts one position earlier, so that the row exists;
* `steps` that the blocks or the length do not divide: the earlier blocks get one more, quotas add up to the length;
* every forward of a threshold method decides something, whatever the thresholds;
* a forward is counted when, and only when, it is made.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache


UNDECIDED = -1


@dataclass
class Rules:
    """How to decode; the names are those of `generate`."""

    decoding_method: str  # "llada", "dparallel", "d3llm" or "dream"
    max_new_tokens: int
    block_length: int = 32
    steps: int | None = None
    remasking: str = "low_confidence"
    entropy_threshold: float = 0.5
    confidence_threshold: float | None = None
    block_add_threshold: float = 0.1
    block_activation_threshold: float = 0.95
    early_stop: bool = False
    kv_cache: str = "none"
    cache_delay: int = 1
    cache_refresh_interval: int = 10_000
    cfg_scale: float = 0.0
    top_k: int | None = None  # the recorded runs of Dream's own sampler kept transformers' default of 50
    mask_token_id: int = -1
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int = 0
    strict: bool = False  # Dream accepts H < threshold, LLaDA H <= threshold
    always_lowest: bool = True  # multi-block LLaDA always commits the lowest entropy of all candidates
    serial_stamps: bool = True  # multi-block LLaDA: a block's delay starts once the block before it is cached
    timestep_eps: float = 1e-3
    noise: Callable[[int, int], float] | None = None  # (forward, position) -> uniform: remasking "random" and "origin"


@dataclass
class Decoded:
    """The result, for the N new positions."""

    sequence: list[int]  # prompt and answer; pad behind the first EOS and where nothing was decided
    canvas: list[int]  # prompt and answer as decoded, UNDECIDED where nothing was
    step_map: list[int]  # forward that committed the position, 1-based; -1 where none did
    decided_after: list[int]  # forward after which the position was no longer undecided, fills included; -1: never
    forwards: int
    reference_forwards: int  # as the reference counts: an exit by the fill counts as one more
    positions_computed: int  # forwarded positions, twice with guidance
    windows: list[int]  # first position forwarded, per forward
    eos: int | None = None  # canvas position of the first EOS


class SlotPerPosition(Cache):
    """One key and value per canvas position; `window` is where the tokens of the running forward go."""

    def __init__(self):
        super().__init__(layers=[])
        self.slots: dict[int, list[torch.Tensor]] = {}
        self.window = 0

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if layer_idx not in self.slots:
            assert self.window == 0, "the first forward covers the canvas"
            self.slots[layer_idx] = [key_states.clone(), value_states.clone()]
        for slot, fresh in zip(self.slots[layer_idx], (key_states, value_states), strict=True):
            slot[:, :, self.window :] = fresh
        return tuple(slot.clone() for slot in self.slots[layer_idx])

    def get_seq_length(self, layer_idx=0):
        return self.window


class Network:
    """Rows of a model such that row i predicts token i; forwards `[first needed row, L)` only."""

    def __init__(self, model, shift: int, mask_token_id: int):
        self.model, self.shift, self.mask_token_id = model, shift, mask_token_id
        self.cache = SlotPerPosition()

    def first_position(self, start: int) -> int:
        return max(start - self.shift, 0)

    @torch.no_grad()
    def __call__(self, canvas: list[int], start: int) -> dict[int, torch.Tensor]:
        ids = torch.tensor([self.mask_token_id if token == UNDECIDED else token for token in canvas])
        first, length = self.first_position(start), len(canvas)
        self.cache.window = first
        raw = self.model(
            input_ids=ids[None, first:],
            position_ids=torch.arange(first, length)[None],
            attention_mask=torch.ones(1, 1, length - first, length, dtype=torch.bool),
            past_key_values=self.cache,
        ).logits[0]
        rows = {}
        for position in range(start, length):
            source = max(position - self.shift, 0)
            rows[position] = raw[source - first]
        return rows


class Scripted:
    """The same for a function from the canvas (a 1-D tensor of token ids) to its rows `(L, V)`; no cache."""

    def __init__(self, logits_fn: Callable[[torch.Tensor], torch.Tensor], mask_token_id: int):
        self.logits_fn, self.mask_token_id = logits_fn, mask_token_id

    def first_position(self, start: int) -> int:
        return start

    def __call__(self, canvas: list[int], start: int) -> dict[int, torch.Tensor]:
        ids = torch.tensor([self.mask_token_id if token == UNDECIDED else token for token in canvas])
        rows = self.logits_fn(ids)
        return {position: rows[position] for position in range(start, len(canvas))}


@dataclass
class Look:
    """What a row of logits says of its position."""

    token: int  # the most probable one that is not the mask token
    probability: float  # its probability, the mask token counted in
    margin: float  # that probability less the highest of all other tokens
    entropy: float  # nats, the mask token counted in


def look(rows: dict[int, torch.Tensor], mask_token_id: int) -> dict[int, Look]:
    """Looks at every row, in float64."""
    if not rows:
        return {}
    p = torch.stack(list(rows.values())).double().softmax(-1)  # (rows, V)
    entropies = -(p * (p + 1e-12).log()).sum(-1)
    allowed = p.clone()
    allowed[:, mask_token_id] = -1.0
    probabilities, tokens = allowed.max(-1)
    margins = probabilities - p.scatter(1, tokens[:, None], -1.0).max(-1).values
    columns = [column.tolist() for column in (tokens, probabilities, margins, entropies)]
    return {position: Look(*values) for position, *values in zip(rows, *columns, strict=True)}


def decode(network, prompt: list[int], rules: Rules) -> Decoded:
    """Decodes `prompt` by `rules`; see [`Oracle`]."""
    return Oracle(network, prompt, rules).run()


def decode_with_model(model, prompt: list[int], rules: Rules) -> Decoded:
    """The same with a model of this package; sets the two families' differences."""
    dream = model.logit_shift == 1
    rules.strict, rules.always_lowest, rules.serial_stamps = dream, not dream, not dream
    return decode(Network(model, model.logit_shift, rules.mask_token_id), prompt, rules)


class Oracle:
    """The canvas of one prompt and the loop that decides it."""

    def __init__(self, network, prompt: list[int], rules: Rules):
        self.network, self.rules, self.prompt_length = network, rules, len(prompt)
        self.canvas = list(prompt) + [UNDECIDED] * rules.max_new_tokens
        self.length = len(self.canvas)
        self.committed: dict[int, int] = {}
        self.decided: dict[int, int] = {}
        self.windows: list[int] = []
        self.positions_computed = self.extra_exit = 0
        self.blocks = [
            (start, min(start + rules.block_length, self.length))
            for start in range(self.prompt_length, self.length, rules.block_length)
        ]

    def run(self) -> Decoded:
        {
            "llada": self.llada,
            "dparallel": self.dparallel,
            "d3llm": self.d3llm,
            "dream": self.dream,
        }[self.rules.decoding_method]()
        return self.result()

    # what all methods share

    @property
    def forwards(self) -> int:
        return len(self.windows)

    def undecided(self, start: int = 0, end: int | None = None) -> list[int]:
        end = self.length if end is None else end
        return [p for p in range(max(start, self.prompt_length), end) if self.canvas[p] == UNDECIDED]

    def first_eos(self) -> int | None:
        for position in range(self.prompt_length, self.length):
            if self.canvas[position] in self.rules.eos_token_ids:
                return position
        return None

    def forward(self, start: int = 0) -> dict[int, Look]:
        """The undecided rows from `start` on, guided by the classifier-free rule if asked for; counts one forward."""
        self.windows.append(self.network.first_position(start))
        self.positions_computed += (self.length - self.windows[-1]) * (2 if self.rules.cfg_scale else 1)
        rows = self.network(self.canvas, start)
        rows = {p: rows[p] for p in self.undecided(start)}
        if self.rules.cfg_scale:
            hidden = [UNDECIDED] * self.prompt_length + self.canvas[self.prompt_length :]
            blind = self.network(hidden, start)
            rows = {p: blind[p] + (self.rules.cfg_scale + 1) * (rows[p] - blind[p]) for p in rows}
        if self.rules.top_k:
            rows = {
                p: row.masked_fill(row < row.topk(self.rules.top_k).values[-1], -math.inf) for p, row in rows.items()
            }
        return look(rows, self.rules.mask_token_id)

    def commit(self, looks: dict[int, Look], positions) -> None:
        for position in positions:
            assert self.canvas[position] == UNDECIDED, "a decided position is never decided again"
            self.canvas[position] = looks[position].token
            self.committed[position] = self.decided[position] = self.forwards

    def answered(self) -> bool:
        """Whether to stop: nothing is undecided, or nothing up to the first EOS is, where `early_stop` asks for it."""
        eos = self.first_eos()
        if self.rules.early_stop and eos is not None and not self.undecided(end=eos):
            return True
        return not self.undecided()

    def result(self) -> Decoded:
        eos, rules = self.first_eos(), self.rules
        sequence = [
            rules.pad_token_id if token == UNDECIDED or (eos is not None and position > eos) else token
            for position, token in enumerate(self.canvas)
        ]
        new = range(self.prompt_length, self.length)
        return Decoded(
            sequence=sequence,
            canvas=self.canvas,
            step_map=[self.committed.get(p, -1) for p in new],
            decided_after=[self.decided.get(p, -1) for p in new],
            forwards=self.forwards,
            reference_forwards=self.forwards + self.extra_exit,
            positions_computed=self.positions_computed,
            windows=self.windows,
            eos=eos,
        )

    # one block after the other

    def llada(self) -> None:
        """A fixed share of the block per forward, highest score first."""
        each, more = divmod(self.rules.steps, len(self.blocks))
        for index, (start, end) in enumerate(self.blocks):
            per_block = max(each + (index < more), 1)
            masks = len(self.undecided(start, end))
            quotas = [masks // per_block + (i < masks % per_block) for i in range(per_block)]
            for quota in quotas:
                if self.answered() or not self.undecided(start, end):
                    break
                looks = self.forward()
                if self.rules.remasking == "random":
                    score = {p: self.rules.noise(self.forwards, p) for p in self.undecided(start, end)}
                else:
                    score = {p: looks[p].probability for p in self.undecided(start, end)}
                self.commit(looks, sorted(score, key=lambda p: (-score[p], p))[:quota])

    def dparallel(self) -> None:
        """Every position of the block whose entropy is low, and always the lowest."""
        for start, end in self.blocks:
            while self.undecided(start, end) and not self.answered():
                looks = self.forward()
                h = {p: looks[p].entropy for p in self.undecided(start, end)}
                lowest = min(h, key=lambda p: (h[p], p))
                self.commit(looks, [p for p in h if p == lowest or self.accepts(h[p])])

    def accepts(self, h: float) -> bool:
        return h < self.rules.entropy_threshold if self.rules.strict else h <= self.rules.entropy_threshold

    # several blocks at once

    def d3llm(self) -> None:
        """Blocks join while others are undecided; the first activated unfinished one always progresses.

        Block 0 is the prompt. A block is created once its predecessor progressed a little, activated once it
        progressed far, and finished once nothing of it is undecided.
        """
        self.blocks = [(0, self.prompt_length), *self.blocks]
        self.activated = {0: True, 1: self.rules.block_activation_threshold <= 1.0}
        self.completed, self.cached, self.cached_length = {0: 0}, set(), 0
        while self.undecided():
            eos = self.first_eos() if self.rules.early_stop else None
            if eos is not None:
                self.fill_after(eos)
                if not self.undecided():
                    self.extra_exit = 1
                    return
            self.grow_blocks(may_create=eos is None)
            looks = self.forward(self.window_start())
            self.commit(looks, sorted(self.chosen(looks)))

    def masks(self, block: int) -> int:
        return len(self.undecided(*self.blocks[block]))

    def progress(self, block: int) -> float:
        start, end = self.blocks[block]
        return 1 - self.masks(block) / (end - start) if end > start else 1.0

    def fill_after(self, eos: int) -> None:
        for position in range(eos + 1, self.length):
            if self.canvas[position] == UNDECIDED:
                self.decided[position] = self.forwards
            self.canvas[position] = self.rules.pad_token_id

    def grow_blocks(self, may_create: bool) -> None:
        far = self.rules.block_activation_threshold
        for block in range(1, len(self.activated)):
            self.activated[block] = self.activated[block] or self.progress(block - 1) >= far
        last = len(self.activated) - 1
        if may_create and last < len(self.blocks) - 1:
            progress = self.progress(last)
            if progress >= self.rules.block_add_threshold or self.masks(last) == 0:
                self.activated[last + 1] = progress >= far

    def window_start(self) -> int:
        """First position whose row the next forward computes; stamps and caches finished blocks on the way."""
        rules, now, commit_to = self.rules, self.forwards + 1, self.cached_length
        for block in sorted(self.activated):
            if 0 < self.blocks[block][1] <= self.cached_length:
                continue
            if self.masks(block):
                break
            self.completed.setdefault(block, now)
            if now - self.completed[block] >= rules.cache_delay:
                self.cached.add(block)
                commit_to = self.blocks[block][1]
            elif rules.serial_stamps:
                break
        stabilising = any(self.masks(block) == 0 and block not in self.cached for block in self.completed)

        if rules.kv_cache == "none" or rules.cache_refresh_interval == 1:
            return 0
        if commit_to > self.cached_length:
            start, self.cached_length = self.cached_length, commit_to
            return start
        return 0 if stabilising or now % rules.cache_refresh_interval == 0 else self.cached_length

    def chosen(self, looks: dict[int, Look]) -> set[int]:
        """The positions that this forward decides."""
        created = sorted(self.activated)[1:]
        h = {p: looks[p].entropy for block in created for p in self.undecided(*self.blocks[block])}

        def lowest(among):
            return min(among, key=lambda p: (h[p], p))

        chosen = {p for p in h if self.accepts(h[p])}
        if self.rules.always_lowest:
            chosen.add(lowest(h))
        unfinished = [block for block in created if self.activated[block] and self.masks(block)]
        if unfinished:
            inside = self.undecided(*self.blocks[unfinished[0]])
            if not chosen.intersection(inside):
                chosen.add(lowest(inside))
        if not chosen:  # an activation threshold above 1 activates nothing
            chosen.add(lowest(h))
        return chosen

    # the whole canvas by a schedule

    def dream(self) -> None:
        """A share 1 - s/t of what is undecided per forward, from t = 1 down to `timestep_eps`."""
        rules = self.rules
        if rules.confidence_threshold is not None:
            return self.dream_by_confidence()
        times = torch.linspace(1, rules.timestep_eps, rules.steps + 1)
        for i in range(rules.steps):
            if self.answered():
                break
            looks = self.forward()
            candidates, last = self.undecided(), i == rules.steps - 1
            share = 1 - times[i + 1] / times[i]
            if rules.remasking == "origin":
                chosen = [p for p in candidates if last or rules.noise(self.forwards, p) < float(share)]
            else:
                count = len(candidates) if last else int(torch.tensor(float(len(candidates))) * share)
                score = {p: self.dream_score(looks[p]) for p in candidates}
                chosen = sorted(score, key=lambda p: (-score[p], p))[:count]
            self.commit(looks, chosen)

    def dream_score(self, seen: Look) -> float:
        by_name = {"maskgit_plus": seen.probability, "topk_margin": seen.margin, "entropy": -seen.entropy}
        return by_name[self.rules.remasking]

    def dream_by_confidence(self) -> None:
        """Quotas of equal size; only the best of a quota may be below the threshold, the others are put off."""
        rules = self.rules
        put_off = 0
        while not self.answered():
            looks = self.forward()
            score = {p: looks[p].probability for p in self.undecided()}
            this, before = (
                rules.max_new_tokens * min(i, rules.steps) // rules.steps for i in (self.forwards, self.forwards - 1)
            )
            quota = max(put_off + this - before, 1)
            ranked = sorted(score, key=lambda p: (-score[p], p))[:quota]
            chosen = [p for rank, p in enumerate(ranked) if rank == 0 or score[p] >= rules.confidence_threshold]
            put_off += this - before - len(chosen)
            self.commit(looks, chosen)
