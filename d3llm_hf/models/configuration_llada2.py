"""Configuration of LLaDA2.0 and LLaDA2.1, under the keys of the official checkpoints."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .architecture import refuse_another_architecture, refusing
from .configuration_common import DerivingConfigMixin


# Keys of the official config that describe variants which no released LLaDA2 uses, with the value that is implemented.
_ONLY_VARIANT = {
    "embedding_dropout": 0.0,
    "is_causal": False,
    "norm_head": False,
    "norm_softmax": False,
    "norm_topk_prob": True,
    "output_dropout": 0.0,
    "router_dtype": "fp32",
    "score_function": "sigmoid",
    "use_bias": False,
    "use_qkv_bias": False,
    "use_rmsnorm": True,
    "use_sliding_window": False,
}
# What it has, where the other families of this package have nothing.
_OWN = frozenset(
    {
        "block_length",
        "first_k_dense_replace",
        "moe_intermediate_size",
        "moe_router_enable_expert_bias",
        "num_experts",
        "num_experts_per_tok",
        "num_shared_experts",
        "output_router_logits",
        "partial_rotary_factor",
        "rotary_dim",
        "routed_scaling_factor",
        "router_dtype",
        "use_qk_norm",
    }
)


@strict
class LLaDA2MoeConfig(DerivingConfigMixin, PreTrainedConfig):
    r"""Configuration of a [`LLaDA2MoeModelLM`]: the keys of `inclusionAI/LLaDA2.0-mini`.

    Keys that describe variants which no released checkpoint uses are kept, and refused when they ask for one, as are
    keys that describe another architecture. All other keys of a config.json are kept, and saved again.

    Args:
        vocab_size (`int`): rows of the embedding and of the head.
        hidden_size (`int`): width of the residual stream.
        intermediate_size (`int`): width of the gated MLP of the dense layers.
        num_hidden_layers (`int`): number of layers.
        first_k_dense_replace (`int`): layers, from the first, that have one MLP in place of experts.
        num_attention_heads (`int`), num_key_value_heads (`int`, *optional*): attention heads, key/value heads.
        head_dim (`int`, *optional*): width of a head, `hidden_size / num_attention_heads` when unset.
        partial_rotary_factor (`float`): fraction of a head, from its first dimension, that is turned by position.
        num_experts (`int`), num_experts_per_tok (`int`): experts of a layer, and those that a token goes through.
        n_group (`int`), topk_group (`int`): groups of neighbouring experts, and those that a token may choose from.
        moe_intermediate_size (`int`): width of an expert.
        num_shared_experts (`int`, *optional*): experts that every token goes through, as one MLP; none when unset.
        routed_scaling_factor (`float`): what the chosen experts' weights sum to.
        max_position_embeddings (`int`): longest sequence (prompt and answer).
        rope_theta (`float`): base of the rotary frequencies; follows `rope_parameters` where that is given.
        block_length (`int`): tokens of a block, which sees itself and all earlier ones; also known as `block_size`.
        mask_token_id (`int`): the token that stands for an undecided position.

    Raises:
        ArchitectureError: (a `ValueError`) for a variant of the architecture that is not implemented, or sizes that
            do not fit together.
    """

    model_type = "llada2_moe"
    attribute_map: ClassVar[dict[str, str]] = {"block_size": "block_length", "num_local_experts": "num_experts"}
    base_model_tp_plan: ClassVar[dict[str, str]] = DerivingConfigMixin.base_model_tp_plan | {
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
        "layers.*.mlp.shared_experts.gate_proj": "colwise",
        "layers.*.mlp.shared_experts.up_proj": "colwise",
        "layers.*.mlp.shared_experts.down_proj": "rowwise",
    }

    vocab_size: int = 157184
    hidden_size: int = 2048
    intermediate_size: int = 5120
    num_hidden_layers: int = 20
    first_k_dense_replace: int = 1
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 4
    head_dim: int | None = 128
    partial_rotary_factor: float | int = 0.5
    num_experts: int = 256
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    moe_intermediate_size: int = 512
    num_shared_experts: int | None = 1
    routed_scaling_factor: float | int = 2.5
    hidden_act: str = "silu"
    attention_dropout: float | int = 0.0
    max_position_embeddings: int = 32768
    rope_theta: float | int = 600000.0
    rope_parameters: dict | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    use_cache: bool = False
    is_causal: bool = False
    block_length: int = 32
    mask_token_id: int | None = 156895
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 156892
    pad_token_id: int | None = 156892

    def __post_init__(self, **kwargs):
        kwargs = self.take_aliases(kwargs)
        if not self.num_key_value_heads:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)
        with refusing():
            self.validate_architecture()
        self.rope_theta = self.rope_parameters["rope_theta"]  # the key that engines of the official code read

    def validate_architecture(self):
        """Part of `@strict`'s validation: refuses what the modelling code does not implement."""
        for name, implemented in _ONLY_VARIANT.items():
            value = getattr(self, name, None)
            if value not in (None, implemented):
                raise ValueError(
                    f"`{name}` must be {implemented!r} (got {value!r}): no released LLaDA2 uses another value, and it "
                    "is not implemented. Correct config.json."
                )
        if self.block_length < 1:
            raise ValueError(
                f"`block_length` must be a positive integer (got {self.block_length}). Correct config.json."
            )
        keys = {name: value for name, value in vars(self).items() if name not in _OWN}
        rope = {name: v for name, v in (self.rope_parameters or {}).items() if name != "partial_rotary_factor"}
        refuse_another_architecture("LLaDA2", keys | {"rope_parameters": rope})
        if self.num_hidden_layers > self.first_k_dense_replace:
            self._check_experts()

    def _check_experts(self) -> None:
        """Whether a token finds as many experts as it goes through."""
        size, rest = divmod(self.num_experts, max(self.n_group, 1))
        fits = self.n_group > 0 and not rest and size > 1 and 0 < self.topk_group <= self.n_group
        if not fits or not 0 < self.num_experts_per_tok <= size * self.topk_group:
            raise ValueError(
                "`num_experts` must be a multiple of `n_group`, groups hold two experts or more, and `topk_group` of "
                f"them at least `num_experts_per_tok` (got num_experts={self.num_experts}, n_group={self.n_group}, "
                f"topk_group={self.topk_group}, num_experts_per_tok={self.num_experts_per_tok}). Correct config.json."
            )


__all__ = ["LLaDA2MoeConfig"]
