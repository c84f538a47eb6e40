"""A slow, obvious decoder of one unpadded prompt, written apart from the library, which must reproduce it.

Everything is a Python loop over positions. Undecided positions are tracked by position, never by token id. The rules
are those of the reference implementations with their defects corrected:

* after the tail behind an EOS is filled, the filled positions are no candidates any more;
* a length that is no multiple of the block ends in one shorter block;
* the mask token is never committed, yet entropies and confidences come from the softmax over the whole vocabulary;
* a cache holds one key and value per position; a forward overwrites what it forwards (`oracle_caches.py`);
* where logits row i predicts token i + 1, a window starts one position earlier, so that the row exists;
* `steps` that the blocks or the length do not divide: the earlier blocks get one more, quotas add up to the length;
* every forward of a threshold method decides something, whatever the thresholds;
* the factor rule of Fast-dLLM is the published one: the last rank must pass it as the others;
* a forward is counted when, and only when, it is made.

Beside it: `oracle_network.py` (running a model), `oracle_choices.py` (which candidates a forward commits) and
`oracle_caches.py` (which slots it recomputes).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import oracle_choices as choices
import torch
from oracle_caches import Windows
from oracle_choices import ranked
from oracle_network import UNDECIDED, Look, Network, Scripted, look


__all__ = ["Decoded", "Look", "Network", "Oracle", "Rules", "Scripted", "decode", "decode_with_model", "look"]


@dataclass
class Rules:
    """How to decode; the names are those of `generate`."""

    decoding_method: str
    max_new_tokens: int
    block_length: int | None = None  # None: 32, or with "dream" the whole answer
    steps: int | None = None  # None: one token a forward, or as many steps as there are positions ("dream")
    remasking: str = "low_confidence"
    entropy_threshold: float = 0.5
    confidence_threshold: float | None = None
    factor: float | None = None
    decoder: str = "threshold"  # of "dinfer": or "hierarchy", "credit"
    low_threshold: float = 0.5
    credit_decay: float = 0.8
    credit_exponent: float = 0.2
    credit_weight: float = 0.7
    entropy_bound: float = 0.1
    relaxed_threshold: float = 0.75
    leap_radius: int = 4
    kl_threshold: float = 0.01
    kl_history: int = 2
    window: str = "blocks"  # or "slide", "slide_span"
    window_span: int | None = None
    threshold_relaxation: float = 0.0
    block_add_threshold: float = 0.1
    block_activation_threshold: float = 0.95
    early_stop: bool = False
    kv_cache: str = "none"
    cache_delay: int = 1
    cache_refresh_interval: int | None = None
    cache_warmup: int = 4
    cache_window: int = 16
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
    # Fast-dLLM's Dream: a block's first forward commits the block's first position, alone. Then no candidate is left
    # whose row lies before the block, and windows start with it.
    blind_block_start: bool = False


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
    recomputed: list[list[int]]  # slots forwarded, per forward
    eos: int | None = None  # canvas position of the first EOS


def decode(network, prompt: list[int], rules: Rules) -> Decoded:
    """Decodes `prompt` by `rules`; see [`Oracle`]."""
    return Oracle(network, prompt, rules).run()


def decode_with_model(model, prompt: list[int], rules: Rules) -> Decoded:
    """The same with a model of this package; sets the two families' differences."""
    dream = model.logit_shift == 1
    rules.strict, rules.always_lowest, rules.serial_stamps = dream, not dream, not dream
    return decode(Network(model, model.logit_shift, rules.mask_token_id), prompt, rules)


