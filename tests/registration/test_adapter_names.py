"""Adapters that name modules as the official LLaDA code does: every place of a config, every way of loading."""

import json

import pytest
import torch
from peft import (
    AdaLoraConfig,
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftMixedModel,
    PeftModel,
    TrainableTokensConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from tiny import answer, tiny_model
from transformers import AutoModel, AutoModelForCausalLM

from d3llm_hf import LLaDAModel, as_diffusion_lm
from d3llm_hf.registration.adapter_names import official_name, translate


OFFICIAL = {"q_proj": (16, 16), "attn_out": (16, 16), "ff_proj": (16, 32), "up_proj": (16, 32), "ff_out": (32, 16)}
BLOCKS = "base_model.model.model.transformer.blocks"


@pytest.fixture
def base(tmp_path):
    """A checkpoint folder of a tiny LLaDA with two blocks."""
    tiny_model("llada").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def lora_tensors(name: str, width: int, height: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(name))
    shapes = {"lora_A": (2, width), "lora_B": (height, 2)}
    return {f"{name}.{part}.weight": torch.randn(shape, generator=generator) for part, shape in shapes.items()}


def write_adapter(folder, base, tensors: dict, **config):
    """As PEFT saved it around the official class."""
    folder.mkdir()
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 2, "target_modules": []}
    settings |= {"base_model_name_or_path": str(base)} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def adapter(tmp_path, base):
    """An adapter of five projections of both blocks by their official names."""
    tensors: dict = {}
    for block in range(2):
        for name, shape in OFFICIAL.items():
            tensors |= lora_tensors(f"{BLOCKS}.{block}.{name}", *shape)
    return write_adapter(tmp_path / "adapter", base, tensors, target_modules=list(OFFICIAL))


def adapted(model) -> list[str]:
    """Names of the modules that have an adapter, without PEFT's prefixes."""
    names = {name.partition(".lora_B")[0] for name, _ in model.named_parameters() if ".lora_B" in name}
    return sorted(name.removeprefix("base_model.model.") for name in names)


def new_lora(**config) -> list[str]:
    return adapted(get_peft_model(tiny_model("llada"), LoraConfig(r=2, **config)))


LAST = {"q_proj": "self_attn.q_proj", "attn_out": "self_attn.o_proj", "ff_proj": "mlp.gate_proj"}
LAST |= {"up_proj": "mlp.up_proj", "ff_out": "mlp.down_proj"}


def of_blocks(*names: str, blocks=(0, 1)) -> list[str]:
    return sorted(f"model.layers.{block}.{LAST[name]}" for block in blocks for name in names)


def test_every_official_name_is_the_name_of_one_module():
    model = tiny_model("llada", layers=1)
    official = {name: official_name(name) for name, _ in model.named_modules() if official_name(name)}
    assert official == {
        "model.embed_tokens": "model.transformer.wte",
        "model.layers": "model.transformer.blocks",
        "model.layers.0": "model.transformer.blocks.0",
        "model.layers.0.self_attn.q_proj": "model.transformer.blocks.0.q_proj",
        "model.layers.0.self_attn.k_proj": "model.transformer.blocks.0.k_proj",
        "model.layers.0.self_attn.v_proj": "model.transformer.blocks.0.v_proj",
        "model.layers.0.self_attn.o_proj": "model.transformer.blocks.0.attn_out",
        "model.layers.0.mlp.gate_proj": "model.transformer.blocks.0.ff_proj",
        "model.layers.0.mlp.up_proj": "model.transformer.blocks.0.up_proj",
        "model.layers.0.mlp.down_proj": "model.transformer.blocks.0.ff_out",
        "model.layers.0.input_layernorm": "model.transformer.blocks.0.attn_norm",
        "model.layers.0.post_attention_layernorm": "model.transformer.blocks.0.ff_norm",
        "model.norm": "model.transformer.ln_f",
        "lm_head": "model.transformer.ff_out",
    }
    assert official_name("layers.3.mlp.up_proj") == "transformer.blocks.3.up_proj"  # of the backbone alone


TARGETS = {
    "ends of names": (list(OFFICIAL), of_blocks(*OFFICIAL)),
    "one of a block": (["blocks.1.attn_out"], of_blocks("attn_out", blocks=[1])),
    "whole names": (["model.transformer.blocks.0.ff_out"], of_blocks("ff_out", blocks=[0])),
    "ours": (["o_proj", "down_proj"], of_blocks("attn_out", "ff_out")),
    "ours beside theirs": (["o_proj", "ff_proj"], of_blocks("attn_out", "ff_proj")),
    "the head": (["transformer.ff_out"], ["lm_head"]),
    "the embedding": (["wte"], []),
    "an expression": (r".*blocks\.\d+\.(q_proj|attn_out)", of_blocks("q_proj", "attn_out")),
    "an expression of ends": (r".*\.(attn_out|ff_out)", of_blocks("attn_out", "ff_out")),
    "an expression of ours": (r".*\.(o_proj|down_proj)", of_blocks("attn_out", "ff_out")),
    "an expression of one block": (r"model\.transformer\.blocks\.1\..*_proj", None),
}


