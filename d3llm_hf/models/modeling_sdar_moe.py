"""SDAR with experts on today's transformers: SDAR's attention, and a router that chooses experts by softmax."""

import torch
from torch import nn
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from .configuration_sdar_moe import SDARMoeConfig
from .experts import Experts, merged_experts
from .generation_d3llm import D3LLMGenerationMixin
from .modeling_common import BidirectionalBackboneMixin, MaskedDiffusionLMMixin
from .modeling_sdar import SDARBlock, SDARPreTrainedModel, SDARRMSNorm, SDARRotaryEmbedding


register_checkpoint_conversion_mapping(SDARMoeConfig.model_type, merged_experts(), overwrite=True)


class SDARRouter(nn.Module):
    """The most probable experts of a token, in float32, with weights that sum to 1."""

    def __init__(self, config: SDARMoeConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of `(T, D)` states the chosen experts `(T, K)`, the best first, and their weights `(T, K)` in float32."""
        probabilities = nn.functional.linear(hidden_states, self.weight).softmax(-1, dtype=torch.float32)
        weights, chosen = probabilities.topk(self.top_k, dim=-1)
        return chosen, weights / weights.sum(-1, keepdim=True)


class SDARMoE(nn.Module):
    """The experts that a router chooses."""

    def __init__(self, config: SDARMoeConfig):
        super().__init__()
        self.gate = SDARRouter(config)
        self.experts = Experts(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        tokens = hidden_states.flatten(0, -2)
        return self.experts(tokens, *self.gate(tokens)).view_as(hidden_states)


class SDARMoeBlock(SDARBlock):
    """SDAR's block, with experts in the layers that have some."""

    def __init__(self, config: SDARMoeConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        if config.has_experts(layer_idx):
            self.mlp = SDARMoE(config)


class SDARMoePreTrainedModel(SDARPreTrainedModel):
    """What transformers asks of a model family; SDAR's answers hold."""

    config: SDARMoeConfig
    config_class = SDARMoeConfig
    _no_split_modules = ["SDARMoeBlock"]  # noqa: RUF012 (as in the classes above it)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """transformers looks for its decorator in this file; it stands in that of the experts."""
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SDARRouter):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, Experts):
            init.normal_(module.gate_up_proj, std=self.config.initializer_range)
            init.normal_(module.down_proj, std=self.config.initializer_range)

    def stored_tensors(self) -> dict[str, torch.Tensor]:
        """As they are published: each expert by itself."""
        return revert_weight_conversion(self, self.state_dict())


class SDARMoeModel(BidirectionalBackboneMixin, SDARMoePreTrainedModel):
    """The backbone."""

    def __init__(self, config: SDARMoeConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([SDARMoeBlock(config, index) for index in range(config.num_hidden_layers)])
        self.norm = SDARRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = SDARRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()


class SDARMoeForCausalLM(MaskedDiffusionLMMixin, SDARMoePreTrainedModel, D3LLMGenerationMixin):
    """SDAR-30B-A3B: logits row i predicts token i, from its block and all earlier ones."""

    model: SDARMoeModel
    logit_shift = 0
    block_alignment = "text"
    default_method = "sdar"

    def __init__(self, config: SDARMoeConfig):
        super().__init__(config)
        self.model = SDARMoeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type = "ForMaskedLM"  # unshifted; transformers would guess a shifted loss from the class name
        self.post_init()


__all__ = ["SDARMoeConfig", "SDARMoeForCausalLM", "SDARMoeModel", "SDARMoePreTrainedModel"]
