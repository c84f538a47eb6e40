"""Forwards of block-causal families against recorded ones."""

import json

import pytest
import torch
from places import GOLDEN
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from d3llm_hf.models.cache import SlotCache
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
