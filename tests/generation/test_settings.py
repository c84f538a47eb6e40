"""Settings: what is refused and how, what a checkpoint carries, what overrides what."""

import json
import math

import pytest
import torch
from tiny import ScriptedModel, answer, constant_script, tiny_model, trained_like
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from d3llm_hf import D3LLMGenerationConfig, LLaDAModelLM
from d3llm_hf.models.cache_name import CACHE, CACHE_NAMES
from d3llm_hf.models.generation_config_d3llm import FIELDS
from d3llm_hf.models.methods import methods_of


# Each alone is refused by the config and by `generate`.
INVALID = [
    ({"decoding_method": "d3lm"}, ValueError, "decoding_method"),
    ({"decoding_method": 3}, TypeError, "decoding_method"),
    ({"block_length": 0}, ValueError, "block_length"),
    ({"block_length": -3}, ValueError, "block_length"),
    ({"block_length": 2.5}, TypeError, "block_length"),
    ({"block_length": "32"}, TypeError, "block_length"),
    ({"block_length": True}, ValueError, "block_length"),
    ({"steps": 0}, ValueError, "steps"),
    ({"steps": 1.0}, TypeError, "steps"),
    ({"remasking": "lowest"}, ValueError, "remasking"),
    ({"remasking": 1}, TypeError, "remasking"),
    ({"entropy_threshold": math.nan}, ValueError, "entropy_threshold"),
    ({"entropy_threshold": "0.5"}, TypeError, "entropy_threshold"),
    ({"confidence_threshold": 0}, ValueError, "confidence_threshold"),
    ({"confidence_threshold": 1.1}, ValueError, "confidence_threshold"),
    ({"confidence_threshold": [0.9]}, TypeError, "confidence_threshold"),
    ({"block_add_threshold": -0.1}, ValueError, "block_add_threshold"),
    ({"block_add_threshold": 1.5}, ValueError, "block_add_threshold"),
    ({"block_add_threshold": math.nan}, ValueError, "block_add_threshold"),
    ({"block_activation_threshold": -1}, ValueError, "block_activation_threshold"),
    ({"block_activation_threshold": math.nan}, ValueError, "block_activation_threshold"),
    ({"early_stop": 1}, TypeError, "early_stop"),
    ({"early_stop": "yes"}, TypeError, "early_stop"),
    ({"kv_cache": "paged"}, ValueError, "kv_cache"),
    ({"kv_cache": True}, TypeError, "kv_cache"),
    ({"cache_delay": -1}, ValueError, "cache_delay"),
    ({"cache_delay": 1.5}, TypeError, "cache_delay"),
    ({"cache_refresh_interval": 0}, ValueError, "cache_refresh_interval"),
    ({"cache_refresh_interval": math.inf}, TypeError, "cache_refresh_interval"),
    ({"suffix_length": -1}, ValueError, "suffix_length"),
    ({"suffix_length": 1.5}, TypeError, "suffix_length"),
    ({"cfg_scale": -0.5}, ValueError, "cfg_scale"),
    ({"cfg_scale": math.inf}, ValueError, "cfg_scale"),
    ({"alg_temp": -0.1}, ValueError, "alg_temp"),
    ({"alg_temp": math.nan}, ValueError, "alg_temp"),
    ({"seed": -1}, ValueError, "seed"),
    ({"seed": 0.5}, TypeError, "seed"),
    ({"seed": []}, ValueError, "seed"),
    ({"seed": [1, -1]}, ValueError, "seed"),
    ({"seed": [1, 0.5]}, ValueError, "seed"),
    ({"mask_token_id": -1}, ValueError, "mask_token_id"),
    ({"mask_token_id": "[MASK]"}, TypeError, "mask_token_id"),
    ({"max_new_tokens": 0}, ValueError, "max_new_tokens"),
    ({"max_new_tokens": -5}, ValueError, "max_new_tokens"),
]

