"""Forwards of Fast-dLLM v2 against recorded ones, and its checkpoints' names both ways."""

import json

import pytest
import torch
from places import GOLDEN
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from d3llm_hf import Fast_dLLM_QwenConfig, Fast_dLLM_QwenForCausalLM
from d3llm_hf.models.cache import SlotCache


FOLDER = GOLDEN / "fdv2-tiny-a"
TENSORS = load_file(GOLDEN / "logits" / "fdv2-tiny-a.safetensors")


@pytest.fixture(params=["sdpa", "eager"])
def model(request):
    return AutoModelForCausalLM.from_pretrained(FOLDER, attn_implementation=request.param).eval()


def block_causal(length, block_length):
    block = torch.arange(length) // block_length
    return (block[:, None] >= block)[None, None]


def assert_close(found, wanted, limit=1e-5):
    assert (found - wanted).abs().max() < limit * wanted.abs().max()


@pytest.mark.parametrize("entry, block_length", [("plain32", 32), ("plain8", 8), ("batch2", 8)])
@torch.no_grad()
def test_logits_are_the_recorded_ones(model, entry, block_length):
    ids = TENSORS[f"{entry}/input_ids"].long()
    mask = block_causal(ids.shape[1], block_length)
    assert torch.equal(mask[0, 0], TENSORS[f"{entry}/mask"].bool())
    output = model(ids, attention_mask=mask.expand(len(ids), -1, -1, -1), output_hidden_states=True)
    assert_close(output.logits, TENSORS[f"{entry}/logits"])
    for index, hidden in enumerate(output.hidden_states):
        if f"{entry}/hidden{index}" in TENSORS:
            assert_close(hidden, TENSORS[f"{entry}/hidden{index}"])


@pytest.mark.parametrize("entry, block_length", [("plain32", 32), ("plain8", 8)])
@torch.no_grad()
def test_logits_in_bfloat16_are_near(model, entry, block_length):
    ids = TENSORS[f"{entry}/input_ids"].long()
    logits = model.to(torch.bfloat16)(ids, attention_mask=block_causal(ids.shape[1], block_length)).logits
    assert_close(logits.float(), TENSORS[f"{entry}/logits_bf16"], limit=0.03)


class Chain:
    """Forwards over some slots of one text, which keep what earlier ones left."""

    def __init__(self, model, length):
        self.model, self.length = model, length
        self.cache = SlotCache(model.config.num_hidden_layers, length)

    def __call__(self, ids, start):
        end = start + ids.shape[1]
        self.cache.at(slice(start, end), self.length if start else end)
        return self.model(ids, position_ids=torch.arange(start, end)[None], cache=self.cache).logits

    def first_layer(self, start, end):
        layer = self.cache.layers[0]
        return layer.keys[:, :, start:end], layer.values[:, :, start:end]


@torch.no_grad()
def test_a_chain_of_cached_forwards_has_the_recorded_logits_and_keys(model):
    def recorded(name):
        return TENSORS[f"chain32/{name}"]

    ids, chain = recorded("input_ids").long(), Chain(model, 64)
    assert_close(chain(ids[:, :32], 0), recorded("prefill_logits"))
    for kept, name in zip(chain.first_layer(0, 32), ("layer0_k", "layer0_v"), strict=True):
        assert_close(kept, recorded(name))
    assert_close(chain(ids[:, 32:], 32), recorded("block_logits"))
    assert_close(chain(ids[:, 32:], 32), recorded("dual_refresh_logits"))
    assert_close(chain(recorded("dual_window_ids").long(), 48), recorded("dual_window_logits"))
    assert_close(chain.first_layer(32, 64)[0], recorded("dual_block_k0_after")[0][None])
    assert_close(chain(recorded("store_ids").long(), 32), recorded("store_logits"))
    assert_close(chain.first_layer(32, 64)[0], recorded("store_layer0_k"))


@torch.no_grad()
def test_a_batch_behind_a_kept_text_has_the_recorded_logits(model):
    ids = TENSORS["chain8/input_ids"].long()
    cache = SlotCache(model.config.num_hidden_layers, 24)
    cache.at(slice(0, 16), 16)
    mask = block_causal(16, 8).expand(2, -1, -1, -1)
    model(ids[:, :16], attention_mask=mask, position_ids=torch.arange(16)[None], cache=cache)
    cache.at(slice(16, 24), 24)
    logits = model(ids[:, 16:24], position_ids=torch.arange(16, 24)[None], cache=cache).logits
    assert_close(logits, TENSORS["chain8/block_logits"])


def test_no_recorded_forward_is_left_out_but_that_of_a_defect():
    entries = json.loads((GOLDEN / "logits" / "fdv2-tiny-a.json").read_text())["entries"]
    assert set(entries) == {"plain32", "plain8", "batch2", "chain32", "chain8", "quirk64"}  # README: `quirk64`


@pytest.mark.parametrize("tied", [False, True])
def test_tensors_have_the_published_names_both_ways(tied, tmp_path):
    published = load_file(FOLDER / "model.safetensors")
    keys = json.loads((FOLDER / "config.json").read_text()) | {"tie_word_embeddings": tied}
    if tied:
        del published["lm_head.weight"]
    source, saved = tmp_path / "source", tmp_path / "saved"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(keys))
    save_file(published, source / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(source)
    assert type(model) is Fast_dLLM_QwenForCausalLM
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(saved)
    again = load_file(saved / "model.safetensors")
    assert again.keys() == published.keys() and all(torch.equal(again[name], published[name]) for name in again)
    config = json.loads((saved / "config.json").read_text())
    for name in ("model_type", "bd_size", "rope_theta", "num_key_value_heads"):
        assert config[name] == keys[name]


def test_what_the_official_functions_have_as_defaults_stands_in_the_config():
    config = Fast_dLLM_QwenConfig()
    assert (config.mask_token_id, config.eos_token_id, config.bd_size, config.block_length) == (151665, 151645, 32, 32)
    assert AutoConfig.from_pretrained(FOLDER, block_length=8).bd_size == 8
    assert Fast_dLLM_QwenConfig(num_attention_heads=4, num_key_value_heads=None).num_key_value_heads == 4


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"use_sliding_window": True}, r"`use_sliding_window` must be False .got True"),
        ({"is_causal": True}, r"`is_causal` must be False .got True"),
        ({"bd_size": 0}, r"`bd_size` must be a positive integer .got 0"),
        ({"attention_bias": False}, r"`attention_bias` must be True .got False"),
        ({"num_experts": 8}, r"`num_experts` describes a mixture of experts .got 8"),
        ({"bd_size": 8, "block_length": 16}, r"`block_length` is another name of `bd_size` .got 16 and 8"),
    ],
)
def test_another_architecture_is_refused_by_its_key(keys, message):
    with pytest.raises(ValueError, match=message):
        Fast_dLLM_QwenConfig(**keys)
