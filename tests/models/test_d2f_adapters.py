"""Forwards of D2F's adapters, loaded as they are published, against recorded ones."""

import pytest
import torch
from peft import PeftModel
from places import GOLDEN
from safetensors.torch import load_file

from d3llm_hf import DreamModel, LLaDAModelLM
from d3llm_hf.models.cache import SlotCache
from d3llm_hf.models.topology import Topology


CLASSES = {"llada": LLaDAModelLM, "dream": DreamModel}
PROMPT, BLOCK, LENGTH = 13, 8, 40


def base(family):
    return CLASSES[family].from_pretrained(GOLDEN / f"{family}-tiny-a")


def by_peft(family):
    return PeftModel.from_pretrained(base(family), str(GOLDEN / f"d2f-{family}-tiny-a-lora")).eval()


def by_transformers(family):
    model = base(family)
    model.load_adapter(str(GOLDEN / f"d2f-{family}-tiny-a-lora"))
    return model.eval()


def merged(family):
    return by_peft(family).merge_and_unload()


def recorded(family):
    return load_file(GOLDEN / "logits" / f"d2f-{family}-tiny-a.safetensors")


def block_causal():
    block = Topology(BLOCK, "prompt").blocks(torch.arange(LENGTH)[None], torch.tensor([PROMPT]))[0]
    return (block[:, None] >= block)[None, None]


def assert_close(logits, wanted, limit=1e-5):
    assert (logits - wanted).abs().max() < limit * wanted.abs().max()


@pytest.fixture(params=CLASSES)
def family(request):
    return request.param


@pytest.mark.every(3)
@pytest.mark.parametrize("load", [by_peft, by_transformers, merged])
@torch.no_grad()
def test_an_adapter_gives_the_recorded_logits_however_it_is_loaded(family, load):
    tensors, model = recorded(family), load(family)
    ids = tensors["blockcausal/input_ids"].long()
    assert torch.equal(block_causal()[0, 0], tensors["blockcausal/mask"].bool())
    output = model(input_ids=ids, attention_mask=block_causal(), output_hidden_states=True)
    assert_close(output.logits, tensors["blockcausal/logits"])
    for index, hidden in enumerate(output.hidden_states):
        assert_close(hidden, tensors[f"blockcausal/hidden{index}"])
    assert_close(model(input_ids=ids).logits, tensors["full/logits"])


@torch.no_grad()
def test_the_model_without_its_adapter_is_the_teacher(family):
    tensors, model = recorded(family), by_peft(family)
    ids = tensors["blockcausal/input_ids"].long()
    with model.disable_adapter():
        assert_close(model(input_ids=ids).logits, tensors["teacher/logits"])
    assert_close(base(family).eval()(ids).logits, tensors["teacher/logits"])


@torch.no_grad()
def test_forwards_over_kept_blocks_give_the_recorded_logits(family):
    tensors, model = recorded(family), by_peft(family)
    first, later = (tensors[name].long() for name in ("blockcausal/input_ids", "chain/ids2"))
    cache = SlotCache(model.config.num_hidden_layers, LENGTH)
    steps = ((first, 0, 21), (first, 13, 40), (later, 13, 40), (later, 21, 40))
    for number, (ids, start, end) in enumerate(steps):
        cache.at(slice(start, end), end)
        mask, places = block_causal()[:, :, start:end, :end], torch.arange(start, end)[None]
        output = model(input_ids=ids[:, start:end], attention_mask=mask, position_ids=places, cache=cache)
        assert_close(output.logits, tensors[f"chain/step{number}_logits"])


@torch.no_grad()
def test_in_bfloat16_it_is_near(family):
    tensors, model = recorded(family), by_peft(family).to(torch.bfloat16)
    logits = model(input_ids=tensors["blockcausal/input_ids"].long(), attention_mask=block_causal()).logits
    assert_close(logits.float(), tensors["blockcausal/logits_bf16"], limit=0.02)


def test_every_matrix_of_an_adapter_finds_its_module(family):
    tensors = load_file(GOLDEN / f"d2f-{family}-tiny-a-lora" / "adapter_model.safetensors")
    found = {name: value for name, value in by_peft(family).named_parameters() if ".lora_" in name}
    assert len(found) == len(tensors) == 2 * 4 * 3
    total = sum(value.double().abs().sum() for value in tensors.values())
    torch.testing.assert_close(sum(value.double().abs().sum() for value in found.values()), total)
