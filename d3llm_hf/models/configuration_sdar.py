"""Configuration of SDAR and TraDo, under the keys of the official checkpoints."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .architecture import refuse_another_architecture
from .configuration_common import QK_NORM_PLAN, QwenConfigMixin


@strict
class SDARConfig(QwenConfigMixin, PreTrainedConfig):
    r"""Configuration of a [`SDARForCausalLM`]: the keys of `JetLM/SDAR-4B-Chat`, which are Qwen3's.

    Keys that describe another architecture (experts, windows, images) are refused. All other keys of a config.json are
    kept, and saved again.

    Args:
        vocab_size (`int`): rows of the embedding and of the head.
        hidden_size (`int`): width of the residual stream.
        intermediate_size (`int`): width of the gated MLP.
        num_hidden_layers (`int`): number of layers.
        num_attention_heads (`int`), num_key_value_heads (`int`, *optional*): attention heads, key/value heads.
        head_dim (`int`): width of a head; the heads together need not be as wide as the residual stream.
        attention_bias (`bool`): biases on the four projections of the attention.
        qk_norm (`bool`): norms of queries and keys. Published models have them; a Qwen2 or a Llama that
            [`block_causal_lm`] made an SDAR has none.
        max_position_embeddings (`int`): longest sequence (prompt and answer).
        rope_theta (`float`): base of the rotary frequencies; follows `rope_parameters` where that is given.
        block_size (`int`): tokens of a block, which sees itself and all earlier ones; also known as `block_length`.
        mask_token_id (`int`): the token that stands for an undecided position.

    Raises:
        ArchitectureError: (a `ValueError`) when sliding-window attention is asked for, or anything else that is not
            implemented.
    """

    model_type = "sdar"
    attribute_map: ClassVar[dict[str, str]] = {"block_length": "block_size"}
    # Keys that would describe another architecture elsewhere.
    own_keys: ClassVar[frozenset[str]] = frozenset({"block_size", "qk_norm"})
    base_model_tp_plan: ClassVar[dict[str, str]] = QwenConfigMixin.base_model_tp_plan | QK_NORM_PLAN

    vocab_size: int = 151936
    hidden_size: int = 2560
    intermediate_size: int = 9728
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    head_dim: int = 128
    hidden_act: str = "silu"
    attention_bias: bool = False
    qk_norm: bool = True
    attention_dropout: float | int = 0.0
    max_position_embeddings: int = 32768
    rope_theta: float | int = 1000000.0
    rope_parameters: dict | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    use_cache: bool = True
    is_causal: bool = False
    layer_types: list[str] | None = None
    block_size: int = 4
    mask_token_id: int | None = 151669
    bos_token_id: int | None = 151643
    eos_token_id: int | list[int] | None = 151643
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        if kwargs.get("attn_implementation") == "flex_attention":  # of the official training, which packs samples
            del kwargs["attn_implementation"]
        super().__post_init__(**kwargs)
        if not self.qk_norm:  # of this model alone
            plan = type(self).base_model_tp_plan.items()
            own = {name: rule for name, rule in plan if name not in QK_NORM_PLAN}
            self.base_model_tp_plan = own  # type: ignore[misc]  # read of the config, not of its class

    def validate_architecture(self):
        """Part of `@strict`'s validation: refuses what SDAR is not."""
        for name in ("is_causal", "use_sliding_window"):
            if getattr(self, name, False):
                raise ValueError(
                    f"`{name}` must be False (got {getattr(self, name)!r}): a token of SDAR sees its block and all "
                    "earlier ones. Correct config.json."
                )
        for name in ("mlp_bias", "qkv_bias"):
            if getattr(self, name, False):
                raise ValueError(
                    f"`{name}` must be False (got {getattr(self, name)!r}): SDAR has no such biases. Correct "
                    "config.json."
                )
        if self.block_size < 1:
            raise ValueError(f"`block_size` must be a positive integer (got {self.block_size}). Correct config.json.")
        keys = {name: value for name, value in vars(self).items() if name not in self.own_keys}
        refuse_another_architecture("SDAR", keys)


__all__ = ["SDARConfig"]
