"""Checkpoints keep their official tensor names and values through loading and saving."""

import json

import pytest
import torch
from families import DREAM, LLADA, SDAR, largest_difference, tokens
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


@pytest.fixture(params=[LLADA, DREAM, SDAR], ids=lambda family: family.name)
def family(request):
    return request.param


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same_tensors(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def loaded(model_class, folder, **kwargs):
    """The model, after checking that each of its tensors came from the folder and each of the folder's was wanted."""
    model, info = model_class.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    return model.eval()


def test_an_official_checkpoint_loads_without_missing_or_unexpected_tensors(family):
    loaded(family.model_class, family.checkpoint)


def test_an_official_checkpoint_is_saved_under_the_same_names_with_the_same_values(family, tmp_path):
    family.model_class.from_pretrained(family.checkpoint).save_pretrained(tmp_path)
    assert same_tensors(weights(tmp_path), weights(family.checkpoint))


def test_a_model_made_in_code_is_saved_under_the_official_names(family, tmp_path):
    family.model_class(family.config_class.from_pretrained(family.checkpoint)).save_pretrained(tmp_path)
    assert weights(tmp_path).keys() == weights(family.checkpoint).keys()


def test_a_checkpoint_under_transformers_own_names_loads_and_is_saved_under_them_again(tiny, family, tmp_path):
    tiny.save_pretrained(tmp_path / "first", save_original_format=False)
    assert weights(tmp_path / "first").keys() == tiny.state_dict().keys()
    again = loaded(family.model_class, tmp_path / "first")
    again.save_pretrained(tmp_path / "second")
    assert same_tensors(weights(tmp_path / "second"), dict(tiny.state_dict()))


def test_a_sharded_checkpoint_keeps_the_official_names(family, tmp_path):
    model = family.model_class.from_pretrained(family.checkpoint)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == weights(family.checkpoint).keys()
    assert same_tensors(loaded(family.model_class, tmp_path).state_dict(), model.state_dict())


def test_the_backbone_loads_from_the_checkpoint_of_the_whole_model(family):
    whole = family.model_class.from_pretrained(family.checkpoint).eval()
    backbone, info = family.backbone_class.from_pretrained(family.checkpoint, output_loading_info=True)
    assert not info["missing_keys"]
    assert same_tensors(backbone.state_dict(), whole.model.state_dict())


def test_the_whole_model_takes_a_saved_backbone_and_lacks_only_the_head(tiny, family, tmp_path):
    tiny.model.save_pretrained(tmp_path)
    again, info = family.model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"} and not info["unexpected_keys"]
    assert same_tensors(again.model.state_dict(), tiny.model.state_dict())


def test_a_saved_backbone_of_llada_has_the_names_of_the_official_backbone(tmp_path):
    LLADA.tiny().model.save_pretrained(tmp_path)
    official = {name.removeprefix("model.") for name in weights(LLADA.checkpoint) if ".ff_out.weight" not in name[:30]}
    assert {name for name in weights(tmp_path) if ".blocks." not in name} <= official
    assert {name for name in weights(tmp_path) if ".blocks.0." in name} == {n for n in official if ".blocks.0." in n}


def test_biases_of_the_attention_projections_are_saved_and_loaded(tmp_path):
    model = LLADA.tiny(include_qkv_bias=True)
    model.save_pretrained(tmp_path)
    assert "model.transformer.blocks.0.q_proj.bias" in weights(tmp_path)
    loaded(LLADA.model_class, tmp_path)


def test_untied_weights_are_two_tensors_in_memory_and_on_disk(tiny, family, tmp_path):
    assert tiny.lm_head.weight is not tiny.get_input_embeddings().weight
    tiny.save_pretrained(tmp_path)
    assert family.head in weights(tmp_path)


def test_tied_weights_are_one_tensor_in_memory_and_on_disk_and_after_loading(family, tmp_path):
    tied = family.tiny(**{family.tied: True})
    tied.save_pretrained(tmp_path)
    assert family.head not in weights(tmp_path)
    again = loaded(family.model_class, tmp_path)
    for model in (tied, again):
        assert model.lm_head.weight is model.get_input_embeddings().weight
    ids = tokens(1, 6)
    assert torch.equal(tied(ids).logits, again(ids).logits)


@pytest.mark.every(3)
@pytest.mark.parametrize("size", [80, 63], ids=["larger", "smaller"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_resized_embeddings_survive_saving_and_loading(family, size, tied, tmp_path):
    model = family.tiny(**{family.tied: tied})
    before = model.get_input_embeddings().weight.detach().clone()
    model.resize_token_embeddings(size)
    model.save_pretrained(tmp_path)
    again = loaded(family.model_class, tmp_path)
    assert again.config.vocab_size == size
    assert again.lm_head.weight.shape[0] == again.get_input_embeddings().weight.shape[0] == size
    kept = min(size, len(before))
    assert torch.equal(again.get_input_embeddings().weight[:kept], before[:kept])
    ids = tokens(2, 5) % kept
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_the_official_embedding_size_follows_a_resize(tmp_path):
    model = LLADA.tiny(embedding_size=64)
    model.resize_token_embeddings(60)
    model.save_pretrained(tmp_path)
    assert loaded(LLADA.model_class, tmp_path).config.embedding_size == 60


def test_every_auto_class_entry_is_written_when_a_model_is_saved(tiny, family, tmp_path):
    tiny.save_pretrained(tmp_path)
    model = f"modeling_{family.name}.{family.model_class.__name__}"
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": f"configuration_{family.name}.{family.config_class.__name__}",
        "AutoModel": model,
        "AutoModelForCausalLM": model,
        "AutoModelForMaskedLM": model,
    }


def test_a_model_sharded_by_fsdp2_saves_its_own_names_code_and_values(tiny, family, tmp_path):
    """FSDP2 gives the model a class of its own, which lives in a file of torch's."""
    expected = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        fully_shard(tiny, mesh=init_device_mesh("cpu", (1,)))
        gathered = {name: shard.full_tensor() for name, shard in tiny.state_dict().items()}  # as accelerate does it
        tiny.save_pretrained(tmp_path, state_dict=gathered)
    finally:
        torch.distributed.destroy_process_group()
    config = json.loads((tmp_path / "config.json").read_text())
    names = {entry.rpartition(".")[2] for entry in config["auto_map"].values()} | set(config["architectures"])
    assert names == {family.config_class.__name__, family.model_class.__name__}
    code = {path.name for path in tmp_path.glob("*.py")}
    assert {f"{entry.rpartition('.')[0]}.py" for entry in config["auto_map"].values()} <= code
    assert not any("fsdp" in name or "fully_shard" in name for name in code)
    assert same_tensors(loaded(family.model_class, tmp_path).state_dict(), expected)


def test_a_tensor_of_another_shape_is_not_loaded_in_silence(family, tmp_path):
    tensors = weights(family.checkpoint)
    tensors[family.head] = tensors[family.head][:-1].contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((family.checkpoint / "config.json").read_text())
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        family.model_class.from_pretrained(tmp_path)


@pytest.mark.every(3)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_checkpoint_loads_in_the_dtype_it_was_saved_in(tiny, family, dtype, tmp_path):
    tiny.to(dtype).save_pretrained(tmp_path)
    again = loaded(family.model_class, tmp_path)
    assert again.dtype is dtype
    assert largest_difference(again(tokens(1, 4)).logits, tiny(tokens(1, 4)).logits) == 0
