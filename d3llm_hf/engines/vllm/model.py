"""LLaDA and Dream of vLLM's own layers, so that tensor parallelism, quantisation and kernels are vLLM's."""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsQuant
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix

from ...models.modeling_dream import DreamModel
from ...models.modeling_llada import LLaDAModelLM, official_names
from .admission import served_by
from .state import D3LLMModelState


_STACKED: dict[str, tuple[str, Any]] = {
    ".q_proj": (".qkv_proj", "q"),
    ".k_proj": (".qkv_proj", "k"),
    ".v_proj": (".qkv_proj", "v"),
    ".gate_proj": (".gate_up_proj", 0),
    ".up_proj": (".gate_up_proj", 1),
}


class CanvasAttention(nn.Module):
    """Attention of every position to all of its canvas; what is hidden is said by the metadata of the forward."""

    def __init__(self, config: Any, vllm_config: VllmConfig, qkv_bias: bool, prefix: str):
        super().__init__()
        shards = get_tensor_model_parallel_world_size()
        head_dim = config.hidden_size // config.num_attention_heads
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        quant_config = vllm_config.quant_config
        self.sizes = [
            heads // shards * head_dim,
            *[max(1, kv_heads // shards) * head_dim] * 2,
        ]
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size, head_dim, heads, kv_heads, bias=qkv_bias, quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )  # fmt: skip
        self.o_proj = RowParallelLinear(
            heads * head_dim, config.hidden_size, bias=False, quant_config=quant_config, prefix=f"{prefix}.o_proj"
        )
        self.rotary_emb = get_rope(
            head_dim, max_position=config.max_position_embeddings, rope_parameters=config.rope_parameters
        )
        self.attn = Attention(
            heads // shards, head_dim, head_dim**-0.5, num_kv_heads=max(1, kv_heads // shards),
            cache_config=vllm_config.cache_config, quant_config=quant_config, prefix=f"{prefix}.attn",
        )  # fmt: skip

    def forward(self, positions: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """`(T,)` positions and `(T, D)` states to `(T, D)`."""
        query, key, value = self.qkv_proj(states)[0].split(self.sizes, dim=-1)
        query, key = self.rotary_emb(positions, query, key)
        return self.o_proj(self.attn(query, key, value))[0]


class GatedMLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: Any, vllm_config: VllmConfig, prefix: str):
        super().__init__()
        quant_config = vllm_config.quant_config
        self.gate_up_proj = MergedColumnParallelLinear(
            config.hidden_size, [config.intermediate_size] * 2, bias=False, quant_config=quant_config,
            prefix=f"{prefix}.gate_up_proj",
        )  # fmt: skip
        self.down_proj = RowParallelLinear(
            config.intermediate_size, config.hidden_size, bias=False, quant_config=quant_config,
            prefix=f"{prefix}.down_proj",
        )  # fmt: skip
        self.act_fn = SiluAndMul()

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """`(T, D)` to `(T, D)`."""
        return self.down_proj(self.act_fn(self.gate_up_proj(states)[0]))[0]


class CanvasBlock(nn.Module):
    """Pre-norm attention and MLP, with the residual carried beside the states as vLLM's fused norms take it."""

    def __init__(self, config: Any, vllm_config: VllmConfig, qkv_bias: bool, prefix: str):
        super().__init__()
        self.self_attn = CanvasAttention(config, vllm_config, qkv_bias, f"{prefix}.self_attn")
        self.mlp = GatedMLP(config, vllm_config, f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, positions: torch.Tensor, states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(T, D)` states and residual to the same."""
        if residual is None:
            residual, states = states, self.input_layernorm(states)
        else:
            states, residual = self.input_layernorm(states, residual)
        states, residual = self.post_attention_layernorm(self.self_attn(positions, states), residual)
        return self.mlp(states), residual


class CanvasBackbone(nn.Module):
    """Embeddings, blocks and the final norm."""

    def __init__(self, config: Any, vllm_config: VllmConfig, qkv_bias: bool, prefix: str):
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.embed_tokens",
        )  # fmt: skip
        self.layers = nn.ModuleList(
            [
                CanvasBlock(config, vllm_config, qkv_bias, f"{prefix}.layers.{index}")
                for index in range(config.num_hidden_layers)
            ]
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, positions: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """`(T,)` positions and `(T, D)` embeddings to `(T, D)` states."""
        residual = None
        for layer in self.layers:
            states, residual = layer(positions, states, residual)
        return self.norm(states, residual)[0]


class MaskedDiffusionForVllm(nn.Module, SupportsQuant):
    """A bidirectional masked diffusion model as vLLM runs it.

    Class attributes:
        logit_shift: as in `CanvasContract`.
        qkv_bias: whether queries, keys and values have biases; `None` is what the config says.
    """

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    hf_to_vllm_mapper: ClassVar[WeightsMapper] = WeightsMapper(orig_to_new_stacked=_STACKED)
    logit_shift = 0
    qkv_bias: bool | None = None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        served_by(vllm_config)  # refused before any weight is read
        config = vllm_config.model_config.hf_config
        bias = config.include_qkv_bias if self.qkv_bias is None else self.qkv_bias
        self.model = CanvasBackbone(config, vllm_config, bias, maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            config.vocab_size, config.hidden_size, quant_config=vllm_config.quant_config,
            prefix=maybe_prefix(prefix, "lm_head"),
        )  # fmt: skip
        if config.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config.vocab_size)
        # Rows of the next logits that are wanted, set before a forward; `None` is all.
        self.wanted: torch.Tensor | None = None

    @staticmethod
    def get_model_state_cls() -> type[D3LLMModelState]:
        """The requests' states and the sampler that goes with them."""
        return D3LLMModelState

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`(T,)` tokens to `(T, D)`."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The last states `(T, D)` of all canvases of a step, one behind the other."""
        states = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
        return self.model(positions, states)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """Logits of the wanted rows of `(m, D)` states, once; then of all."""
        wanted, self.wanted = self.wanted, None
        return self.logits_processor(self.lm_head, hidden_states if wanted is None else hidden_states[wanted])

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Tensors by their official names."""
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)


class LLaDAForVllm(MaskedDiffusionForVllm):
    """LLaDA and its students."""

    hf_to_vllm_mapper = WeightsMapper(orig_to_new_renaming=official_names(), orig_to_new_stacked=_STACKED)
    logit_shift = LLaDAModelLM.logit_shift


class DreamForVllm(MaskedDiffusionForVllm):
    """Dream and its students, whose logits are shifted."""

    logit_shift = DreamModel.logit_shift
    qkv_bias = True


__all__ = ["DreamForVllm", "LLaDAForVllm"]
