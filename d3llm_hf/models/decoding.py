"""The canvas of a batch as a state machine of pure tensor rules: no model, no IO, no random numbers, no row loops.

The answer region of a batch is one table `(B, N)`: rows x positions to decide, in the order of the text. A step is

    open_blocks -> candidates -> choose (selection.py) -> commit -> undecide -> revise -> fill_after_stop -> finished

and `caching.py` says which slots of the canvas the step's forward recomputes. A decoding method is a `Rules` object.
"""

from dataclasses import dataclass, fields, replace

import torch


UNSTAMPED = -1


@dataclass(frozen=True)
class Rules:
    """A decoding method as a row of settings (see the tables of docs/methods.md).

    Attributes:
        block_length: positions of a block; the last one may be shorter. Where a window slides, all are one block.
        window_length: undecided positions of a window that slides with the first of them, in place of blocks (DSB); 0
            where there are blocks.
        window_span: positions that the window reaches over, decided ones included; 0 is all.
        score: what ranks a position, a key of `scoring.SCORES`; the lowest cost is committed first.
        select: which candidates are committed, a key of `selection.SELECTORS`.
        threshold: cost (nats of entropy, or negative log-probability) under which a candidate is committed.
        threshold_relaxation: fraction of itself by which the threshold has grown bolder where a block, or the window,
            is full (Streaming-dLLM); 0 leaves it as it is.
        inclusive: whether a cost equal to the threshold is committed.
        force_score: what ranks the position that a standing block is helped with, a key of `scoring.SCORES`; `None`
            is `score`, or the entropy where that is noise.
        force_best: also commit the cheapest candidate of the row, wherever it lies.
        greedy_force: a token forced into the first active block is the most probable one, even when sampling (LLaDA).
        relaxed_threshold: second, higher cost that suffices in some places (dInfer's hierarchy, LocalLeap).
        radius: positions around an anchor in which the relaxed threshold suffices (LocalLeap).
        factor: Fast-dLLM's factor.
        block_add_threshold: progress of the last block at which the next one is opened.
        block_activation_threshold: progress of the block before at which a block must advance in every step.
        early_stop: a row ends once everything up to its first stop token is decided.
        whole_blocks: it ends no sooner than the block of the stop token is decided (SDAR, LLaDA2).
        eos_fill: positions after the first stop token are filled at once.
        steps: forwards that a quota or a schedule spreads the answer over, or SDAR's and LLaDA2's each block; 0 is one
            for each position.
        min_commits: quota of a step where `steps` is 0 (LLaDA2).
        shift: logits row i predicts the token of slot i + shift (0: LLaDA, 1: Dream).
        kv_cache: which keys and values are kept between forwards, a key of `caching.PLANS` or "none".
        cache_delay: forwards between the end of a block (delayed) or a commit (dkv) and its caching.
        cache_refresh_interval: every how many forwards everything is recomputed; 0 is never.
        cache_window: positions around the decoded ones that are recomputed with them (vicinity, dkv_greedy).
        cache_warmup: forwards at the start that recompute everything (vicinity).
        serial_stamps: a block's delay starts once the block before is cached (LLaDA), not once it is finished (Dream).
        suffix_length: undecided positions behind the last open block that a forward sees; `None` is all of them.
        cfg_scale: weight of classifier-free guidance against the same canvas with its prompt masked; 0 is off.
        alg_temp: temperature of the choice of positions; 0 takes the cheapest.
        score_temperature: logits are divided by it before they rank (SDAR).
        score_processed: rank by the logits after temperature, top-p and the like (Dream's samplers), not before.
        credit: decay, exponent and weight of accumulated evidence (dInfer's credit decoding), or `None`.
        force_each: every active block that would stand still commits its cheapest position, not only the first (D2F).
        stop_closes: no further block opens once a stop token is decided, wherever it lies (D2F).
        starts_with_one: the first forward has one block open, whatever the threshold of the next (D2F).
        stores_apart: the reference has a forward of its own that only stores keys, of the prompt's whole blocks and of
            each finished one (SDAR).
        sub_block_length: candidates are those of the first so many positions of a block that have some, counted from
            the block's start; 0 is the whole block (Fast-dLLM v2).
        first_alone: a block's first position is decided by itself, in a forward that ends with the block before
            (Fast-dLLM v2).
        draft_length: canvases that are drafted beyond the decided one and verified in the same forward; 0 is none.
        lookahead: canvases beside the decided one, of one more token each, of which the row goes on with the surest
            (LoPA); 0 is none.
        lookahead_threshold: cost, as a negative log-probability, up to which a token may be that one.
        edit_threshold: cost under which another token takes the place of a decided one while its block is open
            (LLaDA2.1), `None` where what is decided stays.
        max_post_steps: forwards, after the last position of a block was decided, in which its tokens may be replaced.
        revoke: which decided positions are taken back, a key of `selection.REVOKERS`; `None` where none are.
        shadow_block: each forward also asks what the model would write at the open block's positions did it not see
            them (`asides.py`), whose answers stand for the decided ones (WINO).
        revoke_threshold: cost of a decided token over which it is taken back.
        scores_ahead: also score the block behind the open ones: for drafts, and so that a history begins before a
            block is opened.
        kl_threshold: divergence in nats under which a distribution counts as that of the forward before (KLASS);
            `None` where nobody remembers it.
        kl_history: forwards in a row for which a position must have been calm (KLASS).
        slot_size: positions of a slot, which is drafted and verified as a whole (ReFusion; see `slots.py`, which takes
            the place of this file then); 0 is none.
        serial_num_blocks: parts of the answer that are decided one after the other, of whole slots.
        slot_threshold: probability of its first token above which a slot is verified.
        token_threshold: probability above which a drafted token holds.
        length_rule: what says how long a row's canvas is, one of those of `adaptive_length.py`; `None` where the call
            said it.
        initial_length: positions of such a canvas before the first forward.
        length_low, length_high: signal under which it grows, and over which it shrinks.
        length_step: positions by which it changes, or a multiple of them.
        length_schedule: which multiple, a key of `adaptive_length.SCHEDULES`.
        length_window: predicted stop tokens that count, from the canvas' end.
    """

    block_length: int
    score: str
    select: str
    threshold: float = float("inf")
    window_length: int = 0
    window_span: int = 0
    threshold_relaxation: float = 0.0
    inclusive: bool = True
    force_score: str | None = None
    force_best: bool = False
    greedy_force: bool = False
    relaxed_threshold: float = float("inf")
    radius: int = 0
    factor: float = 0.0
    block_add_threshold: float = 1.0
    block_activation_threshold: float = 1.0
    early_stop: bool = False
    eos_fill: bool = False
    whole_blocks: bool = False
    steps: int = 0
    min_commits: int = 1
    shift: int = 0
    kv_cache: str = "none"
    cache_delay: int = 0
    cache_refresh_interval: int = 0
    cache_window: int = 0
    cache_warmup: int = 0
    serial_stamps: bool = False
    suffix_length: int | None = None
    cfg_scale: float = 0.0
    alg_temp: float = 0.0
    score_temperature: float = 1.0
    score_processed: bool = False
    credit: tuple[float, float, float] | None = None
    force_each: bool = False
    stop_closes: bool = False
    starts_with_one: bool = False
    stores_apart: bool = False
    sub_block_length: int = 0
    first_alone: bool = False
    draft_length: int = 0
    lookahead: int = 0
    lookahead_threshold: float = float("inf")
    edit_threshold: float | None = None
    max_post_steps: int = 0
    revoke: str | None = None
    revoke_threshold: float = float("inf")
    shadow_block: bool = False
    scores_ahead: bool = False
    kl_threshold: float | None = None
    kl_history: int = 1
    slot_size: int = 0
    serial_num_blocks: int = 1
    slot_threshold: float = 1.0
    token_threshold: float = 1.0
    length_rule: str | None = None
    initial_length: int = 0
    length_low: float = 0.0
    length_high: float = float("inf")
    length_step: int = 8
    length_schedule: str = "constant"
    length_window: int = 32

    @property
    def left_to_right(self) -> bool:
        """Whether every position is decided after all before it: blocks of one, opened when the last is decided."""
        if self.window_length:
            return 1 in (self.window_length, self.window_span)
        return self.block_length == 1 and self.block_add_threshold > 0

    @property
    def canvases(self) -> int:
        """Canvases of a row in one forward, at most: the decided one, drafts and lookaheads."""
        return 1 + self.draft_length + self.lookahead


