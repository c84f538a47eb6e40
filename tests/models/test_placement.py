"""Where and how the weights run: device maps, offloading, compilation, parallel plans."""

import pytest
import torch
from families import equal_up_to_rounding, tokens


@pytest.fixture
def saved(tiny, tmp_path):
    tiny.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_device_map_by_name_loads_the_same_model(tiny, family, saved):
    again = family.model_class.from_pretrained(saved, device_map="cpu").eval()
    ids = tokens(1, 6)
    assert torch.equal(again(ids).logits, tiny(ids).logits)


def test_layers_offloaded_to_disk_give_the_same_logits(tiny, family, saved, tmp_path):
    device_map = {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "lm_head": "disk",
    }
    again = family.model_class.from_pretrained(
        saved, device_map=device_map, offload_folder=tmp_path / "offload"
    ).eval()
    assert again.lm_head.weight.device.type == "meta"
    ids = tokens(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    with torch.no_grad():
        ours, expected = (model(ids, attention_mask=mask).logits for model in (again, tiny))
        assert torch.equal(ours, expected)
        assert torch.equal(again(ids, logits_to_keep=mask.bool()).logits, tiny(ids, logits_to_keep=mask.bool()).logits)


def test_an_automatic_device_map_never_splits_a_layer(tiny):
    infer_auto_device_map = pytest.importorskip("accelerate").infer_auto_device_map
    one_layer = sum(weight.numel() * 4 for weight in tiny.model.layers[0].parameters())
    room = int(one_layer * 2.5)
    placed = infer_auto_device_map(tiny, {"cpu": room, "disk": 2**30}, no_split_module_classes=tiny._no_split_modules)
    assert {"cpu", "disk"} == set(placed.values())
    assert not any(name.startswith("model.layers.") and name.count(".") > 2 for name in placed)


@pytest.mark.full
@pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "plain"])
def test_the_forward_pass_compiles_without_a_graph_break(tiny, compiler, padded):
    inputs = {"input_ids": tokens(2, 6), "use_cache": False}
    if padded:
        inputs["attention_mask"] = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
        inputs["logits_to_keep"] = torch.tensor([[2, 4], [0, 2]])
    torch.compiler.reset()
    compiled = torch.compile(tiny, backend=compiler, fullgraph=True)
    with torch.no_grad():
        assert equal_up_to_rounding(compiled(**inputs).logits, tiny(**inputs).logits)


def test_the_tensor_parallel_plan_names_every_projection_and_the_head(tiny):
    plan = tiny.tp_plan
    assert {name.rpartition(".")[2] for name in plan} >= {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
        "lm_head",
    }
    modules = {
        ".".join("*" if part.isdigit() else part for part in name.split(".")) for name, _ in tiny.named_modules()
    }
    assert plan.keys() <= modules


def test_a_model_on_the_meta_device_takes_its_weights_later(family):
    expected = family.tiny()
    with torch.device("meta"):
        model = family.model_class(family.config())
    assert {weight.device.type for weight in model.parameters()} == {"meta"}
    model = family.model_class.from_pretrained(None, config=family.config(), state_dict=expected.state_dict()).eval()
    ids = tokens(1, 5)
    assert torch.equal(model(ids).logits, expected(ids).logits)
