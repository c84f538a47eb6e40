"""Configuration of Dream and its students, under the keys of the official checkpoints."""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .architecture import refuse_another_architecture
from .configuration_common import QwenConfigMixin


# Keys of Qwen2's relatives, with the value that is implemented.
_ONLY_VARIANT = {"attention_bias": True, "mlp_bias": False, "qkv_bias": True}


@strict
class DreamConfig(QwenConfigMixin, PreTrainedConfig):
    r"""Configuration of a [`DreamModel`]: the keys of `Dream-org/Dream-v0-Instruct-7B`, which are Qwen2's.

    Keys that describe another architecture (experts, windows, norms of queries, images) are refused. All other keys
    of a config.json are kept, and saved again.

    Args:
        vocab_size (`int`): rows of the embedding and of the head.
        hidden_size (`int`): width of the residual stream.
        intermediate_size (`int`): width of the gated MLP.
        num_hidden_layers (`int`): number of layers.
        num_attention_heads (`int`), num_key_value_heads (`int`, *optional*): attention heads, key/value heads.
        max_position_embeddings (`int`): longest sequence (prompt and answer).
        rope_theta (`float`): base of the rotary frequencies; follows `rope_parameters` where that is given.
        mask_token_id (`int`): the token that stands for an undecided position.
        is_causal (`bool`): always `False`; engines that take transformers' models read it.

    Raises:
        ArchitectureError: (a `ValueError`) when causal or sliding-window attention is asked for (every token of Dream
            sees all others), or anything else that is not implemented.
    """

    model_type = "Dream"

    vocab_size: int = 152064
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int | None = 4
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    rope_theta: float | int = 1000000.0
    rope_parameters: dict | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_dropout: float | int = 0.0
    initializer_range: float = 0.02
    use_cache: bool = True
    is_causal: bool = False
    layer_types: list[str] | None = None
    mask_token_id: int | None = 151666
    bos_token_id: int | None = 151643
    eos_token_id: int | list[int] | None = 151643
    pad_token_id: int | None = 151643

    def validate_architecture(self):
        """Part of `@strict`'s validation: refuses what Dream is not."""
        for name in ("is_causal", "use_sliding_window"):
            if getattr(self, name, False):
                raise ValueError(
                    f"`{name}` must be False (got {getattr(self, name)!r}): every token of Dream sees all others. "
                    "Correct config.json."
                )
        for name, implemented in _ONLY_VARIANT.items():
            value = getattr(self, name, None)
            if value not in (None, implemented):
                raise ValueError(
                    f"`{name}` must be {implemented!r} (got {value!r}): Dream's biases are those of its queries, keys "
                    "and values. Correct config.json."
                )
        refuse_another_architecture("Dream", vars(self))


__all__ = ["DreamConfig"]
