"""LLaDA2.0 and 2.1 on today's transformers: experts, and blocks of tokens seeing themselves and all earlier ones."""

from typing import ClassVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Split, WeightConverter, WeightRenaming, revert_weight_conversion
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.models.glm.modeling_glm import GlmRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from .cache_name import CACHE_NAMES
from .configuration_llada2 import LLaDA2MoeConfig
from .experts import Experts, merged_experts
from .generation_d3llm import D3LLMGenerationMixin
from .layers import BidirectionalAttentionMixin, BidirectionalBlockMixin
from .modeling_common import (
    BidirectionalBackboneMixin,
    Float32BuffersMixin,
    Float32RotaryMixin,
    MaskedDiffusionLMMixin,
)
from .tensors import WholeCheckpointMixin


# The tensors of a published checkpoint -> ours. transformers applies it when loading and undoes it when saving. The
# rows of `query_key_value` are all query heads, then the key heads, then the value heads.
register_checkpoint_conversion_mapping(
    LLaDA2MoeConfig.model_type,
    [
        *merged_experts(),
        WeightRenaming(r"word_embeddings\.", "embed_tokens."),
        WeightConverter(
            source_patterns="attention.query_key_value",
            target_patterns=["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            operations=[Split(dim=0)],
        ),
        WeightRenaming(r"\.attention\.dense\.", ".self_attn.o_proj."),
        WeightRenaming(r"\.attention\.query_layernorm\.", ".self_attn.q_norm."),
        WeightRenaming(r"\.attention\.key_layernorm\.", ".self_attn.k_norm."),
    ],
    overwrite=True,
)


class LLaDA2RotaryEmbedding(Float32RotaryMixin, GlmRotaryEmbedding):
    """Cosines and sines of the part of a head that is turned, computed in float32 and cast to the model's dtype."""


class LLaDA2Attention(BidirectionalAttentionMixin, nn.Module):
    """Attention that sees what its mask leaves in, with norms of queries and keys over the whole head."""

    def __init__(self, config: LLaDA2MoeConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim  # type: ignore[assignment]  # filled when the config is made
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = False
        width, kv_width = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.q_norm = LlamaRMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = LlamaRMSNorm(self.head_dim, config.rms_norm_eps)


class LLaDA2MLP(nn.Module):
    """Gated MLP: `down(act(gate(x)) * up(x))`."""

    def __init__(self, config: LLaDA2MoeConfig, width: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class LLaDA2Router(Float32BuffersMixin, nn.Module):
    """Chooses the experts of a token, in float32: first groups of them, then the best of these groups.

    `expert_bias` takes part in the choice and not in the weights, as balances the load without a loss.
    """

    def __init__(self, config: LLaDA2MoeConfig):
        super().__init__()
        self.top_k, self.groups, self.kept_groups = config.num_experts_per_tok, config.n_group, config.topk_group
        self.scale = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.register_buffer("expert_bias", torch.zeros(config.num_experts, dtype=torch.float32))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of `(T, D)` states the chosen experts `(T, K)`, the best first, and their weights `(T, K)` in float32."""
        scores = nn.functional.linear(hidden_states.float(), self.weight.float()).sigmoid()  # (T, E)
        grouped = (scores + self.expert_bias).unflatten(1, (self.groups, -1))
        kept = grouped.topk(2, dim=-1).values.sum(-1).topk(self.kept_groups, dim=-1).indices
        left_out = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(1, kept, False)
        chosen = grouped.masked_fill(left_out[..., None], float("-inf")).flatten(1).topk(self.top_k, dim=-1).indices
        weights = scores.gather(1, chosen)
        return chosen, weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.scale


class LLaDA2MoE(nn.Module):
    """The experts that a router chooses, and beside them those that every token goes through."""

    def __init__(self, config: LLaDA2MoeConfig):
        super().__init__()
        self.gate = LLaDA2Router(config)
        self.experts = Experts(config)
        shared = config.num_shared_experts
        self.shared_experts = LLaDA2MLP(config, config.moe_intermediate_size * shared) if shared else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.flatten(0, -2)
        routed = self.experts(tokens, *self.gate(tokens)).view_as(hidden_states)
        return routed if self.shared_experts is None else routed + self.shared_experts(hidden_states)


class LLaDA2Block(BidirectionalBlockMixin, GradientCheckpointingLayer):
    """Pre-norm attention, and experts or, in the first layers, one MLP."""

    def __init__(self, config: LLaDA2MoeConfig, layer_idx: int):
        super().__init__()
        self.self_attn = LLaDA2Attention(config, layer_idx)
        dense = layer_idx < config.first_k_dense_replace
        self.mlp = LLaDA2MLP(config, config.intermediate_size) if dense else LLaDA2MoE(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)


class LLaDA2MoePreTrainedModel(WholeCheckpointMixin, PreTrainedModel):
    """What transformers asks of a model family."""

    config: LLaDA2MoeConfig
    config_class = LLaDA2MoeConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["LLaDA2Block"]
    _skip_keys_device_placement: ClassVar[list[str]] = list(CACHE_NAMES)
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["expert_bias"]
    _can_record_outputs: ClassVar[dict[str, type[nn.Module]]] = {
        "hidden_states": LLaDA2Block,
        "attentions": LLaDA2Attention,
    }

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """transformers looks for its decorator in this file; it stands in that of the experts."""
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LLaDA2Router):
            init.normal_(module.weight, std=self.config.initializer_range)
            init.zeros_(module.expert_bias)
        elif isinstance(module, Experts):
            init.normal_(module.gate_up_proj, std=self.config.initializer_range)
            init.normal_(module.down_proj, std=self.config.initializer_range)

    def stored_tensors(self) -> dict[str, torch.Tensor]:
        """As they are published: queries, keys and values in one, and each expert by itself."""
        return revert_weight_conversion(self, self.state_dict())


class LLaDA2MoeModel(BidirectionalBackboneMixin, LLaDA2MoePreTrainedModel):
    """The backbone: embeddings, blocks and the final norm."""

    def __init__(self, config: LLaDA2MoeConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([LLaDA2Block(config, index) for index in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = LLaDA2RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()


class LLaDA2MoeModelLM(MaskedDiffusionLMMixin, LLaDA2MoePreTrainedModel, D3LLMGenerationMixin):
    """LLaDA2.0 and 2.1: logits row i predicts token i, from its block and all earlier ones."""

    model: LLaDA2MoeModel
    logit_shift = 0
    block_alignment = "text"
    default_method = "llada2"

    def __init__(self, config: LLaDA2MoeConfig):
        super().__init__(config)
        self.model = LLaDA2MoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type = "ForMaskedLM"  # unshifted; transformers would guess a shifted loss from the class name
        self.post_init()


__all__ = ["LLaDA2MoeConfig", "LLaDA2MoeModel", "LLaDA2MoeModelLM", "LLaDA2MoePreTrainedModel"]
