"""ReFusion as a checkpoint: the recorded logits, Qwen3's names both ways, and what its config may say."""

import json

import pytest
import torch
from families import equal_up_to_rounding
from places import GOLDEN
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

from d3llm_hf import ReFusionConfig, ReFusionForCausalLM, export_checkpoint
from d3llm_hf.models.cache import SlotCache


FOLDER = GOLDEN / "refusion-tiny-a"


@pytest.fixture(params=["sdpa", "eager"])
def model(request):
    return ReFusionForCausalLM.from_pretrained(FOLDER, attn_implementation=request.param).eval()


@pytest.fixture(scope="module")
def recorded():
    return load_file(GOLDEN / "logits" / "refusion-tiny-a.safetensors")


@torch.no_grad()
def test_logits_and_states_are_the_recorded_ones_in_any_order(model, recorded):
    output = model(recorded["plain/input_ids"].long(), output_hidden_states=True)
    assert equal_up_to_rounding(output.logits, recorded["plain/logits"])
    for index, state in enumerate(output.hidden_states):
        assert equal_up_to_rounding(state, recorded[f"plain/hidden{index}"])
    moved = model(recorded["perm/input_ids"].long(), position_ids=recorded["perm/position_ids"].long()).logits
    assert equal_up_to_rounding(moved, recorded["perm/logits"])


@torch.no_grad()
def test_keys_may_lie_at_the_places_of_the_text_whatever_the_order(model, recorded):
    """The recorded forwards over kept keys, which lie in the order in which they were fed there."""
    ids, positions = recorded["perm/input_ids"].long(), recorded["perm/position_ids"].long()
    kept, fed = 14, 8  # the prompt of 10 and 4 tokens of a later slot, then masks before it
    cache = SlotCache(model.config.num_hidden_layers, int(positions.max()) + 1)
    cache.at(positions[:, :kept], cache.length)
    mask = torch.zeros(1, 1, kept, cache.length, dtype=torch.bool)
    for row in range(kept):
        mask[0, 0, row, positions[0, : row + 1]] = True
    model(ids[:, :kept], attention_mask=mask, position_ids=positions[:, :kept], cache=cache)
    masks, places = recorded["cached/input_ids"].long(), recorded["cached/position_ids"].long()
    cache.at(places, cache.length)
    seen = torch.zeros(1, 1, fed, cache.length, dtype=torch.bool)
    seen[..., positions[0, :kept]] = True
    for row in range(fed):
        seen[0, 0, row, places[0, : row + 1]] = True
    logits = model(masks, attention_mask=seen, position_ids=places, cache=cache).logits
    assert equal_up_to_rounding(logits, recorded["cached/logits"])


@torch.no_grad()
def test_padding_on_either_side_is_not_seen(model):
    ids = torch.tensor([[5, 6, 7, 8]])
    alone = model(ids).logits
    left, mask = torch.tensor([[9, 9, 5, 6, 7, 8]]), torch.tensor([[0, 0, 1, 1, 1, 1]])
    assert equal_up_to_rounding(model(left, attention_mask=mask).logits[:, 2:], alone)
    right = torch.tensor([[5, 6, 7, 8, 9, 9]])
    assert equal_up_to_rounding(model(right, attention_mask=mask.flip(1)).logits[:, :4], alone)


@torch.no_grad()
def test_tensors_are_qwen3s_on_disk_before_and_after(tmp_path, recorded):
    model = ReFusionForCausalLM.from_pretrained(FOLDER)
    model.save_pretrained(tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (FOLDER, tmp_path))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in (FOLDER, tmp_path))
    own = {"model_type", "architectures", "torch_dtype", "transformers_version", "rope_scaling"}
    assert {name: value for name, value in theirs.items() if name not in own}.items() <= ours.items()
    assert ours["model_type"] == "refusion"
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is ReFusionForCausalLM
    ids = recorded["plain/input_ids"].long()
    stock = Qwen3ForCausalLM.from_pretrained(FOLDER, attn_implementation="sdpa").eval()
    assert equal_up_to_rounding(model.eval()(ids).logits, stock(ids).logits)


def test_an_export_carries_its_code(tmp_path):
    ReFusionForCausalLM.from_pretrained(FOLDER).save_pretrained(tmp_path / "saved")
    folder = export_checkpoint(tmp_path / "saved", tmp_path / "exported")
    assert {"configuration_refusion.py", "modeling_refusion.py", "slots.py"} <= {f.name for f in folder.glob("*.py")}
    rule = r"`decoding_method` of the model's generation config must be one of \['refusion'\] for this model"
    with pytest.raises(ValueError, match=rule):
        export_checkpoint(tmp_path / "saved", tmp_path / "other", decoding_method="llada")


@pytest.mark.parametrize(
    "keys, rule",
    [
        ({"is_causal": True}, r"`is_causal` must be False \(got True\)"),
        ({"use_sliding_window": True}, r"`use_sliding_window` must be False \(got True\)"),
        ({"num_experts": 8}, r"`num_experts` describes a mixture of experts \(got 8\), which ReFusion does not have"),
    ],
)
def test_another_architecture_is_refused(keys, rule):
    config = json.loads((FOLDER / "config.json").read_text())
    with pytest.raises(ValueError, match=rule):
        ReFusionConfig.from_dict(config | keys)
    assert ReFusionConfig(num_key_value_heads=None).num_key_value_heads == 32