# Refused by `generate`, which knows the method and the model.
UNFITTING = [
    ({"decoding_method": "llada", "entropy_threshold": 0.5}, "entropy_threshold"),
    ({"decoding_method": "llada", "kv_cache": "dual", "cache_delay": 1}, "cache_delay"),
    ({"decoding_method": "llada", "kv_cache": "dkv_greedy"}, "kv_cache"),
    ({"decoding_method": "d3llm", "remasking": "random", "kv_cache": "dkv_greedy"}, "kv_cache"),
    ({"decoding_method": "llada", "lossless": True, "kv_cache": "prefix"}, "lossless"),
    ({"decoding_method": "d3llm", "lossless": True}, "lossless"),
    ({"decoding_method": "fast_dllm", "factor": 1.0, "confidence_threshold": 0.9}, "factor"),
    ({"decoding_method": "fast_dllm", "remasking": "random"}, "remasking"),
    ({"decoding_method": "dparallel", "steps": 4}, "steps"),
    ({"decoding_method": "dparallel", "block_add_threshold": 0.5}, "block_add_threshold"),
    ({"decoding_method": "d3llm", "steps": 4}, "steps"),
    ({"decoding_method": "d3llm", "alg_temp": 0.5}, "alg_temp"),
    ({"decoding_method": "d3llm", "confidence_threshold": 0.9}, "confidence_threshold"),
    ({"decoding_method": "dream", "cache_delay": 2}, "cache_delay"),
    ({"decoding_method": "llada", "remasking": "origin"}, "remasking"),
    ({"decoding_method": "d3llm", "remasking": "origin"}, "remasking"),
    ({"decoding_method": "d3llm", "kv_cache": "delayed", "cfg_scale": 1.0}, "cfg_scale"),
    ({"num_beams": 3}, "(?i)beam"),
    ({"num_return_sequences": 2}, "num_return_sequences"),
    ({"guidance_scale": 2.0}, "guidance_scale"),
    ({"cache_implementation": "static"}, "cache_implementation"),
    ({"output_scores": True}, "output_scores"),
    ({"output_attentions": True}, "output_attentions"),
    ({"penalty_alpha": 0.6, "top_k": 4}, "penalty_alpha"),
    ({"dola_layers": "low"}, "dola_layers"),
    ({"force_words_ids": [[3]]}, "force_words_ids"),
    ({"constraints": [3]}, "constraints"),
    ({"num_beam_groups": 2}, "num_beam_groups"),
    ({"diversity_penalty": 0.5}, "diversity_penalty"),
    ({"token_healing": True}, "token_healing"),
    ({"is_assistant": True}, "is_assistant"),
    ({"use_mtp": True}, "(?i)assisted"),
    ({"prompt_lookup_num_tokens": 3}, "(?i)assisted"),
]

# A misspelt name, and the one that is meant.
MISSPELT = [
    ({"temprature": 0.5}, "temperature"),
    ({"entropy_treshold": 0.5}, "entropy_threshold"),
    ({"block_size": 16}, "block_length"),
    ({"max_new_token": 4}, "max_new_tokens"),
    ({"blocklength": 4}, "block_length"),
    ({"cache_delay_iter": 2}, "cache_delay"),
    ({"refresh_interval": 2}, "cache_refresh_interval"),
]


def name(value) -> str:
    return " ".join(f"{key}={value[key]}" for key in value) if isinstance(value, dict) else ""


@pytest.fixture
def scripted():
    """A model that must not be called."""
    return ScriptedModel(constant_script([1] * 16, 2))


@pytest.mark.parametrize("fields, kind, named", INVALID, ids=name)
def test_an_invalid_value_is_refused_by_config_and_generate_before_any_forward(fields, kind, named, scripted):
    with pytest.raises(kind, match=named) as refused:
        D3LLMGenerationConfig(**fields)
    assert repr(next(iter(fields.values()))) in str(refused.value)
    with pytest.raises(kind, match=named):
        answer(scripted, [1, 2], **fields)
    assert scripted.calls == 0


@pytest.mark.parametrize("fields, named", UNFITTING, ids=name)
def test_what_the_method_or_diffusion_does_not_know_is_refused_not_ignored(fields, named, scripted):
    with pytest.raises(ValueError, match=named):
        answer(scripted, [1, 2], **fields)
    assert scripted.calls == 0


@pytest.mark.parametrize("fields, meant", MISSPELT, ids=name)
def test_a_misspelt_setting_is_refused_with_the_nearest_known_name(fields, meant, scripted):
    for refuse in (lambda: D3LLMGenerationConfig(**fields), lambda: answer(scripted, [1, 2], **fields)):
        with pytest.raises(ValueError, match=f"`{next(iter(fields))}` is not .*`{meant}`"):
            refuse()
    assert scripted.calls == 0


