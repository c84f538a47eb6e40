"""The draft head: one decoder layer over a token and what the target computed before it."""

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from ...models.tensors import described
from .checkpoint import HeadConfig, read_checkpoint


class HeadCache:
    """Keys and values of the head's layer, `(1, heads, n, head_dim)` each, in the order in which they were fed."""

    def __init__(self) -> None:
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """Entries n."""
        return 0 if self.keys is None else self.keys.shape[2]

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All entries, with new ones at the end."""
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        self.keys, self.values = keys, values
        return keys, values

    def keep(self, length: int) -> None:
        """Drops all but the first entries: those of a tree, once it is drafted."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[:, :, :length], self.values[:, :, :length]


class _Attention(nn.Module):
    """Grouped attention whose input is twice as wide as its output."""

    def __init__(self, config: HeadConfig):
        super().__init__()
        self.config = config
        queries = config.num_attention_heads * config.head_dim
        pairs = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(2 * config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(2 * config.hidden_size, pairs, bias=False)
        self.v_proj = nn.Linear(2 * config.hidden_size, pairs, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(
        self, x: torch.Tensor, positions: torch.Tensor, visible: torch.Tensor, cache: HeadCache
    ) -> torch.Tensor:
        def split(projected: torch.Tensor) -> torch.Tensor:  # (n, heads * head_dim) to (1, heads, n, head_dim)
            return projected.view(len(x), -1, self.config.head_dim).transpose(0, 1)[None]

        # 1. The rotation is by the entry's own position, so that kept keys stay right
        cos, sin = self._rotation(positions, x.dtype)
        query, key = apply_rotary_pos_emb(split(self.q_proj(x)), split(self.k_proj(x)), cos, sin)

        # 2. Every head of keys serves several heads of queries
        keys, values = cache.append(key, split(self.v_proj(x)))
        repeats = self.config.num_attention_heads // self.config.num_key_value_heads
        keys, values = keys.repeat_interleave(repeats, dim=1), values.repeat_interleave(repeats, dim=1)
        mixed = nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=visible)
        return self.o_proj(mixed[0].transpose(0, 1).flatten(1))

    def _rotation(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines `(1, n, head_dim)`."""
        size = self.config.head_dim
        exponent = torch.arange(0, size, 2, device=positions.device).float() / size
        scaled = positions[:, None].float() / self.config.rope_factor
        angles = (scaled / self.config.rope_theta**exponent).repeat(1, 2)[None]
        return angles.cos().to(dtype), angles.sin().to(dtype)


class _MLP(nn.Module):
    """A gated linear unit."""

    def __init__(self, config: HeadConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class _Layer(nn.Module):
    """Reads a token's embedding beside the hidden state before it; only the latter is carried on."""

    def __init__(self, config: HeadConfig):
        super().__init__()
        self.self_attn = _Attention(config)
        self.mlp = _MLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)  # of the embedding
        self.hidden_norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, embedded, hidden, positions, visible, cache: HeadCache) -> torch.Tensor:
        both = torch.cat([self.input_layernorm(embedded), self.hidden_norm(hidden)], dim=-1)
        hidden = hidden + self.self_attn(both, positions, visible, cache)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Eagle3Head(nn.Module):
    """EAGLE-3's draft head (arXiv:2503.01840, section 3), with the modules of its published checkpoints.

    Position i of the head reads the target's hidden states of position i and the token of position i + 1, and drafts
    that of position i + 2. Where the target has not been yet, the head's own output stands for the hidden states.

    Attributes:
        config ([`HeadConfig`]): the sizes.
        d2t (`(Vd,)` long, *optional*): a draft token's id in the target, minus its own; unset where the vocabularies
            are one.
        t2d (`(V,)` bool, *optional*): the target's tokens that can be drafted.
        embed_tokens (`Embedding`, *optional*): unset where the head takes the target's.

    Example:

    ```python
    from d3llm_hf import Eagle3Head

    head = Eagle3Head.from_pretrained("yuhuili/EAGLE3-LLaMA3.1-Instruct-8B").to(model.device, model.dtype)
    ```
    """

    def __init__(self, config: HeadConfig, *, own_embedding: bool = False):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size) if own_embedding else None
        self.fc = nn.Linear(3 * config.target_hidden_size, config.hidden_size, bias=False)
        self.midlayer = _Layer(config)
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.d2t: torch.Tensor | None
        self.t2d: torch.Tensor | None
        part = config.draft_vocab_size != config.vocab_size
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long) if part else None)
        first = torch.arange(config.vocab_size) < config.draft_vocab_size
        self.register_buffer("t2d", first if part else None)

    @classmethod
    def from_pretrained(cls, name: str, *, revision: str | None = None) -> "Eagle3Head":
        """Loads a published head, on the CPU in the dtype of its `fc.weight`, for inference.

        Args:
            name (`str`): a folder, or an id on the Hub, with `config.json` and `model.safetensors` or
                `pytorch_model.bin`. Of the latter only tensors are read.
            revision (`str`, *optional*): branch, tag or commit on the Hub.

        Raises:
            OSError: where it is not found, or not whole.
            ValueError: for what is no head of EAGLE-3: other tensors, other shapes, or tables of tokens that
                contradict each other.
        """
        config, tensors = read_checkpoint(str(name), revision)
        own = "embed_tokens.weight" in tensors
        if not own and config.target_hidden_size != config.hidden_size:
            raise ValueError(
                "A draft head of another width than its target must hold `embed_tokens.weight` (got "
                f"{str(name)!r} without, of width {config.hidden_size} for a target of {config.target_hidden_size}). "
                "Take a head with an embedding of its own."
            )
        with torch.device("meta"):
            head = cls(config, own_embedding=own)
        _check_tensors(head, tensors, str(name))
        dtype = tensors["fc.weight"].dtype
        kept = {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}
        head.load_state_dict(kept, assign=True)
        return head.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        return self.fc.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.fc.weight.dtype

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """The target's hidden states of three layers side by side, `(n, 3 * target_hidden_size)`, as `(n, D)`."""
        return self.fc(features)

    def forward(
        self,
        hidden: torch.Tensor,
        embedded: torch.Tensor,
        positions: torch.Tensor,
        visible: torch.Tensor,
        cache: HeadCache,
    ) -> torch.Tensor:
        """Feeds n entries behind those of the cache, to which they are added.

        Args:
            hidden (`(n, D)`): of the position before each token: fused, or the head's own output.
            embedded (`(n, D)`): the tokens.
            positions (`(n,)` long): of `hidden`, one less than the token's.
            visible (`(n, cache.length + n)` bool): the entries that each attends to, itself among them.
            cache ([`HeadCache`]): changed in place.

        Returns:
            `(n, D)`, to be fed back, or given to [`draft_logits`].
        """
        return self.midlayer(embedded, hidden, positions, visible, cache)

    def draft_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `(n, Vd)` over the draft vocabulary."""
        return self.lm_head(self.norm(hidden))

    def to_target(self, tokens: torch.Tensor) -> torch.Tensor:
        """The target's ids of draft tokens, in any shape."""
        return tokens if self.d2t is None else tokens + self.d2t[tokens]


def _check_tensors(head: Eagle3Head, tensors: dict[str, Any], name: str) -> None:
    wanted = {key: tuple(value.shape) for key, value in head.state_dict().items()}
    missing, unplaced = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
    if missing or unplaced:
        raise ValueError(
            f"A draft head must hold the tensors of EAGLE-3 and no others (got {name!r} "
            f"{described(missing, unplaced)}). Correct its config.json, or fetch it again."
        )
    for key, shape in wanted.items():
        if tuple(tensors[key].shape) != shape:
            raise ValueError(
                f"`{key}` must have the shape {shape} that config.json gives (got {tuple(tensors[key].shape)} in "
                f"{name!r}). Correct its config.json, or fetch it again."
            )
    if "d2t" in wanted:
        ids = torch.arange(head.config.draft_vocab_size) + tensors["d2t"].long()
        named = tensors["t2d"].bool().nonzero()[:, 0]
        if not torch.equal(ids.sort().values, named):
            raise ValueError(
                f"`d2t` and `t2d` must name the same tokens of the target, each once (got others in {name!r}). The "
                "file is damaged, fetch it again."
            )


__all__ = ["Eagle3Head", "HeadCache"]