@dataclass
class State:
    """What is known of every row. B rows, N positions, K blocks; block 0 of the cache's tables is the prompt.

    Attributes:
        tokens (`(B, N)` long): the answer region of the canvas; the mask token where undecided.
        undecided (`(B, N)` bool): by position, never by token id.
        unsettled (`(B, N)` bool): decided, but may still change; nowhere unless the rules edit or take back.
        changed (`(B, N)` bool): decided, replaced or taken back since the last forward, whose keys are still of what
            was there.
        step_map (`(B, N)` long): the forward (from 1) that committed the position, -1 where none did; the last one
            where it was taken back in between.
        rows (`(B,)` long): index of the row in the batch that `generate` was given.
        length (`(B,)` long): positions that the row has to decide; the columns behind them are nobody's. It changes
            where the rules let it find itself.
        slots (`(B, N)` long): where in the text a position lies; neighbours are neighbours there.
        offset (`(B,)` long): given tokens at the start of the first block; 0 unless blocks are aligned to the text.
        step (`(B,)` long): decoding steps made; one a forward, or several where drafts are verified together.
        open_count (`(B,)` long): blocks that may be decoded.
        active (`(B, K)` bool): blocks that must advance in every step.
        opened_step, opened_size (`(B, K)` long): step before which, and undecided positions with which, it opened.
        alone (`(B,)` bool): the next forward decides only the first position of the last open block, and sees nothing
            of that block.
        cached (`(B,)` long): leading blocks (prompt included) whose keys and values are kept.
        refreshed (`(B,)` long): steps made before the last forward that recomputed everything because a window's worth
            had been decided; 0 where blocks say when.
        completed_step (`(B, K + 1)` long): the forward from which a finished block's caching delay counts.
        reviews (`(B, K)` long): forwards that looked at a block in which nothing was undecided, and might replace.
        revoked (`(B,)` long): how often a position was taken back.
        calm (`(B, N)` long): forwards in a row, up to the last, that left a position's distribution nearly as it was;
            0 where nobody remembers it.
        finding (`(B,)` bool): whether `length` may still change; nowhere unless it finds itself.
        held (`(B,)` bool): whether what is decided may still be cut off with the end of the canvas.
        tail (`(B,)` long): given stop tokens behind the positions to decide, which are seen and are no answer.
        forward (`(B,)` long): forwards made, in all of which the row took part.
    """

    tokens: torch.Tensor
    undecided: torch.Tensor
    unsettled: torch.Tensor
    changed: torch.Tensor
    step_map: torch.Tensor
    rows: torch.Tensor
    length: torch.Tensor
    slots: torch.Tensor
    offset: torch.Tensor
    step: torch.Tensor
    open_count: torch.Tensor
    active: torch.Tensor
    opened_step: torch.Tensor
    opened_size: torch.Tensor
    alone: torch.Tensor
    cached: torch.Tensor
    refreshed: torch.Tensor
    completed_step: torch.Tensor
    reviews: torch.Tensor
    revoked: torch.Tensor
    calm: torch.Tensor
    finding: torch.Tensor
    held: torch.Tensor
    tail: torch.Tensor
    forward: torch.Tensor

    @classmethod
    def start(
        cls,
        tokens: torch.Tensor,
        undecided: torch.Tensor,
        rules: Rules,
        slots: torch.Tensor | None = None,
        offset: torch.Tensor | None = None,
    ) -> "State":
        """The canvas before the first forward, with its first block open; its prompt is complete since step 0.

        Args:
            tokens, undecided (`(B, N)`): as the attributes; what is undecided comes first in every row.
            slots (`(B, N)`, *optional*): as the attribute; one behind the other unless said otherwise.
            offset (`(B,)`, *optional*): as the attribute; 0 unless said otherwise.
        """
        (batch, length), device = tokens.shape, tokens.device
        first = 0 if offset is None else int(offset.max())
        blocks = -(-(first + length) // rules.block_length)

        def full(*shape: int, value: int = 0, dtype: torch.dtype = torch.long) -> torch.Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        state = cls(
            tokens=tokens,
            undecided=undecided,
            unsettled=torch.zeros_like(undecided),
            changed=torch.zeros_like(undecided),
            step_map=full(batch, length, value=-1),
            rows=torch.arange(batch, device=device),
            length=undecided.sum(1),
            slots=torch.arange(length, device=device).expand(batch, -1) if slots is None else slots,
            offset=full(batch) if offset is None else offset,
            step=full(batch),
            open_count=full(batch, value=1),
            active=full(batch, blocks, value=False, dtype=torch.bool),
            opened_step=full(batch, blocks),
            opened_size=full(batch, blocks),
            alone=full(batch, value=False, dtype=torch.bool),
            cached=full(batch),
            refreshed=full(batch),
            completed_step=full(batch, blocks + 1, value=UNSTAMPED),
            reviews=full(batch, blocks),
            revoked=full(batch),
            calm=full(batch, length),
            finding=full(batch, value=False, dtype=torch.bool),
            held=full(batch, value=False, dtype=torch.bool),
            tail=full(batch),
            forward=full(batch),
        )
        state.active[:, 0] = rules.block_activation_threshold <= 1
        state.opened_size[:, 0] = state.per_block(undecided, rules)[:, 0]
        state.completed_step[:, 0] = 0
        return state

    def select(self, index: torch.Tensor) -> "State":
        """The states of some rows, `index` being their `(B',)` indices; a row may be taken several times."""
        return State(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def moved(self, slots: torch.Tensor, blocks: int, mask_token_id: int) -> "State":
        """The same rows in tables of other widths; what is cut off is nobody's.

        Args:
            slots (`(B, N')`): as the attribute, in the canvas that they move to.
            blocks: of the row that has most.
            mask_token_id: of an undecided position.
        """
        columns = slots.shape[1] - self.tokens.shape[1]
        further = blocks - self.active.shape[1]
        # By columns of text, with what stands where a row has none; then by blocks.
        text = {"tokens": mask_token_id, "undecided": 0, "unsettled": 0, "changed": 0, "step_map": -1, "calm": 0}
        rest = {"active": 0, "opened_step": 0, "opened_size": 0, "completed_step": UNSTAMPED, "reviews": 0}
        wide = [(name, columns, value) for name, value in text.items()]
        wide += [(name, further, value) for name, value in rest.items()]
        pad = torch.nn.functional.pad
        tables = {name: pad(getattr(self, name), (0, more), value=value) for name, more, value in wide}
        return replace(self, slots=slots, **tables)

    @property
    def pending(self) -> torch.Tensor:
        """Positions `(B, N)` that are not what they will be: a block with one is not finished."""
        return self.undecided | self.unsettled

    def block_of(self, rules: Rules) -> torch.Tensor:
        """The block `(B, N)` in which a position lies."""
        column = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return (column + self.offset[:, None]) // rules.block_length

    def blocks(self, rules: Rules) -> torch.Tensor:
        """The blocks `(B,)` that a row has; the tables have as many as the longest."""
        return (self.length + self.offset + rules.block_length - 1) // rules.block_length

    def per_block(self, table: torch.Tensor, rules: Rules) -> torch.Tensor:
        """Sums a `(B, N)` bool table over blocks: `(B, K)`."""
        (batch, blocks), length = self.active.shape, table.shape[1]
        place = torch.arange(blocks * rules.block_length, device=table.device) - self.offset[:, None]
        inside = (place >= 0) & (place < length)
        return (table.gather(1, place.clamp(0, length - 1)) & inside).view(batch, blocks, -1).sum(-1)

    def reach(self, rules: Rules, ahead: int = 0) -> torch.Tensor:
        """Positions `(B,)` up to the end of the last open block, or of `ahead` more; to one that is decided alone.

        Where a window slides, up to its end; decided positions that lie in it count only for its span.
        """
        if rules.window_length:
            return window_end(self.undecided, rules.window_length, rules.window_span, ahead)
        end = (self.open_count + ahead) * rules.block_length - self.offset
        return torch.where(self.alone, end - rules.block_length + 1, end)

    def stop(self, stop_ids: torch.Tensor | None, may_stop: torch.Tensor) -> torch.Tensor:
        """Column of the first decided stop token `(B,)` among the positions `(B, N)` at which one ends a row, or N."""
        column = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return stop_position(self.tokens, ~self.undecided & may_stop & (column < self.length[:, None]), stop_ids)

    @staticmethod
    def cat(states: list["State"]) -> "State":
        """The rows of several states one after the other."""
        return State(**{f.name: torch.cat([getattr(state, f.name) for state in states]) for f in fields(State)})


def first_true(table: torch.Tensor) -> torch.Tensor:
    """Column of the first True of each row, the row's length where there is none: `(B,)`."""
    return torch.where(table.any(1), table.long().argmax(1), table.shape[1])


def window_end(undecided: torch.Tensor, length: int, span: int, ahead: int = 0) -> torch.Tensor:
    """The column `(B,)` behind a window that begins with the first undecided position (DSB, arXiv:2602.05992).

    Args:
        undecided (`(B, N)` bool): which positions are.
        length: undecided positions of the window; it goes to N where fewer are left.
        span: positions that it reaches over at most; 0 is all.
        ahead: windows behind it that count as well.
    """
    last = undecided.long().cumsum(1) >= length * (1 + ahead)
    end = (first_true(last) + 1).clamp_max(undecided.shape[1])
    return torch.minimum(end, first_true(undecided) + span * (1 + ahead)) if span else end


def stop_position(tokens: torch.Tensor, decided: torch.Tensor, stop_ids: torch.Tensor | None) -> torch.Tensor:
    """Column of the first decided stop token of each row of `(B, N)` tokens, N where there is none: `(B,)`."""
    if stop_ids is None:
        return torch.full(tokens.shape[:1], tokens.shape[1], device=tokens.device)
    return first_true(torch.isin(tokens, stop_ids) & decided)


def open_blocks(state: State, rules: Rules, stop: torch.Tensor) -> None:
    """Activates blocks whose predecessor is far enough, and opens at most one more block per row.

    Nothing opens behind a stop token that has been filled after (d3LLM, section 3.2
    steps 3 and 4 of its loop: activation first, then opening), nor with `stop_closes`.
    """
    left = state.per_block(state.pending, rules)  # (B, K)
    block = torch.arange(left.shape[1], device=left.device)
    column = torch.arange(state.tokens.shape[1], device=left.device)
    size = state.per_block(column < state.length[:, None], rules).clamp_min(1)

    def reached(fraction: float) -> torch.Tensor:  # (B, K)
        # In float64 as the reference does: in float32 a block of 5 with 2 decided would not reach 0.4.
        return 1 - left.double() / size >= fraction

    ready = reached(rules.block_activation_threshold).roll(1, dims=1)
    ready[:, 0] = rules.block_activation_threshold <= 1  # the prompt is decided

    state.active |= ready & (block < state.open_count[:, None])

    last = (state.open_count - 1)[:, None]
    far_enough = reached(rules.block_add_threshold).gather(1, last)[:, 0] | (left.gather(1, last)[:, 0] == 0)
    # Its own blocks, not those of the longest row: when a block opens decides what a cache recomputes.
    grows = far_enough & (state.open_count < state.blocks(rules))
    if rules.eos_fill or rules.stop_closes:
        grows &= stop == state.tokens.shape[1]
    if rules.starts_with_one:
        grows &= state.step > 0
    opened = grows[:, None] & (block == state.open_count[:, None])
    state.active |= opened & ready
    state.opened_step = torch.where(opened, state.step[:, None], state.opened_step)
    state.opened_size = torch.where(opened, left, state.opened_size)
    state.open_count = state.open_count + grows
    if rules.first_alone:
        last = (state.open_count - 1)[:, None]
        untouched = left.gather(1, last)[:, 0] == state.opened_size.gather(1, last)[:, 0]
        state.alone = untouched & (last[:, 0] * rules.block_length >= state.offset)


def decided_share(state: State, rules: Rules) -> torch.Tensor:
    """The decided fraction `(B, N)` of the block of each position; where a window slides, of the window `(B, 1)`."""
    if not rules.window_length:
        column = torch.arange(state.tokens.shape[1], device=state.tokens.device)
        left = state.per_block(state.undecided, rules)
        size = state.per_block(column < state.length[:, None], rules).clamp_min(1)
        return (1 - left.double() / size).gather(1, state.block_of(rules))
    end = torch.minimum(state.reach(rules), state.length)
    size = (end - first_true(state.undecided)).clamp_min(1)
    return (1 - candidates(state, rules).sum(1).double() / size)[:, None]


def candidates(state: State, rules: Rules, ahead: int = 0) -> torch.Tensor:
    """Undecided positions of open blocks and of `ahead` more, or of the window that slides in place of blocks.

    `(B, N)` bool, some in every unfinished row.

    Of those ahead, only what a forward sees.
    """
    column = torch.arange(state.tokens.shape[1], device=state.tokens.device)
    reach = state.reach(rules, ahead)
    if rules.suffix_length is not None:
        reach = torch.minimum(reach, state.reach(rules) + min(rules.suffix_length, len(column)))
    among = state.undecided & (column < reach[:, None])
    if rules.sub_block_length:
        part = (column + state.offset[:, None]) // rules.sub_block_length
        among &= part == part.gather(1, among.long().argmax(1, keepdim=True))
    return among


def commit(state: State, commits: torch.Tensor, tokens: torch.Tensor) -> None:
    """Writes the committed tokens of one step of every row; `state.forward` already counts the forward."""
    state.tokens = torch.where(commits, tokens, state.tokens)
    state.step_map = torch.where(commits, state.forward[:, None], state.step_map)
    state.undecided = state.undecided & ~commits
    state.changed = commits
    state.step = state.step + 1


def undecide(state: State, revoked: torch.Tensor | None, mask_token_id: int) -> None:
    """Takes back decided positions `(B, N)` in the step whose commits were just written; `None` is nothing."""
    if revoked is None:
        return
    state.tokens = state.tokens.masked_fill(revoked, mask_token_id)
    state.step_map = state.step_map.masked_fill(revoked, -1)
    state.undecided = state.undecided | revoked
    state.unsettled = state.unsettled & ~revoked
    state.changed = state.changed | revoked
    state.revoked = state.revoked + revoked.sum(1)


def revise(state: State, rules: Rules, commits: torch.Tensor, tokens: torch.Tensor, cost: torch.Tensor) -> None:
    """Replaces decided tokens by what the same forward is surer of, and settles the blocks that are through with it.

    A block is through with a forward that began with all of it decided and replaced nothing, or with the last of
    `max_post_steps` such forwards, or, where there are none, once all of it is decided. So is one whose positions may
    be taken back: nobody looks at it again.

    Args:
        state: after the `commits` `(B, N)` of the forward, and what it took back.
        tokens, cost (`(B, N)`): what the forward would have at each unsettled position, and at what cost.
    """
    if rules.edit_threshold is None and rules.revoke is None:
        return
    looked_at, hidden = state.unsettled, state.per_block(state.undecided | commits, rules)
    surer = float("-inf") if rules.edit_threshold is None else rules.edit_threshold
    edits = looked_at & (tokens != state.tokens) & (cost < surer)
    state.tokens = torch.where(edits, tokens, state.tokens)
    state.changed = state.changed | edits
    reviewed = (hidden == 0) & (state.per_block(looked_at, rules) > 0)
    state.reviews = state.reviews + reviewed
    through = reviewed & ((state.per_block(edits, rules) == 0) | (state.reviews >= rules.max_post_steps))
    if not rules.max_post_steps:
        through = state.per_block(state.undecided, rules) == 0
    state.unsettled = (looked_at | commits) & ~through.gather(1, state.block_of(rules))


def resize(state: State, rules: Rules, length: torch.Tensor, mask_token_id: int) -> None:
    """Gives rows another `length` `(B,)`: what is new is undecided, what lies behind is nobody's.

    A block that is cut off has never been open; one that is cut short, or goes on, stays as open as it was.
    """
    column = torch.arange(state.tokens.shape[1], device=length.device)
    new = (column >= state.length[:, None]) & (column < length[:, None])
    gone = column >= (length + state.tail)[:, None]
    state.tokens = state.tokens.masked_fill(new | gone, mask_token_id)
    state.step_map = state.step_map.masked_fill(new | gone, -1)
    state.undecided = (state.undecided | new) & ~gone
    state.unsettled = state.unsettled & ~gone
    state.changed = (state.changed | new) & ~gone
    state.calm = state.calm.masked_fill(new | gone, 0)
    state.length = length
    state.open_count = torch.minimum(state.open_count, state.blocks(rules)).clamp_min(1)
    block = torch.arange(state.active.shape[1], device=length.device)
    state.active = state.active & (block < state.open_count[:, None])


def fill_after_stop(state: State, stop: torch.Tensor, fill_token_id: int) -> None:
    """Decides everything after the first stop token at once, so that no forward is spent on it."""
    after = torch.arange(state.tokens.shape[1], device=stop.device) > stop[:, None]
    state.changed = state.changed | (after & (state.tokens != fill_token_id))
    state.tokens = torch.where(after, fill_token_id, state.tokens)
    state.undecided = state.undecided & ~after


def finished(state: State, rules: Rules, stop: torch.Tensor) -> torch.Tensor:
    """Rows that need no further forward: `(B,)` bool."""
    needed = state.pending
    if rules.whole_blocks:
        last = (stop + state.offset) // rules.block_length
        needed = needed & (state.block_of(rules) <= last[:, None])
    elif rules.early_stop:  # what may still change does not once the row has ended
        needed = state.undecided & (torch.arange(needed.shape[1], device=stop.device) <= stop[:, None])
    elif rules.stop_closes:  # what will never open is nobody's
        needed = torch.where((stop < needed.shape[1])[:, None], candidates(state, rules), needed)
    return ~needed.any(1)
