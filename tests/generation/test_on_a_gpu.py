"""What a CUDA device must give: the tokens of a CPU, compiled or not. Run on a machine with one by `.ci/gpu`."""

import pytest
import torch
from every_setting import CACHES, METHODS
from families import DREAM, LLADA, largest_difference, tokens
from tiny import EOS, PAD, left_padded, tiny_model, tiny_prompt
from transformers.generation import CompileConfig


DEVICE = "cuda"
CHOSEN = {"max_new_tokens": 24, "return_dict_in_generate": True, "eos_token_id": EOS, "pad_token_id": PAD, "seed": 0}

pytestmark = pytest.mark.gpu


def decoded(model, lengths: tuple[int, ...], **chosen):
    """The answers to a padded batch of prompts, on the CPU again."""
    inputs = left_padded([tiny_prompt(seed, length) for seed, length in enumerate(lengths)])
    output = model.generate(**{name: value.to(model.device) for name, value in inputs.items()}, **CHOSEN | chosen)
    assert output.sequences.device.type == model.device.type
    return {name: value.cpu() for name, value in output.items()}


def assert_same(found, expected) -> None:
    for name in ("sequences", "step_map", "num_forwards", "positions_computed"):
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_every_cache_gives_the_tokens_of_a_cpu(family, cache):
    model = tiny_model(family, 1)
    chosen = METHODS["llada, random" if cache == "dkv_greedy" else "d3llm"] | CACHES[cache]
    expected = decoded(model, (3, 11, 6), **chosen)
    assert_same(decoded(model.to(DEVICE), (3, 11, 6), **chosen), expected)


@pytest.mark.parametrize("cache", ["none", "delayed", "dual"])
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_static_shapes_and_the_default_compiler_with_its_cuda_graphs_change_no_token(family, cache):
    torch.compiler.reset()
    model, chosen = tiny_model(family, 1).to(DEVICE), METHODS["d3llm"] | CACHES[cache]
    for lengths in [(3, 11, 6), (3, 11, 6), (20, 2, 13)]:  # the second call runs recorded graphs
        expected = decoded(model, lengths, **chosen)
        assert_same(decoded(model, lengths, **chosen, compile_config=CompileConfig()), expected)


@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2"])
@pytest.mark.parametrize("family", [LLADA, DREAM], ids=lambda family: family.name)
def test_a_padded_batch_has_the_logits_of_eager_attention(family, implementation):
    if implementation == "flash_attention_2":
        pytest.importorskip("flash_attn")
    inputs = {"input_ids": tokens(2, 9).to(DEVICE)}
    inputs["attention_mask"] = torch.tensor([[0] * 4 + [1] * 5, [1] * 9], device=DEVICE)
    seen = inputs["attention_mask"].bool()
    logits = {
        name: family.tiny(attn_implementation=name).to(DEVICE, torch.bfloat16)(**inputs).logits[seen]
        for name in ("eager", implementation)
    }
    scale = logits["eager"].float().abs().max().item()
    assert largest_difference(*logits.values()) <= 0.05 * scale  # of bfloat16's three digits
