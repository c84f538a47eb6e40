"""Dream on today's transformers: Qwen2's layers, every token seeing all others."""

from torch import nn
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model, Qwen2PreTrainedModel, Qwen2RotaryEmbedding

from .configuration_dream import DreamConfig
from .generation_d3llm import D3LLMGenerationMixin
from .modeling_common import BidirectionalBackboneMixin, Float32RotaryMixin, MaskedDiffusionLMMixin


class DreamRotaryEmbedding(Float32RotaryMixin, Qwen2RotaryEmbedding):
    """Qwen2's cosines and sines, computed in float32 and cast to the model's dtype."""


class DreamPreTrainedModel(Qwen2PreTrainedModel):
    """What transformers asks of a model family; Qwen2's answers hold."""

    config: DreamConfig
    config_class = DreamConfig


class DreamBaseModel(BidirectionalBackboneMixin, DreamPreTrainedModel, Qwen2Model):
    """The backbone: Qwen2's modules, with a forward of our own that is bidirectional and ends `position_ids` early."""

    def __init__(self, config: DreamConfig):
        super().__init__(config)
        self.rotary_emb = DreamRotaryEmbedding(config)
        for layer in self.layers:
            layer.self_attn.is_causal = False


class DreamModel(MaskedDiffusionLMMixin, DreamPreTrainedModel, D3LLMGenerationMixin):
    """Dream (v0, Coder, d3LLM-Dream and every checkpoint of that format): logits row i predicts token i + 1."""

    logit_shift = 1

    def __init__(self, config: DreamConfig):
        super().__init__(config)
        self.model = DreamBaseModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type = "ForMaskedLM"  # unshifted; transformers would guess a shifted loss from the class name
        self.post_init()


__all__ = ["DreamBaseModel", "DreamConfig", "DreamModel", "DreamPreTrainedModel"]
