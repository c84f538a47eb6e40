"""ReFusion on today's transformers: Qwen3's layers, causal in the order in which tokens are fed or were decided."""

from typing import ClassVar

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3DecoderLayer,
    Qwen3PreTrainedModel,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
)

from .cache_name import takes_either_cache_name
from .configuration_refusion import ReFusionConfig
from .generation_d3llm import D3LLMGenerationMixin
from .layers import BidirectionalAttentionMixin, BidirectionalBlockMixin
from .modeling_common import BidirectionalBackboneMixin, Float32RotaryMixin, MaskedDiffusionLMMixin, positions_of
from .tensors import WholeCheckpointMixin


class ReFusionRotaryEmbedding(Float32RotaryMixin, Qwen3RotaryEmbedding):
    """Qwen3's cosines and sines, computed in float32 and cast to the model's dtype."""


class ReFusionAttention(BidirectionalAttentionMixin, Qwen3Attention):
    """Qwen3's projections, and norms of queries and keys, in an attention that sees what its mask leaves in."""

    def __init__(self, config: ReFusionConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.is_causal = False


class ReFusionBlock(BidirectionalBlockMixin, Qwen3DecoderLayer):
    """Qwen3's norms and MLP around [`ReFusionAttention`]."""

    def __init__(self, config: ReFusionConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = ReFusionAttention(config, layer_idx)


class ReFusionPreTrainedModel(WholeCheckpointMixin, Qwen3PreTrainedModel):
    """What transformers asks of a model family; most of Qwen3's answers hold."""

    config: ReFusionConfig  # type: ignore[assignment]  # has what is read of a Qwen3Config
    config_class = ReFusionConfig
    _no_split_modules: ClassVar[list[str]] = ["ReFusionBlock"]
    _can_record_outputs: ClassVar[dict[str, type[nn.Module]]] = {
        "hidden_states": ReFusionBlock,
        "attentions": ReFusionAttention,
    }


class ReFusionModel(BidirectionalBackboneMixin, ReFusionPreTrainedModel):
    """The backbone: Qwen3's modules by Qwen3's names."""

    def __init__(self, config: ReFusionConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([ReFusionBlock(config, index) for index in range(config.num_hidden_layers)])
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = ReFusionRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @takes_either_cache_name
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """As the other families', but without a 4-D mask a token sees what was fed or kept before it, and itself.

        `position_ids` say where tokens stand in the text, in whatever order they are fed.
        """
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is not None and (attention_mask is None or attention_mask.ndim == 2):
            length, kept = given.shape[1], 0 if cache is None else cache.get_seq_length()
            before = torch.ones(length, kept + length, dtype=torch.bool, device=given.device).tril(kept)[None, None]
            if attention_mask is not None:
                if position_ids is None:
                    position_ids = positions_of(attention_mask)[:, -length:]
                before = before & attention_mask[:, None, None].bool()
            attention_mask = before
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )


class ReFusionForCausalLM(MaskedDiffusionLMMixin, ReFusionPreTrainedModel, D3LLMGenerationMixin):
    """ReFusion: logits row i predicts token i where that is masked, and the next token where it is not."""

    model: ReFusionModel
    logit_shift = 0
    default_method = "refusion"

    def __init__(self, config: ReFusionConfig):
        super().__init__(config)
        self.model = ReFusionModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type = "ForMaskedLM"  # unshifted; transformers would guess a shifted loss from the class name
        self.post_init()


__all__ = ["ReFusionConfig", "ReFusionForCausalLM", "ReFusionModel", "ReFusionPreTrainedModel"]
