"""Forwards of very few shapes, compiled in one graph each: `generate(..., compile_config=CompileConfig())`.

Decoding by itself has a shape for every forward: windows grow and shrink, rows leave, candidates come and go. A
compiled forward, and a CUDA graph still more, wants the same shape and the same addresses again. Here

* the canvas is padded on the left to a length that calls of similar length share;
* every row keeps its lane for the whole call: a finished one rides along idle;
* a window is widened to the next of at most four widths; rows with a shorter one repeat its first slot;
* logits are computed at a fixed number of places of each row, one of at most two numbers;
* the cache's buffers stay where they are, for later calls as well.

The loop around the forward, and with it what is decided, is that of every other call.
"""

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from transformers.generation import CompileConfig
from transformers.utils.generic import is_flash_attention_requested

from .cache import SlotCache
from .canvas import Canvas
from .contract import CanvasContract
from .decoding import Rules, State
from .layers import packed
from .text_config import text_config


def rounded(number: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-number // step) * step


def bucket(length: int) -> int:
    """The length of a padded canvas: the next multiple of 64, and so at most an eighth longer from 512 slots on."""
    return rounded(length, max(64, (1 << (length - 1).bit_length()) // 16))


@dataclass(frozen=True)
class Shapes:
    """The shapes of a call: rows x widths of the forward x places of the logits.

    Attributes:
        rows: of the batch.
        length: slots of the padded canvas.
        widths: slots of a forward, ascending.
        places: logits of each row, ascending.
    """

    rows: int
    length: int
    widths: tuple[int, ...]
    places: tuple[int, ...]

    @classmethod
    def of(cls, canvas: Canvas, rules: Rules) -> "Shapes":
        """Those that a canvas of this length needs under these rules, whatever its prompt is."""
        length, block = bucket(canvas.length), rules.window_length or rules.block_length
        narrow = min(rounded(2 * (block + rules.cache_window), 16), length)
        widths = {narrow, length // 4, length // 2, length} if rules.kv_cache != "none" else {length}
        # One open block has at most its own positions to decide (and the next one's to score, for a history); where
        # several may be open, four will mostly do.
        positions = rounded(canvas.slots.shape[1], block)
        places = (
            {min(block << rules.scores_ahead, positions)}
            if rules.block_add_threshold >= 1
            else {min(4 * block, positions), positions}
        )
        return cls(canvas.batch, length, tuple(sorted(widths)), tuple(sorted(places)))

    def fitting(self, recompute: torch.Tensor | None, wanted: torch.Tensor) -> tuple[int, int]:
        """The least width and number of places for marked slots `(B, L)` and candidates `(B, N)`."""
        if len(self.widths) == len(self.places) == 1:
            return self.widths[0], self.places[0]
        marks = [wanted] if recompute is None else [wanted, recompute]
        most = torch.stack([each.sum(1).amax() for each in marks]).tolist()  # a host sync, the only one of a forward
        place = next(place for place in self.places if place >= most[0])
        return next(width for width in self.widths if width >= most[-1] or recompute is None), place


class StaticCache(SlotCache):
    """A slot cache whose rows stay where they are."""

    def select_rows(self, keep: torch.Tensor) -> None:
        """Nothing: the rows that go on keep their lanes."""

    def pin(self) -> None:
        """Tells CUDA graphs that the buffers, once allocated, are always the same memory."""
        for layer in self.layers:
            torch._dynamo.mark_static_address(layer.keys, guard=False)
            torch._dynamo.mark_static_address(layer.values, guard=False)

    def wipe(self) -> None:
        """Forgets a former call: what lies under padding is weighted with 0, which does not make NaN harmless."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys.zero_()
                layer.values.zero_()


class CompiledForwards:
    """The compiled forwards of a model, kept on it between calls, and the buffers of the last one.

    A copy of the model, or a pickled one, starts without any.
    """

    def __init__(self):
        self.functions: dict[tuple, Callable] = {}
        self.spare: list[tuple[tuple, StaticCache]] = []  # at most one; calls in other threads have their own

    def __reduce__(self):
        return type(self), ()

    @classmethod
    def of(cls, model: CanvasContract) -> "CompiledForwards":
        """The model's own."""
        return vars(model).setdefault("_compiled_forwards", cls())

    def function(self, key: tuple, config: CompileConfig) -> Callable:
        """The function for a signature, compiled once."""
        if key not in self.functions:
            # Compiled graphs are kept with the code object, eight at most: every signature gets one of its own.
            code = logits_at.__code__.replace()
            fresh = types.FunctionType(code, logits_at.__globals__, logits_at.__name__)
            chosen = {f.name: getattr(config, f.name) for f in fields(config)}
            self.functions[key] = torch.compile(fresh, **chosen | {"fullgraph": True, "dynamic": False})
        return self.functions[key]

    @contextmanager
    def cache(self, key: tuple, layers: int, length: int) -> Iterator[StaticCache]:
        """Buffers for one call: those of the last one where it was of the same signature, else new ones."""
        kept, cache = self.spare.pop() if self.spare else (None, None)
        if cache is None or kept != key:
            cache = StaticCache(layers, length)
        cache.wipe()
        try:
            yield cache
        finally:
            self.spare[:] = [(key, cache)]


def logits_at(model: CanvasContract, places: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
    """Logits `(B, K, V)` at K places `(B, K)` of a forward: what is compiled."""
    logits = model(**inputs).logits
    return logits if "logits_to_keep" in inputs else torch.take_along_dim(logits, places[..., None], dim=1)


@dataclass
class StaticCanvas(Canvas):
    """A canvas whose forwards have static shapes. B' rows go on, of the B lanes of every forward.

    Attributes:
        lanes (`(B',)` long): the lane of each row.
        shapes: of the call.
        seen (`(B, length)` bool): False on padding, of all lanes.
        config: how to compile.
        forwards: the model's.
        signature: of the call.
    """

    lanes: torch.Tensor = field(kw_only=True)
    shapes: Shapes = field(kw_only=True)
    seen: torch.Tensor = field(kw_only=True)
    config: CompileConfig = field(kw_only=True)
    forwards: CompiledForwards = field(kw_only=True)
    signature: tuple = field(kw_only=True)

    def select(self, index: torch.Tensor) -> "StaticCanvas":
        return replace(super().select(index), lanes=self.lanes[index])

    def forward(  # type: ignore[override]  # `static_shapes` hands out no other cache with it
        self,
        model: CanvasContract,
        state: State,
        rules: Rules,
        cache: StaticCache | None,
        recompute: torch.Tensor | None,
        where: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As [`Canvas.forward`]; padding and repeated slots do not count as computed."""
        # 1. The slot that predicts a candidate, and the candidate's place among those of its row
        row, column = where
        slot = self.predicting(row, column, rules)
        wanted = torch.zeros_like(state.undecided).index_put((row, column), torch.ones_like(row, dtype=torch.bool))
        rank = (wanted.long().cumsum(1) - 1)[row, column]

        # 2. The window, in one of few widths
        padding = self.shapes.length - self.length
        slots: slice | torch.Tensor
        if cache is None or recompute is None:
            width, most = self.shapes.fitting(None, wanted)
            slots, place, computed = slice(None), slot + padding, self.length - self.first
        else:
            recompute = self.needed(recompute, row, slot, self.length)
            width, most = self.shapes.fitting(recompute, wanted)
            slots, computed = packed(recompute, width), recompute.sum(1)
            place = (recompute.long().cumsum(1) - 1)[row, slot]
            cache.at(self._in_lanes(slots + padding, width))

        # 3. The forward over all lanes
        inputs = self._inputs(model, state, slots)
        inputs = {name: self._in_lanes(value, width) for name, value in inputs.items() if name != "attention_mask"}
        places = place.new_zeros(self.shapes.rows, most).index_put((self.lanes[row], rank), place)
        logits = self._run(model, inputs | {"attention_mask": self.seen}, places, cache)
        return logits[self.lanes[row], rank], computed

    def _in_lanes(self, table: torch.Tensor, width: int) -> torch.Tensor:
        """A `(B', Q, ...)` table padded on the left to `width`, each row in its lane; zeros in idle lanes."""
        table = torch.nn.functional.pad(table, (0, 0) * (table.ndim - 2) + (width - table.shape[1], 0))
        return table.new_zeros(self.shapes.rows, *table.shape[1:]).index_copy(0, self.lanes, table)

    def _run(self, model, inputs: dict[str, Any], places: torch.Tensor, cache: StaticCache | None) -> torch.Tensor:
        inputs = inputs | self.model_kwargs | {"use_cache": cache is not None}
        if model.supports_position_index:
            inputs["logits_to_keep"] = places
        if cache is not None:
            inputs[model.cache_name] = cache
        inputs = model.accepted(inputs)
        if cache is not None and not cache.is_initialized:  # once, since a graph cannot allocate what it is to keep
            logits = logits_at(model, places, inputs)
            cache.pin()
            return logits
        key = (*self.signature, inputs["position_ids"].shape[1], places.shape[1])
        return self.forwards.function(key, self.config)(model, places, inputs)


def is_compiled(generation_config) -> bool:
    """Whether a call asks for compiled forwards."""
    return generation_config.compile_config is not None and not generation_config.disable_compile


@contextmanager
def static_shapes(
    model: CanvasContract, canvas: Canvas, rules: Rules, cache: SlotCache | None, generation_config
) -> Iterator[tuple[Canvas, SlotCache | None]]:
    """The canvas and the cache of a call: those given, or where `compile_config` is set those of static shapes.

    Raises:
        ValueError: for what cannot be compiled in one graph; see [`refuse`].
    """
    if not is_compiled(generation_config):
        yield canvas, cache
        return
    config = generation_config.compile_config
    refuse(model, canvas, rules, config)
    shapes, device = Shapes.of(canvas, rules), canvas.base.device
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    numbers = device, model.dtype, autocast, torch.is_inference_mode_enabled()
    signature = repr(config), rules.kv_cache != "none", shapes.rows, shapes.length, *numbers
    seen = torch.ones_like(canvas.base, dtype=torch.bool) if canvas.mask is None else canvas.mask
    forwards = CompiledForwards.of(model)
    static = StaticCanvas(
        **vars(canvas),
        lanes=torch.arange(canvas.batch, device=device),
        shapes=shapes,
        seen=torch.nn.functional.pad(seen, (shapes.length - canvas.length, 0)),
        config=config,
        forwards=forwards,
        signature=signature,
    )
    if cache is None:
        yield static, None
        return
    with forwards.cache(signature, len(cache.layers), shapes.length) as buffers:
        yield static, buffers


def refuse(model: CanvasContract, canvas: Canvas, rules: Rules, config: CompileConfig) -> None:
    """Raises a ValueError, with the way out, for what has no static shapes or cannot be compiled in one graph."""
    name = type(model).__name__
    places = set(map(str, getattr(model, "hf_device_map", {}).values()))
    quantizer = getattr(model, "hf_quantizer", None)
    own = type(model).canvas_logits is CanvasContract.canvas_logits
    reasons = {
        "`lossless`, whose drafts make batches of any size (unset one of them)": rules.draft_length > 0,
        "`lookahead`, whose canvases make batches of any size (unset one of them)": rules.lookahead > 0,
        "`cfg_scale`, which doubles the batch (unset one of them)": rules.cfg_scale > 0,
        "block-causal attention, whose canvas grows (leave `compile_config` unset)": canvas.blocks is not None,
        'decoding_method="wino", whose shadow block moves (leave `compile_config` unset)': rules.shadow_block,
        "`suffix_length`, with which the canvas grows (unset one of them)": rules.suffix_length is not None,
        '`length="adaptive"`, whose canvas changes (unset one of them)': rules.length_rule is not None,
        "`dynamic=True`: every forward has one of few static shapes (leave `dynamic` unset)": config.dynamic is True,
        'flash-attention, which takes padding out (load the model with `attn_implementation="sdpa"`)': (
            is_flash_attention_requested(text_config(model.config))
        ),
        f"{name}, which is not known to compile in one graph (set `_can_compile_fullgraph = True` on a class whose "
        "forward does)": not getattr(model, "_can_compile_fullgraph", False),
        f"{name}, whose forward takes no `position_ids`: padding would move the text (leave `compile_config` unset)": (
            not model.accepted({"position_ids": None})
        ),
        f"the `canvas_logits` of {name}, which takes the wanted slots as a mask (leave it to the forward)": not own,
        f"weights that are offloaded to {sorted(places & {'cpu', 'disk'})} (load the model onto its devices)": (
            "disk" in places or ("cpu" in places and len(places) > 1)
        ),
        f"the quantisation of this model, {type(quantizer).__name__} (leave `compile_config` unset)": (
            quantizer is not None and not quantizer.is_compileable
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"`compile_config` does not go together with {reason}.")


__all__ = ["CompiledForwards", "Shapes", "StaticCache", "StaticCanvas", "is_compiled", "static_shapes"]
