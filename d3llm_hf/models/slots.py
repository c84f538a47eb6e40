"""Decoding in slots (ReFusion): whole slots are drafted in any order, and verified from left to right.

A slot is a few neighbouring positions. The cache holds tokens in the order in which they were decided, which is not
that of the text: here a key lies at its place in the text, and masks say what was decided before.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from transformers.generation import LogitsProcessorList

from .at_work import RowsAtWork
from .cache import SlotCache
from .call import Call
from .decoding import Rules
from .ledger import Ledger
from .processors import Processors
from .scoring import CHUNK_ELEMENTS, NOT_FINITE, NOTHING_LEFT, Sampler
from .text_config import text_setting
from .token_ids import vocabulary_of


BEST = -1
"""Asked for in place of a token: the most probable one."""


@dataclass
class Ask:
    """What a row feeds to its next forward, and what it wants to know of it.

    Attributes:
        columns: of the answer, ascending.
        tokens: at these; the mask token where undecided.
        apart: whether a slot sees no other slot of this forward; otherwise a token sees all that are fed before it.
        wanted: places among `columns` whose logits are asked for.
        targets: for each of them the token whose probability is asked for, or `BEST`.
        draws: whether `BEST` may be drawn at random.
    """

    columns: list[int]
    tokens: list[int]
    apart: bool
    wanted: list[int]
    targets: list[int]
    draws: bool = False


Reply = list[tuple[int, float]]
"""For each place that was asked for a token and its probability."""


class RowInSlots:
    """One row as a sequence of forwards: `ask` says what to feed, `answer` takes what came of it.

    Args:
        rules: of the method.
        count: slots of the answer.
        stop_ids: tokens that end it.
        mask_token_id: of an undecided position.

    Attributes:
        ask: of the next forward, `None` where the row is decided.
        committed: columns and tokens that the last forward decided.
        rates: of each round, tokens per forward by the official count: a slot that ends the row, and those that it
            takes away, count as whole ones.
    """

    def __init__(self, rules: Rules, count: int, stop_ids: frozenset[int], mask_token_id: int):
        self.rules, self.size = rules, rules.slot_size
        self.stop_ids, self.mask_token_id = stop_ids, mask_token_id
        self.committed: list[tuple[int, int]] = []
        self.rates: list[float] = []
        self._rounds = self._decide(count)
        self.ask: Ask | None = next(self._rounds)

    def answer(self, reply: Reply) -> None:
        """Goes on with what the forward said."""
        self.committed = []
        try:
            self.ask = self._rounds.send(reply)
        except StopIteration:
            self.ask = None

    def _columns(self, slots: Sequence[int], start: int = 0) -> list[int]:
        """The columns of slots, from their column `start` on."""
        return [slot * self.size + column for slot in slots for column in range(start, self.size)]

    def _decide(self, count: int) -> Generator[Ask, Reply, None]:
        """Block by block, each until none of its slots is undecided; what follows a stop token's block is not."""
        blocks = min(self.rules.serial_num_blocks, count)
        ends = [count * block // blocks for block in range(blocks + 1)]
        for start, end in pairwise(ends):
            undecided, stopped = list(range(start, end)), False
            while undecided:
                undecided, stops = yield from self._round(undecided)
                stopped |= stops
            if stopped:
                return

    def _round(self, undecided: list[int]) -> Generator[Ask, Reply, tuple[list[int], bool]]:
        """One round: the slots that are left undecided, and whether a stop token was decided.

        1. Draft all tokens of the block's undecided slots.
        2. Choose the slots whose first token is sure, or the surest.
        3. Verify their drafts from left to right.
        4. Keep the whole slots of the leading run that holds; where there is none, repair each slot by itself.
        """
        # 1. Draft
        columns = self._columns(undecided)
        masks, everything = [self.mask_token_id] * len(columns), list(range(len(columns)))
        drafted = yield Ask(columns, masks, False, everything, [BEST] * len(columns), draws=True)
        tokens = {column: token for column, (token, _) in zip(columns, drafted, strict=True)}

        # 2. Choose
        sureness = [drafted[place][1] for place in range(0, len(columns), self.size)]
        chosen = [slot for slot, sure in zip(undecided, sureness, strict=True) if sure > self.rules.slot_threshold]
        chosen = chosen or [undecided[max(range(len(sureness)), key=sureness.__getitem__)]]

        # 3. Verify: a token by the logits of the one before it in its slot; the first of a slot holds
        columns = self._columns(chosen)
        drafts = [tokens[column] for column in columns]
        asking = [place for place in everything[: len(columns)] if (place + 1) % self.size]
        verified = yield Ask(columns, drafts, False, asking, [drafts[place + 1] for place in asking])
        holds = [True] * len(columns)
        for place, (_, probability) in zip(asking, verified, strict=True):
            holds[place + 1] = probability > self.rules.token_threshold
        run = holds.index(False) if False in holds else len(holds)

        # 4. Keep
        stop = next((place for place in range(run) if drafts[place] in self.stop_ids), None)
        if stop is not None:
            return self._commit(undecided, chosen, drafts[: stop + 1], forwards=2)
        if run >= self.size:
            kept = run // self.size
            return self._commit(undecided, chosen[:kept], drafts[: kept * self.size], forwards=2)
        filled = [drafts[start : start + self.size] for start in range(0, len(drafts), self.size)]
        held = [[*holds[start : start + self.size], False].index(False) for start in range(0, len(holds), self.size)]
        forwards = yield from self._repair(chosen, filled, held)
        return self._commit(undecided, chosen, [token for slot in filled for token in slot], forwards=2 + forwards)

    def _repair(self, chosen: list[int], tokens: list[list[int]], held: list[int]) -> Generator[Ask, Reply, int]:
        """Fills and verifies each slot by itself, until all of its tokens hold; returns the forwards made.

        A slot sees what was decided before the round and itself, not the others.

        Args:
            tokens: of each slot, which are replaced; slots behind one with a stop token are taken away.
            held: leading tokens of each slot that hold.
        """
        fixed, forwards = 0, 0  # leading columns whose keys stay, and the forwards
        while min(held) < self.size:
            # 1. Fill what does not hold, each position by its own logits
            rows = range(len(tokens))
            columns = self._columns(chosen[: len(tokens)], fixed)
            fed = [(row, column) for row in rows for column in range(fixed, self.size)]
            open_places = [place for place, (row, column) in enumerate(fed) if column >= held[row]]
            given = [self.mask_token_id if column >= held[row] else tokens[row][column] for row, column in fed]
            found = yield Ask(columns, given, True, open_places, [BEST] * len(open_places))
            for place, (token, _) in zip(open_places, found, strict=True):
                row, column = fed[place]
                tokens[row][column] = token

            # 2. Verify it; the first token that did not hold now does, so that each slot advances
            given = [tokens[row][column] for row, column in fed]
            asking = [place for place, (row, column) in enumerate(fed) if held[row] <= column < self.size - 1]
            verified = yield Ask(columns, given, True, asking, [given[place + 1] for place in asking])
            sure = {
                fed[place]: reply[1] > self.rules.token_threshold
                for place, reply in zip(asking, verified, strict=True)
            }
            forwards += 2
            for row in rows:
                held[row] = min(held[row] + 1, self.size)
                while held[row] < self.size and sure[row, held[row] - 1]:
                    held[row] += 1

            # 3. A stop token takes away the slots behind its own, in which nothing needs to hold any more
            for row in rows:
                if not self.stop_ids.isdisjoint(tokens[row][fixed : held[row]]):
                    held[row] = self.size
                    del tokens[row + 1 :], held[row + 1 :]
                    break

            # 4. The last token that holds in all slots is fed again: its logits are those of the next one
            fixed = min(held) - 1
        return forwards

    def _commit(
        self, undecided: list[int], chosen: list[int], tokens: list[int], forwards: int
    ) -> tuple[list[int], bool]:
        """Decides the tokens of the chosen slots, up to the first stop token.

        What follows that in the block is taken away. (The official code takes away by place among the chosen slots
        where it should go by place in the block, and so loses slots before it.)
        """
        stop = next((place for place, token in enumerate(tokens) if token in self.stop_ids), None)
        tokens = tokens if stop is None else tokens[: stop + 1]
        self.committed = list(zip(self._columns(chosen), tokens, strict=False))
        left = [slot for slot in undecided if slot not in chosen]
        whole = len(chosen)
        if stop is not None:
            last = chosen[stop // self.size]
            left = [slot for slot in left if slot < last]
            whole = stop // self.size + 1 if forwards == 2 else whole
        self.rates.append(whole * self.size / forwards)
        return left, stop is not None


class SlotRows(RowsAtWork):
    """Rows whose answer is decided in slots, one forward for all of them at a time, whatever each is about."""

    def _begin(self, call: Call) -> None:
        canvas = call.canvas
        if canvas.prompt_embeds is not None:
            raise ValueError(
                '`inputs_embeds` has no meaning with decoding_method="refusion", which feeds the prompt as tokens '
                "(got them). Pass `input_ids`."
            )
        Processors.check(call.processors, call.rules, vocabulary_of(self.model.config))
        self.rules, self.processors = call.rules, call.processors
        self.sampler, self.sampling = call.sampler, call.sampling
        self.canvas, self.state = canvas, canvas.start(call.rules)
        self.ledger = Ledger(call, self.state)
        self.rows = self._new_rows(call)
        self.cache = SlotCache(text_setting(self.model.config, "num_hidden_layers"), canvas.length)
        self.visible = torch.zeros_like(canvas.base, dtype=torch.bool)  # prompts that were fed, and decided tokens
        self.ledger.take(call, self.state.rows.tolist())

    def _join(self, call: Call) -> None:
        before = self.canvas.prompt_length
        places = self._lay(call)
        left, length = self.canvas.prompt_length - before, self.canvas.length
        self.cache.move(left, length, len(places))
        right = length - self.visible.shape[1] - left
        self.visible = torch.nn.functional.pad(self.visible, (left, right, 0, len(places)))
        self.sampler = self._draw_apart(self.sampler, call, places)
        self.rows += self._new_rows(call)

    def _new_rows(self, call: Call) -> list["RowInSlots"]:
        rules, canvas = call.rules, call.canvas
        stops = frozenset() if call.stop_ids is None or not rules.early_stop else frozenset(call.stop_ids.tolist())
        count = (canvas.slots < canvas.length).sum(1).div(rules.slot_size, rounding_mode="floor").tolist()
        rows = [RowInSlots(rules, slots, stops, canvas.mask_token_id) for slots in count]
        call.rates = [row.rates for row in rows]
        return rows

    def _select(self, keep: torch.Tensor) -> None:
        super()._select(keep)
        self.rows = [self.rows[index] for index in keep.tolist()]
        self.visible = self.visible[keep]
        self.cache.select_rows(keep)

    def _forward(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """In place of the stages 2 to 6 of `generate`.

        1. Each row says what it feeds; its first forward has its prompt as well.
        2. A mask for each token: what is decided, and what is fed before it.
        3. One forward.
        4. A token and its probability for each place that was asked for.
        5. Rows go on.
        """
        state, canvas, rows, start = self.state, self.canvas, self.rows, self.canvas.prompt_length
        device, length = canvas.base.device, canvas.length
        place = torch.arange(length, device=device)
        prompts = (place >= canvas.first[:, None]) & (place < start)

        def table(values: list, dtype: torch.dtype = torch.long) -> torch.Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        # 1. What each row feeds
        asks = [row.ask for row in rows if row.ask is not None]
        text = canvas.fill(state.tokens)
        beginnings = torch.where(state.forward == 0, canvas.first, start).clamp_max(start).tolist()
        given = [list(range(first, start)) for first in beginnings]
        fed = [before + [start + column for column in ask.columns] for before, ask in zip(given, asks, strict=True)]
        width = max(map(len, fed))
        query = table([slots + slots[:1] * (width - len(slots)) for slots in fed])
        owner = table([number for number, ask in enumerate(asks) for _ in ask.columns])
        column = table([column for ask in asks for column in ask.columns])
        text[owner, start + column] = table([token for ask in asks for token in ask.tokens])

        # 2. What each token sees
        slot_of = torch.where(place < start, -1, (place - start).div(self.rules.slot_size, rounding_mode="floor"))
        here = torch.zeros_like(self.visible).scatter(1, query, True)[:, None]
        own = slot_of == slot_of[query][..., None]
        near = torch.where(table([ask.apart for ask in asks], torch.bool)[:, None, None], own, here)
        mask = self.visible[:, None] | (near & (place <= query[..., None]))

        # 3. The forward
        wanted = torch.zeros_like(query, dtype=torch.bool)
        for number, (before, ask) in enumerate(zip(given, asks, strict=True)):
            wanted[number, table([len(before) + each for each in ask.wanted])] = True
        inputs = {
            "input_ids": text.gather(1, query),
            "position_ids": canvas.positions.gather(1, query),
            "attention_mask": mask[:, None],
        }
        logits = self.model.canvas_logits(inputs, wanted, self.cache.at(query, length), **canvas.model_kwargs)
        self.ledger.counts.computed.index_add_(0, state.rows, table([len(slots) for slots in fed]))
        state.forward = state.forward + 1
        self.visible |= prompts

        # 4. A token and its probability
        index = table([number for number, ask in enumerate(asks) for _ in ask.wanted])
        targets = table([target for ask in asks for target in ask.targets])
        drawn = table([ask.draws and self.sampling for ask in asks], torch.bool)[index]
        columns = table([ask.columns[each] for ask in asks for each in ask.wanted])
        tokens, sureness, fault = _scored(
            self.model.text_logits(logits), targets, drawn, canvas.mask_token_id, self.processors, self.sampler,
            (state.rows[index], state.step[index], columns),
        )  # fmt: skip
        broken = torch.zeros_like(state.rows).scatter_reduce(0, index, fault, "amax")

        # 5. Rows go on
        replies = iter(zip(tokens.tolist(), sureness.tolist(), strict=True))  # a host sync
        for row, ask in zip(rows, asks, strict=True):
            row.answer([next(replies) for _ in ask.wanted])
        state.step = state.step + 1
        owner = table([number for number, row in enumerate(rows) for _ in row.committed])
        column = table([column for row in rows for column, _ in row.committed])
        state.tokens[owner, column] = table([token for row in rows for _, token in row.committed])
        state.undecided[owner, column], state.step_map[owner, column] = False, state.forward[owner]
        self.visible[owner, start + column] = True
        done = table([row.ask is None for row in rows], torch.bool)
        return done, torch.zeros_like(done), torch.zeros_like(state.rows), broken


def _scored(
    logits: torch.Tensor,
    targets: torch.Tensor,
    drawn: torch.Tensor,
    mask_token_id: int,
    processors: LogitsProcessorList,
    sampler: Sampler,
    where: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The token of each row of `(n, V)` logits, its probability before any processor, and what is wrong; `(n,)` each.

    Args:
        targets (`(n,)` long): the token, or `BEST`, which is never the mask token.
        drawn (`(n,)` bool): where the best is drawn instead.
        where: rows, steps and columns `(n,)`, for the random numbers.
    """
    size = max(1, CHUNK_ELEMENTS // logits.shape[1])
    parts = []
    for begin in range(0, len(logits), size):
        chunk = slice(begin, begin + size)
        raw, token = logits[chunk].float(), targets[chunk].clone()
        finite = raw.amax(-1).isfinite()
        fault = torch.where(finite, 0, NOT_FINITE)
        free = token == BEST
        scores = raw[free]
        scores[:, mask_token_id] = float("-inf")
        for processor in processors:
            scores = processor(where[0], scores)  # of single rows: none reads a text
        found = scores.argmax(-1)
        draws = drawn[chunk][free]
        if draws.any():
            found[draws] = sampler.tokens(scores[draws], *(each[chunk][free][draws] for each in where))
        token[free] = found
        left = scores.amax(-1).isfinite() | ~finite[free]
        fault[free] = torch.where(left, fault[free], NOTHING_LEFT)
        parts.append((token, raw.log_softmax(-1).gather(1, token[:, None])[:, 0].exp(), fault))
    if not parts:  # slots of one token, which nothing has to verify
        return targets, torch.zeros_like(targets, dtype=torch.float32), targets
    tokens, sureness, faults = (torch.cat(part) for part in zip(*parts, strict=True))
    return tokens, sureness, faults


__all__ = ["RowInSlots", "SlotRows"]
