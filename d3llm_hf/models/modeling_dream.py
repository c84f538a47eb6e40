"""Dream on today's transformers: Qwen2's layers, every token seeing all others."""

from typing import ClassVar

from torch import nn
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2Attention,
    Qwen2DecoderLayer,
    Qwen2PreTrainedModel,
    Qwen2RMSNorm,
    Qwen2RotaryEmbedding,
)

from .configuration_dream import DreamConfig
from .generation_d3llm import D3LLMGenerationMixin
from .layers import BidirectionalAttentionMixin, BidirectionalBlockMixin
from .modeling_common import BidirectionalBackboneMixin, Float32RotaryMixin, MaskedDiffusionLMMixin
from .tensors import WholeCheckpointMixin
from .token_ids import check_inside


class DreamRotaryEmbedding(Float32RotaryMixin, Qwen2RotaryEmbedding):
    """Qwen2's cosines and sines, computed in float32 and cast to the model's dtype."""


class DreamAttention(BidirectionalAttentionMixin, Qwen2Attention):
    """Qwen2's projections in an attention that sees the whole canvas."""

    def __init__(self, config: DreamConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.is_causal = False


class DreamBlock(BidirectionalBlockMixin, Qwen2DecoderLayer):
    """Qwen2's norms and MLP around [`DreamAttention`]."""

    def __init__(self, config: DreamConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.self_attn = DreamAttention(config, layer_idx)


class DreamPreTrainedModel(WholeCheckpointMixin, Qwen2PreTrainedModel):
    """What transformers asks of a model family; most of Qwen2's answers hold."""

    config: DreamConfig  # type: ignore[assignment]  # has what is read of a Qwen2Config
    config_class = DreamConfig
    _no_split_modules: ClassVar[list[str]] = ["DreamBlock"]
    _can_record_outputs: ClassVar[dict[str, type[nn.Module]]] = {
        "hidden_states": DreamBlock,
        "attentions": DreamAttention,
    }


class DreamBaseModel(BidirectionalBackboneMixin, DreamPreTrainedModel):
    """The backbone: Qwen2's modules by Qwen2's names."""

    def __init__(self, config: DreamConfig):
        super().__init__(config)
        way_out = "Set it in config.json, which takes that of Dream-7B where it names none; null is none."
        check_inside("`pad_token_id` of the model's config", config.pad_token_id, config.vocab_size, way_out)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([DreamBlock(config, index) for index in range(config.num_hidden_layers)])
        self.norm = Qwen2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = DreamRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()


class DreamModel(MaskedDiffusionLMMixin, DreamPreTrainedModel, D3LLMGenerationMixin):
    """Dream (v0, Coder, d3LLM-Dream and every checkpoint of that format): logits row i predicts token i + 1."""

    model: DreamBaseModel
    logit_shift = 1

    def __init__(self, config: DreamConfig):
        super().__init__(config)
        self.model = DreamBaseModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type = "ForMaskedLM"  # unshifted; transformers would guess a shifted loss from the class name
        self.post_init()


__all__ = ["DreamBaseModel", "DreamConfig", "DreamModel", "DreamPreTrainedModel"]
