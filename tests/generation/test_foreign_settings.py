"""A `generation_config.json` of another project means here what it means there, or is called the file's."""

import json
import shutil

import pytest
import torch
from families import DREAM, LLADA, SDAR
from transformers import AutoModel, GenerationConfig

from d3llm_hf import D3LLMGenerationConfig, export_checkpoint
from d3llm_hf.models.foreign_settings import RENAMED, translated


TOKENS = {"bos_token_id": 510, "eos_token_id": 510, "pad_token_id": 510}
DREAMS = {"alg": "maskgit_plus", "alg_temp": 0.0, "eps": 0.001, "output_history": False, "steps": 8}

IN_BLOCKS = ("sdar", "llada2", "fast_dllm_v2")  # methods of models whose blocks see earlier ones only

# What a file holds -> what it says here.
FILES = [
    (DREAMS, {"decoding_method": "dream", "remasking": "maskgit_plus", "steps": 8}),
    (
        {"alg": "entropy", "alg_temp": 0.5, "temperature": 0.2, "top_p": 0.95},
        {"decoding_method": "dream", "remasking": "entropy", "alg_temp": 0.5, "temperature": 0.2, "do_sample": True},
    ),
    ({"alg": "origin", "alg_temp": 0.5}, {"decoding_method": "dream", "remasking": "origin", "alg_temp": None}),
    ({"alg": "entropy", "temperature": 0.0}, {"decoding_method": "dream", "do_sample": False, "temperature": None}),
    ({"alg": None, "eps": 1e-3}, {"decoding_method": "dream", "remasking": "origin"}),
    (
        {"alg": "confidence_threshold", "threshold": 0.8, "steps": 8},
        {"decoding_method": "dream", "confidence_threshold": 0.8, "steps": 8},
    ),
    (
        {"alg": "confidence_threshold", "block_length": 4, "dual_cache": True, "use_cache": True, "steps": 8},
        {"decoding_method": "fast_dllm", "confidence_threshold": 0.9, "kv_cache": "dual", "steps": None},
    ),
    (
        {"gen_length": 8, "mask_id": 511, "steps": 4, "block_length": 4, "remasking": "random", "cfg_scale": 0.5},
        {"decoding_method": "llada", "max_new_tokens": 8, "mask_token_id": 511, "steps": 4, "remasking": "random"},
    ),
    (
        {"gen_length": 8, "logits_eos_inf": True, "confidence_eos_eot_inf": False},
        {"decoding_method": "llada", "suppress_tokens": [510]},
    ),
    (
        {"threshold": 0.9, "block_length": 4, "steps": 8, "remasking": "low_confidence", "dual_cache": False},
        {"decoding_method": "fast_dllm", "confidence_threshold": 0.9, "steps": None, "remasking": None},
    ),
    (
        {"block_size": 4, "threshold": 0.4, "decoded_token_threshold": 0.5, "cache_delay_iter": 1, "steps": 8},
        {"decoding_method": "d3llm", "block_length": 4, "entropy_threshold": 0.4, "kv_cache": "delayed"},
    ),
    (
        {"cache_delay_iter": 10000, "refresh_interval": 10000, "lazy_cache_refresh_num": None},
        {"decoding_method": "d3llm", "kv_cache": None, "cache_delay": None, "cache_refresh_interval": None},
    ),
    ({"steps": 4, "decoding_method": "llada"}, {"decoding_method": "llada", "steps": 4}),
    (
        {"denoising_steps": 2, "remasking_strategy": "low_confidence_dynamic", "confidence_threshold": 0.8},
        {"decoding_method": "sdar", "steps": 2, "remasking": "low_confidence", "confidence_threshold": 0.8},
    ),
    (
        {"denoising_steps": 2, "remasking_strategy": "low_confidence_static", "confidence_threshold": 0.8},
        {"decoding_method": "sdar", "steps": 2, "remasking": "low_confidence", "confidence_threshold": None},
    ),
    (
        {"denoising_steps": 2, "remasking_strategy": "sequential", "eb_threshold": 0.6, "temperature": 0.0},
        {"decoding_method": "sdar", "steps": 2, "remasking": "sequential", "entropy_bound": None, "do_sample": False},
    ),
    (
        {"denoising_steps": 2, "remasking_strategy": "entropy_bounded", "eb_threshold": 0.6},
        {"decoding_method": "sdar", "steps": None, "remasking": None, "entropy_bound": 0.6},
    ),
    (
        {"gen_length": 8, "mask_id": 511, "steps": 2, "threshold": 0.7, "eos_early_stop": True},
        {"decoding_method": "llada2", "steps": 2, "confidence_threshold": 0.7, "early_stop": True},
    ),
    (
        {"steps": 2, "threshold": 0.7, "editing_threshold": 0.5, "max_post_steps": 4, "num_to_transfer": 2},
        {"decoding_method": "llada2", "steps": None, "edit_threshold": 0.5, "max_post_steps": 4, "min_commits": 2},
    ),
    (
        {"block_size": 4, "small_block_size": 2, "threshold": 0.7, "use_block_cache": True},
        {"decoding_method": "fast_dllm_v2", "block_length": 4, "sub_block_length": 2, "kv_cache": "exact_dual"},
    ),
    (
        {"block_size": 4, "small_block_size": 4, "use_block_cache": False},
        {"decoding_method": "fast_dllm_v2", "block_length": 4, "sub_block_length": 4, "kv_cache": None},
    ),
    (
        {"block_size": 4, "skip_threshold": 0.8, "decoded_token_threshold": 0.9, "sampling_strategy": "neg_entropy"},
        {
            "decoding_method": "d2f",
            "confidence_threshold": 0.8,
            "block_activation_threshold": 0.9,
            "remasking": "entropy",
        },
    ),
    (
        {"block_size": 4, "skip_threshold": 0.8, "sampling_strategy": "default"},
        {"decoding_method": "d2f", "block_length": 4, "remasking": None},
    ),
]


