"""MMaDA's text part as a checkpoint: the recorded logits, official names both ways, and what its config may say."""

import json

import pytest
import torch
from families import equal_up_to_rounding
from places import GOLDEN
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from d3llm_hf import LLaDAConfig, MMadaConfig, MMadaModelLM, export_checkpoint
from d3llm_hf.models.modeling_mmada import MMadaModel


FOLDER = GOLDEN / "mmada-tiny-a"


@pytest.fixture(params=["sdpa", "eager"])
def model(request):
    return AutoModelForCausalLM.from_pretrained(FOLDER, attn_implementation=request.param).eval()


@pytest.fixture(scope="module")
def recorded():
    return load_file(GOLDEN / "logits" / "mmada-tiny-a.safetensors")


@torch.no_grad()
def test_logits_and_states_are_the_recorded_ones_codes_of_images_included(model, recorded):
    output = model(recorded["plain/input_ids"].long(), output_hidden_states=True)
    assert equal_up_to_rounding(output.logits, recorded["plain/logits"])
    for index, state in enumerate(output.hidden_states):
        assert equal_up_to_rounding(state, recorded[f"plain/hidden{index}"])


@torch.no_grad()
def test_padding_is_what_the_official_attention_bias_makes_of_it(model, recorded):
    """Its `attention_mask` would add a causal bias for the whole batch ("am" of the recording), which here it never
    does. Rows of padding mean nothing."""
    seen = recorded["bias/attention_mask"].bool()
    logits = model(recorded["bias/input_ids"].long(), attention_mask=seen.long()).logits
    assert equal_up_to_rounding(logits[seen], recorded["bias/logits"][seen])
    assert not equal_up_to_rounding(logits[seen], recorded["am/logits"][seen])


def test_keys_and_tensors_are_official_on_disk_before_and_after(tmp_path):
    model = AutoModel.from_pretrained(FOLDER)
    assert type(model) is MMadaModelLM and type(model.config) is MMadaConfig
    model.save_pretrained(tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (FOLDER, tmp_path))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in (FOLDER, tmp_path))
    renamed = {"torch_dtype", "transformers_version", "multi_query_attention"}
    assert {name: value for name, value in theirs.items() if name not in renamed}.items() <= ours.items()
    assert (ours["model_type"], ours["architectures"]) == ("mmada", ["MMadaModelLM"])
    again = MMadaModel.from_pretrained(tmp_path)
    assert torch.equal(again.embed_tokens.weight, model.model.embed_tokens.weight)


def test_an_export_carries_its_code(tmp_path):
    folder = export_checkpoint(FOLDER, tmp_path / "exported", decoding_method="fast_dllm")
    assert {"configuration_mmada.py", "modeling_mmada.py", "modeling_llada.py"} <= {
        f.name for f in folder.glob("*.py")
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_mmada.MMadaModelLM"
    assert config["auto_map"]["AutoConfig"] == "configuration_mmada.MMadaConfig"
    assert AutoModel.from_pretrained(folder).generation_config.decoding_method == "fast_dllm"
    with pytest.raises(
        ValueError, match=r"`engine` must have code for the family \(got 'sglang' for model_type 'mmad"
    ):
        export_checkpoint(FOLDER, tmp_path / "engine", engine="sglang")


def test_text_ends_where_lladas_tokenizer_does_unless_the_config_says_so():
    assert MMadaConfig().text_vocab_size == 126349  # 115 rows before `llm_vocab_size`, where the codes begin
    assert MMadaConfig(llm_vocab_size=512, vocab_size=640).text_vocab_size == 512
    assert MMadaConfig(text_vocab_size=126400).text_vocab_size == 126400


@pytest.mark.parametrize(
    "keys, rule",
    [
        ({"text_vocab_size": 641}, r"`text_vocab_size` must lie between 1 and `vocab_size` \(got 641 of 640\)"),
        ({"text_vocab_size": 0}, r"`text_vocab_size` must lie between 1 and `vocab_size` \(got 0 of 640\)"),
        ({"num_experts": 8}, r"`num_experts` describes a mixture of experts \(got 8\), which MMaDA does not have"),
        ({"alibi": True}, r"`alibi` must be False \(got True\): no released MMaDA"),
    ],
)
def test_another_architecture_is_refused(keys, rule):
    config = json.loads((FOLDER / "config.json").read_text())
    with pytest.raises(ValueError, match=rule):
        MMadaConfig.from_dict(config | keys)


def test_llada_still_refuses_the_codes_of_images():
    with pytest.raises(ValueError, match=r"`codebook_size` describes images, video or sound \(got 128\), which LLaDA"):
        LLaDAConfig(codebook_size=128)