@pytest.mark.parametrize("case", TARGETS)
def test_target_modules_reach_what_they_reach_in_the_official_code(case):
    said, expected = TARGETS[case]
    if case == "the embedding":
        model = get_peft_model(tiny_model("llada"), LoraConfig(r=2, target_modules=said))
        assert any("embed_tokens.lora_embedding_A" in name for name, _ in model.named_parameters())
        return
    if expected is None:
        names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
        expected = sorted(f"model.layers.1.{name}" for name in names)
    assert new_lora(target_modules=said) == expected


def test_all_linear_is_still_all_linear():
    assert len(new_lora(target_modules="all-linear")) == 14


def test_every_other_field_that_names_modules_is_translated():
    assert new_lora(target_modules=["q_proj", "attn_out"], exclude_modules=["attn_out"]) == of_blocks("q_proj")
    excluded = r"model\.transformer\.blocks\.0\.attn_out"
    assert new_lora(target_modules=["attn_out"], exclude_modules=excluded) == of_blocks("attn_out", blocks=[1])
    chosen = {"layers_to_transform": [1], "layers_pattern": "blocks"}
    assert new_lora(target_modules=["attn_out"], **chosen) == of_blocks("attn_out", blocks=[1])
    several = {"layers_to_transform": [0], "layers_pattern": ["transformer.blocks"]}
    assert new_lora(target_modules=["ff_out"], **several) == of_blocks("ff_out", blocks=[0])


def test_ranks_and_alphas_follow_their_modules():
    config = LoraConfig(
        r=2,
        target_modules=["attn_out", "ff_proj", "ff_out"],
        rank_pattern={r"blocks\.1\.attn_out": 3, "ff_proj": 4},
        alpha_pattern={"attn_out": 6, "model.transformer.blocks.0.ff_out": 5},
    )
    model = get_peft_model(tiny_model("llada"), config)
    layers = model.get_base_model().model.layers
    ranks = [[layer.self_attn.o_proj.r, layer.mlp.gate_proj.r, layer.mlp.down_proj.r] for layer in layers]
    assert [[rank["default"] for rank in each] for each in ranks] == [[2, 4, 2], [3, 4, 2]]
    alphas = [[layer.self_attn.o_proj.lora_alpha, layer.mlp.down_proj.lora_alpha] for layer in layers]
    assert [[alpha["default"] for alpha in each] for each in alphas] == [[6, 5], [6, 8]]


def test_what_is_saved_whole_is_found_by_its_official_name():
    model = get_peft_model(
        tiny_model("llada"), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["wte", "ln_f"])
    )
    whole = {
        name.partition(".modules_to_save")[0] for name, _ in model.named_parameters() if "modules_to_save" in name
    }
    assert whole == {"base_model.model.model.embed_tokens", "base_model.model.model.norm"}
    model = get_peft_model(
        tiny_model("llada"), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["transformer.ff_out"])
    )
    assert any("lm_head.modules_to_save" in name for name, _ in model.named_parameters())


def test_tokens_parameters_and_other_kinds_of_adapters_are_found_too():
    model = get_peft_model(
        tiny_model("llada"), LoraConfig(r=2, target_modules=["attn_out"], trainable_token_indices={"wte": [1, 2]})
    )
    assert any("embed_tokens.token_adapter" in name for name, _ in model.named_parameters())
    model = get_peft_model(tiny_model("llada"), TrainableTokensConfig(target_modules=["wte"], token_indices=[1]))
    assert any("embed_tokens.trainable_tokens_delta" in name for name, _ in model.named_parameters())
    model = get_peft_model(tiny_model("llada"), LoraConfig(r=2, target_parameters=["attn_out.weight"]))
    assert len(adapted(model)) == 2
    model = get_peft_model(
        tiny_model("llada"), IA3Config(target_modules=["attn_out", "ff_out"], feedforward_modules=["ff_out"])
    )
    assert sum("ia3_l" in name for name, _ in model.named_parameters()) == 4
    model = get_peft_model(tiny_model("llada"), LNTuningConfig(target_modules=["attn_norm", "ln_f"]))
    assert sum("ln_tuning" in name for name, _ in model.named_parameters()) == 3


def test_ranks_of_adalora_are_found_by_the_names_of_tensors():
    config = AdaLoraConfig(
        total_step=10,
        target_modules=["attn_out"],
        rank_pattern={"model.transformer.blocks.0.attn_out.lora_E": [True, False]},
    )
    translate(config, tiny_model("llada"))
    assert config.rank_pattern == {"model.layers.0.self_attn.o_proj.lora_E": [True, False]}


def test_the_backbone_alone_and_other_models_keep_what_is_said():
    backbone = LLaDAModel(tiny_model("llada").config)
    assert adapted(get_peft_model(backbone, LoraConfig(r=2, target_modules=["attn_out"]))) == [
        "layers.0.self_attn.o_proj",
        "layers.1.self_attn.o_proj",
    ]
    with pytest.raises(ValueError, match="attn_out"):
        get_peft_model(tiny_model("dream"), LoraConfig(r=2, target_modules=["attn_out"]))


