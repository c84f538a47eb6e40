"""SDAR and TraDo on today's transformers: Qwen3's layers, blocks of tokens seeing themselves and all earlier ones."""

from typing import ClassVar

import torch
from torch import nn
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3Attention,
    Qwen3DecoderLayer,
    Qwen3PreTrainedModel,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
)

from .configuration_sdar import SDARConfig
from .generation_d3llm import D3LLMGenerationMixin
from .layers import BidirectionalAttentionMixin, BidirectionalBlockMixin
from .modeling_common import BidirectionalBackboneMixin, Float32RotaryMixin, MaskedDiffusionLMMixin
from .tensors import WholeCheckpointMixin


class SDARRMSNorm(Qwen3RMSNorm):
    """Qwen3's norm, whose weight is multiplied in float32 as well: one rounding, where there are two."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        wide = hidden_states.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (wide * self.weight.float()).to(hidden_states.dtype)


class SDARRotaryEmbedding(Float32RotaryMixin, Qwen3RotaryEmbedding):
    """Qwen3's cosines and sines, computed in float32 and cast to the model's dtype."""


class SDARAttention(BidirectionalAttentionMixin, Qwen3Attention):
    """Qwen3's projections, and norms of queries and keys unless the config has none, under a mask alone."""

    def __init__(self, config: SDARConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        del self.q_norm, self.k_norm  # Qwen3's
        if config.qk_norm:
            self.q_norm = SDARRMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = SDARRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.is_causal = False


class SDARBlock(BidirectionalBlockMixin, Qwen3DecoderLayer):
    """Qwen3's MLP and SDAR's norms around [`SDARAttention`]."""

    def __init__(self, config: SDARConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = SDARAttention(config, layer_idx)
        self.input_layernorm = SDARRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = SDARRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class SDARPreTrainedModel(WholeCheckpointMixin, Qwen3PreTrainedModel):
    """What transformers asks of a model family; most of Qwen3's answers hold."""

    config: SDARConfig  # type: ignore[assignment]  # has what is read of a Qwen3Config
    config_class = SDARConfig
    _no_split_modules: ClassVar[list[str]] = ["SDARBlock"]
    _can_record_outputs: ClassVar[dict[str, type[nn.Module]]] = {
        "hidden_states": SDARBlock,
        "attentions": SDARAttention,
    }


class SDARModel(BidirectionalBackboneMixin, SDARPreTrainedModel):
    """The backbone: Qwen3's modules by Qwen3's names."""

    def __init__(self, config: SDARConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([SDARBlock(config, index) for index in range(config.num_hidden_layers)])
        self.norm = SDARRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = SDARRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()


class SDARForCausalLM(MaskedDiffusionLMMixin, SDARPreTrainedModel, D3LLMGenerationMixin):
    """SDAR and TraDo: logits row i predicts token i, from its block and all earlier ones."""

    model: SDARModel
    logit_shift = 0
    block_alignment = "text"
    default_method = "sdar"

    def __init__(self, config: SDARConfig):
        super().__init__(config)
        self.model = SDARModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type = "ForMaskedLM"  # unshifted; transformers would guess a shifted loss from the class name
        self.post_init()


__all__ = ["SDARConfig", "SDARForCausalLM", "SDARModel", "SDARPreTrainedModel"]
