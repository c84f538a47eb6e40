"""Checkpoints of another architecture, and those that lack weights, are refused by name."""

import json
import shutil

import pytest
import torch
from families import DREAM, LLADA
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from d3llm_hf import export_checkpoint
from d3llm_hf.hub.push import checked_files
from d3llm_hf.models.architecture import ArchitectureError


FOREIGN = {
    "experts": {"num_experts": 4},
    "experts of a layer": {"n_routed_experts": 8},
    "layers of experts": {"moe_layer_freq": [0, 1]},
    "a router": {"router_aux_loss_coef": 0.01},
    "an MLP beside experts": {"dense_intermediate_size": 64},
    "norms of queries": {"qk_layernorm": True},
    "norms of queries, spelt otherwise": {"use_qk_norm": True},
    "norms behind": {"use_post_norm": True},
    "parallel blocks": {"parallel_residual": True},
    "a window": {"sliding_window": 4},
    "windows": {"attention_window": [4, 4]},
    "a window of GPT-Neo": {"window_size": 4},
    "chunks": {"attention_chunk_size": 8},
    "local layers": {"local_attention": 8},
    "kinds of layers": {"layer_types": ["full_attention", "sliding_attention"]},
    "state spaces": {"mamba_d_state": 16},
    "linear attention": {"linear_num_key_heads": 2},
    "latent attention": {"kv_lora_rank": 8},
    "soft caps": {"final_logit_softcapping": 30.0},
    "clipping": {"clip_qkv": 8.0},
    "multipliers": {"residual_multiplier": 0.22},
    "distances": {"use_alibi": True},
    "turned in part": {"partial_rotary_factor": 0.5},
    "turned in part, spelt otherwise": {"rotary_pct": 0.25},
    "layers without positions": {"no_rope_layers": [1, 0]},
    "a vision tower": {"mm_vision_tower": "clip"},
    "a vision config": {"vision_config": {"hidden_size": 8}},
    "images": {"image_token_index": 5},
    "time steps": {"timestep_embed_dim": 8},
    "biases of the MLP": {"mlp_bias": True},
    "scaled embeddings": {"scale_embeddings": True},
    "scaled embeddings, spelt otherwise": {"embedding_scale": 12.0},
    "embeddings of length one": {"normalize_embeddings": True},
    "scaled residuals": {"residual_scale": 0.5},
    "scaled attention": {"attn_scale": 0.1},
    "attention scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
    "caps, spelt otherwise": {"attn_logit_cap": 30.0},
    "caps in two words": {"logits_soft_cap": 30.0},
    "clipped MLPs": {"swiglu_limit": 7.0},
    "another norm": {"norm_type": "layernorm"},
    "another norm, switched": {"use_rmsnorm": False},
    "norms around one": {"rms_norm_add_unit_offset": True},
    "learnt positions": {"position_embedding_type": "absolute"},
    "no positions": {"use_rope": False},
    "turned in part, a third spelling": {"rotary_emb_fraction": 0.5},
    "another base": {"rotary_emb_base": 12345},
    "stretched positions": {"rope_ratio": 4},
    "repeated layers": {"num_loops": 3},
    "hyper-connections": {"hc_mult": 4},
    "gates of attention": {"attn_output_gate": True},
    "sinks": {"use_sinks": True},
    "causality": {"is_decoder": True},
    "causality, spelt otherwise": {"use_causal_mask": True},
    "causality, switched": {"bidirectional": False},
    "causality in a word": {"attention_type": "causal"},
    "an encoder and a decoder": {"is_encoder_decoder": True},
    "experts in a config of their own": {"ffn_config": {"moe_num_experts": 4}},
    "a text part": {"text_config": {"hidden_size": 4}},
    "noise that conditions": {"time_conditioning": True},
}
NEUTRAL = {
    "no experts": {"num_experts": 0, "moe_layer_freq": [0, 0], "output_router_logits": False},
    "no norms": {"qk_layernorm": False, "use_qk_norm": None},
    "a window that is switched off": {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 2},
    "no scaling": {"logit_scale": 1.0, "residual_multiplier": 1, "clip_qkv": None},
    "whole turns": {"partial_rotary_factor": 1.0},
    "plain layers": {"layer_types": ["full_attention", "full_attention"]},
    "the activation": {"hidden_act": "silu"},
    "the norm": {"norm_type": "RMSNorm", "use_rmsnorm": True, "norm_eps": 1e-5},
    "the positions": {
        "position_embedding_type": "rope",
        "use_rope": True,
        "rotary_emb_fraction": 1.0,
    },
    "attention to all": {"attention_type": "non-causal", "attn_type": "bidirectional", "bidirectional": True},
    "no causality": {"is_decoder": False, "causal": False, "is_encoder_decoder": False, "time_conditioning": False},
    "what trains": {
        "label_smoothing": 0.1,
        "initializer_scale": 1.0,
        "scale_attn_weights": True,
        "flash_attention": True,
    },
    "what quantises": {"quantization_config": {"quant_method": "fp8"}, "text_config": {}, "pretraining_tp": 1},
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_key_that_describes_another_architecture_is_refused_by_name(case, family):
    keys = FOREIGN[case]
    with pytest.raises(ValueError, match=rf"`{next(iter(keys))}` .*\(got "):
        family.config(**keys)


@pytest.mark.parametrize("case", NEUTRAL)
def test_a_key_whose_value_asks_for_nothing_is_kept(case, family):
    family.config(**NEUTRAL[case])


def test_activations_beside_the_implemented_one_are_refused():
    for keys in ({"hidden_act": "gelu"}, {"hidden_activation": "relu"}):
        with pytest.raises(ValueError, match=f"`{next(iter(keys))}` describes another activation than 'silu'"):
            LLADA.config(**keys)
    with pytest.raises(ValueError, match="`hidden_activation` describes another activation than 'gelu'"):
        DREAM.config(hidden_act="gelu", hidden_activation="relu")


@pytest.mark.parametrize("key", ["attention_bias", "bias_for_layer_norm"])
def test_biases_that_llada_lacks_are_refused(key):
    with pytest.raises(ValueError, match=f"`{key}` must be False"):
        LLADA.config(**{key: True})


def test_a_width_of_heads_that_does_not_follow_from_the_others_is_refused():
    assert LLADA.config(head_dim=8).head_dim == 8
    with pytest.raises(ValueError, match=r"`head_dim` must be `d_model` / `n_heads`, 8 .got 16"):
        LLADA.config(head_dim=16)


ORIGINAL = {"original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, **ORIGINAL},
        {"type": "ntk", "factor": 2.0},
        {"type": "mrope", "mrope_section": [1, 1, 2]},
        {"rope_type": "default", "mrope_section": [1, 1, 2]},
        {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    ],
    ids=["longrope", "ntk", "mrope", "sections", "by layer"],
)
def test_rotary_positions_that_are_not_implemented_are_refused(scaling, family):
    with pytest.raises(
        ValueError, match=r"`rope_scaling` .or `rope_parameters`. must have one `rope_type`|`mrope_sect"
    ):
        family.config(rope_scaling=scaling)


def test_rotary_positions_that_are_implemented_are_computed(family):
    for scaling in ({"type": "linear", "factor": 2.0}, {"rope_type": "yarn", "factor": 2.0, **ORIGINAL}):
        scaled, plain = family.tiny(rope_scaling=scaling), family.tiny()
        ids = torch.arange(8)[None]
        assert not torch.equal(scaled(ids).logits, plain(ids).logits)


def test_a_foreign_key_that_was_set_later_is_not_saved(tiny, tmp_path):
    tiny.config.num_experts = 4
    with pytest.raises(Exception, match="`num_experts` describes a mixture of experts"):
        tiny.save_pretrained(tmp_path)


# ---- a checkpoint that calls itself LLaDA and is a mixture of experts ----------------------------------------------

CONFIGURATION = """from transformers import PretrainedConfig


class LLaDAConfig(PretrainedConfig):
    model_type = "llada"
"""
MODELING = """import torch
from transformers import PreTrainedModel

from .configuration_moe import LLaDAConfig


class Inner(PreTrainedModel):
    config_class = LLaDAConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = torch.nn.Embedding(8, 4)
        self.post_init()


class MoE(PreTrainedModel):
    config_class = LLaDAConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.model = Inner(config)
        self.lm_head = torch.nn.Linear(4, 8, bias=False)
        self.post_init()
"""
AUTO_MAP = {"AutoConfig": "configuration_moe.LLaDAConfig", "AutoModel": "modeling_moe.MoE"}


@pytest.fixture
def mixture(tmp_path):
    folder = tmp_path / "mixture"
    folder.mkdir()
    config = {"model_type": "llada", "num_experts": 4, "d_model": 4, "vocab_size": 8, "auto_map": AUTO_MAP}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_moe.py").write_text(CONFIGURATION)
    (folder / "modeling_moe.py").write_text(MODELING)
    tensors = {"model.embed_tokens.weight": torch.randn(8, 4), "lm_head.weight": torch.randn(8, 4)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("auto", [AutoConfig, AutoModel, AutoModelForCausalLM])
def test_a_mixture_that_calls_itself_llada_is_refused_without_the_flag(auto, mixture):
    with pytest.raises(
        ArchitectureError, match=r"`num_experts` describes a mixture .*`trust_remote_code=True`, which runs"
    ):
        auto.from_pretrained(mixture)


def test_a_mixture_that_calls_itself_llada_runs_its_own_code_with_the_flag(mixture, tmp_path):
    assert type(AutoConfig.from_pretrained(mixture, trust_remote_code=True)).__module__.startswith(
        "transformers_modules"
    )
    model = AutoModel.from_pretrained(mixture, trust_remote_code=True)
    assert type(model).__name__ == "MoE" and type(model).__module__.startswith("transformers_modules")
    model.save_pretrained(tmp_path / "saved")
    before, after = (load_file(folder / "model.safetensors") for folder in (mixture, tmp_path / "saved"))
    assert before.keys() == after.keys() and all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_ours_still_loads_after_a_foreign_one_has_run(mixture, family):
    AutoModel.from_pretrained(mixture, trust_remote_code=True)
    assert type(AutoModel.from_pretrained(family.checkpoint, trust_remote_code=True)) is family.model_class


@pytest.mark.parametrize(
    "auto_map", [None, {"AutoConfig": "a.LLaDAConfig"}, {**AUTO_MAP, "AutoModel": "b.LLaDAModelLM"}]
)
def test_what_brings_no_code_of_its_own_is_refused_with_the_flag_too(auto_map, mixture):
    config = json.loads((mixture / "config.json").read_text()) | {"auto_map": auto_map}
    (mixture / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value}))
    with pytest.raises(ArchitectureError, match="`num_experts` describes a mixture") as caught:
        AutoModel.from_pretrained(mixture, trust_remote_code=True)
    assert "trust_remote_code" not in str(caught.value)


