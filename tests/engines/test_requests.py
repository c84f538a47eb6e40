"""Settings of a request: over those of the checkpoint, as `generate` reads them, or refused with the reason."""

import pytest
from tiny import EOS, PAD, tiny_model

from d3llm_hf import D3LLMGenerationConfig, LLaDAConfig
from d3llm_hf.engines.requests import Served, decoding_of, draws, generation_config_of, overridden, stops_of
from d3llm_hf.models.topology import Traits


def served(**own) -> Served:
    return Served(
        D3LLMGenerationConfig(**{"eos_token_id": [EOS, 7], "pad_token_id": PAD} | own), Traits(0), 31, 32, 64
    )


def test_settings_count_over_those_of_the_checkpoint_and_then_of_the_method():
    own = served(decoding_method="d3llm", entropy_threshold=0.3, block_length=16)
    found = decoding_of(own, {"block_length": 8, "early_stop": 0, "block_add_threshold": None}, 24)
    assert (found.rules.threshold, found.rules.block_length, found.rules.early_stop) == (0.3, 8, False)
    assert decoding_of(own, {}, 24).rules == own.own.rules(24)
    assert decoding_of(own, {"decoding_method": "llada"}, 24).rules.block_length == 24


def test_stop_tokens_are_those_of_checkpoint_and_request():
    found = decoding_of(served(), {}, 8, stop_ids=(3, 7))
    assert (found.stop_ids, found.fill_token_id) == ((EOS, 7, 3), PAD)
    assert decoding_of(served(), {}, 8, stop_ids=(3,), ignore_eos=True).stop_ids == (3,)
    assert decoding_of(served(pad_token_id=None), {}, 8).fill_token_id == EOS
    assert decoding_of(served(pad_token_id=None, eos_token_id=None), {}, 8).fill_token_id is None
    assert stops_of(served(eos_token_id=EOS)) == (EOS,) and stops_of(served(eos_token_id=None)) == ()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"blocklength": 4}, r"`blocklength` is not a generation setting. Did you mean `block_length`\?"),
        ({"seed": [1, 2]}, r"`seed` must be one integer for a request \(got \[1, 2\]\)"),
        ({"infill": True}, "`infill` does not apply to requests of an engine"),
        ({"mask_token_id": 3}, "`mask_token_id` does not apply"),
        ({"kv_cache": "delayed"}, r"`kv_cache` cannot be carried out in a serving engine: .*\(got 'delayed'\)"),
        ({"decoding_method": "dkv"}, r"`kv_cache` cannot be carried out"),
        ({"decoding_method": "llada", "lossless": 1}, r"`lossless` cannot be .* one canvas in a forward \(got True\)"),
        ({"lookahead": 2}, "`lookahead` cannot be"),
        ({"cfg_scale": 1.5}, "`cfg_scale` cannot be"),
        ({"suffix_length": 8}, "`suffix_length` cannot be .* sees the whole canvas"),
        ({"decoding_method": "wino"}, r"`decoding_method` cannot be .* no shadow block .*\(got 'wino'\)"),
        ({"decoding_method": "klass"}, "`decoding_method` cannot be .* no distributions"),
        ({"decoding_method": "llada2", "edit_threshold": 0.9}, "`edit_threshold` cannot be .* stays"),
        ({"decoding_method": "d2f"}, "`decoding_method` must be one for canvases"),
        ({"decoding_method": "refusion"}, "`decoding_method` must be one of"),
        ({"entropy_threshold": "low"}, "`entropy_threshold` must be a number"),
        ({"decoding_method": "llada", "entropy_threshold": 1.0}, "`entropy_threshold` is not used by"),
    ],
)
def test_what_an_engine_cannot_carry_out_is_refused(asked, message):
    with pytest.raises((TypeError, ValueError), match=message):
        decoding_of(served(), asked, 16)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"do_sample": True}, "`do_sample` of the model's generation config cannot be carried out"),
        ({"repetition_penalty": 1.2}, r"`repetition_penalty` of the model's .*\(got 1.2\)"),
        ({"kv_cache": "delayed"}, "`kv_cache` of the model's generation config cannot be"),
        ({"num_beams": 2}, "`num_beams` of the model's generation config does not apply"),
    ],
)
def test_a_checkpoint_that_asks_for_it_is_named(own, message):
    with pytest.raises(ValueError, match=message):
        decoding_of(served(**own), {}, 16)


def test_random_numbers_are_needed_for_random_positions_alone():
    rules = decoding_of(served(decoding_method="llada"), {"remasking": "random"}, 8).rules
    assert draws(rules) and draws(decoding_of(served(decoding_method="dream"), {"alg_temp": 0.1}, 8).rules)
    assert not draws(decoding_of(served(), {}, 8).rules)


def test_a_server_takes_models_in_which_everything_sees_everything():
    config = tiny_model("llada").config
    own = D3LLMGenerationConfig()
    assert Served.of(config, own, 0, 128).mask_token_id == 31
    assert Served.of(config, D3LLMGenerationConfig(mask_token_id=4), 0, 128).mask_token_id == 4
    for length in (1, 4096):
        with pytest.raises(
            ValueError, match=rf"`canvas_length` must be from 2 to the model's 2048 .*\(got {length}\)"
        ):
            Served.of(config, own, 0, length)
    with pytest.raises(ValueError, match="block_alignment='text'"):
        Served.of(LLaDAConfig(block_length=4, block_alignment="text"), own, 0, 128)
    config = LLaDAConfig()
    config.mask_token_id = None
    with pytest.raises(ValueError, match="`mask_token_id` must name the token"):
        Served.of(config, own, 0, 128)


def test_the_generation_config_is_that_of_the_folder_or_else_of_the_config(tmp_path):
    config = LLaDAConfig(eos_token_id=5)
    assert generation_config_of(str(tmp_path), None, config).eos_token_id == 5
    D3LLMGenerationConfig(decoding_method="llada", steps=4).save_pretrained(tmp_path)
    own = generation_config_of(str(tmp_path), None, config)
    assert (own.decoding_method, own.steps) == ("llada", 4)
    assert overridden(own, {"steps": 8, "top_k": 3}, 0).steps == 8
    changed = overridden(own, {"decoding_method": "d3llm"}, 0)
    assert (changed.decoding_method, changed.steps) == ("d3llm", None)
