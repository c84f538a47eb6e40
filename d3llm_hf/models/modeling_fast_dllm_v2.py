"""Fast-dLLM v2 on today's transformers: Qwen2's layers, blocks of tokens seeing themselves and all earlier ones."""

from typing import ClassVar

from torch import nn
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2Attention,
    Qwen2DecoderLayer,
    Qwen2PreTrainedModel,
    Qwen2RMSNorm,
    Qwen2RotaryEmbedding,
)

from .configuration_fast_dllm_v2 import Fast_dLLM_QwenConfig
from .generation_d3llm import D3LLMGenerationMixin
from .layers import BidirectionalAttentionMixin, BidirectionalBlockMixin
from .modeling_common import BidirectionalBackboneMixin, Float32RotaryMixin, MaskedDiffusionLMMixin
from .tensors import WholeCheckpointMixin
from .token_ids import check_inside


class Fast_dLLM_QwenRotaryEmbedding(Float32RotaryMixin, Qwen2RotaryEmbedding):
    """Qwen2's cosines and sines, computed in float32 and cast to the model's dtype."""


class Fast_dLLM_QwenAttention(BidirectionalAttentionMixin, Qwen2Attention):
    """Qwen2's projections, and norms of queries and keys where the config has them, under a mask alone."""

    def __init__(self, config: Fast_dLLM_QwenConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        if config.qk_norm:
            self.q_norm = Qwen2RMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = Qwen2RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.is_causal = False


class Fast_dLLM_QwenBlock(BidirectionalBlockMixin, Qwen2DecoderLayer):
    """Qwen2's norms and MLP around [`Fast_dLLM_QwenAttention`]."""

    def __init__(self, config: Fast_dLLM_QwenConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = Fast_dLLM_QwenAttention(config, layer_idx)


class Fast_dLLM_QwenPreTrainedModel(WholeCheckpointMixin, Qwen2PreTrainedModel):
    """What transformers asks of a model family; most of Qwen2's answers hold."""

    config: Fast_dLLM_QwenConfig  # type: ignore[assignment]  # has what is read of a Qwen2Config
    config_class = Fast_dLLM_QwenConfig
    _no_split_modules: ClassVar[list[str]] = ["Fast_dLLM_QwenBlock"]
    _can_record_outputs: ClassVar[dict[str, type[nn.Module]]] = {
        "hidden_states": Fast_dLLM_QwenBlock,
        "attentions": Fast_dLLM_QwenAttention,
    }


class Fast_dLLM_QwenModel(BidirectionalBackboneMixin, Fast_dLLM_QwenPreTrainedModel):
    """The backbone: Qwen2's modules by Qwen2's names."""

    def __init__(self, config: Fast_dLLM_QwenConfig):
        super().__init__(config)
        way_out = "Correct config.json; null is none."
        check_inside("`pad_token_id` of the model's config", config.pad_token_id, config.vocab_size, way_out)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([Fast_dLLM_QwenBlock(config, index) for index in range(config.num_hidden_layers)])
        self.norm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Fast_dLLM_QwenRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()


class Fast_dLLM_QwenForCausalLM(MaskedDiffusionLMMixin, Fast_dLLM_QwenPreTrainedModel, D3LLMGenerationMixin):
    """Fast-dLLM v2: logits row i predicts token i + 1, from the block of token i and all earlier ones."""

    model: Fast_dLLM_QwenModel
    logit_shift = 1
    block_alignment = "text"
    default_method = "fast_dllm_v2"

    def __init__(self, config: Fast_dLLM_QwenConfig):
        super().__init__(config)
        self.model = Fast_dLLM_QwenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type = "ForMaskedLM"  # unshifted; transformers would guess a shifted loss from the class name
        self.post_init()


__all__ = [
    "Fast_dLLM_QwenConfig",
    "Fast_dLLM_QwenForCausalLM",
    "Fast_dLLM_QwenModel",
    "Fast_dLLM_QwenPreTrainedModel",
]
