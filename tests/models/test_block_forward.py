"""Forwards of block-causal families against recorded ones."""

import json

import pytest
import torch
from places import GOLDEN
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from d3llm_hf import LLaDA2MoeConfig, LLaDA2MoeModelLM
from d3llm_hf.hub.whole_model import misfits
from d3llm_hf.models.cache import SlotCache
from d3llm_hf.models.modeling_llada2 import LLaDA2MoeModel
from d3llm_hf.models.topology import Topology


def recorded(name):
    entries = json.loads((GOLDEN / "logits" / f"{name}.json").read_text())["entries"]
    return entries, load_file(GOLDEN / "logits" / f"{name}.safetensors")


def block_causal(length, block_length):
    block = torch.arange(length) // block_length
    return (block[:, None] >= block)[None, None]


def assert_close(logits, wanted, limit=1e-5):
    assert (logits - wanted).abs().max() < limit * wanted.abs().max()


@pytest.fixture(params=["sdpa", "eager"])
def sdar(request):
    return AutoModelForCausalLM.from_pretrained(GOLDEN / "sdar-tiny-a", attn_implementation=request.param).eval()


@pytest.mark.parametrize("entry", ["plain1", "plain2", "plain3_block16", "batch2", "offset_positions"])
@torch.no_grad()
def test_sdars_logits_are_the_recorded_ones(sdar, entry):
    entries, tensors = recorded("sdar-tiny-a")
    ids = tensors[f"{entry}/input_ids"].long()
    length = ids.shape[-1]
    positions = torch.arange(50, 50 + length)[None] if entry == "offset_positions" else None
    mask = block_causal(length, entries[entry].get("block", 4)).expand(len(ids), 1, -1, -1)
    output = sdar(ids, attention_mask=mask, position_ids=positions, output_hidden_states=True)
    assert_close(output.logits, tensors[f"{entry}/logits"])
    for index, hidden in enumerate(output.hidden_states):
        if f"{entry}/hidden{index}" in tensors:
            assert_close(hidden, tensors[f"{entry}/hidden{index}"])


@torch.no_grad()
def test_sdar_in_bfloat16_is_near(sdar):
    _, tensors = recorded("sdar-tiny-a")
    ids = tensors["plain1/input_ids"].long()
    logits = sdar.to(torch.bfloat16)(ids, attention_mask=block_causal(ids.shape[1], 4)).logits
    assert_close(logits.float(), tensors["plain1/logits_bf16"].float(), limit=0.02)


@torch.no_grad()
def test_blocks_after_kept_ones_have_the_logits_of_the_whole_text(sdar):
    ids = torch.tensor([[3, 141, 59, 26, 53, 58, 97, 93, 238, 46]])
    whole = sdar(ids, attention_mask=block_causal(10, 4)).logits
    cache = SlotCache(sdar.config.num_hidden_layers, 10)
    for start, end in ((0, 4), (4, 8), (4, 8), (8, 10)):
        cache.at(slice(start, end), end)
        mask = block_causal(10, 4)[:, :, start:end, :end]
        positions = torch.arange(start, end)[None]
        logits = sdar(ids[:, start:end], attention_mask=mask, position_ids=positions, cache=cache).logits
        assert_close(logits, whole[:, start:end])


@pytest.fixture(params=["sdpa", "eager"])
def llada2(request):
    return AutoModelForCausalLM.from_pretrained(GOLDEN / "llada2-tiny-a", attn_implementation=request.param).eval()


@pytest.mark.every(4)
@pytest.mark.parametrize("entry", ["plain1", "plain2", "plain3_block4", "batch2", "offset_positions"])
@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm", "eager"])
@torch.no_grad()
def test_llada2s_logits_and_choices_of_experts_are_the_recorded_ones(llada2, entry, experts):
    entries, tensors = recorded("llada2-tiny-a")
    llada2.set_experts_implementation(experts)
    ids = tensors[f"{entry}/input_ids"].long()
    length = ids.shape[-1]
    positions = torch.arange(50, 50 + length)[None] if entry == "offset_positions" else None
    mask = block_causal(length, entries[entry].get("block", 8)).expand(len(ids), 1, -1, -1)
    chosen = {}
    for index, layer in enumerate(llada2.model.layers):
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(lambda _, inputs, output, index=index: chosen.update({index: output}))
    output = llada2(ids, attention_mask=mask, position_ids=positions, output_hidden_states=True)
    assert_close(output.logits, tensors[f"{entry}/logits"])
    for index, hidden in enumerate(output.hidden_states):
        if f"{entry}/hidden{index}" in tensors:
            assert_close(hidden, tensors[f"{entry}/hidden{index}"])
    assert set(chosen) == {1, 2}
    for index, (experts, weights) in chosen.items():
        if f"{entry}/router{index}/topk_idx" in tensors:
            assert torch.equal(experts, tensors[f"{entry}/router{index}/topk_idx"].long())
            assert_close(weights, tensors[f"{entry}/router{index}/topk_weight"])


@torch.no_grad()
def test_llada2_without_a_mask_sees_everything(llada2):
    _, tensors = recorded("llada2-tiny-a")
    ids = tensors["mask_none_sdpa/input_ids"].long()
    assert_close(llada2(ids).logits, tensors["mask_none_sdpa/logits"])