def test_a_mixture_is_neither_exported_nor_pushed(mixture, tmp_path):
    with pytest.raises(ValueError, match="`num_experts` describes a mixture of experts"):
        export_checkpoint(mixture, tmp_path / "out")
    ours = {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"}
    config = json.loads((mixture / "config.json").read_text()) | {"auto_map": ours}
    (mixture / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"of what its code implements .`num_experts` describes a mixture of experts"):
        checked_files(mixture)


# ---- tensors that are missing, or have no place --------------------------------------------------------------------


def changed(folder, source, change):
    """A copy of a checkpoint whose tensors went through `change`."""
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def without(part):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


WRONG = {
    "no MLP": (without("up_proj"), "without model.layers.0.mlp.up_proj.weight, .* and 1 more"),
    "no last layer": (without("s.2."), "without model.layers.2.* and .* more"),
    "no head": (without("a name that follows"), "without lm_head.weight"),
    "a norm of queries": (
        lambda tensors: tensors | {"model.layers.0.self_attn.q_norm.weight": torch.ones(16)},
        "with model.layers.0.self_attn.q_norm.weight, which has no place",
    ),
    "experts for an MLP": (
        lambda tensors: (
            without("up_proj")(tensors) | {"model.layers.0.mlp.experts.0.up_proj.weight": torch.ones(2, 2)}
        ),
        "without model.layers.0.mlp.up_proj.weight.* and with model.layers.0.mlp.experts.0.up_proj.weight, which has",
    ),
}


@pytest.mark.every(3)
@pytest.mark.parametrize("case", WRONG)
def test_tensors_that_are_missing_or_have_no_place_are_named_when_loaded_exported_or_pushed(case, family, tmp_path):
    change, message = WRONG[case]
    if case == "no head":
        change = without(family.head)
    folder = changed(tmp_path / "wrong", family.checkpoint, change)
    with pytest.raises(ValueError, match=f"must hold the tensors of {family.model_class.__name__} and no .*{message}"):
        AutoModel.from_pretrained(folder)
    with pytest.raises(ValueError, match=f"`source` must hold the tensors of its model and no others .*{message}"):
        export_checkpoint(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=f"the tensors of its model and no others, not weights {message}"):
        checked_files(folder)


def test_tensors_of_another_shape_are_not_exported(family, tmp_path):
    folder = changed(
        tmp_path / "wrong",
        family.checkpoint,
        lambda tensors: tensors | {family.head: tensors[family.head][:-1].contiguous()},
    )
    with pytest.raises(ValueError, match=r"with lm_head.weight of shape .511, 64., not .512, 64."):
        export_checkpoint(folder, tmp_path / "out")


def test_a_backbone_takes_no_checkpoint_that_lacks_its_tensors(family, tmp_path):
    folder = changed(tmp_path / "wrong", family.checkpoint, without("up_proj"))
    with pytest.raises(ValueError, match=f"must hold the tensors of {family.backbone_class.__name__}"):
        family.backbone_class.from_pretrained(folder)


@pytest.mark.every(2)
def test_whole_checkpoints_under_every_name_are_exported(family, tmp_path):
    for name, overrides in (("untied", {}), ("tied", {family.tied: True})):
        model = family.tiny(**overrides)
        model.save_pretrained(tmp_path / name)
        model.save_pretrained(tmp_path / f"own {name}", save_original_format=False)
    family.tiny(**{family.tied: True}).model.save_pretrained(tmp_path / "backbone")
    for source in list(tmp_path.iterdir()):
        export_checkpoint(source, tmp_path / f"{source.name} exported")


def test_weights_that_a_quantiser_has_packed_are_exported_as_they_are(family, tmp_path):
    folder = changed(tmp_path / "packed", family.checkpoint, without("up_proj"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    export_checkpoint(folder, tmp_path / "out")


def test_tensors_that_the_caller_passes_are_the_callers_choice(family):
    model = family.model_class.from_pretrained(None, config=family.config(), state_dict={})
    assert isinstance(model, family.model_class)
