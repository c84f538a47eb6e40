"""Which slots of the canvas a forward recomputes: one plan for each way in which the field caches keys and values.

A forward overwrites the keys and values of the slots that it recomputes and attends to all (`cache.SlotCache`). In a
bidirectional model every kept key is an approximation: it was computed before something else was decided.
"""

from collections.abc import Callable

import torch

from .canvas import Canvas
from .decoding import UNSTAMPED, Rules, State, first_true
from .scoring import Sampler
from .selection import choose


class Plan:
    """What a plan may look at, and what it may narrow. B rows, N positions to decide, L slots of the canvas.

    Args:
        state, rules: before the forward, its blocks opened.
        among (`(B, N)` bool): the candidates of the forward; a plan may take some out.
        length: L.
        sampler: gives the costs of random remasking, which are known before the forward.
    """

    def __init__(self, state: State, rules: Rules, among: torch.Tensor, length: int, sampler: Sampler):
        self.state, self.rules, self.among, self.sampler = state, rules, among, sampler
        self.slots = slots = state.slots
        self.slot = torch.arange(length, device=slots.device)  # (L,)
        self.left = state.per_block(state.pending, rules)  # (B, K)
        self.is_open = torch.arange(self.left.shape[1], device=slots.device) < state.open_count[:, None]
        if rules.window_length:  # in place of a block's end: as much was decided as a block has
            since = (state.step_map > state.refreshed[:, None]).sum(1)
            state.refreshed = torch.where(since >= rules.window_length, state.step, state.refreshed)

    def edge(self, block: torch.Tensor, *, end: bool) -> torch.Tensor:
        """First slot of a block `(B,)`, or with `end` the slot behind it."""
        column = block * self.rules.block_length - self.state.offset + (self.rules.block_length - 1 if end else 0)
        before = column.clamp_max(0)  # given tokens at the start of the first block
        column = torch.minimum(column, self.state.length - 1).clamp_min(0)
        return self.slots.gather(1, column[:, None])[:, 0] + (1 if end else before)

    def slot_of(self, column: torch.Tensor) -> torch.Tensor:
        """The slot `(B,)` of a column, at most of the row's last one."""
        return self.slots.gather(1, torch.minimum(column, self.state.length - 1)[:, None])[:, 0]

    @property
    def start(self) -> torch.Tensor:
        """First slot `(B,)` of the first open block that is not finished, or of the window."""
        if self.rules.window_length:
            return self.slot_of(first_true(self.state.undecided))
        return self.edge(((self.left > 0) & self.is_open).long().argmax(1), end=False)

    @property
    def end(self) -> torch.Tensor:
        """Slot `(B,)` behind the last open block, or the window."""
        if self.rules.window_length:
            return self.slot_of(self.state.reach(self.rules) - 1) + 1
        return self.edge(self.state.open_count - 1, end=True)

    @property
    def opened(self) -> torch.Tensor:
        """Forwards `(B,)` that had been made when the last block was opened, or a window's worth had been decided."""
        if self.rules.window_length:
            return self.state.refreshed
        return self.state.opened_step.masked_fill(~self.is_open, 0).amax(1)

    @property
    def fresh(self) -> torch.Tensor:
        """Rows `(B, 1)` whose forward recomputes everything: the first of a block, and every so many after it."""
        done = self.state.step - self.opened
        every = self.rules.cache_refresh_interval
        return (done % every == 0 if every else done == 0)[:, None]

    def window(self, start: torch.Tensor, end: torch.Tensor | None = None) -> torch.Tensor:
        """Slots `(B, L)` from `start` to before `end` (the canvas's), with the one that predicts the first of them."""
        inside = self.slot >= (start - self.rules.shift)[:, None]
        return inside if end is None else inside & (self.slot < end[:, None])

    def between(self, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        """Slots `(B, L)` from `start` to before `end`."""
        return (self.slot >= start[:, None]) & (self.slot < end[:, None])

    @property
    def changed(self) -> torch.Tensor:
        """Slots `(B, L)` decided or replaced since the last forward: what is kept of them is of another token."""
        return self.spread(self.state.changed)

    def spread(self, marked: torch.Tensor) -> torch.Tensor:
        """The slots `(B, L)` of marked positions `(B, N)`."""
        blank = torch.zeros(len(self.slots), len(self.slot) + 1, dtype=torch.bool, device=self.slot.device)
        return blank.scatter(1, self.slots, marked)[:, :-1]

    def decided_in(self) -> torch.Tensor:
        """Forward `(B, L)` that decided the slot, at the earliest the first of the last block; inf where undecided."""
        first = (self.opened + 1).float()[:, None]
        decided = first.expand(-1, len(self.slot) + 1)
        steps = torch.maximum(self.state.step_map.float(), first).masked_fill(self.state.undecided, float("inf"))
        return decided.scatter(1, self.slots, steps)[:, :-1]


def prefix(plan: Plan) -> torch.Tensor:
    """Fast-dLLM's prefix cache: while a block is decoded, what lies before it is kept."""
    return plan.window(plan.start) | plan.changed | plan.fresh


def dual(plan: Plan) -> torch.Tensor:
    """Fast-dLLM's dual cache: while a block is decoded, what lies before and behind it is kept."""
    return plan.window(plan.start, plan.end) | plan.changed | plan.fresh


def vicinity(plan: Plan) -> torch.Tensor:
    """dInfer's vicinity refresh: the dual cache with a margin, after some forwards that recompute everything."""
    width = plan.rules.cache_window
    warm = (plan.state.step < plan.rules.cache_warmup)[:, None]
    return plan.window(plan.start - width, plan.end + width) | plan.changed | plan.fresh | warm


def sliding(plan: Plan) -> torch.Tensor:
    """DSB's cache (arXiv:2602.05992): the dual cache with a margin before it, at least as far as the start moved."""
    moved = first_true(plan.changed)  # where anything was decided, the first of it began the window or lies behind it
    start = torch.minimum(plan.start - plan.rules.cache_window, moved)
    return plan.window(start, plan.end) | plan.changed | plan.fresh


def dkv(plan: Plan) -> torch.Tensor:
    """dKV-Cache-Decode: a token is kept from `cache_delay` forwards after its commit, until the next block."""
    now = (plan.state.step + 1)[:, None]
    young = (now - plan.decided_in() <= plan.rules.cache_delay) | plan.fresh
    return young | plan.changed if plan.rules.cache_delay else young


def dkv_greedy(plan: Plan) -> torch.Tensor:
    """dKV-Cache-Greedy: what was just committed, what is committed next (known, being random), and its neighbours.

    Narrows the candidates to what is committed next.
    """
    rules, state = plan.rules, plan.state
    rows = state.rows[:, None].expand_as(plan.slots)
    columns = torch.arange(plan.slots.shape[1], device=plan.slots.device).expand_as(plan.slots)
    cost = plan.sampler.noise(rows.flatten(), state.step[:, None].expand_as(rows).flatten(), columns.flatten())
    cost = cost.view(rows.shape)
    plan.among, _ = choose(cost, cost, plan.among, state, rules)

    just = torch.zeros_like(plan.changed)
    for back in range(rules.cache_delay):
        just |= plan.spread((state.step_map == (state.step - back)[:, None]) & (state.step_map > 0))
    left, right = -(-rules.cache_window // 2), rules.cache_window // 2
    chosen = torch.nn.functional.pad(plan.spread(plan.among).float(), (right, left))
    near = torch.nn.functional.max_pool1d(chosen, left + right + 1, stride=1) > 0
    needed = just | near | plan.fresh
    return needed | plan.changed if rules.cache_delay else needed


def delayed(plan: Plan) -> torch.Tensor:
    """The delayed cache with refresh (d3LLM, section 3.4 of its loop), by blocks.

    A finished block is kept once `cache_delay` forwards have passed; while a finished block waits, and every
    `cache_refresh_interval` forwards, everything is recomputed.
    """
    state, rules = plan.state, plan.rules
    column = torch.arange(plan.left.shape[1] + 1, device=plan.left.device)
    finished = torch.cat([torch.ones_like(plan.left[:, :1], dtype=torch.bool), plan.left == 0], dim=1)  # (B, K + 1)
    finished &= column <= state.open_count[:, None]
    leading = finished.long().cumprod(1).bool()
    now = (state.step + 1)[:, None]

    # 1. Delays end, and start: for every finished leading block, or only for the first that is not cached yet.
    def due() -> torch.Tensor:
        stamped = state.completed_step != UNSTAMPED
        waited = leading & stamped & (now - state.completed_step >= rules.cache_delay)
        return waited.long().cumprod(1).sum(1)

    def stamp(which: torch.Tensor) -> None:
        new = which & leading & (state.completed_step == UNSTAMPED)
        state.completed_step = torch.where(new, now, state.completed_step)

    before = state.cached
    cached = torch.maximum(before, due()) if rules.serial_stamps else before
    stamp(column == cached[:, None] if rules.serial_stamps and rules.cache_delay else torch.ones_like(leading))
    if not (rules.serial_stamps and rules.cache_delay):
        cached = torch.maximum(cached, due())
    state.cached = cached

    # 2. The window: what was not cached, or everything.
    waiting = (leading & (state.completed_step != UNSTAMPED) & (column >= cached[:, None])).any(1)
    refresh = waiting
    if rules.cache_refresh_interval:
        refresh = refresh | ((state.step + 1) % rules.cache_refresh_interval == 0)
    full = refresh & (cached == before)  # a forward that caches more blocks reads what is cached already
    if rules.cache_refresh_interval == 1:
        full = torch.ones_like(full)  # "every forward" leaves nothing to read: the same tokens as without a cache
    start = plan.edge((before - 1).clamp_min(0), end=False).masked_fill(before == 0, 0)
    return plan.window(start) | full[:, None]


def exact(plan: Plan) -> torch.Tensor:
    """Of block-causal attention: finished blocks are kept from the first forward that saw them as they are.

    It is the one that follows their last commit and stores them beside what it decides, or one that replaced nothing
    in them; so there is none that only stores.
    """
    state = plan.state
    clean = (plan.left == 0) & (state.per_block(state.changed, plan.rules) == 0)
    start = plan.edge(clean.long().cumprod(1).sum(1), end=False)
    # What predicts the first of them is final; where that is a candidate, the forward takes it in of itself.
    return plan.between(start.where(state.forward > 0, 0), plan.end)


def exact_dual(plan: Plan) -> torch.Tensor:
    """Fast-dLLM v2's cache of sub-blocks: of the last block only the sub-block that is being decided, once that began.

    All that lies before the block is exact. The block is recomputed in its first forward, and while the first slot of
    the sub-block is undecided.
    """
    state, rules = plan.state, plan.rules
    length = rules.sub_block_length
    first = plan.among.long().argmax(1) + state.offset
    start = first // length * length - state.offset  # (B,) column of the sub-block's first slot, or before the first
    begun = (start < 0) | ~state.undecided.gather(1, start.clamp_min(0)[:, None])[:, 0]
    block = (state.open_count - 1) * rules.block_length - state.offset
    seen = state.step - plan.opened > (rules.first_alone & (block >= 0)).long()  # by more than what decides its first
    slot = state.slots[:, 0] + start
    return torch.where((begun & seen)[:, None], plan.between(slot, slot + length), exact(plan))


# A plan gives the slots `(B, L)` to recompute.
PLANS: dict[str, Callable[[Plan], torch.Tensor]] = {
    "prefix": prefix,
    "dual": dual,
    "delayed": delayed,
    "dkv": dkv,
    "dkv_greedy": dkv_greedy,
    "vicinity": vicinity,
    "sliding": sliding,
    "exact": exact,
    "exact_dual": exact_dual,
}


def spent_by_reference(state: State, rules: Rules, canvas: Canvas) -> torch.Tensor:
    """Forwards `(B,)` that a method's own code would have made beside the present one.

    Fast-dLLM's first code: one more where the step that opened a block finished it. SDAR's and Fast-dLLM v2's: one
    that stores the whole blocks of the prompt, and one for each block that was finished, less what is one already.
    """
    if rules.stores_apart:
        left, changed = state.per_block(state.pending, rules), state.per_block(state.changed, rules)
        stored = ((left == 0) & (changed > 0)).sum(1) - canvas.only_stores(state).long()
        return stored + (canvas.has_earlier_blocks & (state.forward == 1)).long()
    by_threshold = rules.select == "threshold" and rules.block_add_threshold >= 1 and not rules.window_length
    if rules.kv_cache not in ("prefix", "dual") or rules.early_stop or not by_threshold:
        return torch.zeros_like(state.rows)
    last = (state.open_count - 1)[:, None]
    left = state.per_block(state.pending, rules).gather(1, last)[:, 0]
    return ((left == 0) & (state.opened_step.gather(1, last)[:, 0] == state.step - 1)).long()
