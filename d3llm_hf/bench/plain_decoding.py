"""The decoding loops of the reference code, done plainly: what `d3llm bench` measures `generate` against.

Written from what the published code of d3LLM does, for models whose logits row i predicts token i (LLaDA), greedily:

    llada      a quota of the surest candidates of a block in each forward, as LLaDA's own loop
    dparallel  block by block, by an entropy threshold: d3LLM's `generate`, the baseline of its paper
    d3llm      several blocks at once: d3LLM's `generate_multi_block`, with the delayed cache `..._kv_cache`

What it spends is what the reference spends: every forward is over the whole canvas (with the cache, over everything
behind what is cached), the head runs at all of its positions, and softmax and entropy are taken in float64 over the
whole vocabulary at every position of the canvas, decided or not. What it decides is the reference's with its
defects corrected as in `generate`, so that both can give the same tokens:

* the mask token is never committed (its probability still counts);
* what lies behind a stop token is filled before candidates are looked for, with the pad token;
* an answer that blocks do not divide ends in a shorter block, and blocks that do not divide the steps share them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..models.cache_name import CACHE
from ..models.methods import CACHES, COMMON, METHODS


# Method -> the kinds of cache that the reference has for it (its LLaDA code, batch 1).
METHODS_AND_CACHES: dict[str, tuple[str, ...]] = {
    "llada": ("none",),
    "dparallel": ("none",),
    "d3llm": ("none", "delayed"),
}

# Settings of which the plain loops have but one value.
FIXED = frozenset({"remasking", "cfg_scale", "lossless", "draft_length", "suffix_length"}) | {
    *("window", "window_span", "threshold_relaxation", "lookahead", "lookahead_threshold", "length")
}


@dataclass
class PlainOutput:
    """What [`plain_generate`] returns, as `D3LLMGenerationOutput`.

    Attributes:
        sequences (`(B, P + N)` long): prompt and answer; pad tokens behind the first stop token.
        num_forwards (`(B,)` long): forwards until the row was finished.
        positions_computed (`(B,)` long): positions, without padding, that these forwards pushed through the model.
    """

    sequences: torch.Tensor
    num_forwards: torch.Tensor
    positions_computed: torch.Tensor


@torch.no_grad()
def plain_generate(
    model,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    max_new_tokens: int,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
    **settings: Any,
) -> PlainOutput:
    """Decodes a batch greedily as the reference does.

    Without a cache, left-padded rows share their forwards until the last is finished. The reference's cache is that of
    a single row, so with it the rows are decoded one after the other.

    Args:
        model: whose logits row i predicts token i.
        input_ids, attention_mask (`(B, P)`): a left-padded batch of prompts.
        settings: as `generate` takes them; what is left out has the method's default.

    Raises:
        ValueError: For a method, a cache or another setting that the reference's loops do not have.
    """
    chosen = plain_settings(settings)
    if model.logit_shift:
        raise ValueError(
            f"`model` must predict token i in logits row i (got logit_shift={model.logit_shift}). The plain loops are "
            "those of LLaDA: pass such a checkpoint."
        )
    stops = input_ids.new_tensor([] if eos_token_id is None else eos_token_id).reshape(-1)
    if pad_token_id is None:
        pad_token_id = int(stops[0]) if len(stops) else model.config.mask_token_id
    tokens = _Tokens(model.config.mask_token_id, stops, pad_token_id)
    canvas = torch.cat([input_ids, input_ids.new_full((len(input_ids), max_new_tokens), tokens.mask)], dim=1)
    seen = torch.ones_like(canvas)
    if attention_mask is not None:
        seen[:, : input_ids.shape[1]] = attention_mask
    first = seen.argmax(1).tolist()
    kind = _MultiBlock if chosen["decoding_method"] == "d3llm" else _BlockByBlock
    if chosen["kv_cache"] == "none":
        rows = [kind(row, input_ids.shape[1], chosen, tokens) for row in canvas]
        _together(model, canvas, seen if attention_mask is not None else None, rows)
    else:
        rows = [
            kind(row[start:], input_ids.shape[1] - start, chosen, tokens)
            for row, start in zip(canvas, first, strict=True)
        ]
        for row in rows:
            _cached(model, row, chosen)
    for row in rows:
        row.fill_after_stop()
    padding = torch.tensor(first if chosen["kv_cache"] == "none" else [0] * len(rows))
    forwards, positions = (torch.tensor([getattr(row, name) for row in rows]) for name in ("forwards", "positions"))
    return PlainOutput(canvas, forwards, positions - forwards * padding)


def plain_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """All settings of a method of the reference.

    Raises:
        ValueError: For what its loops do not have.
    """
    method, kind = settings.get("decoding_method", "d3llm"), settings.get("kv_cache", "none")
    if method not in METHODS_AND_CACHES:
        raise ValueError(
            f"`decoding_method` must be one of {list(METHODS_AND_CACHES)} to be compared with a plain loop (got "
            f"{method!r})."
        )
    if kind not in METHODS_AND_CACHES[method]:
        raise ValueError(
            f"`kv_cache` of a plain {method} must be one of {list(METHODS_AND_CACHES[method])} (got {kind!r})."
        )
    chosen = COMMON | METHODS[method] | CACHES[kind] | {"decoding_method": method}
    for name, value in settings.items():
        if name not in chosen or (name in FIXED and value != chosen[name]):
            raise ValueError(
                f"`{name}` is not a setting of a plain {method} with kv_cache={kind!r} (got {value!r}). Leave it out."
            )
        chosen[name] = value
    return chosen


@dataclass(frozen=True, eq=False)
class _Tokens:
    mask: int
    stops: torch.Tensor
    fill: int


# ---- the model ------------------------------------------------------------------------------------------------------


def _together(
    model, canvas: torch.Tensor, seen: torch.Tensor | None, rows: Sequence["_MultiBlock | _BlockByBlock"]
) -> None:
    """Forwards over the whole canvases of all rows until the last is finished."""
    while working := [index for index, row in enumerate(rows) if row.prepare()]:
        logits = model(input_ids=canvas, attention_mask=seen, use_cache=False).logits  # (B, L, V)
        for index in working:
            rows[index].forwards += 1
            rows[index].positions += canvas.shape[1]
            rows[index].decide(logits[index])


def _cached(model, row: "_MultiBlock | _BlockByBlock", chosen: dict[str, Any]) -> None:
    """The delayed cache with refresh of d3LLM's LLaDA: a finished block is kept once its delay has passed.

    While a finished block waits, and every so many forwards, everything is forwarded. All else is a forward over
    what is not cached, to the end of the canvas.
    """
    delay, every, length = chosen["cache_delay"], chosen["cache_refresh_interval"], len(row.canvas)
    past, kept = None, 0
    while row.prepare():
        # 1. What has waited long enough is cached by this forward; the delays of blocks do not overlap
        now, newest, waiting = row.forwards + 1, None, False
        for block in row.blocks:
            if block.end <= kept:
                continue
            if block.left:
                break
            block.completed = now if block.completed is None else block.completed
            if now - block.completed < delay:
                waiting = True
                break
            newest = block.end
        # 2. One of three forwards; `start` is the first position that it is over
        start, ids = kept, row.canvas[None]
        if newest is not None:
            output = model(input_ids=ids[:, kept:], **{CACHE: past}, use_cache=True)
            past, kept = getattr(output, CACHE), newest
        elif past is not None and not waiting and not (every and now % every == 0):
            output = model(input_ids=ids[:, kept:], **{CACHE: past}, use_cache=True)
        else:
            start = 0
            output = model(input_ids=ids, use_cache=past is not None)
            past = getattr(output, CACHE)
        if past is not None:
            past.crop(kept - length)  # how many to remove, as a negative number
        # 3. Logits of the whole canvas, -inf where nothing was forwarded
        row.forwards, row.positions = now, row.positions + length - start
        logits = output.logits.new_full((length, output.logits.shape[-1]), float("-inf"))
        logits[start:] = output.logits[0]
        row.decide(logits)


def entropies(logits: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of every row of `(L, V)` logits, in float64: `(L,)`."""
    p = logits.double().softmax(-1)
    return -(p * (p + 1e-12).log()).sum(-1)


