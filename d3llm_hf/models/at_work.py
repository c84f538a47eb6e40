"""The rows at work: calls are admitted, all rows take a step together, and each leaves when it has ended.

`generate` admits one call and steps until its rows have left. A server admits further calls between any two steps:
they are laid beside the others in canvases of one width, and begin with their own first forward. What a row draws and
decides, and how many forwards it takes, does not depend on who is beside it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch

from .adaptive_length import AdaptiveLength
from .cache import SlotCache
from .caching import PLANS, Plan, spent_by_reference
from .call import Call, check_contract
from .canvas import Canvas
from .decoding import State, candidates, commit, fill_after_stop, finished, open_blocks, revise, undecide
from .half_precision import fast_products
from .ledger import Ledger
from .lookahead import Lookahead
from .processors import Processors
from .scoring import SamplerOfMany, Scorer
from .selection import choose, take_back
from .speculation import Speculation
from .static_shapes import static_shapes
from .text_config import text_setting
from .token_ids import vocabulary_of


FORWARD = 256
"""Positions that cost as much as it costs to make one forward more."""


def narrower(widths: list[int]) -> list[int] | None:
    """The rows whose forward is better made apart from the wider ones, `None` where one forward of all is less work.

    A forward is as wide as its widest row.

    Args:
        widths: positions that each row recomputes.
    """
    order = sorted(range(len(widths)), key=widths.__getitem__)
    best, found = len(widths) * widths[order[-1]], None
    for count in range(1, len(order)):
        work = FORWARD + count * widths[order[count - 1]] + (len(order) - count) * widths[order[-1]]
        if work < best:
            best, found = work, order[:count]
    return found


class RowsAtWork(ABC):
    """State, canvases, cache and counts of the rows that are being decoded. Leave it as a context, whatever happens.

    Its memory is that of as many canvases as rows are admitted, each as long as the longest prompt and answer.

    Args:
        model: a `CanvasContract`.
    """

    canvas: Canvas
    state: State
    ledger: Ledger

    def __init__(self, model: Any):
        self.model = model
        self.kind: Any = None  # of the calls that it takes; see [`Call.kind`]
        self._cleanup = ExitStack()
        self._size = 0
        self._pads: bool | None = None  # whether the model reads padded rows, once known

    def __enter__(self) -> "RowsAtWork":
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Ends the streams of calls that are still at work, because of `error` if there is one."""
        left, self._size = self.calls, 0
        for call in left:
            call.close(error)
        self._cleanup.close()

    @property
    def size(self) -> int:
        """Rows at work."""
        return self._size

    @property
    def calls(self) -> Sequence[Call]:
        """Those that have rows at work."""
        return self.ledger.calls if self._size else ()

    def takes(self, call: Call) -> bool:
        """Whether a call may be admitted: any where nobody is at work, otherwise those of the same kind."""
        if not self._size:
            return True
        return call.kind is not None and call.kind == self.kind and self._reads_padding(call)

    def _reads_padding(self, call: Call) -> bool:
        if self._pads is None:
            mask, in_blocks = torch.zeros_like(call.canvas.base, dtype=torch.bool), call.canvas.blocks is not None
            try:
                check_contract(self.model, mask, call.rules, batch=2, in_blocks=in_blocks)
                self._pads = True
            except ValueError:
                self._pads = False
        return self._pads

    @torch.no_grad()
    def admit(self, call: Call) -> None:
        """Takes in all rows of a call, which take part from the next step on.

        Raises:
            ValueError: for a call of another kind than those at work, and what the method has to say of its settings.
        """
        if not self.takes(call):
            raise ValueError(
                "`call` must be of the kind of those at work, and one that others may join (got another). Admit it to "
                "`RowsAtWork` of its own, or when all rows have left."
            )
        if self._size:
            self._join(call)
        else:
            self._cleanup.close()
            self.kind = call.kind
            self._begin(call)
        self._size += call.canvas.batch

    @torch.no_grad()
    def step(self) -> None:
        """One forward for all rows. What has ended has left afterwards: see [`Call`] for what came of it."""
        with fast_products(self.model, compiled=self._compiled):
            outcome = self._forward()
        self._keep(self.ledger.leave(self.state, *outcome))

    @torch.no_grad()
    def leave(self, call: Call, error: Exception) -> None:
        """Takes the rows of a call out, which fails with `error`."""
        gone = torch.tensor(call.places, device=self.state.rows.device)
        self.ledger.drop(call, error)
        self._keep((~torch.isin(self.state.rows, gone)).nonzero()[:, 0])

    # ---- what depends on the method --------------------------------------------------------------------------------

    _compiled = False

    @abstractmethod
    def _begin(self, call: Call) -> None:
        """Admits a call where nobody is at work."""

    @abstractmethod
    def _join(self, call: Call) -> None:
        """Admits a call beside others."""

    @abstractmethod
    def _forward(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Forwards and decides; returns what [`Ledger.leave`] takes beside the state."""

    def _select(self, keep: torch.Tensor) -> None:
        """Keeps the rows with the `(B',)` indices `keep`."""
        self.state, self.canvas = self.state.select(keep), self.canvas.select(keep)

    def _keep(self, keep: torch.Tensor | None) -> None:
        if keep is not None:
            self._select(keep)
            self._size = len(keep)

    # ---- what does not ---------------------------------------------------------------------------------------------

    def _lay(self, call: Call) -> torch.Tensor:
        """Lays the canvases of a call beside the others; returns the places `(B,)` of its rows.

        The prompts of all rows end at one slot. So those at work may move, and padding that nobody needs goes.
        """
        # 1. Lengths for all
        rules = call.rules
        prompt = max(self.canvas.widths[0], call.canvas.widths[0])
        columns = max(each.canvas.slots.shape[1] for each in (*self.calls, call))
        state = call.canvas.start(rules)
        offset = max(int(self.state.offset.max()), int(state.offset.max()))  # host syncs
        blocks = -(-(offset + columns) // rules.block_length)

        # 2. Both move there
        tables = ((self.state, self.canvas), (state, call.canvas))
        moved = [(each, canvas.moved(prompt, columns)) for each, canvas in tables]
        places = torch.tensor(self.ledger.admit(call, columns), device=state.rows.device)
        states = [each.moved(canvas.slots, blocks, canvas.mask_token_id) for each, canvas in moved]
        states[1].rows = places
        self.state = State.cat(states)
        self.canvas = moved[0][1].beside(moved[1][1])
        return places

    def _draw_apart(self, sampler: Any, call: Call, places: torch.Tensor) -> SamplerOfMany:
        """The sampler of all rows, of which `sampler` was that of the ones before the call."""
        if not isinstance(sampler, SamplerOfMany):
            first = self.calls[0]
            own, sampler = sampler, SamplerOfMany()
            sampler.admit(own, first.places)
        sampler.admit(call.sampler, places.tolist())
        return sampler


class CanvasRows(RowsAtWork):
    """Rows whose canvas is decided position by position."""

    def _begin(self, call: Call) -> None:
        canvas, rules = call.canvas, call.rules
        state = canvas.start(rules)
        self.adaptive = AdaptiveLength(rules, call.stop_ids, canvas, call.least)
        self.adaptive.begin(state)
        ledger = Ledger(call, state)
        self._compiled = call.compiled
        self.rules, self.stop_ids = rules, call.stop_ids
        self.scorer = Scorer(
            rules,
            canvas.mask_token_id,
            sampler=call.sampler,
            sampling=call.sampling,
            processors=Processors(
                call.processors,
                rules,
                prompt=call.shown,
                canvas=canvas,
                tokens=ledger.tokens,
                stop_ids=call.stop_ids,
                vocab_size=vocabulary_of(self.model.config),
            ),
        )
        self.speculation: Speculation | Lookahead = Speculation(rules, call.stop_ids, call.sampler)
        if rules.lookahead:
            self.speculation = Lookahead(rules, call.stop_ids, self.scorer.processors)
        cache = None
        if rules.kv_cache != "none":
            cache = SlotCache(text_setting(self.model.config, "num_hidden_layers"), canvas.length)
        shapes = static_shapes(self.model, canvas, rules, cache, call.config)
        self.canvas, self.cache = self._cleanup.enter_context(shapes)
        self.state, self.ledger = state, ledger
        ledger.take(call, state.rows.tolist())

    def _join(self, call: Call) -> None:
        slot = self.canvas.prompt_length
        places = self._lay(call)
        more, columns = len(places), self.state.tokens.shape[1]
        if self.cache is not None:
            self.cache.move(self.canvas.prompt_length - slot, self.canvas.length, more)
        self.scorer.admit(places, columns)
        self.speculation.admit(more, columns)
        sampler = self._draw_apart(self.scorer.sampler, call, places)
        self.scorer.sampler = sampler
        if isinstance(self.speculation, Speculation):
            self.speculation.sampler = sampler

    def _forward(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Stages 2 to 6 of `generate`."""
        model, rules, canvas, cache = self.model, self.rules, self.canvas, self.cache
        stop_ids, counts = self.stop_ids, self.ledger.counts

        # 2. Draft canvases beside the decided ones, where the rules ask for it
        trial, drawn = self.speculation.extend(self.state, canvas)

        # 3. Open blocks and plan which slots the next forward recomputes
        open_blocks(trial, rules, trial.stop(stop_ids, drawn.may_stop))
        among, recompute = candidates(trial, rules), None
        if cache is not None:
            plan = Plan(trial, rules, among, drawn.length, self.scorer.sampler)
            recompute, among = PLANS[rules.kv_cache](plan), plan.among

        # 4. Forward them; logits of the candidates only, and of decided positions that may still change
        asked = among | trial.unsettled
        scored = asked | candidates(trial, rules, ahead=1) if rules.scores_ahead else asked
        row, column = self.adaptive.heard(scored, trial).nonzero(as_tuple=True)  # (n,) each
        where = row, column
        logits, computed = self._logits(drawn, trial, recompute, where)
        counts.computed.index_add_(0, trial.rows, computed)
        counts.stored.index_add_(0, trial.rows, drawn.only_stores(trial).long())

        # 5. Score the candidates: a token and a cost each
        logits, where = self.adaptive.read(model.text_logits(logits), scored, where)
        scores = self.scorer(logits, trial, drawn, where)
        scores.broken *= asked  # of what is looked at for drafts or a history alone nothing is asked

        # 6. Commit what the rules choose, take back, replace, settle which canvases stay; fill after a stop; lengthen
        #    or shorten the canvas
        commits, forced = choose(scores.cost, scores.force_cost, among, trial, rules)
        tokens = torch.where(forced, scores.best_tokens, scores.tokens)
        commits = self.scorer.processors.compatible(commits, tokens, scores.cost, trial, drawn)
        commits = self.adaptive.permitted(commits, trial)
        revoked = take_back(scores.cost, commits, trial, rules)
        trial.forward = trial.forward + 1
        commit(trial, commits, tokens)
        undecide(trial, revoked, drawn.mask_token_id)
        revise(trial, rules, commits, tokens, scores.cost)
        state, scores = self.speculation.settle(trial, scores)
        stop = state.stop(stop_ids, canvas.may_stop)
        further = spent_by_reference(state, rules, canvas)
        filled = torch.zeros_like(state.rows, dtype=torch.bool)
        if rules.eos_fill and stop_ids is not None and canvas.fill_token_id is not None:
            filled = state.undecided.any(1)
            fill_after_stop(state, stop, canvas.fill_token_id)
        if self.adaptive.change(state, stop):
            stop = state.stop(stop_ids, canvas.may_stop)  # which may have been cut off
        self.state = state
        return finished(state, rules, stop), filled, further, scores.broken.amax(1)

    def _logits(
        self, drawn: Canvas, trial: State, recompute: torch.Tensor | None, where: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What [`Canvas.forward`] returns. Where calls share a cache, in two forwards if that is less work.

        Who has just come, or opens a block, recomputes much; beside it all others would.
        """
        cache, narrow = self.cache, None
        alone = len(self.calls) == 1 or self.rules.draft_length or self.rules.lookahead
        if cache is not None and recompute is not None and cache.is_initialized and not alone:
            narrow = narrower(recompute.sum(1).tolist())  # a host sync
        if narrow is None or cache is None or recompute is None:
            return drawn.forward(self.model, trial, self.rules, cache, recompute, where)
        row, column = where
        of_row = torch.ones_like(trial.undecided[:, 0]).index_fill(0, row.new_tensor(narrow), False)
        logits, computed = None, torch.zeros_like(trial.rows)
        for part in (of_row, ~of_row):
            rows, mine = part.nonzero()[:, 0], part[row]
            place = (part.long().cumsum(0) - 1)[row[mine]]
            with cache.only(rows):
                found, computed[rows] = drawn.select(rows).forward(
                    self.model, trial.select(rows), self.rules, cache, recompute[rows], (place, column[mine])
                )
            logits = found.new_empty(len(row), found.shape[1]) if logits is None else logits
            logits[mine] = found
        return logits, computed  # type: ignore[return-value]  # both parts have rows

    def _select(self, keep: torch.Tensor) -> None:
        super()._select(keep)
        self.speculation.select(keep)
        if self.cache is not None:
            self.cache.select_rows(keep)


__all__ = ["CanvasRows", "RowsAtWork", "narrower"]
