"""LLaDA on today's transformers: official tensor names on disk, transformers' own structure in memory."""

import re
from typing import ClassVar

import torch
from torch import nn
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from .cache_name import CACHE_NAMES
from .configuration_llada import LLaDAConfig
from .generation_d3llm import D3LLMGenerationMixin
from .layers import BidirectionalAttentionMixin, BidirectionalBlockMixin
from .modeling_common import BidirectionalBackboneMixin, Float32RotaryMixin, MaskedDiffusionLMMixin
from .tensors import WholeCheckpointMixin


# Official name of each tensor's module -> ours. transformers applies it when loading and undoes it when saving; the
# backbone alone has the same names without `model.`. The lookbehind keeps `input_layernorm.` out of the way back.
_WAY_BACK = "(?<![a-z_])"
_OFFICIAL_TOP = {
    r"transformer\.wte\.": "embed_tokens.",
    r"transformer\.ln_f\.": f"{_WAY_BACK}norm.",
    r"^model\.transformer\.ff_out\.": "lm_head.",
}
OFFICIAL_BLOCK = {
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
_OFFICIAL = _OFFICIAL_TOP | {
    rf"transformer\.blocks\.(\d+)\.{theirs}\.": rf"layers.\1.{ours}." for theirs, ours in OFFICIAL_BLOCK.items()
}


def official_names() -> list[WeightConverter | WeightRenaming]:
    """The renaming of official tensors, for each `model_type` that has them."""
    return [WeightRenaming(theirs, ours) for theirs, ours in _OFFICIAL.items()]


register_checkpoint_conversion_mapping(LLaDAConfig.model_type, official_names(), overwrite=True)


class LLaDARotaryEmbedding(Float32RotaryMixin, LlamaRotaryEmbedding):
    """Llama's cosines and sines, in float32 whatever the model's dtype (`rope_full_precision`)."""

    def forward(self, x: torch.Tensor, position_ids: torch.LongTensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(B, L)` positions to cosines and sines `(B, L, head_dim)`; of `x` only the device matters."""
        return super().forward(x[..., :1].float(), position_ids)


class LLaDAAttention(BidirectionalAttentionMixin, nn.Module):
    """Multi-head attention that sees the whole canvas."""

    def __init__(self, config: LLaDAConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.n_heads // config.n_kv_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = False
        kv_width = config.n_kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.d_model, config.d_model, bias=config.include_qkv_bias)
        self.k_proj = nn.Linear(config.d_model, kv_width, bias=config.include_qkv_bias)
        self.v_proj = nn.Linear(config.d_model, kv_width, bias=config.include_qkv_bias)
        self.o_proj = nn.Linear(config.d_model, config.d_model, bias=False)


class LLaDAMLP(nn.Module):
    """Gated MLP: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: LLaDAConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.mlp_hidden_size, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.mlp_hidden_size, bias=False)
        self.down_proj = nn.Linear(config.mlp_hidden_size, config.d_model, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class LLaDABlock(BidirectionalBlockMixin, GradientCheckpointingLayer):
    """Pre-norm attention and MLP."""

    def __init__(self, config: LLaDAConfig, layer_idx: int):
        super().__init__()
        self.self_attn = LLaDAAttention(config, layer_idx)
        self.mlp = LLaDAMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.d_model, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.d_model, config.rms_norm_eps)


class LLaDAPreTrainedModel(WholeCheckpointMixin, PreTrainedModel):
    """What transformers asks of a model family."""

    config: LLaDAConfig
    config_class = LLaDAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["LLaDABlock"]
    _skip_keys_device_placement: ClassVar[list[str]] = list(CACHE_NAMES)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs: ClassVar[dict[str, type[nn.Module]]] = {
        "hidden_states": LLaDABlock,
        "attentions": LLaDAAttention,
    }

    @staticmethod
    def own_tensor_name(name: str) -> str:
        """As transformers renames a tensor by the mapping above, or leaves it."""
        for theirs, ours in _OFFICIAL.items():
            name = re.sub(theirs, ours.replace(_WAY_BACK, ""), name)
        return name


class LLaDAModel(BidirectionalBackboneMixin, LLaDAPreTrainedModel):
    """The backbone: embeddings, blocks and the final norm."""

    def __init__(self, config: LLaDAConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList([LLaDABlock(config, index) for index in range(config.n_layers)])
        self.norm = LlamaRMSNorm(config.d_model, config.rms_norm_eps)
        self.rotary_emb = LLaDARotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()


class LLaDAModelLM(MaskedDiffusionLMMixin, LLaDAPreTrainedModel, D3LLMGenerationMixin):
    """LLaDA (8B, 1.5, d3LLM-LLaDA and every checkpoint of that format): logits row i predicts token i.

    A checkpoint whose config has a `block_alignment` is block-causal: it is decoded and trained so.
    """

    model: LLaDAModel
    logit_shift = 0

    def __init__(self, config: LLaDAConfig):
        super().__init__(config)
        self.model = LLaDAModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.loss_type = "ForMaskedLM"  # unshifted; transformers would guess a shifted loss from the class name
        if config.block_alignment is not None:
            self.block_alignment = config.block_alignment
        self.post_init()

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """As transformers', keeping the official key `embedding_size` equal to the new vocabulary."""
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        if self.config.embedding_size is not None:
            self.config.embedding_size = self.config.vocab_size
        return embeddings


__all__ = ["LLaDAConfig", "LLaDAModel", "LLaDAModelLM", "LLaDAPreTrainedModel"]
