"""Models that are made in code: random ones small enough for the CPU, and ones whose logits are written down."""

import copy
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace

import torch

from d3llm_hf import DreamConfig, DreamModel, LLaDAConfig, LLaDAModelLM


MASK, EOS, PAD = 31, 30, 29  # of a vocabulary of 32


def tiny_model(
    family: str, seed: int = 0, vocab_size: int = 32, width: int = 16, layers: int = 2, spread: float = 2.0
):
    """A random model whose entropies cover the range from certain to clueless, so that thresholds matter.

    Args:
        family: "llada" or "dream".
        spread: standard deviation of the logits.
    """
    tokens = {"mask_token_id": vocab_size - 1, "eos_token_id": vocab_size - 2, "pad_token_id": vocab_size - 3}
    if family == "llada":
        config = LLaDAConfig(
            vocab_size=vocab_size,
            d_model=width,
            n_layers=layers,
            n_heads=2,
            mlp_hidden_size=2 * width,
            max_sequence_length=2048,
            **tokens,
        )
        model = LLaDAModelLM(config)
    else:
        config = DreamConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=2 * width,
            max_position_embeddings=2048,
            **tokens,
        )
        model = DreamModel(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim < 2:
                continue
            scale = 1.0 if "embed_tokens" in name else weight.shape[1] ** -0.5
            scale *= spread if "lm_head" in name else 1.5
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    return model.eval()


@cache
def trained_like(family: str, seed: int = 0):
    """A random model of one layer that is as sure of some positions as a trained one; shared by the tests."""
    return tiny_model(family, seed, layers=1, spread=4.0)


def tiny_prompt(seed: int, length: int, vocab_size: int = 32) -> list[int]:
    """Random ordinary tokens: neither mask, EOS nor pad."""
    return torch.randint(0, vocab_size - 3, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def left_padded(prompts: list[list[int]], pad_token_id: int = PAD) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` of unequal prompts."""
    width = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[pad_token_id] * (width - len(p)) + p for p in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
    }


class ScriptedModel(LLaDAModelLM):
    """A model whose logits are a function of the canvas: `script(input_ids)` gives `(B, L, V)`; counts its calls.

    Its rows are those of LLaDA (row i predicts token i), or of Dream with `shift=1`.
    """

    def __init__(self, script: Callable[[torch.Tensor], torch.Tensor], vocab_size: int = 32, shift: int = 0, **config):
        tokens = {"mask_token_id": vocab_size - 1, "eos_token_id": vocab_size - 2, "pad_token_id": vocab_size - 3}
        sizes = {"d_model": 4, "n_layers": 1, "n_heads": 1, "mlp_hidden_size": 4, "max_sequence_length": 2048}
        super().__init__(LLaDAConfig(vocab_size=vocab_size, **(tokens | sizes | config)))
        self.script, self.logit_shift, self.calls = script, shift, 0
        self.eval()

    def forward(self, input_ids=None, logits_to_keep=0, **kwargs):
        self.calls += 1
        logits = self.script(input_ids)
        if isinstance(logits_to_keep, torch.Tensor):
            logits = logits[logits_to_keep]
        return SimpleNamespace(logits=logits, past_key_values=None)


def tables(count: int, length: int, vocab_size: int = 32, spread: float = 3.0, seed: int = 0) -> torch.Tensor:
    """Random logits `(count, length, V)`."""
    return torch.randn(count, length, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread


def changing_script(table: torch.Tensor, mask_token_id: int):
    """Logits that change whenever a token is decided: one row of tables per number of undecided positions."""

    def script(ids: torch.Tensor) -> torch.Tensor:
        return table[(ids == mask_token_id).sum(1) % len(table), : ids.shape[1]]

    return script


def constant_script(answer: list[int], prompt_length: int, sureness: float = 20.0, vocab_size: int = 32):
    """A model that is sure of one answer from the start."""

    def script(ids: torch.Tensor) -> torch.Tensor:
        wanted = torch.tensor([0] * prompt_length + answer)[: ids.shape[1]]
        return torch.nn.functional.one_hot(wanted, vocab_size).float().expand(len(ids), -1, -1) * sureness

    return script


def answer(model, prompt: list[int], **chosen):
    """Decodes one prompt, by default 16 tokens."""
    defaults = {"max_new_tokens": 16, "return_dict_in_generate": True, "eos_token_id": EOS, "pad_token_id": PAD}
    ids = torch.tensor([prompt])
    return model.generate(ids, attention_mask=torch.ones_like(ids), **(defaults | chosen))


def attributes(model) -> dict:
    """What a model holds, its weights by value."""
    plain = {name: value for name, value in vars(model).items() if not name.startswith("_") and name != "config"}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {
        "names": set(vars(model)),
        "plain": {name: repr(value) for name, value in plain.items()},
        "config": copy.deepcopy(model.config.to_dict()),
        "generation": copy.deepcopy(model.generation_config.to_dict()),
        "weights": weights,
    }


def same_attributes(before: dict, after: dict) -> bool:
    """Whether [`attributes`] are what they were."""
    weights = before["weights"], after["weights"]
    rest = [{name: value for name, value in held.items() if name != "weights"} for held in (before, after)]
    return rest[0] == rest[1] and all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
