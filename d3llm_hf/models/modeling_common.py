"""What all masked diffusion language models of this package share: backbone pass, head, loss, saving with the code."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import is_flash_attention_requested, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache_name import CACHE, takes_either_cache_name
from .generation_config_d3llm import D3LLMGenerationConfig
from .layers import at_positions, can_narrow, packed
from .publishing import PublishingMixin
from .wrappers import refuse_homeless


def positions_of(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position `(B, L)` of each token where padding (0) does not count: 0, 1, 2, ... from the first unpadded one."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)


def dense_mask(attention_mask: torch.Tensor, dtype: torch.dtype, attn_implementation: str) -> torch.Tensor:
    """A 4-D mask as the attention backend takes it: transformers hands one through as it is, right or wrong.

    Args:
        attention_mask (`(B, 1, L, S)`): bool or integer, 0 where a key must not be seen; or floating point, then added
            to the scores and returned unchanged.
        dtype: of the scores.
        attn_implementation: `config._attn_implementation`.

    Raises:
        ValueError: for flash-attention, which knows padding only.
    """
    if is_flash_attention_requested(requested_attention_implementation=attn_implementation):
        raise ValueError(
            f"`attention_mask` must be 2-D with attention implementation {attn_implementation!r} (got 4-D). Pass a "
            '`(B, S)` padding mask, or load the model with `attn_implementation="sdpa"`.'
        )
    if attention_mask.is_floating_point():
        return attention_mask
    seen = attention_mask.bool()
    if "sdpa" in attn_implementation:
        return seen
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def select_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """Keeps the positions whose logits are wanted, before the (large) head runs.

    Args:
        hidden_states (`torch.Tensor` of shape `(B, L, D)`).
        logits_to_keep: an `int` keeps the last positions (0: all); a 1-D index the same positions of every row; a 2-D
            index `(B, K)` its own K positions per row; a bool mask `(B, L)` the marked ones, flattened to `(N, D)`.
    """
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    if logits_to_keep.ndim == 2:
        return at_positions(hidden_states, logits_to_keep)
    return hidden_states[:, logits_to_keep]


@dataclass
class Kept:
    """The positions whose logits are wanted, as many in each row, so that the last layer runs at no others.

    Attributes:
        positions (`(B, K)` long): those of each row; one with fewer repeats its first.
        among (`(n,)` long or `slice`, *optional*): the marked ones of a bool mask among the B x K, in its order.
    """

    positions: torch.Tensor
    among: torch.Tensor | slice | None = None

    @classmethod
    def of(cls, logits_to_keep: int | torch.Tensor) -> "Kept | None":
        """Those that a 2-D index or a bool mask names; `None` for what [`select_positions`] takes beside them."""
        if isinstance(logits_to_keep, int) or logits_to_keep.ndim != 2:
            return None
        if logits_to_keep.dtype != torch.bool:
            return cls(logits_to_keep)
        if len(logits_to_keep) == 1:  # as below, in fewer steps
            marked = logits_to_keep[0].nonzero().T  # a host sync
            return cls(marked, slice(None)) if marked.numel() else cls(marked.new_zeros(1, 1), slice(0))
        count = logits_to_keep.sum(1)
        total, width = torch.stack([count.sum(), count.amax()]).tolist()  # a host sync
        positions = packed(logits_to_keep, max(width, 1))
        beyond = torch.arange(positions.shape[1], device=positions.device) >= count[:, None]
        return cls(positions, beyond.flatten().long().argsort(stable=True)[:total])

    def select(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Of `(B, K, D)` states what [`select_positions`] would take."""
        return hidden_states if self.among is None else hidden_states.flatten(0, 1)[self.among]


class Float32BuffersMixin:
    """Keeps the buffers of a module in their dtype when the model is cast (`.to(dtype)`, DeepSpeed's bf16)."""

    def _apply(self, fn, recurse=True):
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if getattr(self, name).dtype != buffer.dtype:
                setattr(self, name, buffer.to(getattr(self, name).device))
        return self


class Float32RotaryMixin(Float32BuffersMixin):
    """Keeps the frequencies of a rotary embedding in float32.

    In bfloat16 a frequency is off by up to 0.2 %: at position 1000 the fastest pairs are turned by a radian too much.
    """


if TYPE_CHECKING:  # what it is mixed into
    from transformers.modeling_utils import PreTrainedModel
else:
    PreTrainedModel = object