class Oracle(Windows):
    """The canvas of one prompt and the loop that decides it. Block 0 is the prompt."""

    def __init__(self, network, prompt: list[int], rules: Rules):
        self.network, self.rules, self.prompt_length = network, rules, len(prompt)
        self.canvas = list(prompt) + [UNDECIDED] * rules.max_new_tokens
        self.length = len(self.canvas)
        self.canvas_before: list[int] | None = None
        self.committed: dict[int, int] = {}
        self.decided: dict[int, int] = {}
        self.recomputed: list[list[int]] = []
        self.positions_computed = self.extra_exit = 0
        self.seen: dict[int, list[tuple[int, Look]]] = {}  # of "credit": every look at a position, and its forward
        block_length = rules.block_length or (rules.max_new_tokens if rules.decoding_method == "dream" else 32)
        self.window_length = min(block_length, rules.max_new_tokens)
        if rules.window != "blocks":  # the answer is one block
            block_length = rules.max_new_tokens
        self.blocks = [(0, self.prompt_length)] + [
            (start, min(start + block_length, self.length))
            for start in range(self.prompt_length, self.length, block_length)
        ]
        # What the caches ask for: the blocks at work, since when, which exist, and the delayed cache's books.
        self.current, self.opened, self.activated = self.blocks[1], 0, {0: True}
        self.completed, self.cached, self.cached_length = {0: 0}, set(), 0

    def run(self) -> Decoded:
        {
            "llada": self.llada,
            "dkv": self.llada,
            "dream": self.dream,
            "d3llm": self.d3llm,
            "dparallel": lambda: self.block_by_block(choices.dparallel),
            "fast_dllm": lambda: self.block_by_block(choices.fast_dllm),
            "dinfer": self.dinfer,
            "entropy_bound": lambda: self.block_by_block(choices.entropy_bound),
            "local_leap": lambda: self.block_by_block(choices.local_leap),
            "klass": self.klass,
        }[self.rules.decoding_method]()
        return self.result()

    # what all methods share

    @property
    def forwards(self) -> int:
        return len(self.recomputed)

    def is_undecided(self, position: int) -> bool:
        return position >= self.prompt_length and self.canvas[position] == UNDECIDED

    def undecided(self, start: int = 0, end: int | None = None) -> list[int]:
        return [p for p in range(start, self.length if end is None else end) if self.is_undecided(p)]

    def masks(self, block: int) -> int:
        return len(self.undecided(*self.blocks[block]))

    def first_eos(self) -> int | None:
        for position in range(self.prompt_length, self.length):
            if self.canvas[position] in self.rules.eos_token_ids:
                return position
        return None

    def forward(self, wanted: list[int]) -> dict[int, torch.Tensor]:
        """The rows of some positions, guided by the classifier-free rule if asked for; counts one forward."""
        slots = self.slots(wanted)
        self.canvas_before = list(self.canvas)
        self.recomputed.append(slots)
        self.positions_computed += len(slots) * (2 if self.rules.cfg_scale else 1)
        rows = self.network(self.canvas, slots, wanted)
        if self.rules.cfg_scale:
            hidden = [UNDECIDED] * self.prompt_length + self.canvas[self.prompt_length :]
            blind = self.network(hidden, slots, wanted)
            rows = {p: blind[p] + (self.rules.cfg_scale + 1) * (rows[p] - blind[p]) for p in rows}
        if self.rules.top_k:
            rows = {
                p: row.masked_fill(row < row.topk(self.rules.top_k).values[-1], -math.inf) for p, row in rows.items()
            }
        return rows

    def look(self, rows: dict[int, torch.Tensor]) -> dict[int, Look]:
        return look(rows, self.rules.mask_token_id)

    def commit(self, looks: dict[int, Look], positions) -> None:
        if self.rules.blind_block_start and self.forwards == self.opened + 1:
            positions = [self.current[0]]
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

    def wasted(self) -> int:
        """Forwards that Fast-dLLM's first code makes for blocks that their first forward has finished."""
        rules, last, count = self.rules, 0, 0
        by_threshold = {
            "d3llm": rules.block_add_threshold >= 1,
            "dparallel": True,
            "fast_dllm": rules.factor is None,
        }.get(rules.decoding_method, False)
        by_threshold = by_threshold and rules.window == "blocks"
        if rules.kv_cache not in ("prefix", "dual") or rules.early_stop or not by_threshold:
            return 0
        for start, end in self.blocks:
            deciding = {self.committed[p] for p in range(max(start, self.prompt_length), end)}
            count += deciding == {last + 1}
            last = max(deciding, default=0)
        return count

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
            reference_forwards=self.forwards + self.extra_exit + self.wasted(),
            positions_computed=self.positions_computed,
            recomputed=self.recomputed,
            eos=eos,
        )

    # one block after the other

    def open_block(self, block: int) -> None:
        self.current, self.opened, self.activated[block] = self.blocks[block], self.forwards, True

    def works(self) -> bool:
        """Whether the current block needs another forward."""
        if self.rules.window != "blocks":
            return not self.answered()
        return bool(self.undecided(*self.current)) and not self.answered()

    def inside(self) -> list[int]:
        """The candidates of the next forward: what is undecided in the blocks at work, or in the window."""
        rules = self.rules
        if rules.window != "blocks":
            left = self.undecided()
            count = self.window_length
            end = left[count - 1] + 1 if len(left) >= count else self.length
            if rules.window == "slide_span":
                end = min(end, left[0] + (rules.window_span or rules.block_length or 32))
            self.current = left[0], end
            if sum(forward > self.opened for forward in self.committed.values()) >= count:
                self.opened = self.forwards
        return self.undecided(*self.current)

    def eased(self, position: int) -> Rules:
        """The rules at a position, with thresholds as its block or the window leaves them."""
        rules, (start, end) = self.rules, self.current
        if not rules.threshold_relaxation:
            return rules
        if rules.window == "blocks":
            start, end = next(block for block in self.blocks[1:] if block[0] <= position < block[1])
        loose = rules.threshold_relaxation * (1 - len(self.undecided(start, end)) / (min(end, self.length) - start))
        probability = rules.confidence_threshold and rules.confidence_threshold * (1 - loose)
        return replace(
            rules, confidence_threshold=probability, entropy_threshold=rules.entropy_threshold * (1 + loose)
        )

    def block_by_block(self, choose, looks_of=None) -> None:
        """In every block, what `choose` picks from the looks at its undecided positions, until none are left."""
        for block in range(1, len(self.blocks)):
            self.open_block(block)
            while self.works():
                looks = (looks_of or self.look)(self.forward(self.inside()))
                self.commit(looks, sorted(choose(looks, self.eased(min(looks)))))

    def dinfer(self) -> None:
        """One of dInfer's decoders."""
        if self.rules.decoder == "hierarchy":
            self.block_by_block(choices.dinfer_hierarchy)
        elif self.rules.decoder == "credit":
            self.block_by_block(choices.dinfer_threshold, self.look_with_credit)
        else:
            self.block_by_block(choices.dinfer_threshold)

    def klass(self) -> None:
        """Sure positions that have been calm for long enough; the next block is looked at before it is its turn."""
        last: dict[int, torch.Tensor] = {}
        calm: dict[int, int] = {}
        for block in range(1, len(self.blocks)):
            self.open_block(block)
            ahead = self.blocks[block + 1] if block + 1 < len(self.blocks) else (0, 0)
            while self.works():
                inside = self.undecided(*self.current)
                rows = self.forward(inside + self.undecided(*ahead))
                now = {p: row.double().softmax(-1) for p, row in rows.items()}
                calm = {
                    p: calm.get(p, 0) + 1
                    if p in last and choices.divergence(now[p], last[p]) < self.rules.kl_threshold
                    else 0
                    for p in now
                }
                last = now
                looks, made = self.look({p: rows[p] for p in inside}), self.forwards - self.opened
                self.commit(looks, sorted(choices.klass(looks, self.rules, calm, made)))

    def look_with_credit(self, rows: dict[int, torch.Tensor]) -> dict[int, Look]:
        """Looks at rows in which tokens gain that were the best before, the more the more recently and surely."""
        rules, now = self.rules, self.forwards
        for position, seen in self.look(rows).items():
            self.seen.setdefault(position, []).append((now, seen))
        fused = {}
        for position, row in rows.items():
            credit: dict[int, float] = {}
            for forward, seen in self.seen[position]:
                share = rules.credit_decay ** (now - forward) * seen.probability**rules.credit_exponent
                credit[seen.token] = credit.get(seen.token, 0.0) + share
            fused[position] = row.double().clone()
            for token, amount in credit.items():
                fused[position][token] += rules.credit_weight * math.log(1 + amount)
        return self.look(fused)

    def commit_cheapest(self, count: int) -> None:
        """One forward that commits the best ranked positions of the current block."""
        rules, candidates = self.rules, self.inside()
        noise = {p: rules.noise(self.forwards + 1, p) for p in candidates} if rules.remasking == "random" else {}
        if rules.kv_cache == "dkv_greedy":  # what will be committed is known before the forward
            candidates = sorted(ranked(noise)[:count])
        looks = self.look(self.forward(candidates))
        self.commit(looks, ranked(choices.costs(looks, rules.remasking, noise))[:count])

    def steps_per_block(self) -> list[int]:
        """The steps shared out, the earlier blocks getting one more; a step a position where none are given."""
        count = len(self.blocks) - 1
        if self.rules.steps is None:
            return [end - start for start, end in self.blocks[1:]]
        each, more = divmod(self.rules.steps, count)
        return [max(each + (index < more), 1) for index in range(count)]

    def llada(self) -> None:
        """A fixed share of the block per forward."""
        for block, steps in enumerate(self.steps_per_block(), start=1):
            self.open_block(block)
            masks = self.masks(block)
            # A window may hold less than a quota; what it put off takes further forwards.
            for i in range(steps if self.rules.window == "blocks" else masks):
                if self.works():
                    self.commit_cheapest(max(masks // steps + (i < masks % steps), 1))

    def dream(self) -> None:
        """A share 1 - s/t of what is undecided per forward, from t = 1 down to `timestep_eps`."""
        rules = self.rules
        if rules.confidence_threshold is not None:
            return self.dream_by_confidence()
        for block, steps in enumerate(self.steps_per_block(), start=1):
            self.open_block(block)
            times = torch.linspace(1, rules.timestep_eps, steps + 1)
            for i in range(steps):
                if not self.works():
                    break
                candidates, last = self.undecided(*self.current), i == steps - 1
                share = 1 - times[i + 1] / times[i]
                if rules.remasking == "origin":
                    looks = self.look(self.forward(candidates))
                    self.commit(looks, [p for p in candidates if last or rules.noise(self.forwards, p) < float(share)])
                else:
                    count = int(torch.tensor(float(len(candidates))) * share)
                    self.commit_cheapest(len(candidates) if last else count)

    def dream_by_confidence(self) -> None:
        """Quotas of equal size; only the best of a quota may be below the threshold, the others are put off."""
        rules = self.rules
        assert len(self.blocks) == 2, "the whole answer is one block"
        self.open_block(1)
        steps, put_off = rules.steps or rules.max_new_tokens, 0
        while not self.answered():
            looks = self.look(self.forward(self.undecided()))
            this, before = (rules.max_new_tokens * min(i, steps) // steps for i in (self.forwards, self.forwards - 1))
            quota = max(put_off + this - before, 1)
            best = ranked({p: -looks[p].probability for p in looks})[:quota]
            chosen = [
                p for rank, p in enumerate(best) if rank == 0 or looks[p].probability >= rules.confidence_threshold
            ]
            put_off += this - before - len(chosen)
            self.commit(looks, chosen)

    # several blocks at once

    def d3llm(self) -> None:
        """Blocks join while others are undecided; the first activated unfinished one always progresses.

        A block is created once its predecessor progressed a little, activated once it progressed far, and finished
        once nothing of it is undecided.
        """
        self.activated[1] = self.rules.block_activation_threshold <= 1.0
        while self.undecided():
            eos = self.first_eos() if self.rules.early_stop else None
            if eos is not None:
                self.fill_after(eos)
                if not self.undecided():
                    self.extra_exit = 1
                    return
            self.grow_blocks(may_create=eos is None)
            created = sorted(self.activated)[1:]
            first = min(block for block in created if self.masks(block))
            self.current = (self.blocks[first][0], self.blocks[created[-1]][1])
            looks = self.look(self.forward(self.inside()))
            self.commit(looks, sorted(self.chosen(looks)))

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
                self.opened = self.forwards

    def chosen(self, looks: dict[int, Look]) -> set[int]:
        """The positions that this forward decides."""
        h = {p: looks[p].entropy for p in looks}
        chosen = {p for p in h if choices.is_low(h[p], self.eased(p))}
        if self.rules.always_lowest:
            chosen.add(ranked(h)[0])
        unfinished = [block for block in sorted(self.activated)[1:] if self.activated[block] and self.masks(block)]
        if unfinished:
            inside = [p for p in self.undecided(*self.blocks[unfinished[0]]) if p in h]
            if not chosen.intersection(inside):
                chosen.add(ranked({p: h[p] for p in inside})[0])
        if not chosen:  # an activation threshold above 1 activates nothing
            chosen.add(ranked(h)[0])
        return chosen