EVERYTHING = {
    "decoding_method": "d3llm",
    "block_length": 16,
    "entropy_threshold": math.inf,
    "block_add_threshold": 0.25,
    "block_activation_threshold": 0.5,
    "early_stop": False,
    "kv_cache": "delayed",
    "cache_delay": 3,
    "cache_refresh_interval": 7,
    "seed": 2**70,
    "mask_token_id": 31,
    "max_new_tokens": 12,
    "do_sample": True,
    "temperature": 0.7,
}


def test_a_config_survives_json(tmp_path):
    config = D3LLMGenerationConfig(**EVERYTHING)
    config.save_pretrained(tmp_path)
    json.loads((tmp_path / "generation_config.json").read_text())
    loaded = D3LLMGenerationConfig.from_pretrained(tmp_path)
    assert {field: getattr(loaded, field) for field in EVERYTHING} == EVERYTHING
    assert loaded == config


def test_fields_that_are_unset_are_not_written(tmp_path):
    D3LLMGenerationConfig(block_length=8).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert set(written) & set(FIELDS) == {"block_length"}


def test_a_saved_model_decodes_by_the_settings_it_was_saved_with(tmp_path):
    model = trained_like("llada")
    saved = LLaDAModelLM.from_pretrained(_saved(model, tmp_path, block_length=4, entropy_threshold=1.5))
    settings = {"block_length": 4, "entropy_threshold": 1.5}
    assert torch.equal(answer(saved, [1, 2]).step_map, answer(model, [1, 2], **settings).step_map)
    assert not torch.equal(answer(saved, [1, 2]).step_map, answer(model, [1, 2]).step_map)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_settings_that_a_model_built_from_its_config_was_given_are_saved_with_it(family, tmp_path):
    model = tiny_model(family)
    model.generation_config.decoding_method = "dparallel"
    model.generation_config.update(entropy_threshold=0.25)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).generation_config
    assert (loaded.decoding_method, loaded.entropy_threshold) == ("dparallel", 0.25)


def test_arguments_override_the_config_which_overrides_the_checkpoint(tmp_path):
    model = trained_like("llada")
    saved = LLaDAModelLM.from_pretrained(_saved(model, tmp_path, entropy_threshold=math.inf, block_length=16))
    plain = {"block_length": 16, "early_stop": False}

    def forwards(chosen_model, **chosen) -> int:
        return int(answer(chosen_model, [1, 2], early_stop=False, **chosen).num_forwards)

    config = D3LLMGenerationConfig(entropy_threshold=0.0)
    assert forwards(saved) == 1
    assert forwards(saved, generation_config=config) == int(
        answer(model, [1, 2], entropy_threshold=0.0, **plain).num_forwards
    )
    assert forwards(saved, generation_config=config, entropy_threshold=math.inf) == 1


@pytest.mark.full
def test_settings_of_a_checkpoints_method_do_not_reach_another_method(tmp_path):
    saved = LLaDAModelLM.from_pretrained(
        _saved(
            trained_like("llada"), tmp_path, decoding_method="d3llm", entropy_threshold=math.inf, kv_cache="delayed"
        )
    )
    for method in methods_of(saved.traits):
        assert answer(saved, [1, 2], decoding_method=method).sequences.shape == (1, 18)
    assert int(answer(saved, [1, 2], decoding_method="dparallel", early_stop=False).num_forwards) > 1


def _saved(model, folder, **settings):
    config = model.generation_config
    model.generation_config = D3LLMGenerationConfig(eos_token_id=30, pad_token_id=29, **settings)
    try:
        model.save_pretrained(folder)
    finally:
        model.generation_config = config
    return folder


def test_calling_generate_changes_no_config_that_it_was_given():
    model, config = trained_like("llada"), D3LLMGenerationConfig(block_length=4)
    before = config.to_dict()
    answer(model, [1, 2], generation_config=config, entropy_threshold=1.0)
    assert config.to_dict() == before


def test_a_plain_generation_config_is_understood():
    model = trained_like("llada")
    config = GenerationConfig(max_new_tokens=5, eos_token_id=30, pad_token_id=29)
    assert model.generate(torch.tensor([[1, 2]]), generation_config=config).shape == (1, 7)