class BidirectionalBackboneMixin(PreTrainedModel):
    """The pass through a backbone's `embed_tokens`, `rotary_emb`, `layers` and `norm`; every token sees all others."""

    embed_tokens: torch.nn.Embedding
    rotary_emb: torch.nn.Module
    layers: torch.nn.ModuleList
    norm: torch.nn.Module

    @takes_either_cache_name
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        kept_positions: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """See [`MaskedDiffusionLMMixin.forward`]; returns the last hidden states `(B, L, D)`.

        With `kept_positions` `(B, K)` it returns those at these positions, `(B, K, D)`, and the last layer computes
        no others.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds` (got both or neither).")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        length = inputs_embeds.shape[1]
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            position_ids = positions_of(attention_mask)[:, -length:]
        elif position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = (torch.arange(length, device=inputs_embeds.device) + seen)[None]

        mask: object  # as the attention takes it: a tensor, a block mask of flex attention, or nothing
        if attention_mask is not None and attention_mask.ndim == 4:
            mask = dense_mask(attention_mask, inputs_embeds.dtype, self.config._attn_implementation)
        else:
            mask = create_bidirectional_mask(self.config, inputs_embeds, attention_mask, **{CACHE: cache})
        kwargs["is_causal"] = False  # a missing mask must not make sdpa and flash-attention fall back to causal
        # `position_ids` end here: flash-attention would take gaps between them for packed sequences.
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        narrow = kept_positions is not None and can_narrow(mask)
        hidden_states = inputs_embeds
        for index, layer in enumerate(self.layers, start=1):
            hidden_states = layer(
                hidden_states,
                kept=kept_positions if narrow and index == len(self.layers) else None,
                position_embeddings=position_embeddings,
                attention_mask=mask,
                **{CACHE: cache},
                **kwargs,
            )
        if kept_positions is not None and not narrow:
            hidden_states = at_positions(hidden_states, kept_positions)
        kept: dict[str, Any] = {CACHE: cache}
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **kept)


@dataclass
class MaskedDiffusionOutput(CausalLMOutputWithPast):
    """Loss, logits and the cache of the forward, which is called as transformers calls it."""


class MaskedDiffusionLMMixin(PublishingMixin):
    """Head, loss and saving of a masked diffusion LM whose backbone is `self.model` and whose head is `self.lm_head`.

    `labels` are *not* shifted: label i belongs to logits row i. For a model whose row i predicts token i + 1 (Dream)
    the trainer shifts them, since the row before a window may lie outside of it.
    """

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan: ClassVar[dict[str, str]] = {"lm_head": "colwise_gather_output"}
    # Names of inputs and outputs, as transformers reads and writes it itself, whatever it declares.
    _pp_plan: ClassVar[dict[str, tuple[list[str], list[str]]]] = {  # type: ignore[assignment]
        "lm_head": (["hidden_states"], ["logits"])
    }
    _fsdp_plan: ClassVar[dict[str, str]] = {"lm_head": "keep_full_weight"}
    model: torch.nn.Module
    lm_head: torch.nn.Linear
    generation_config_class = D3LLMGenerationConfig  # PreTrainedModel's would come before the decoder's
    supports_position_mask = True
    supports_position_index = True
    supports_slot_cache = True
    supports_padding = True
    counts_positions = True

    # The entries that let `AutoModel.from_pretrained(folder, trust_remote_code=True)` find the code in the folder.
    auto_classes = ("AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM")

    @takes_either_cache_name
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedDiffusionOutput:
        r"""Predicts every position of the canvas from all others.

        Args:
            input_ids (`(B, L)`), inputs_embeds (`(B, L, D)`): exactly one of them.
            attention_mask (`(B, S)` or `(B, 1, L, S)`): 0 where a key must not be seen (padding); a floating-point 4-D
                mask is added to the scores instead.
            position_ids (`(B, L)`): position of each token; counted from the first unpadded one when unset.
            cache: a `transformers.Cache`, also taken as `past_key_values`; see `cache.SlotCache` for the one that
                decoding uses.
            labels (`(B, L)`): target tokens, -100 where there is no loss; unshifted.
            logits_to_keep: see [`select_positions`].

        Returns:
            [`MaskedDiffusionOutput`]: `logits` of shape `(B, K, V)`, or `(N, V)` for a bool mask.
        """
        # What is recorded of the layers is of the whole canvas.
        recorded = ("output_hidden_states", "output_attentions")
        recording = any(kwargs.get(name, getattr(self.config, name, False)) for name in recorded)
        kept = None if recording else Kept.of(logits_to_keep)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **({} if kept is None else {"kept_positions": kept.positions}),
            **kwargs,
        )
        states = outputs.last_hidden_state
        logits = self.lm_head(select_positions(states, logits_to_keep) if kept is None else kept.select(states))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MaskedDiffusionOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )

    def load_adapter(self, *args, **kwargs):
        """As transformers', but an adapter's tensor that finds no module is an error.

        Raises:
            ValueError: naming the first ones.
        """
        loaded = super().load_adapter(*args, **kwargs)
        refuse_homeless(
            getattr(loaded, "unexpected_keys", ()), str(args[0] if args else kwargs.get("peft_model_id")), self
        )
        return loaded

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Saves as transformers does, with *every* entry of `auto_map` (transformers alone writes one model class)."""
        model = next(cls for cls in type(self).__mro__ if not cls.__name__.startswith("FSDP"))
        if type(self) is not model:  # FSDP2's class would make transformers save torch's file in place of the model's
            type(self).__module__, type(self).__name__ = model.__module__, model.__name__
        configuration, model = (
            f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}" for cls in (type(self.config), model)
        )
        entries = {"AutoConfig": configuration} | dict.fromkeys(self.auto_classes, model)
        self.config.auto_map = (getattr(self.config, "auto_map", None) or {}) | entries
        return super().save_pretrained(save_directory, *args, **kwargs)
