"""The model families side by side, for the tests that hold for each of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from places import GOLDEN
from safetensors.torch import load_file

from d3llm_hf import DreamConfig, DreamModel, LLaDAConfig, LLaDAModel, LLaDAModelLM, SDARConfig, SDARForCausalLM
from d3llm_hf.models.modeling_dream import DreamBaseModel
from d3llm_hf.models.modeling_sdar import SDARModel


VOCABULARY = 64


@dataclass(frozen=True)
class Family:
    """The classes of a family, a tiny size of it, and its names for what both have."""

    name: str
    config_class: type
    model_class: type
    backbone_class: type
    sizes: dict = field(repr=False)
    tied: str  # config key that ties the head to the embedding
    head: str  # the head's tensor on disk

    def config(self, **overrides):
        tokens = {"mask_token_id": VOCABULARY - 1, "eos_token_id": VOCABULARY - 2, "pad_token_id": VOCABULARY - 2}
        return self.config_class(**({"vocab_size": VOCABULARY} | tokens | self.sizes | overrides))

    def tiny(self, attn_implementation: str = "sdpa", **overrides):
        """A random model whose tokens matter to each other, in evaluation mode; the same one on every call."""
        torch.manual_seed(0)
        return self.model_class._from_config(self.config(**overrides), attn_implementation=attn_implementation).eval()

    @property
    def checkpoint(self) -> Path:
        """A small trained checkpoint as the reference code saved it (see `golden/README.md`)."""
        return GOLDEN / f"{self.name}-tiny-a"

    def recorded(self) -> dict[str, torch.Tensor]:
        """What the reference code computed with that checkpoint."""
        return load_file(GOLDEN / "logits" / f"{self.name}-tiny-a.safetensors")


LLADA = Family(
    name="llada",
    config_class=LLaDAConfig,
    model_class=LLaDAModelLM,
    backbone_class=LLaDAModel,
    sizes={
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "mlp_hidden_size": 48,
        "max_sequence_length": 128,
        "init_std": 0.3,
    },
    tied="weight_tying",
    head="model.transformer.ff_out.weight",
)
DREAM = Family(
    name="dream",
    config_class=DreamConfig,
    model_class=DreamModel,
    backbone_class=DreamBaseModel,
    sizes={
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
    },
    tied="tie_word_embeddings",
    head="lm_head.weight",
)
SDAR = Family(
    name="sdar",
    config_class=SDARConfig,
    model_class=SDARForCausalLM,
    backbone_class=SDARModel,
    sizes=DREAM.sizes | {"head_dim": 12},
    tied="tie_word_embeddings",
    head="lm_head.weight",
)


def tokens(*shape: int, seed: int = 0) -> torch.LongTensor:
    """Random tokens that are neither mask nor EOS."""
    return torch.randint(0, VOCABULARY - 2, shape, generator=torch.Generator().manual_seed(seed))


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a.float() - b.float()).abs().max().item()


def equal_up_to_rounding(ours: torch.Tensor, expected: torch.Tensor) -> bool:
    """Two float32 computations of one thing: nearer than 1e-5 of the largest value.

    The recorded logits are themselves 1e-5 to 3e-5 away from the same computation in float64, at logits up to 18; and
    a product rounds differently with its shape and with the processor. So no absolute figure holds everywhere.
    """
    if ours.shape != expected.shape or not expected.numel():
        return ours.shape == expected.shape
    return largest_difference(ours, expected) <= 1e-5 * expected.abs().max().item()


def gradients(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Runs the loss backwards and returns a copy of every gradient there is."""
    model.zero_grad()
    loss().backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def flat(found: dict[str, torch.Tensor]) -> torch.Tensor:
    """All gradients as one vector, for what rounding moves is small beside the largest of them."""
    return torch.cat([gradient.flatten() for gradient in found.values()])
