"""Attention and block of the backbones, whose output can be asked for at some positions only.

Of a position whose logits nobody wants the last layer needs a key and a value, and nothing else: no query, no output
projection, no MLP. Those are four fifths of a layer's weights, and few positions of a canvas are wanted at a time.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import Cache
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward, rotate_half
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .cache_name import CACHE


def at_positions(table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Entries `(B, K, D)` of a `(B, L, D)` or `(1, L, D)` table at positions `(B, K)`."""
    return torch.take_along_dim(table, positions[..., None], dim=1)


def packed(marked: torch.Tensor, width: int) -> torch.Tensor:
    """The marked positions `(B, L)` of each row one behind the other, `(B, width)`.

    Rows with fewer marks repeat their first one: the same token at the same position gives the same key.
    """
    first, count = marked.long().argmax(1, keepdim=True), marked.sum(1, keepdim=True)
    places = (~marked).long().argsort(dim=1, stable=True)[:, :width]
    places = torch.nn.functional.pad(places, (0, width - places.shape[1]))
    return torch.where(torch.arange(width, device=places.device) < count, places, first)


def can_narrow(attention_mask: object) -> bool:
    """Whether an attention mask, as the attention function gets it, has rows of queries that can be picked."""
    return attention_mask is None or (isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4)


def _mask_at(attention_mask: torch.Tensor | None, positions: torch.Tensor) -> torch.Tensor | None:
    """The rows of some queries; a mask of one row serves them all."""
    if attention_mask is None or attention_mask.shape[2] == 1:
        return attention_mask
    return torch.take_along_dim(attention_mask, positions[:, None, :, None], dim=2)


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`(B, H, L, d)` queries or keys turned by `(B, L, r)` cosines and sines: the first r dimensions, or all."""
    cos, sin = cos[:, None], sin[:, None]
    turned, rest = x.tensor_split([cos.shape[-1]], dim=-1)
    turned = turned * cos + rotate_half(turned) * sin
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


if TYPE_CHECKING:  # what they are mixed into
    from torch.nn import Module
else:
    Module = object


class BidirectionalAttentionMixin(Module):
    """The forward of an attention with `q_proj`, `k_proj`, `v_proj` and `o_proj`, in which a mask alone hides tokens.

    Queries and keys go through `q_norm` and `k_norm` where there are such modules. The rotation happens in the dtype
    of the cosines; where these are narrower than a head, the dimensions behind them are not turned.
    """

    config: PreTrainedConfig
    layer_idx: int
    head_dim: int
    scaling: float
    attention_dropout: float
    q_proj: torch.nn.Linear
    k_proj: torch.nn.Linear
    v_proj: torch.nn.Linear
    o_proj: torch.nn.Linear

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        kept: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`(B, L, D)` to `(B, L, D)`, or `(B, K, D)` at the positions `kept` `(B, K)`; and the weights."""
        # By transformers' name, by which a checkpointed layer of its knows what not to write twice.
        cache: Cache | None = kwargs.pop(CACHE, None)  # type: ignore[misc]
        asking = hidden_states if kept is None else at_positions(hidden_states, kept)

        def heads(projection: torch.nn.Module, states: torch.Tensor, norm: str = "") -> torch.Tensor:
            split = projection(states).view(*states.shape[:-1], -1, self.head_dim)
            return (getattr(self, norm)(split) if norm in self._modules else split).transpose(1, 2)

        query, key = heads(self.q_proj, asking, "q_norm"), heads(self.k_proj, hidden_states, "k_norm")
        value = heads(self.v_proj, hidden_states)
        if kept is None and position_embeddings[0].shape[-1] == self.head_dim:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        else:
            asked: tuple[torch.Tensor, ...] = position_embeddings
            if kept is not None:
                asked = at_positions(position_embeddings[0], kept), at_positions(position_embeddings[1], kept)
                attention_mask = _mask_at(attention_mask, kept)
            query, key = _rotated(query, *asked), _rotated(key, *position_embeddings)
        query, key = query.to(value.dtype), key.to(value.dtype)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)

        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(*asking.shape[:-1], -1).contiguous()), weights


class BidirectionalBlockMixin(Module):
    """The forward of a block: pre-norm attention and MLP."""

    self_attn: torch.nn.Module
    mlp: torch.nn.Module
    input_layernorm: torch.nn.Module
    post_attention_layernorm: torch.nn.Module

    def forward(
        self, hidden_states: torch.Tensor, kept: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        """`(B, L, D)` to `(B, L, D)`, or `(B, K, D)` at the positions `kept` `(B, K)`."""
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), kept=kept, **kwargs)
        hidden_states = (hidden_states if kept is None else at_positions(hidden_states, kept)) + attended
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