# ---- loading -------------------------------------------------------------------------------------------------------


def test_every_way_of_loading_an_official_adapter_reaches_every_module(adapter, base):
    expected = of_blocks(*OFFICIAL)
    wrapper = PeftModel.from_pretrained(AutoModel.from_pretrained(base), adapter)
    assert adapted(wrapper) == expected
    second = PeftModel.from_pretrained(AutoModel.from_pretrained(base), adapter, adapter_name="first")
    second.load_adapter(adapter, "second")
    second.set_adapter("second")
    loaded = AutoModel.from_pretrained(base)
    loaded.load_adapter(str(adapter))
    models = [second, loaded, AutoModelForCausalLM.from_pretrained(adapter), AutoModel.from_pretrained(adapter)]
    models.append(AutoPeftModelForCausalLM.from_pretrained(adapter))
    ids = torch.tensor([[1, 2, 3]])
    for model in models:
        assert adapted(model) == expected
        assert torch.equal(model.eval()(input_ids=ids).logits, wrapper(input_ids=ids).logits)
    tensors = load_file(adapter / "adapter_model.safetensors")
    ours = wrapper.get_base_model().model.layers[1].mlp.down_proj.lora_A["default"].weight
    assert torch.equal(ours, tensors[f"{BLOCKS}.1.ff_out.lora_A.weight"])


def test_an_adapter_of_the_head_is_loaded_where_the_file_has_one(tmp_path, base):
    tensors = lora_tensors("base_model.model.model.transformer.ff_out", 16, 32)
    for block in range(2):
        tensors |= lora_tensors(f"{BLOCKS}.{block}.ff_out", 32, 16)
    folder = write_adapter(tmp_path / "head", base, tensors, target_modules=["ff_out"])
    expected = ["lm_head", *of_blocks("ff_out")]
    assert adapted(PeftModel.from_pretrained(AutoModel.from_pretrained(base), folder)) == expected
    assert adapted(AutoModel.from_pretrained(folder)) == expected


def test_what_was_saved_whole_is_loaded_by_its_official_name(tmp_path, base):
    table = torch.randn(32, 16)
    tensors = lora_tensors(f"{BLOCKS}.0.attn_out", 16, 16) | lora_tensors(f"{BLOCKS}.1.attn_out", 16, 16)
    tensors |= {"base_model.model.model.transformer.wte.weight": table}
    whole = {"target_modules": ["attn_out"], "modules_to_save": ["wte"]}
    folder = write_adapter(tmp_path / "whole", base, tensors, **whole)
    models = [PeftModel.from_pretrained(AutoModel.from_pretrained(base), folder)]
    try:
        models.append(AutoModel.from_pretrained(folder))
    except ValueError as error:  # transformers 5.16 loads adapters without what was saved whole
        assert "model.embed_tokens.weight" in str(error)
    for model in models:
        [found] = [weight for name, weight in model.named_parameters() if "modules_to_save" in name]
        assert torch.equal(found, table)


def test_a_tensor_that_finds_no_module_is_an_error_that_names_it(tmp_path, base):
    tensors = lora_tensors(f"{BLOCKS}.0.attn_out", 16, 16) | lora_tensors(f"{BLOCKS}.0.ff_proj", 16, 32)
    folder = write_adapter(tmp_path / "other", base, tensors, target_modules=["attn_out"])
    said = r"Every tensor of an adapter must belong to a module .*other' with 2 for none.*mlp\.gate_proj\.lora_A"
    with pytest.raises(ValueError, match=said):
        PeftModel.from_pretrained(AutoModel.from_pretrained(base), folder)
    with pytest.raises(ValueError, match=said):
        PeftMixedModel.from_pretrained(AutoModel.from_pretrained(base), folder)
    with pytest.raises(ValueError, match=said):
        AutoModel.from_pretrained(folder)
    with pytest.raises(ValueError, match=said):
        AutoModel.from_pretrained(base).load_adapter(str(folder))


def test_adapters_that_are_saved_here_load_again(tmp_path, base):
    model = get_peft_model(AutoModel.from_pretrained(base), LoraConfig(target_modules=list(OFFICIAL), r=2))
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data.normal_(generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "saved")
    expected = answer(model.eval(), [1, 2, 3]).sequences
    for auto in (AutoPeftModel, AutoPeftModelForCausalLM):
        assert torch.equal(answer(auto.from_pretrained(tmp_path / "saved"), [1, 2, 3]).sequences, expected)


def test_stock_models_are_nobody_elses_business(tmp_path):
    from others import DECODERS

    stock = get_peft_model(DECODERS[0].tiny(), LoraConfig(target_modules=["q_proj"], r=2))
    stock.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors |= lora_tensors("base_model.model.model.layers.0.self_attn.elsewhere", 16, 16)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    PeftModel.from_pretrained(DECODERS[0].tiny(), tmp_path)
    with pytest.raises(ValueError, match="elsewhere"):
        PeftModel.from_pretrained(as_diffusion_lm(DECODERS[0].tiny(), mask_token_id=3), tmp_path)
