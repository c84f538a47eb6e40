"""Tiny random models of architectures that are not ours, and the oracle's view of them."""

from dataclasses import dataclass, field

import torch
import transformers
from oracle import UNDECIDED, Network, Rules
from tiny import EOS, MASK, PAD


SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "vocab_size": 32,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "bos_token_id": None,
}


@dataclass(frozen=True)
class Other:
    """A class of transformers, and what differs from the usual sizes."""

    name: str
    shift: int
    sizes: dict = field(repr=False)
    first: int = 0  # position id of a text's first token

    @property
    def model_class(self) -> type:
        return getattr(transformers, self.name)

    def config(self, **overrides):
        return self.model_class.config_class(**(SIZES | self.sizes | overrides))

    def tiny(self, seed: int = 0, attn_implementation: str = "sdpa", spread: float = 3.0, cls=None, **overrides):
        """A random model whose tokens, positions and neighbours matter, as [`tiny.tiny_model`]'s do."""
        config = self.config(**overrides)
        model = (cls or self.model_class)._from_config(config, attn_implementation=attn_implementation)
        generator = torch.Generator().manual_seed(seed)
        head = model.get_output_embeddings().weight
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    is_table = weight.shape[0] in (config.vocab_size, config.max_position_embeddings)
                    scale = 1.0 if is_table else 1.5 * weight.shape[1] ** -0.5
                    weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
            head.copy_(torch.randn(head.shape, generator=generator) * head.shape[1] ** -0.5 * spread)
        return model.eval()


SEPARATORS = {"cls_token_id": 1, "sep_token_id": 2}
UNTIED = {"tie_word_embeddings": False}
QWEN = UNTIED | {"num_attention_heads": 4, "num_key_value_heads": 2, "is_causal": False}
ENCODERS = (
    Other("BertForMaskedLM", 0, UNTIED),
    Other("RobertaForMaskedLM", 0, UNTIED | {"pad_token_id": 3}, first=4),
    Other("ModernBertForMaskedLM", 0, UNTIED | {"local_attention": 8, "global_attn_every_n_layers": 2} | SEPARATORS),
)
DECODERS = (Other("Qwen2ForCausalLM", 1, QWEN), Other("Qwen3ForCausalLM", 1, QWEN | {"head_dim": 8}))
OTHERS = ENCODERS + DECODERS


class OtherNetwork:
    """What `oracle.Network` is for our families: the stock class's own forward over whole canvases, one by one."""

    def __init__(self, model, other: Other, mask_token_id: int = MASK):
        self.forward = other.model_class.forward.__get__(model)
        self.other, self.shift, self.mask_token_id = other, other.shift, mask_token_id

    def source(self, position: int) -> int:
        return max(position - self.shift, 0)

    @torch.no_grad()
    def __call__(self, canvas: list[int], slots: list[int], wanted: list[int]) -> dict[int, torch.Tensor]:
        ids = torch.tensor([[self.mask_token_id if token == UNDECIDED else token for token in canvas]])
        raw = self.forward(input_ids=ids, position_ids=self.other.first + torch.arange(len(canvas))[None]).logits[0]
        return {position: raw[self.source(position)] for position in wanted}


def cached_network(model, other: Other, mask_token_id: int = MASK) -> Network:
    """The oracle's network with a cache, for a model that attends to what a cache returns."""

    def forward(position_ids, **inputs):
        return model(position_ids=position_ids + other.first, **inputs)

    return Network(forward, other.shift, mask_token_id)


def oracle_rules(other: Other, pad_token_id: int, **chosen) -> Rules:
    """The oracle's rules with the differences of shifted and unshifted models."""
    shifted = other.shift == 1
    families = {"strict": shifted, "always_lowest": not shifted, "serial_stamps": not shifted}
    tokens = {"mask_token_id": MASK, "eos_token_ids": (EOS,), "pad_token_id": pad_token_id}
    return Rules(max_new_tokens=12, **families, **tokens, **chosen)