def confidences(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Probability of the token `(L,)` of every row of `(L, V)` logits, in float64: `(L,)`."""
    return logits.double().softmax(-1).gather(-1, tokens[:, None])[:, 0]


def best_tokens(logits: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """The most probable token of every row of `(L, V)` logits but the mask token: `(L,)`."""
    logits = logits.clone()
    logits[:, mask_token_id] = float("-inf")
    return logits.argmax(-1)


# ---- which candidates a forward decides -----------------------------------------------------------------------------


@dataclass
class _Block:
    start: int
    end: int
    left: int = 0  # masks
    active: bool = False  # must advance in every step
    completed: int | None = None  # forward in which it was found finished

    @property
    def progress(self) -> float:
        return 1 - self.left / max(self.end - self.start, 1)


@dataclass(eq=False)
class _Row:
    """One canvas `(L,)`, decided in place; `prepare` looks at it before a forward, `decide` after it."""

    canvas: torch.Tensor
    prompt_length: int
    chosen: dict[str, Any]
    tokens: _Tokens
    forwards: int = 0
    positions: int = 0
    end: int = 0  # candidates lie before it
    blocks: list[_Block] = field(default_factory=list)  # those that are open, the prompt first

    def __post_init__(self):
        size, length = self.chosen["block_length"], len(self.canvas)
        starts = range(self.prompt_length, length, size)
        self.all_blocks = [_Block(start, min(start + size, length)) for start in starts]

    @property
    def undecided(self) -> torch.Tensor:
        masks = self.canvas == self.tokens.mask
        masks[: self.prompt_length] = False
        return masks

    def first_stop(self) -> int | None:
        """Position of the first stop token that was decided."""
        found = torch.isin(self.canvas[self.prompt_length :], self.tokens.stops).nonzero()
        return self.prompt_length + int(found[0]) if len(found) else None

    def finished(self) -> bool:
        """Whether nothing is undecided, with `early_stop` up to the first stop token."""
        stop = self.first_stop() if self.chosen["early_stop"] else None
        return not self.undecided[: None if stop is None else stop].any().item()

    def candidates(self) -> torch.Tensor:
        among = self.undecided
        among[self.end :] = False
        return among

    def fill_after_stop(self) -> bool:
        """Fills what lies behind the first stop token; returns whether there is one."""
        stop = self.first_stop()
        if stop is not None:
            self.canvas[stop + 1 :] = self.tokens.fill
        return stop is not None

    def by_entropy(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Candidates under the threshold, and the surest in any case: `(L,)` bool; and costs, inf elsewhere."""
        among = self.candidates()
        cost = entropies(logits).masked_fill(~among, float("inf"))
        chosen = among & ~(cost > self.chosen["entropy_threshold"])
        chosen[cost.argmin()] = True
        return chosen, cost


class _BlockByBlock(_Row):
    """LLaDA's quota, or with `"dparallel"` an entropy threshold, in one block after the other."""

    block, step = 0, 0

    def prepare(self) -> bool:
        if self.finished():
            return False
        while not self.undecided[: self.all_blocks[self.block].end].any().item():
            self.block, self.step = self.block + 1, 0
        self.end = self.all_blocks[self.block].end
        return True

    def decide(self, logits: torch.Tensor) -> None:
        tokens = best_tokens(logits, self.tokens.mask)
        if self.chosen["decoding_method"] == "dparallel":
            chosen, _ = self.by_entropy(logits)
        else:
            among = self.candidates()
            sure = confidences(logits, tokens).masked_fill(~among, -1.0)
            chosen = torch.zeros_like(among)
            chosen[sure.topk(self.quota()).indices] = True
        self.canvas[chosen] = tokens[chosen]
        self.step += 1

    def quota(self) -> int:
        """How many candidates this step of the block decides."""
        block = self.all_blocks[self.block]
        size, steps = block.end - block.start, self.chosen["steps"]
        if steps is None:
            return 1
        each, more = divmod(steps, len(self.all_blocks))
        each = max(each + (self.block < more), 1)
        return max(size // each + (self.step < size % each), 1)


class _MultiBlock(_Row):
    """d3LLM: a block opens when the one before has made some progress, and must advance when it is nearly done."""

    def __post_init__(self):
        super().__post_init__()
        self.blocks = [_Block(0, self.prompt_length, active=True, completed=0)]

    def prepare(self) -> bool:
        stopped = self.chosen["early_stop"] and self.fill_after_stop()
        if self.finished():
            return False
        if len(self.blocks) == 1:
            self.open_block()
        for block in self.blocks[1:]:
            block.left = int((self.canvas[block.start : block.end] == self.tokens.mask).sum().item())
        for before, block in zip(self.blocks, self.blocks[1:], strict=False):
            block.active = block.active or before.progress >= self.chosen["block_activation_threshold"]
        last = self.blocks[-1]
        if not stopped and (last.progress >= self.chosen["block_add_threshold"] or not last.left):
            self.open_block()
        self.end = self.blocks[-1].end
        return True

    def open_block(self) -> None:
        """Opens the next block, where there is one."""
        if len(self.blocks) <= len(self.all_blocks):
            before, block = self.blocks[-1], self.all_blocks[len(self.blocks) - 1]
            block.left = int((self.canvas[block.start : block.end] == self.tokens.mask).sum().item())
            block.active = before.progress >= self.chosen["block_activation_threshold"]
            self.blocks.append(block)

    def decide(self, logits: torch.Tensor) -> None:
        tokens = best_tokens(logits, self.tokens.mask)
        chosen, cost = self.by_entropy(logits)
        for block in self.blocks[1:]:
            if block.active and block.left:
                if not chosen[block.start : block.end].any().item():
                    chosen[block.start + int(cost[block.start : block.end].argmin().item())] = True
                break
        self.canvas[chosen] = tokens[chosen]