def folder_with(family, folder, settings):
    shutil.copytree(family.checkpoint, folder)
    (folder / "generation_config.json").write_text(json.dumps(TOKENS | settings))
    return folder


@pytest.mark.every(6)
@pytest.mark.parametrize("settings, meant", FILES, ids=lambda value: " ".join(value))
def test_a_file_of_another_project_is_read_as_it_is_meant(settings, meant, tmp_path):
    family = DREAM if "alg" in settings else SDAR if meant["decoding_method"] in IN_BLOCKS else LLADA
    folder = folder_with(family, tmp_path / "source", settings)
    model, ids = AutoModel.from_pretrained(folder), torch.tensor([[1, 2, 3]])
    assert {name: getattr(model.generation_config, name) for name in meant} == meant
    assert model.generate(ids, max_new_tokens=8, seed=0).shape == (1, 11)
    assert model.generate(ids, max_new_tokens=8, decoding_method="entropy_bound", seed=0).shape == (1, 11)
    read = D3LLMGenerationConfig.from_pretrained(folder)
    assert {name: getattr(read, name) for name in meant} == meant
    exported = export_checkpoint(folder, tmp_path / "exported")
    written = json.loads((exported / "generation_config.json").read_text())
    assert {name: written.get(name) for name in meant} == meant
    assert not set(written) & (set(RENAMED) | {"eps", "output_history", "threshold", "use_block_cache"})


def test_a_config_of_another_project_is_understood_as_an_argument():
    config = GenerationConfig(max_new_tokens=8, **TOKENS)
    config.alg, config.steps = "entropy", 4
    model = AutoModel.from_pretrained(DREAM.checkpoint)
    chosen = {"return_dict_in_generate": True, "early_stop": False}
    output = model.generate(torch.tensor([[1, 2, 3]]), generation_config=config, **chosen)
    assert int(output.num_forwards) == 4


@pytest.mark.parametrize("name", ["alg", "remasking_strategy", "sampling_strategy"])
def test_an_algorithm_that_nobody_knows_is_called_the_files(name):
    with pytest.raises(ValueError, match=rf"`{name}` of the model's generation config must be one of .*got 'best'"):
        translated({name: "best"})


def test_what_has_no_counterpart_is_left_to_be_reported():
    found = translated({"alg": "entropy", "eps": 0.5, "output_history": True})
    assert found == {"decoding_method": "dream", "remasking": "entropy", "eps": 0.5, "output_history": True}


@pytest.mark.parametrize(
    "settings, pattern",
    [
        ({"steps": 8}, r"`steps` of the model's generation config is not used by decoding_method=\"d3llm\" \(got 8\)"),
        ({"cache_delay": 2}, r"`cache_delay` of the model's generation config is not used by kv_cache=\"none\""),
        ({"remasking": "topk_margin"}, r"`remasking` of the model's generation config must be one of"),
        ({"repetition_penalty": 1e-40}, r"`repetition_penalty` of the model's generation config must be"),
        ({"guidance_scale": 2.0}, r"`guidance_scale` of the model's generation config does not apply"),
        ({"num_beams": 4}, r"`num_beams` of the model's generation config does not apply .*there are no beams"),
    ],
    ids=str,
)
def test_what_a_file_says_is_called_the_files_by_generate_and_export(settings, pattern, tmp_path):
    folder = folder_with(LLADA, tmp_path / "source", settings)
    model = AutoModel.from_pretrained(folder)
    with pytest.raises(ValueError, match=pattern):
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=8)
    with pytest.raises(ValueError, match=pattern):
        model.check_settings(max_new_tokens=8)
    with pytest.raises(ValueError, match=pattern):
        export_checkpoint(folder, tmp_path / "out")


def test_an_argument_by_another_projects_name_is_answered_with_ours():
    model = AutoModel.from_pretrained(DREAM.checkpoint)
    for theirs, ours in (("alg", "remasking"), ("gen_length", "max_new_tokens"), ("mask_id", "mask_token_id")):
        with pytest.raises(ValueError, match=f"`{theirs}` is not a generation setting. Did you mean `{ours}`"):
            model.generate(torch.tensor([[1, 2, 3]]), **{theirs: 1})
