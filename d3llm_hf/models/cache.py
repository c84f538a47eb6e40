"""A key/value cache addressed by absolute position, so that any slots of the canvas can be recomputed in place."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer in a preallocated buffer `(B, H, length, D)`; slot i belongs to canvas slot i."""

    is_compileable = True
    keys: torch.Tensor  # both once `is_initialized`
    values: torch.Tensor

    def __init__(self, cache: "SlotCache"):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocates the buffers; heads, dtype and device are known only now."""
        batch, heads, _, width = key_states.shape
        self.keys = key_states.new_zeros(batch, heads, self.cache.length, width)
        self.values = value_states.new_zeros(batch, heads, self.cache.length, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Overwrites the slots that the forward recomputes, and returns all that it sees to attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        slots, rows = self.cache.slots, self.cache.rows
        if rows is not None:
            return self._update_rows(rows, slots, key_states, value_states)
        if isinstance(slots, slice):
            self.keys[:, :, slots] = key_states
            self.values[:, :, slots] = value_states
        else:
            index = slots[:, None, :, None]
            self.keys.scatter_(2, index.expand_as(key_states), key_states)
            self.values.scatter_(2, index.expand_as(value_states), value_states)
        seen = self.cache.seen
        return (self.keys, self.values) if seen is None else (self.keys[:, :, :seen], self.values[:, :, :seen])

    def _update_rows(
        self, rows: torch.Tensor, slots: slice | torch.Tensor, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if isinstance(slots, slice):
            self.keys[rows, :, slots] = key_states
            self.values[rows, :, slots] = value_states
        else:
            self.keys[rows[:, None], :, slots] = key_states.transpose(1, 2)
            self.values[rows[:, None], :, slots] = value_states.transpose(1, 2)
        return self.keys[rows, :, : self.cache.seen], self.values[rows, :, : self.cache.seen]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length(), 0

    def get_seq_length(self) -> int:
        return self.cache.length if self.cache.seen is None else self.cache.seen

    def get_max_length(self) -> int:
        return self.cache.length


class SlotCache(Cache):
    """The refreshable cache of bidirectional decoding.

    A forward overwrites the slots given to [`at`] and attends to every slot, so each position is attended exactly
    once: by the keys of this forward where it is recomputed, by older ones where it is not. The five verbs that
    decoding needs are choices of slots: *peek* recomputes a window again and again, *commit* is a later window that
    starts further right, *scatter* any slots, *refresh* all slots, *crop* a later window that starts further left.

    Args:
        num_layers (`int`): attention layers of the model.
        length (`int`): slots, the width of the canvas.
    """

    layers: list[SlotLayer]  # type: ignore[assignment]  # transformers' list may mix all kinds of layers

    def __init__(self, num_layers: int, length: int):
        self.length = length
        self.slots: slice | torch.Tensor = slice(0, length)
        self.seen: int | None = None
        self.rows: torch.Tensor | None = None
        super().__init__(layers=[SlotLayer(self) for _ in range(num_layers)])

    def at(self, slots: slice | torch.Tensor, seen: int | None = None) -> "SlotCache":
        """Names the slots of the next forward's tokens: a slice that all rows share, or a `(B, Q)` index.

        The forward attends to the first `seen` slots, to all of them where nothing else is said.

        A slot may occur twice in a row when it holds the same token both times (a window padded with its first slot).
        """
        self.slots, self.seen = slots, seen
        return self

    @contextmanager
    def only(self, rows: torch.Tensor) -> Iterator["SlotCache"]:
        """Inside, forwards are those of the rows with the `(B',)` indices `rows`. Its buffers exist already."""
        self.rows = rows
        try:
            yield self
        finally:
            self.rows = None

    def select_rows(self, keep: torch.Tensor) -> None:
        """Keeps the rows with the `(B',)` indices `keep`."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.keys, layer.values = layer.keys[keep], layer.values[keep]

    def move(self, left: int, length: int, more: int) -> None:
        """Moves all rows to a canvas with `left` more slots before them, of `length` slots, and adds `more` rows."""
        right = length - self.length - left
        for layer in self.layers:
            if layer.is_initialized:
                places = (0, 0, left, right, 0, 0, 0, more)  # of the last dimension first
                layer.keys = torch.nn.functional.pad(layer.keys, places)
                layer.values = torch.nn.functional.pad(layer.values, places)
        self.length, self.slots, self.seen = length, slice(0, length), None


__all__ = ["SlotCache", "SlotLayer"]
