"""What `d3llm export --for sglang` writes: names, settings and sizes as that engine's public code reads them.

The engine itself is not run. The oracle are the names in its code (see `docs/engines.md`), written down here again.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from d3llm_hf import export_checkpoint
from d3llm_hf.cli import main
from d3llm_hf.hub import engines
from d3llm_hf.hub.push import checked_files


# What sgl-project/sglang's models/d3llm_llada.py renames, for block 0 (commit 7804f31).
LLADA_NAMES = {
    *(f"model.transformer.{name}.weight" for name in ("wte", "ln_f", "ff_out")),
    *(
        f"model.transformer.blocks.0.{name}.weight"
        for name in ("q_proj", "k_proj", "v_proj", "ff_proj", "up_proj", "attn_out", "attn_norm", "ff_norm", "ff_out")
    ),
}


def changed(source: Path, target: Path, rename=lambda name: name, **config) -> Path:
    """A copy of a checkpoint whose tensors or config differ."""
    export_checkpoint(source, target)
    weights = {rename(name): tensor for name, tensor in load_file(target / "model.safetensors").items()}
    save_file({name: tensor for name, tensor in weights.items() if name}, target / "model.safetensors")
    content = json.loads((target / "config.json").read_text()) | config
    (target / "config.json").write_text(json.dumps(content))
    return target


@pytest.mark.parametrize("family", ["llada", "Dream"])
def test_an_export_for_sglang_has_official_names_decoding_settings_and_a_section_in_the_card(
    family, official, tmp_path
):
    source, target = official[family], tmp_path / "out"
    assert main(["export", str(source), str(target), "--for", "sglang"]) == 0
    assert (target / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    names = set(load_file(target / "model.safetensors"))
    if family == "llada":
        assert {name for name in names if "blocks" not in name or "blocks.0." in name} == LLADA_NAMES
    config = json.loads((target / "config.json").read_text())
    assert config["architectures"] == [{"llada": "LLaDAModelLM", "Dream": "DreamModel"}[family]]
    assert yaml.safe_load((target / "decoding.yaml").read_text()) == {
        "block_size": 32,
        "threshold": {"llada": 0.5, "Dream": 0.4}[family],
        "block_add_threshold": 0.1,
        "decoded_token_threshold": 0.95,
    }
    card = (target / "README.md").read_text()
    assert "--dllm-algorithm FullAttnMultiBlock --dllm-algorithm-config decoding.yaml" in card
    assert "closed without being merged" in card and "no engine was run to try it" in card
    fixed = {"llada": 126336, "Dream": 151666}[family]
    assert f"the mask token {fixed} fixed" in " ".join(card.split()) and "here it is 511" in " ".join(card.split())
    assert {"decoding.yaml", "configuration_sglang.py", f"configuration_{family.lower()}.py"} <= {
        file.name for file in checked_files(target)
    }

    # Under transformers 5 the configuration is the checkpoint's own; under an older one it has the same attributes.
    from transformers import AutoConfig
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    own = AutoConfig.from_pretrained(target, trust_remote_code=False)
    name = config["auto_map"]["AutoConfig"]
    assert name == f"configuration_sglang.{type(own).__name__}"
    remote = get_class_from_dynamic_module(name, target)
    assert remote.__module__.endswith(f"configuration_{family.lower()}")
    spec = importlib.util.spec_from_file_location("lonely", target / "configuration_sglang.py")
    lonely = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lonely)  # its relative import fails here, as it does under transformers 4
    plain = getattr(lonely, type(own).__name__).from_pretrained(target)
    assert plain.model_type == family and "strict" not in repr(type(plain).__mro__)
    wanted = ("hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers", "intermediate_size")
    for attribute in (*wanted, "vocab_size", "rms_norm_eps", "rope_theta", "max_position_embeddings"):
        if attribute == "rope_theta" and family == "Dream":
            continue  # transformers 5 keeps it in `rope_parameters` of a plain config
        assert getattr(plain, attribute) == getattr(own, attribute), attribute


def test_a_card_for_a_checkpoint_with_the_fixed_mask_token_asks_for_no_change(official, tmp_path, monkeypatch):
    monkeypatch.setitem(engines.SGLANG_MASK_TOKENS, "llada", 511)  # in place of a checkpoint of so many tokens
    target = export_checkpoint(official["llada"], tmp_path / "out", engine="sglang")
    assert "here it is" not in (target / "README.md").read_text()


def test_settings_of_the_folder_are_those_of_the_engine_under_its_names():
    algorithm, settings = engines.sglang_decoding(
        "llada", {"decoding_method": "d3llm", "entropy_threshold": 0.3, "block_length": 16, "max_new_tokens": 8}
    )
    assert (algorithm, settings["threshold"], settings["block_size"]) == ("FullAttnMultiBlock", 0.3, 16)
    assert engines.sglang_decoding("Dream", {"decoding_method": "dparallel"}) == (
        "EntropyThreshold",
        {"block_size": 32, "threshold": 0.45},
    )


def test_what_the_engine_would_load_wrongly_is_refused_and_nothing_is_written(official, tmp_path):
    def refused(match: str, source: Path, **options) -> None:
        with pytest.raises(ValueError, match=match):
            export_checkpoint(source, tmp_path / "out", **({"engine": "sglang"} | options))
        assert not (tmp_path / "out").exists()

    refused(r"`engine` must be one of \['sglang'\] \(got 'vllm'\)", official["llada"], engine="vllm")
    refused(r"`decoding_method` must be one of \['d3llm', 'dparallel'\]", official["llada"], decoding_method="llada")
    tied = changed(
        official["llada"], tmp_path / "tied", lambda name: None if name.endswith("transformer.ff_out.weight") else name
    )
    refused(r"a head of its own \(model\.transformer\.ff_out\.weight\)", tied)
    other = changed(official["Dream"], tmp_path / "other", lambda name: name.replace("model.layers", "layers"))
    refused(r"the official tensor names for SGLang.*layers\.0", other)
