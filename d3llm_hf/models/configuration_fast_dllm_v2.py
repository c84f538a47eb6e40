"""Configuration of Fast-dLLM v2, under the keys of the official checkpoints."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .architecture import refuse_another_architecture
from .configuration_common import QK_NORM_PLAN, QwenConfigMixin


# Keys of Qwen2's relatives, with the value that is implemented.
_ONLY_VARIANT = {"attention_bias": True, "mlp_bias": False, "qkv_bias": True}


@strict
class Fast_dLLM_QwenConfig(QwenConfigMixin, PreTrainedConfig):
    r"""Configuration of a [`Fast_dLLM_QwenForCausalLM`]: the keys of `Efficient-Large-Model/Fast_dLLM_v2_7B`.

    They are Qwen2's, with the official class's defaults. Keys that describe another architecture (experts, windows,
    images) are refused. All other keys of a config.json are kept, and saved again.

    Args:
        vocab_size (`int`): rows of the embedding and of the head.
        hidden_size (`int`): width of the residual stream.
        intermediate_size (`int`): width of the gated MLP.
        num_hidden_layers (`int`): number of layers.
        num_attention_heads (`int`), num_key_value_heads (`int`, *optional*): attention heads, key/value heads.
        qk_norm (`bool`): norms of queries and keys. Published models have none; a Qwen3 that [`block_causal_lm`] made
            a Fast-dLLM v2 has them.
        max_position_embeddings (`int`): longest sequence (prompt and answer).
        rope_theta (`float`): base of the rotary frequencies; follows `rope_parameters` where that is given.
        bd_size (`int`): tokens of a block, which sees itself and all earlier ones; also known as `block_length`.
        mask_token_id (`int`), eos_token_id (`int`): the token that stands for an undecided position, and the one that
            ends an answer. Official files name neither of them; the official functions have them as defaults.

    Raises:
        ArchitectureError: (a `ValueError`) when sliding-window attention is asked for, or anything else that is not
            implemented.
    """

    model_type = "Fast_dLLM_Qwen"
    attribute_map: ClassVar[dict[str, str]] = {"block_length": "bd_size"}

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 32
    hidden_act: str = "silu"
    qk_norm: bool = False
    attention_dropout: float | int = 0.0
    max_position_embeddings: int = 32768
    rope_theta: float | int = 10000.0
    rope_parameters: dict | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    use_cache: bool = True
    is_causal: bool = False
    layer_types: list[str] | None = None
    bd_size: int = 32
    mask_token_id: int | None = 151665
    bos_token_id: int | None = 151643
    eos_token_id: int | list[int] | None = 151645
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.qk_norm:  # of this model alone
            own = type(self).base_model_tp_plan | QK_NORM_PLAN
            self.base_model_tp_plan = own  # type: ignore[misc]  # read of the config, not of its class

    def validate_architecture(self):
        """Part of `@strict`'s validation: refuses what Fast-dLLM v2 is not."""
        for name in ("is_causal", "use_sliding_window"):
            if getattr(self, name, False):
                raise ValueError(
                    f"`{name}` must be False (got {getattr(self, name)!r}): a token of Fast-dLLM v2 sees its block "
                    "and all earlier ones. Correct config.json."
                )
        if self.bd_size < 1:
            raise ValueError(f"`bd_size` must be a positive integer (got {self.bd_size}). Correct config.json.")
        for name, implemented in _ONLY_VARIANT.items():
            value = getattr(self, name, None)
            if value not in (None, implemented):
                raise ValueError(
                    f"`{name}` must be {implemented!r} (got {value!r}): Fast-dLLM v2's biases are those of its "
                    "queries, keys and values. Correct config.json."
                )
        keys = {name: value for name, value in vars(self).items() if name != "qk_norm"}
        refuse_another_architecture("Fast-dLLM v2", keys)


__all__ = ["Fast_dLLM_QwenConfig"]
