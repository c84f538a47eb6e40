"""Multi-token prediction: a checkpoint whose further layers draft, which transformers loads for each answer."""

import pytest
import torch
from causal import plain_greedy
from safetensors.torch import load_file, save_file
from tiny import tiny_prompt

from d3llm_hf.autoregressive.generate import generate


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny GLM-4 MoE of one layer, with one more that drafts."""
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    folder, width = tmp_path_factory.mktemp("mtp"), 16
    config = Glm4MoeConfig(
        vocab_size=32, hidden_size=width, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, moe_intermediate_size=8, n_routed_experts=4, num_experts_per_tok=2,
        n_shared_experts=1, first_k_dense_replace=0, max_position_embeddings=64, num_mtp_layers=1, eos_token_id=None,
        pad_token_id=None, bos_token_id=None,
    )  # fmt: skip
    Glm4MoeForCausalLM(config).save_pretrained(folder)
    file, generator = folder / "model.safetensors", torch.Generator().manual_seed(0)
    weights = load_file(file)
    weights |= {
        name.replace("layers.0.", "layers.1."): value for name, value in weights.items() if "layers.0." in name
    }
    weights |= {f"model.layers.1.{name}.weight": torch.ones(width) for name in ("enorm", "hnorm", "shared_head.norm")}
    weights["model.layers.1.eh_proj.weight"] = torch.ones(width, 2 * width)
    for name, value in weights.items():
        if value.ndim > 1:
            weights[name] = torch.randn(value.shape, generator=generator) * value.shape[-1] ** -0.5
    save_file({name: value.clone() for name, value in weights.items()}, file, metadata={"format": "pt"})
    model = Glm4MoeForCausalLM.from_pretrained(folder).eval()
    # transformers finds the layers that draft by what the class ignores on loading: those of the published sizes
    model._keys_to_ignore_on_load_unexpected = [r"model\.layers\.1\..*"]
    return model


def test_each_forward_but_the_first_verifies_drafts_and_tokens_are_plain_greedy_ones(model):
    prompt = tiny_prompt(0, 6)
    output = generate(model, torch.tensor([prompt]), method="ar_mtp", max_new_tokens=12)
    assert output.sequences[0].tolist() == prompt + plain_greedy(model, prompt, 12)
    assert output.num_draft_forwards[0] == output.num_forwards[0] - 1
    assert output.draft_positions_computed[0] >= output.num_draft_forwards[0]
    assert output.tokens_per_forward.tolist() == [12 / output.num_forwards.item()]
