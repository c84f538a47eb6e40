"""Where the time of a decoding goes, and how near its backbone comes to what the machine's matmuls give.

The parts of a turn are taken apart in turns of their own, since the clock that stands around each of them disturbs:

    backbone  the layers of the model, without the cache below
    head      the matrix of the vocabulary
    score     from logits to a token and a cost for each candidate: softmax, entropy, argmax
    decide    the rules: which blocks are open, which candidates are committed, which rows are finished
    cache     the plan of what to recompute, and writing keys and values
    rest      all else: preparing inputs, books on rows, `generate`'s own preparations

A part that runs within another counts as itself alone.
"""

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from transformers import PreTrainedModel

from ..models import at_work, caching
from ..models.cache import SlotLayer
from ..models.cache_name import given_cache
from ..models.half_precision import fast_products
from ..models.scoring import Scorer
from . import plain_decoding


PARTS = ("backbone", "head", "score", "decide", "cache", "rest")
OVERHEAD = ("head", "score", "decide")

_SECONDS_OF_MATMUL = 0.1


class Stopwatch:
    """Exclusive seconds of named parts of a piece of work, waiting for the device at every border.

    Attributes:
        seconds: of each of `PARTS`.
    """

    def __init__(self, device: str):
        self.device = device
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._running: list[str] = []
        self._since = 0.0

    def _turn(self) -> None:
        """Books what has passed since the last border."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What runs inside belongs to the part `name`."""
        self._turn()
        self._running.append(name)
        try:
            yield
        finally:
            self._turn()
            self._running.pop()

    def timed(self, function: Callable, name: str) -> Callable:
        """The function, as part `name`."""

        @wraps(function)
        def inside(*args, **kwargs):
            with self.part(name):
                return function(*args, **kwargs)

        return inside


@contextlib.contextmanager
def taken_apart(model: PreTrainedModel, device: str) -> Iterator[Stopwatch]:
    """Everything inside is decoding with `model`, by `generate` or the plain loop; its parts are timed."""
    watch = Stopwatch(device)
    attributes = [
        (Scorer, "__call__", "score"),
        *((at_work, name, "decide") for name in ("open_blocks", "candidates", "choose", "commit", "finished")),
        *((plain_decoding, name, "score") for name in ("entropies", "confidences", "best_tokens")),
        *((kind, "decide", "decide") for kind in (plain_decoding._BlockByBlock, plain_decoding._MultiBlock)),
        *((kind, "prepare", "decide") for kind in (plain_decoding._BlockByBlock, plain_decoding._MultiBlock)),
        (at_work, "Plan", "cache"),
        (SlotLayer, "update", "cache"),
        (model.base_model, "forward", "backbone"),
        (model.get_output_embeddings(), "forward", "head"),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, part in attributes:
            stack.enter_context(_replaced(owner, name, watch.timed(getattr(owner, name), part)))
        for kind, plan in list(caching.PLANS.items()):
            caching.PLANS[kind] = watch.timed(plan, "cache")
            stack.callback(caching.PLANS.__setitem__, kind, plan)
        with watch.part("rest"):
            yield watch


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    own, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextlib.contextmanager
def steps_timed(model: PreTrainedModel, device: str) -> Iterator[list[float]]:
    """Collects the seconds from the start of each forward of the backbone to the start of the next one."""
    starts: list[float] = []
    found: list[float] = []

    def note(module, args) -> None:
        if device == "cuda":
            torch.cuda.synchronize()
        starts.append(time.perf_counter())

    handle = model.base_model.register_forward_pre_hook(note)
    try:
        yield found
    finally:
        handle.remove()
        found += [after - before for before, after in itertools.pairwise(starts)]


@dataclass(frozen=True)
class Width:
    """How wide a forward of the backbone was.

    Attributes:
        positions: of all rows together.
        keys: that each of them attends to.
        last: positions, of all rows, at which the last layer has an output.
    """

    positions: int
    keys: int
    last: int


@contextlib.contextmanager
def widths_seen(model: PreTrainedModel) -> Iterator[list[Width]]:
    """Collects the widths of the forwards of the backbone."""
    found: list[Width] = []

    def note(module, args, kwargs) -> None:
        ids, (_, past), kept = kwargs["input_ids"], given_cache(kwargs) or ("", None), kwargs.get("kept_positions")
        before = 0 if past is None else past.get_seq_length()
        slots = hasattr(past, "at")  # the decoder's own cache counts what it will hold, transformers' what it holds
        keys = before if slots else before + ids.shape[1]
        found.append(Width(ids.numel(), keys, ids.numel() if kept is None else kept.numel()))

    handle = model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


def layer_matrices(model: PreTrainedModel) -> list[tuple[int, int]]:
    """`(outputs, inputs)` of every linear layer of the backbone."""
    return [(module.out_features, module.in_features) for module in _linear(model.base_model).values()]


def _linear(module: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    return {name: inner for name, inner in module.named_modules() if isinstance(inner, torch.nn.Linear)}


def backbone_flops(model: PreTrainedModel, forwards: list[Width]) -> float:
    """Multiplications and additions of the backbone's matrices and attention in `forwards`.

    The last layer has keys and values at all positions, and all else where it has an output.
    """
    config: Any = model.config.get_text_config()  # of any family
    backbone: Any = model.base_model
    last = _linear(backbone.layers[-1])
    narrow = 2.0 * sum(
        each.out_features * each.in_features for name, each in last.items() if not name.endswith(("k_proj", "v_proj"))
    )
    whole = 2.0 * sum(outputs * inputs for outputs, inputs in layer_matrices(model))
    pair = 4.0 * config.hidden_size  # of a query and a key in a layer
    attention = sum(each.keys * (each.positions * (config.num_hidden_layers - 1) + each.last) for each in forwards)
    matrices = sum(each.positions * (whole - narrow) + each.last * narrow for each in forwards)
    return matrices + pair * attention


def matmul_rate(model: PreTrainedModel, positions: int, repeats: int = 3) -> float:
    """Operations a second that this machine reaches in bare products of the backbone's shapes and dtype.

    Half precision without instructions for it is multiplied as decoding does; see `models/half_precision.py`.

    Args:
        positions: rows of the left factor, those of a forward.
    """
    shapes = layer_matrices(model)
    device = model.device
    seconds = 0.0
    for outputs, inputs in set(shapes):
        left = torch.randn(positions, inputs).to(model.dtype).to(device)
        weight = torch.randn(outputs, inputs).to(model.dtype).to(device)
        with torch.no_grad(), fast_products(model, compiled=False):
            product = partial(torch.nn.functional.linear, left, weight)
            seconds += shapes.count((outputs, inputs)) * _seconds_of(product, device.type, repeats)
    return 2.0 * positions * sum(outputs * inputs for outputs, inputs in shapes) / seconds


def _seconds_of(product: Callable[[], torch.Tensor], device: str, repeats: int) -> float:
    """Median seconds of a product, each measured over a tenth of a second or more."""

    def run(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            product()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    run(1)
    count = 1
    while (taken := run(count)) < _SECONDS_OF_MATMUL:
        count *= max(2, min(16, int(_SECONDS_OF_MATMUL / max(taken, 1e-6))))
    return statistics.median([taken, *(run(count) for _ in range(repeats - 1))]) / count
