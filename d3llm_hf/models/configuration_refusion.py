"""Configuration of ReFusion, under the keys of the official checkpoints, which are Qwen3's."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .architecture import refuse_another_architecture
from .configuration_common import QwenConfigMixin


@strict
class ReFusionConfig(QwenConfigMixin, PreTrainedConfig):
    r"""Configuration of a [`ReFusionForCausalLM`]: the keys of Qwen3, and `mask_token_id`.

    Official files say `model_type` "qwen3", as any Qwen3 does; `ReFusionForCausalLM.from_pretrained` reads them, and
    what it saves says "refusion". Keys that describe another architecture (experts, windows, images) are refused.
    All other keys of a config.json are kept, and saved again.

    Args:
        vocab_size (`int`): rows of the embedding and of the head: `len(tokenizer)`, fewer than Qwen3 has.
        hidden_size (`int`): width of the residual stream.
        intermediate_size (`int`): width of the gated MLP.
        num_hidden_layers (`int`): number of layers.
        num_attention_heads (`int`), num_key_value_heads (`int`, *optional*): attention heads, key/value heads.
        head_dim (`int`): width of a head; the heads together need not be as wide as the residual stream.
        attention_bias (`bool`): biases on the four projections of the attention.
        max_position_embeddings (`int`): longest sequence (prompt and answer).
        rope_theta (`float`): base of the rotary frequencies; follows `rope_parameters` where that is given.
        mask_token_id (`int`): the token that stands for an undecided position.

    Raises:
        ArchitectureError: (a `ValueError`) when sliding-window attention is asked for, or anything else that is not
            implemented.
    """

    model_type = "refusion"
    base_model_tp_plan: ClassVar[dict[str, str]] = QwenConfigMixin.base_model_tp_plan | {
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
    }

    vocab_size: int = 151671
    hidden_size: int = 4096
    intermediate_size: int = 12288
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 8
    head_dim: int = 128
    hidden_act: str = "silu"
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    max_position_embeddings: int = 40960
    rope_theta: float | int = 1000000.0
    rope_parameters: dict | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    use_cache: bool = True
    is_causal: bool = False
    layer_types: list[str] | None = None
    mask_token_id: int | None = 151670
    bos_token_id: int | None = 151669
    eos_token_id: int | list[int] | None = 151645
    pad_token_id: int | None = None

    def validate_architecture(self):
        """Part of `@strict`'s validation: refuses what ReFusion is not.

        `is_causal` is transformers' word for a mask that its attention functions make themselves: here it would be by
        place in a forward, where keys of an earlier one stand in any order.
        """
        for name in ("is_causal", "use_sliding_window", "mlp_bias", "qkv_bias"):
            if getattr(self, name, False):
                raise ValueError(
                    f"`{name}` must be False (got {getattr(self, name)!r}): ReFusion has Qwen3's layers, and masks of "
                    "its own. Correct config.json."
                )
        refuse_another_architecture("ReFusion", vars(self))


__all__ = ["ReFusionConfig"]
