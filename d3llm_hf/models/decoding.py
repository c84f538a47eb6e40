"""The decoding step as pure tensor rules: no model, no IO, no random state, no loop over rows or positions.

The answer region of a batch of canvases is one table `(B, N)`: rows x new tokens. Prompts are left-padded, so column j
is slot P + j of every row. A step is

    open_blocks  ->  choose  ->  commit  ->  fill_after_stop  ->  finished

and `plan_cache` says which slots the step's forward must recompute. A decoding method is a `Rules` object, no more.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import torch


UNSTAMPED = -1


@dataclass(frozen=True)
class Rules:
    """A decoding method as a row of settings (see the README's table of methods).

    Attributes:
        block_length: positions of a block; the last one may be shorter.
        score: what ranks a position, a key of `scoring.SCORES`; the lowest cost is committed first.
        select: which candidates are committed, a key of `SELECTORS`.
        threshold: cost (nats of entropy, or negative log-probability) under which `select="threshold"` commits.
        inclusive: whether a cost equal to the threshold is committed.
        force_best: also commit the cheapest candidate of the row, wherever it lies (LLaDA).
        greedy_force: a token forced into the first active block is the most probable one, even when sampling (LLaDA).
        block_add_threshold: progress of the last block at which the next one is opened.
        block_activation_threshold: progress of the block before at which a block must advance in every step.
        early_stop: a row ends once everything up to its first stop token is decided.
        eos_fill: positions after the first stop token are filled at once.
        steps: forwards that a quota or a schedule spreads the answer over.
        shift: logits row i predicts the token of slot i + shift (0: LLaDA, 1: Dream).
        delayed_cache: keep keys and values of finished blocks (`plan_cache`).
        cache_delay: forwards between the end of a block and its caching.
        cache_refresh_interval: every how many forwards everything is recomputed; 0 is never.
        serial_stamps: a block's delay starts once the block before is cached (LLaDA), not once it is finished (Dream).
        cfg_scale: weight of classifier-free guidance against the same canvas with its prompt masked; 0 is off.
        alg_temp: temperature of the choice of positions; 0 takes the cheapest.
        score_processed: rank by the logits after temperature, top-p and the like (Dream's samplers), not before.
    """

    block_length: int
    score: str
    select: str
    threshold: float = float("inf")
    inclusive: bool = True
    force_best: bool = False
    greedy_force: bool = False
    block_add_threshold: float = 1.0
    block_activation_threshold: float = 1.0
    early_stop: bool = False
    eos_fill: bool = False
    steps: int = 1
    shift: int = 0
    delayed_cache: bool = False
    cache_delay: int = 0
    cache_refresh_interval: int = 0
    serial_stamps: bool = False
    cfg_scale: float = 0.0
    alg_temp: float = 0.0
    score_processed: bool = False

    @property
    def left_to_right(self) -> bool:
        """Whether every position is decided after all before it: blocks of one, opened when the last is decided."""
        return self.block_length == 1 and self.block_add_threshold > 0


@dataclass
class State:
    """What is known of every row. B rows, N new tokens, K blocks; block 0 of the cache's tables is the prompt.

    Attributes:
        tokens (`(B, N)` long): the answer region of the canvas; the mask token where undecided.
        undecided (`(B, N)` bool): by position, never by token id.
        step_map (`(B, N)` long): the forward (from 1) that committed the token, -1 where none did.
        rows (`(B,)` long): index of the row in the batch that `generate` was given.
        open_count (`(B,)` long): blocks that may be decoded.
        active (`(B, K)` bool): blocks that must advance in every step.
        opened_step, opened_size (`(B, K)` long): forward before which, and undecided positions with which, it opened.
        cached (`(B,)` long): leading blocks (prompt included) whose keys and values are kept.
        completed_step (`(B, K + 1)` long): the forward from which a finished block's caching delay counts.
        step (`int`): forwards made; every row in the state took part in all of them.
    """

    tokens: torch.Tensor
    undecided: torch.Tensor
    step_map: torch.Tensor
    rows: torch.Tensor
    open_count: torch.Tensor
    active: torch.Tensor
    opened_step: torch.Tensor
    opened_size: torch.Tensor
    cached: torch.Tensor
    completed_step: torch.Tensor
    step: int = 0

    @classmethod
    def start(cls, batch: int, length: int, rules: Rules, mask_token_id: int, device: torch.device) -> "State":
        """The fully masked answer with its first block open; the prompt before it is complete since step 0."""
        blocks = -(-length // rules.block_length)

        def full(*shape: int, value: int = 0, dtype: torch.dtype = torch.long) -> torch.Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        state = cls(
            tokens=full(batch, length, value=mask_token_id),
            undecided=full(batch, length, value=True, dtype=torch.bool),
            step_map=full(batch, length, value=-1),
            rows=torch.arange(batch, device=device),
            open_count=full(batch, value=1),
            active=full(batch, blocks, value=False, dtype=torch.bool),
            opened_step=full(batch, blocks),
            opened_size=full(batch, blocks),
            cached=full(batch),
            completed_step=full(batch, blocks + 1, value=UNSTAMPED),
        )
        state.active[:, 0] = rules.block_activation_threshold <= 1
        state.opened_size[:, 0] = min(rules.block_length, length)
        state.completed_step[:, 0] = 0
        return state

    def select(self, keep: torch.Tensor) -> "State":
        """The state of some rows, `keep` being their `(B',)` indices."""
        kept = {f.name: getattr(self, f.name)[keep] for f in fields(self) if f.name != "step"}
        return replace(self, **kept)


def per_block(table: torch.Tensor, block_length: int) -> torch.Tensor:
    """Sums a `(B, N)` bool table over blocks: `(B, K)`."""
    batch, length = table.shape
    padded = torch.nn.functional.pad(table.long(), (0, -length % block_length))
    return padded.view(batch, -1, block_length).sum(-1)


def first_true(table: torch.Tensor) -> torch.Tensor:
    """Column of the first True of each row, the row's length where there is none: `(B,)`."""
    return torch.where(table.any(1), table.long().argmax(1), table.shape[1])


@lru_cache
def most_left(size: int, fraction: float) -> int:
    """Most undecided positions with which a block of `size` is decided to `fraction`, -1 where none will do.

    Counted in float64 as the reference does; in float32 a block of 5 with 2 decided would not reach 0.4.
    """
    return max((left for left in range(size + 1) if 1 - left / size >= fraction), default=-1)


def stop_position(tokens: torch.Tensor, decided: torch.Tensor, stop_ids: torch.Tensor | None) -> torch.Tensor:
    """Column of the first decided stop token of each row of `(B, N)` tokens, N where there is none: `(B,)`."""
    if stop_ids is None:
        return torch.full(tokens.shape[:1], tokens.shape[1], device=tokens.device)
    return first_true(torch.isin(tokens, stop_ids) & decided)


def open_blocks(state: State, rules: Rules, stop: torch.Tensor) -> None:
    """Activates blocks whose predecessor is far enough, and opens at most one more block per row.

    Nothing opens behind a stop token that has been filled after (d3LLM, section 3.2
    steps 3 and 4 of its loop: activation first, then opening).
    """
    left = per_block(state.undecided, rules.block_length)  # (B, K)
    block = torch.arange(left.shape[1], device=left.device)

    def reached(fraction: float) -> torch.Tensor:  # (B, K)
        last = state.tokens.shape[1] - (left.shape[1] - 1) * rules.block_length
        limit = torch.full_like(block, most_left(rules.block_length, fraction))
        return left <= limit.masked_fill(block == left.shape[1] - 1, most_left(last, fraction))

    ready = reached(rules.block_activation_threshold).roll(1, dims=1)
    ready[:, 0] = rules.block_activation_threshold <= 1  # the prompt is decided

    state.active |= ready & (block < state.open_count[:, None])

    last = (state.open_count - 1)[:, None]
    far_enough = reached(rules.block_add_threshold).gather(1, last)[:, 0] | (left.gather(1, last)[:, 0] == 0)
    grows = far_enough & (state.open_count < left.shape[1])
    if rules.eos_fill:
        grows &= stop == state.tokens.shape[1]
    opened = grows[:, None] & (block == state.open_count[:, None])
    state.active |= opened & ready
    state.opened_step = torch.where(opened, state.step, state.opened_step)
    state.opened_size = torch.where(opened, left, state.opened_size)
    state.open_count = state.open_count + grows


def candidates(state: State, rules: Rules) -> torch.Tensor:
    """Undecided positions of open blocks: `(B, N)` bool, at least one in every unfinished row."""
    column = torch.arange(state.tokens.shape[1], device=state.tokens.device)
    return state.undecided & (column < (state.open_count * rules.block_length)[:, None])


def plan_cache(state: State, rules: Rules, prompt_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which slots the next forward recomputes, for the delayed cache with refresh (d3LLM, section 3.4).

    Keys and values of slots before the window stay as they are; the forward overwrites those of the window and attends
    to all. A finished block is kept once `cache_delay` forwards have passed; while a finished block waits, and every
    `cache_refresh_interval` forwards, everything is recomputed.

    Returns:
        `(B,)` first slot of the window, and `(B,)` blocks that count as cached after this forward.
    """
    left = per_block(state.undecided, rules.block_length)
    column = torch.arange(left.shape[1] + 1, device=left.device)
    finished = torch.cat([torch.ones_like(left[:, :1], dtype=torch.bool), left == 0], dim=1)  # (B, K + 1)
    finished &= column <= state.open_count[:, None]
    leading = finished.long().cumprod(1).bool()
    now = state.step + 1

    # 1. Delays end, and start: for every finished leading block, or only for the first that is not cached yet.
    def due() -> torch.Tensor:
        stamped = state.completed_step != UNSTAMPED
        waited = leading & stamped & (now - state.completed_step >= rules.cache_delay)
        return waited.long().cumprod(1).sum(1)

    def stamp(which: torch.Tensor) -> None:
        new = which & leading & (state.completed_step == UNSTAMPED)
        state.completed_step = torch.where(new, now, state.completed_step)

    cached = torch.maximum(state.cached, due()) if rules.serial_stamps else state.cached
    stamp(column == cached[:, None] if rules.serial_stamps and rules.cache_delay else torch.ones_like(leading))
    if not (rules.serial_stamps and rules.cache_delay):
        cached = torch.maximum(cached, due())

    # 2. The window: what is not cached, or everything.
    waiting = (leading & (state.completed_step != UNSTAMPED) & (column >= cached[:, None])).any(1)
    start = _end_of_blocks(state.cached, rules, prompt_length, state.tokens.shape[1])
    refresh = waiting
    if rules.cache_refresh_interval and now % rules.cache_refresh_interval == 0:
        refresh = torch.ones_like(waiting)
    full = refresh & (cached == state.cached)  # a forward that caches more blocks reads what is cached already
    if rules.cache_refresh_interval == 1:
        full = torch.ones_like(full)  # "every forward" leaves nothing to read: the same tokens as without a cache
    return torch.where(full, 0, start), cached


def _end_of_blocks(blocks: torch.Tensor, rules: Rules, prompt_length: int, length: int) -> torch.Tensor:
    """Slot behind the first `blocks` blocks, the prompt being the first: `(B,)`."""
    end = prompt_length + ((blocks - 1) * rules.block_length).clamp(max=length)
    return torch.where(blocks > 0, end, 0)


def _best(cost: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """One-hot `(B, N)` of the cheapest marked position of each row; rows without a mark stay empty."""
    column = cost.masked_fill(~among, float("inf")).argmin(1, keepdim=True)
    return torch.zeros_like(among).scatter_(1, column, True) & among


def _cheapest(cost: torch.Tensor, among: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The `count` `(B,)` cheapest marked positions of each row."""
    rank = cost.masked_fill(~among, float("inf")).argsort(dim=1, stable=True).argsort(dim=1)
    return among & (rank < count[:, None])


def _by_threshold(cost: torch.Tensor, among: torch.Tensor, state: State, rules: Rules) -> torch.Tensor:
    """Every candidate whose cost is under the threshold; with `force_best` the cheapest of the row in any case."""
    under = cost <= rules.threshold if rules.inclusive else cost < rules.threshold
    commits = among & under
    return commits | _best(cost, among) if rules.force_best else commits


def _by_quota(cost: torch.Tensor, among: torch.Tensor, state: State, rules: Rules) -> torch.Tensor:
    """LLaDA's fixed quota: each block's positions spread evenly over its share of `steps`, the earlier steps first."""
    blocks = state.active.shape[1]
    current = first_true(per_block(among, rules.block_length) > 0).clamp_max(blocks - 1)  # (B,)
    steps = (rules.steps // blocks + (current < rules.steps % blocks)).clamp_min(1)
    size = state.opened_size.gather(1, current[:, None])[:, 0]
    done = state.step - state.opened_step.gather(1, current[:, None])[:, 0]
    quota = size // steps + (done < size % steps)
    return _cheapest(cost, among, quota.clamp_min(1))  # what a constraint put off is decided after the last step


def _kept_fraction(state: State, rules: Rules, eps: float = 1e-3) -> torch.Tensor:
    """Dream's schedule: the fraction s / t of masks that step i leaves, times falling linearly from 1 to `eps`."""
    times = torch.linspace(1, eps, rules.steps + 1)
    return times[state.step + 1] / times[state.step] if state.step < rules.steps - 1 else torch.zeros(())


def _by_schedule(cost: torch.Tensor, among: torch.Tensor, state: State, rules: Rules) -> torch.Tensor:
    """Dream's schedule: the cheapest `1 - s / t` of what is still masked, everything in the last step."""
    count = among.sum(1).float() * (1 - _kept_fraction(state, rules)).to(cost.device)
    return _cheapest(cost, among, count.long())


def _by_coin(cost: torch.Tensor, among: torch.Tensor, state: State, rules: Rules) -> torch.Tensor:
    """Dream's `origin`: each masked position with probability `1 - s / t`; `cost` is a uniform number."""
    return among & (cost < (1 - _kept_fraction(state, rules)).to(cost.device))


def _by_quota_and_threshold(cost: torch.Tensor, among: torch.Tensor, state: State, rules: Rules) -> torch.Tensor:
    """Dream's confidence threshold: of a quota that carries over, those under the threshold, and the cheapest."""
    length = state.tokens.shape[1]
    decided = length - state.undecided.sum(1)
    quota = _cheapest(cost, among, (length * (state.step + 1) // rules.steps - decided).clamp_min(1))
    return (quota & (cost <= rules.threshold)) | _best(cost, among)


SELECTORS: dict[str, Callable[[torch.Tensor, torch.Tensor, State, Rules], torch.Tensor]] = {
    "threshold": _by_threshold,
    "quota": _by_quota,
    "schedule": _by_schedule,
    "coin": _by_coin,
    "quota_and_threshold": _by_quota_and_threshold,
}


def choose(
    cost: torch.Tensor, force_cost: torch.Tensor, among: torch.Tensor, state: State, rules: Rules
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which candidates this step commits.

    Args:
        cost, force_cost (`(B, N)` float): rank for the selection, and for the position that is forced.
        among (`(B, N)` bool): the candidates.

    Returns:
        `(B, N)` bool of the commits, and of those among them that were forced: the cheapest position of the first
        active block that would otherwise stand still.
    """
    commits = SELECTORS[rules.select](cost, among, state, rules)
    forced = torch.zeros_like(commits)
    if rules.select == "threshold":
        left = per_block(among, rules.block_length) > 0
        first = first_true(state.active & left)  # (B,): K where no active block has work
        column = torch.arange(among.shape[1], device=among.device)
        inside = among & (column // rules.block_length == first[:, None])
        forced = _best(force_cost, inside) & ~(commits & inside).any(1, keepdim=True)
        # Whatever the thresholds, a row advances: every forward decides at least one token.
        stuck = ~(commits | forced).any(1, keepdim=True)
        commits = commits | forced | (_best(force_cost, among) & stuck)
    return commits, forced


def commit(state: State, commits: torch.Tensor, tokens: torch.Tensor) -> None:
    """Writes the committed tokens; `state.step` already counts the forward that decided them."""
    state.tokens = torch.where(commits, tokens, state.tokens)
    state.step_map = torch.where(commits, state.step, state.step_map)
    state.undecided = state.undecided & ~commits


def fill_after_stop(state: State, stop: torch.Tensor, fill_token_id: int) -> None:
    """Decides everything after the first stop token at once, so that no forward is spent on it."""
    after = torch.arange(state.tokens.shape[1], device=stop.device) > stop[:, None]
    state.tokens = torch.where(after, fill_token_id, state.tokens)
    state.undecided = state.undecided & ~after


def finished(state: State, rules: Rules, stop: torch.Tensor) -> torch.Tensor:
    """Rows that need no further forward: `(B,)` bool."""
    needed = state.undecided
    if rules.early_stop:
        needed = needed & (torch.arange(needed.shape[1], device=stop.device) <= stop[:, None])
    return ~needed.any(1)