@torch.no_grad()
def test_llada2_in_bfloat16_is_near_and_chooses_by_a_bias_in_float32(llada2):
    _, tensors = recorded("llada2-tiny-a")
    ids = tensors["plain1/input_ids"].long()
    cast = llada2.to(torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(GOLDEN / "llada2-tiny-a", dtype=torch.bfloat16).eval()
    for model in (cast, loaded):
        gate = model.model.layers[1].mlp.gate
        assert (gate.weight.dtype, gate.expert_bias.dtype) == (torch.bfloat16, torch.float32)
        logits = model(ids, attention_mask=block_causal(ids.shape[1], 32)).logits.float()
        away = (logits - tensors["plain1/logits_bf16"].float()).abs().amax(-1) / tensors["plain1/logits"].abs().max()
        assert away.median() < 0.02 and (away < 0.1).float().mean() > 0.9  # a token may go to another expert


@torch.no_grad()
def test_llada2s_blocks_after_kept_ones_have_the_recorded_logits(llada2):
    _, tensors = recorded("llada2-tiny-a")
    cache, start = SlotCache(llada2.config.num_hidden_layers, 32), 0
    for entry in ("cache_prefill", "cache_block_noisy", "cache_block_clean", "cache_block_masks"):
        ids = tensors[f"{entry}/input_ids"].long()
        end = start + ids.shape[1]
        cache.at(slice(start, end), end)
        mask = block_causal(32, 8)[:, :, start:end, :end]
        logits = llada2(ids, attention_mask=mask, position_ids=torch.arange(start, end)[None], cache=cache).logits
        assert_close(logits, tensors[f"{entry}/logits"])
        start = start if entry == "cache_block_noisy" else end


def test_llada2s_tensors_have_their_published_names_on_disk(tmp_path):
    published = load_file(GOLDEN / "llada2-tiny-a" / "model.safetensors")
    AutoModelForCausalLM.from_pretrained(GOLDEN / "llada2-tiny-a").save_pretrained(tmp_path / "loaded")
    saved = load_file(tmp_path / "loaded" / "model.safetensors")
    assert saved.keys() == published.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in published.items())

    config = LLaDA2MoeConfig.from_pretrained(GOLDEN / "llada2-tiny-a")
    new = LLaDA2MoeModelLM(config)
    assert not new.model.layers[1].mlp.gate.expert_bias.any() and new.model.layers[1].mlp.gate.weight.std() > 0
    new.save_pretrained(tmp_path / "new")
    again = LLaDA2MoeModelLM.from_pretrained(tmp_path / "new")
    assert load_file(tmp_path / "new" / "model.safetensors").keys() == published.keys()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in new.state_dict().items())


def test_llada2s_backbone_alone_is_loaded_and_saved(tmp_path):
    backbone = LLaDA2MoeModel.from_pretrained(GOLDEN / "llada2-tiny-a")
    backbone.save_pretrained(tmp_path)
    published = load_file(GOLDEN / "llada2-tiny-a" / "model.safetensors")
    saved = load_file(tmp_path / "model.safetensors")
    assert {name.removeprefix("model.") for name in published} - {"lm_head.weight"} == saved.keys()
    assert torch.equal(LLaDA2MoeModel.from_pretrained(tmp_path).norm.weight, backbone.norm.weight)


@pytest.mark.parametrize("lost", ["mlp.experts.3.up_proj", "attention.query_key_value", "mlp.gate.expert_bias"])
def test_a_checkpoint_of_llada2_that_lacks_a_tensor_is_refused(tmp_path, lost):
    tensors = load_file(GOLDEN / "llada2-tiny-a" / "model.safetensors")
    gone = next(name for name in tensors if name.startswith("model.layers.1.") and lost in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, tmp_path / "model.safetensors")
    config = json.loads((GOLDEN / "llada2-tiny-a" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert misfits(GOLDEN / "llada2-tiny-a", config) == ""
    assert misfits(tmp_path, config) == f"without {gone}"
    with pytest.raises((ValueError, RuntimeError)):
        LLaDA2MoeModelLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "keys, rule",
    [
        ({"score_function": "softmax"}, r"`score_function` must be 'sigmoid' \(got 'softmax'\)"),
        ({"use_qkv_bias": True}, r"`use_qkv_bias` must be False \(got True\)"),
        ({"block_length": 0}, r"`block_length` must be a positive integer \(got 0\)"),
        ({"n_group": 3}, r"`num_experts` must be a multiple of `n_group`.*\(got num_experts=8, n_group=3"),
        ({"num_experts_per_tok": 5}, r"at least `num_experts_per_tok` .*num_experts_per_tok=5"),
        ({"q_lora_rank": 8}, r"`q_lora_rank` describes latent or crossed attention \(got 8\), which LLaDA2"),
    ],
)
def test_another_architecture_than_llada2s_is_refused(keys, rule):
    config = json.loads((GOLDEN / "llada2-tiny-a" / "config.json").read_text())
    with pytest.raises(ValueError, match=rule):
        LLaDA2MoeConfig.from_dict(config | keys)


def test_sizes_of_llada2_that_follow_from_others():
    config = LLaDA2MoeConfig(num_key_value_heads=0, head_dim=None, hidden_size=64, num_attention_heads=4, block_size=8)
    assert (config.num_key_value_heads, config.head_dim, config.block_length) == (4, 16, 8)


def test_rows_of_a_text_are_numbered_by_block():
    given = torch.tensor([5, 2])
    text, prompt = Topology(4), Topology(4, "prompt")
    positions = torch.arange(12).expand(2, -1)
    assert text.blocks(positions, given).tolist() == [[0] * 4 + [1] * 4 + [2] * 4] * 2
    assert prompt.blocks(positions, given).tolist() == [
        [0] * 5 + [1] * 4 + [2] * 3,
        [0] * 2 + [1] * 4 + [2] * 4 + [3] * 2,
    ]
    assert (text.offset(given).tolist(), prompt.offset(given).tolist()) == ([1, 2], [0, 0])
    assert (text.whole(given, 6).tolist(), prompt.whole(given, 6).tolist()) == ([7, 6], [8, 8])