def test_the_cache_works_on_a_model_built_from_its_config():
    # Official configs say `use_cache: false`, of a cache that is not this one.
    for family in ("llada", "dream"):
        output = answer(trained_like(family), [1, 2, 3], kv_cache="delayed", cache_delay=0, block_length=4)
        assert int(output.positions_computed) < 19 * int(output.num_forwards)


def test_use_cache_false_turns_the_delayed_cache_off():
    chosen = {"kv_cache": "delayed", "cache_delay": 0, "block_length": 4}
    output = answer(trained_like("llada"), [1, 2, 3], use_cache=False, **chosen)
    assert int(output.positions_computed) == 19 * int(output.num_forwards)


def test_a_right_padded_prompt_is_refused():
    with pytest.raises(ValueError, match="left-padded"):
        trained_like("llada").generate(
            torch.tensor([[1, 2], [3, 29]]), attention_mask=torch.tensor([[1, 1], [1, 0]]), max_new_tokens=4
        )


def test_a_cache_of_another_call_is_refused():
    model = trained_like("llada")
    cache = model(torch.tensor([[1, 2]]), use_cache=True)[CACHE]
    for name in CACHE_NAMES:
        with pytest.raises(ValueError, match=f"`{name}` cannot be continued"):
            answer(model, [1, 2], **{name: cache})


def test_a_model_without_a_mask_token_is_refused():
    model = trained_like("llada")
    mask, model.config.mask_token_id = model.config.mask_token_id, None
    try:
        with pytest.raises(ValueError, match="mask_token_id"):
            answer(model, [1, 2])
        assert answer(model, [1, 2], mask_token_id=mask).sequences.shape == (1, 18)
    finally:
        model.config.mask_token_id = mask


def test_every_setting_is_declared_for_type_checkers():
    assert set(D3LLMGenerationConfig.__annotations__) == set(FIELDS)


def test_other_models_of_transformers_are_untouched():
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    assert type(model.generation_config) is GenerationConfig
    assert model.generate(torch.tensor([[1, 2]]), max_new_tokens=3).shape == (1, 5)


@pytest.mark.parametrize(
    "chosen, pattern",
    [
        ({"decoding_metod": "llada"}, "`decoding_metod`.*decoding_method"),
        ({"block_length": 0}, "`block_length`"),
        ({"decoding_method": "llada", "steps": 2, "entropy_threshold": 0.1}, "`entropy_threshold`"),
        ({"do_sample": True, "temperature": 1e-40}, "`temperature`.*between 1e-30 and 1e.30.*got 1e-40"),
        ({"repetition_penalty": 1e-40}, "`repetition_penalty`.*1e.30 *.*got"),
        ({"repetition_penalty": 1e38}, "`repetition_penalty`.*1e.30 *.*got"),
        ({"cfg_scale": 1e40}, "`cfg_scale`.*1e.30 *.*got"),
        ({"decoding_method": "dinfer", "credit_weight": 1e39}, "`credit_weight`.*1e.30 *.*got"),
    ],
)
def test_settings_are_checked_without_a_prompt_as_generate_checks_them(chosen, pattern):
    model = trained_like("llada")
    with pytest.raises((ValueError, TypeError), match=pattern):
        model.check_settings(max_new_tokens=8, **chosen)
    with pytest.raises((ValueError, TypeError), match=pattern):
        answer(model, [1, 2], max_new_tokens=8, **chosen)


def test_checked_settings_are_those_that_generate_would_use():
    config = trained_like("llada").check_settings(max_new_tokens=8, decoding_method="dparallel", block_length=4)
    assert (config.decoding_method, config.block_length, config.max_new_tokens) == ("dparallel", 4, 8)


@pytest.mark.parametrize(
    ("name", "value", "error"), [("block_length", "32", TypeError), ("kv_cache", "fast", ValueError)]
)
def test_a_wrong_setting_of_a_file_is_called_the_files(tmp_path, name, value, error):
    trained_like("llada").save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    message = rf"`{name}` must be .* .got {value!r}.* It stands in the checkpoint's generation_config.json"
    with pytest.raises(error, match=message):
        LLaDAModelLM.from_pretrained(tmp_path)
