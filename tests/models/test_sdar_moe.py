"""SDAR with experts against transformers' Qwen3-MoE, whose weights and forward are the same under a mask."""

import copy

import pytest
import torch
from families import equal_up_to_rounding, tokens
from safetensors.torch import load_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from d3llm_hf import SDARMoeConfig, SDARMoeForCausalLM, export_checkpoint


SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16,
    "decoder_sparse_step": 1, "mlp_only_layers": [1], "max_position_embeddings": 128, "initializer_range": 0.3,
    "norm_topk_prob": True, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 62,
    "rope_theta": 10000.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of Qwen3-MoE that calls itself SDAR."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("moe")
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES)).save_pretrained(folder)
    SDARMoeConfig(**SIZES, block_size=4, mask_token_id=63).save_pretrained(folder)
    return folder


def block_causal(length, block_length=4):
    block = torch.arange(length) // block_length
    return (block[:, None] >= block)[None, None]


@pytest.mark.every(3)
@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_the_forward_is_that_of_qwen3_moe_under_the_same_mask(folder, experts, attention):
    ids, mask = tokens(2, 11), block_causal(11).expand(2, 1, -1, -1)
    ours = SDARMoeForCausalLM.from_pretrained(
        folder, attn_implementation=attention, experts_implementation=experts
    ).eval()
    config = Qwen3MoeConfig(**SIZES)
    theirs = Qwen3MoeForCausalLM.from_pretrained(folder, config=config, attn_implementation="sdpa").eval()
    assert equal_up_to_rounding(ours(ids, attention_mask=mask).logits, theirs(ids, attention_mask=mask).logits)


def test_tensors_are_saved_under_the_published_names_and_exported(folder, tmp_path):
    SDARMoeForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "saved"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    exported = export_checkpoint(folder, tmp_path / "exported")
    assert {file.name for file in exported.glob("*sdar*.py")} == {
        "configuration_sdar.py", "configuration_sdar_moe.py", "modeling_sdar.py", "modeling_sdar_moe.py",
    }  # fmt: skip


def test_kept_blocks_change_nothing(folder):
    model = SDARMoeForCausalLM.from_pretrained(folder).eval()
    prompt = tokens(1, 7)
    chosen = {"max_new_tokens": 9, "pad_token_id": 0, "confidence_threshold": 0.5, "return_dict_in_generate": True}
    kept, anew = (model.generate(prompt, kv_cache=cache, **chosen) for cache in ("exact", "none"))
    assert torch.equal(kept.sequences, anew.sequences) and torch.equal(kept.step_map, anew.step_map)


@pytest.mark.parametrize("sizes", [{"num_experts_per_tok": 9}, {"num_experts_per_tok": 0}, {"decoder_sparse_step": 0}])
def test_sizes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(ValueError, match="`num_experts_per_tok` must be from 1 to `num_experts`"):
        SDARMoeConfig(**copy.deepcopy(SIZES) | sizes)


def test_arguments_over_a_folder_take_part_in_what_is_derived(folder):
    config = SDARMoeConfig.from_pretrained(folder, rope_theta=5000.0, block_length=8)
    assert config.rope_parameters["rope_theta"] == config.rope_theta == 5000.0
    assert (config.block_size, config.block_length) == (8, 8)


def test_layers_without_experts_have_one_mlp():
    assert [SDARMoeConfig(**SIZES).has_experts(layer) for layer in range(3)] == [True, False, True]
    every_other = SDARMoeConfig(**SIZES | {"decoder_sparse_step": 2, "mlp_only_layers": None})
    assert [every_other.has_experts(layer) for layer in range(3)] == [False, True, False]
    assert not any(SDARMoeConfig(**SIZES | {"num_experts": 0}).has_experts(layer) for layer in range(3))
