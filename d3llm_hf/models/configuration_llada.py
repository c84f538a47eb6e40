"""Configuration of LLaDA and its students, under the keys of the official checkpoints."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .architecture import refuse_another_architecture, refusing
from .configuration_common import DerivingConfigMixin


# Keys of the official config that describe variants which no released LLaDA uses, with the value that is implemented.
_ONLY_VARIANT = {
    "activation_type": "silu",
    "alibi": False,
    "attention_bias": False,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "embedding_dropout": 0.0,
    "include_bias": False,
    "input_emb_norm": False,
    "is_causal": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mlp_bias": False,
    "multi_query_attention": False,
    "residual_dropout": 0.0,
    "rope": True,
    "scale_logits": False,
}
_ALIGNMENTS = ("text", "prompt")  # as in topology.py, which needs torch


@strict
class LLaDAConfig(DerivingConfigMixin, PreTrainedConfig):
    r"""Configuration of a [`LLaDAModelLM`], a bidirectional Llama-like masked diffusion language model.

    The field names are those of `GSAI-ML/LLaDA-8B-Instruct`; transformers' usual names (`hidden_size`,
    `num_attention_heads`, ...) work as aliases. Keys of the official config that describe variants which no released
    checkpoint uses (`alibi`, `block_type`, ...) are kept, and refused when they ask for such a variant, as are keys
    that describe another architecture (experts, windows, norms of queries, images; LLaDA-MoE has this `model_type`
    too). All other keys of a config.json are kept, and saved again.

    Args:
        vocab_size (`int`): rows of the embedding and of the head. Raised to `embedding_size` where that is larger.
        d_model (`int`): width of the residual stream.
        n_layers (`int`): number of blocks.
        n_heads (`int`): attention heads; must divide `d_model`.
        n_kv_heads (`int`, *optional*): key/value heads, `n_heads` when unset.
        mlp_hidden_size (`int`, *optional*): width of the gated MLP, `mlp_ratio * d_model` when unset.
        max_sequence_length (`int`): longest sequence (prompt and answer) the model was trained for.
        rope_theta (`float`): base of the rotary frequencies; follows `rope_parameters` where that is given.
        rms_norm_eps (`float`): epsilon of the norms.
        weight_tying (`bool`): whether the head shares the embedding's weight.
        include_qkv_bias (`bool`): biases on the q, k, v projections.
        mask_token_id (`int`): the token that stands for an undecided position.
        block_length (`int`, *optional*), block_alignment (`str`, *optional*): of a checkpoint that was trained so,
            tokens of a block, which sees itself and all earlier ones, and where blocks begin: `"text"` or `"prompt"`,
            as in [`Topology`]. With neither, as in the official checkpoints, every position sees all others.

    Raises:
        ArchitectureError: (a `ValueError`) for a variant of the architecture that is not implemented, or sizes that
            do not fit together.
    """

    model_type = "llada"
    label: ClassVar[str] = "LLaDA"  # for people
    # Keys that would describe another architecture elsewhere.
    own_keys: ClassVar[frozenset[str]] = frozenset()
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "num_hidden_layers": "n_layers",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "tie_word_embeddings": "weight_tying",
        "initializer_range": "init_std",
    }

    vocab_size: int = 126464
    embedding_size: int | None = None
    d_model: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None
    mlp_hidden_size: int | None = None
    mlp_ratio: int | float = 4
    max_sequence_length: int = 4096
    rope_theta: float | int = 500000.0
    rope_parameters: dict | None = None
    rms_norm_eps: float = 1e-5
    weight_tying: bool = False
    include_bias: bool = False
    include_qkv_bias: bool = False
    attention_dropout: float | int = 0.0
    embedding_dropout: float | int = 0.0
    residual_dropout: float | int = 0.0
    init_std: float = 0.02
    activation_type: str = "silu"
    block_type: str = "llama"
    layer_norm_type: str = "rms"
    alibi: bool = False
    scale_logits: bool = False
    attention_layer_norm: bool = False
    input_emb_norm: bool = False
    rope: bool = True
    use_cache: bool = False
    is_causal: bool = False
    mask_token_id: int | None = 126336
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 126081
    pad_token_id: int | None = 126081
    block_length: int | None = None
    block_alignment: str | None = None

    def __post_init__(self, **kwargs):
        kwargs = self.take_aliases(kwargs)
        if self.n_kv_heads is None:
            self.n_kv_heads = self.n_heads
        if self.mlp_hidden_size is None:
            self.mlp_hidden_size = int(self.mlp_ratio * self.d_model)
        if self.embedding_size is not None and self.embedding_size > self.vocab_size:
            self.vocab_size = self.embedding_size
        head_dim = kwargs.pop("head_dim", None)  # follows from the others
        super().__post_init__(**kwargs)
        with refusing():
            self.validate_architecture()
            if head_dim not in (None, self.head_dim):
                raise ValueError(
                    f"`head_dim` must be `d_model` / `n_heads`, {self.head_dim} (got {head_dim}). Correct config.json."
                )
        self.rope_theta = self.rope_parameters["rope_theta"]  # the key that engines of the official code read

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.d_model // self.n_heads

    def validate_architecture(self):
        """Part of `@strict`'s validation: refuses what the modelling code does not implement."""
        for name, implemented in _ONLY_VARIANT.items():
            value = getattr(self, name, None)
            if value not in (None, implemented):
                raise ValueError(
                    f"`{name}` must be {implemented!r} (got {value!r}): no released {self.label} uses another value, "
                    "and it is not implemented. Remove the key from config.json if the checkpoint does not need it."
                )
        keys = {name: value for name, value in vars(self).items() if name not in self.own_keys}
        refuse_another_architecture(self.label, keys, activation="silu")
        if self.d_model % self.n_heads or self.n_heads % self.n_kv_heads:
            raise ValueError(
                "`d_model` must be a multiple of `n_heads`, and `n_heads` of `n_kv_heads` "
                f"(got d_model={self.d_model}, n_heads={self.n_heads}, n_kv_heads={self.n_kv_heads}). "
                "Correct config.json."
            )
        self._validate_blocks()

    def _validate_blocks(self):
        length, alignment = self.block_length, self.block_alignment
        if alignment not in (None, *_ALIGNMENTS):
            raise ValueError(
                f"`block_alignment` must be one of {list(_ALIGNMENTS)} (got {alignment!r}). Correct it, or leave it "
                "unset where every position sees all others."
            )
        if (length is None) != (alignment is None):
            raise ValueError(
                "`block_length` and `block_alignment` must be given together (got "
                f"{length} and {alignment!r}). Give both for a block-causal model, else neither."
            )
        if length is not None and length < 1:
            raise ValueError(f"`block_length` must be a positive integer (got {length}). Correct it.")


__all__ = ["LLaDAConfig"]
