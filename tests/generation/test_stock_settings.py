"""Every setting and argument of transformers' `generate` is honoured, refused, or refused where a call sets it."""

import inspect
import itertools
import math

import numpy as np
import pytest
import torch
from thin import covering, some_of
from tiny import EOS, MASK, PAD, ScriptedModel, answer, constant_script, left_padded, tables, trained_like
from transformers import GenerationConfig, XLNetConfig, XLNetLMHeadModel
from transformers.generation import GenerationMixin

from d3llm_hf import D3LLMGenerationConfig, as_diffusion_lm
from d3llm_hf.models.decoding import Rules, State
from d3llm_hf.models.generation_config_d3llm import FIELDS
from d3llm_hf.models.methods import methods_of
from d3llm_hf.models.selection import SELECTORS, choose
from d3llm_hf.models.stock_settings import HONOURED, IDLE, NO_INPUTS, NUMBERS, REFUSED, SAMPLING


@pytest.fixture
def scripted():
    """A model that must not be called."""
    return ScriptedModel(constant_script([1] * 16, 2))


# ---- The tables ---------------------------------------------------------------------------------------------------


def test_every_setting_of_transformers_is_in_one_table():
    known = {name for name in GenerationConfig().to_dict() if not name.startswith("_")}
    assert known <= {*HONOURED, *REFUSED, *IDLE}
    assert not [pair for pair in itertools.combinations((HONOURED, REFUSED, IDLE), 2) if set(pair[0]) & set(pair[1])]
    assert not {*HONOURED, *REFUSED, *IDLE} & set(FIELDS)


def test_every_argument_of_generate_is_known():
    taken = {
        "self", "inputs", "generation_config", "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn",
        "synced_gpus", "streamer", "custom_generate", "kwargs",
    }  # fmt: skip
    refused = {"assistant_model", "negative_prompt_ids", "negative_prompt_attention_mask"}
    assert set(inspect.signature(GenerationMixin.generate).parameters) <= taken | refused


VALUES = {
    "early_stopping": True,
    "length_penalty": 2.0,
    "low_memory": True,
    "cache_config": {"a": 1},
    "max_cache_len": 64,
    "decoder_start_token_id": 3,
    "num_assistant_tokens": 5,
    "num_assistant_tokens_schedule": "heuristic",
    "assistant_confidence_threshold": 0.7,
    "assistant_early_exit": 2,
    "assistant_lookbehind": 3,
    "assistant_ensemble_weight": 0.5,
    "target_lookbehind": 3,
    "max_matching_ngram_size": 2,
    "prompt_lookup_num_tokens": 3,
    "speculation_type": "mtp",
    "use_mtp": True,
    "continuous_batching_config": {"a": 1},
}


@pytest.mark.every(3)
@pytest.mark.parametrize("name", IDLE)
def test_a_setting_that_would_have_no_effect_is_refused_from_a_call_and_left_alone_in_a_checkpoint(name, scripted):
    if not hasattr(GenerationConfig(), name):
        pytest.skip(f"this version of transformers has no {name}")
    config = D3LLMGenerationConfig()
    setattr(config, name, VALUES[name])
    for chosen in ({name: VALUES[name]}, {"generation_config": config}):
        with pytest.raises(ValueError, match=f"`{name}` does not apply to diffusion decoding"):
            answer(scripted, [1, 2], **chosen)
    with pytest.raises(ValueError, match=f"`{name}` does not apply"):
        scripted.check_settings(max_new_tokens=4, **{name: VALUES[name]})
    assert scripted.calls == 0
    neutral = GenerationConfig._get_default_generation_params().get(name)
    assert answer(scripted, [1, 2], **{name: neutral}).sequences.shape == (1, 18)
    if name not in (
        "use_mtp",
        "prompt_lookup_num_tokens",
        "assistant_early_exit",
    ):  # another way of decoding, whoever asks for it
        setattr(scripted.generation_config, name, VALUES[name])
        assert answer(scripted, [1, 2]).sequences.shape == (1, 18)


# ---- Arguments that reach nothing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NO_INPUTS)
def test_an_argument_that_reaches_nothing_is_refused(name, scripted):
    value = torch.tensor([[1, 2]]) if name != "return_dict" else False
    with pytest.raises(ValueError, match=f"`{name}`"):
        answer(scripted, [1, 2], **{name: value})
    assert scripted.calls == 0


def test_another_model_that_drafts_is_refused(scripted):
    with pytest.raises(ValueError, match=r"(?i)assist"):
        answer(scripted, [1, 2], assistant_model=trained_like("llada"))
    assert scripted.calls == 0


def test_positions_may_say_what_decoding_counts_and_nothing_else():
    for family in ("llada", "dream"):
        model, inputs = trained_like(family), left_padded([[1, 2], [1, 2, 3, 4]])
        chosen = {"max_new_tokens": 6, "eos_token_id": EOS, "pad_token_id": PAD}
        expected = model.generate(**inputs, **chosen)
        for padding in (0, 1):  # whatever padding is counted as
            positions = (inputs["attention_mask"].cumsum(1) - 1).masked_fill(inputs["attention_mask"] == 0, padding)
            assert torch.equal(model.generate(**inputs, position_ids=positions, **chosen), expected)
        for wrong in (positions * 5, positions + 1, torch.arange(4)[None]):
            with pytest.raises(ValueError, match="`position_ids` must count each text from its first token"):
                model.generate(**inputs, position_ids=wrong, **chosen)
        alone = torch.tensor([[1, 2]])
        model.generate(alone, position_ids=torch.arange(2)[None], **chosen)
        with pytest.raises(ValueError, match="`position_ids`"):
            model.generate(alone, position_ids=torch.arange(2)[None] * 5, **chosen)


def test_what_a_tokenizer_returns_beyond_the_models_inputs_is_called_an_input(scripted):
    ids = torch.tensor([[1, 2]])
    with pytest.raises(
        ValueError, match=r"`token_type_ids` is no input of ScriptedModel.*return_token_type_ids=False"
    ):
        ScriptedLike = trained_like("llada")
        ScriptedLike.__class__ = type("ScriptedModel", (type(ScriptedLike),), {})
        ScriptedLike.generate(ids, token_type_ids=torch.zeros_like(ids))
    with pytest.raises(ValueError, match=r"`special_tokens_mask` is no input"):
        trained_like("dream").generate(ids, special_tokens_mask=torch.zeros_like(ids))


def test_a_name_of_a_method_of_the_config_is_no_setting(scripted):
    with pytest.raises(ValueError, match="`rules` is not a generation setting"):
        answer(scripted, [1, 2], rules=3)


# ---- Numbers of any kind ------------------------------------------------------------------------------------------

NUMERIC = {
    "block_length": 4,
    "entropy_threshold": 0.5,
    "block_add_threshold": 0.5,
    "block_activation_threshold": 0.5,
    "cache_delay": 1,
    "suffix_length": 3,
    "seed": 7,
    "mask_token_id": MASK,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "max_new_tokens": 8,
    "min_new_tokens": 2,
    "temperature": 0.5,
    "top_k": 5,
    "top_p": 0.9,
    "min_p": 0.1,
    "typical_p": 0.9,
    "epsilon_cutoff": 0.01,
    "eta_cutoff": 0.01,
    "repetition_penalty": 1.5,
    "no_repeat_ngram_size": 3,
    "max_time": 100.0,
}
WITH = {"cache_delay": {"kv_cache": "delayed"}}


def kinds_of(value):
    yield torch.tensor(value)
    yield torch.tensor([value])
    if isinstance(value, int):
        yield from (np.int64(value), np.int32(value), np.uint8(value), np.array(value), np.arange(value, value + 1))
    else:
        yield from (np.float64(value), np.float32(value), np.array([value]))


@pytest.mark.full
@pytest.mark.every(6)
@pytest.mark.parametrize("name", some_of(NUMERIC, every=4))
def test_numbers_of_numpy_and_torch_are_numbers(name):
    model, value = trained_like("llada"), NUMERIC[name]
    chosen = {"max_new_tokens": 8, "do_sample": True, "seed": 1} | WITH.get(name, {})
    expected = answer(model, [1, 2], **(chosen | {name: value})).sequences
    for other in kinds_of(value):
        assert torch.equal(answer(model, [1, 2], **(chosen | {name: other})).sequences, expected)
        config = D3LLMGenerationConfig(**{name: other})
        assert type(getattr(config, name)) is type(value) and getattr(config, name) == pytest.approx(value)
        config.to_json_string()
        setattr(config, name, other)
        assert type(getattr(config, name)) is type(value)
        model.check_settings(**(chosen | {name: other}))


def test_truths_and_lists_of_numpy_are_those_of_python():
    config = D3LLMGenerationConfig(
        early_stop=np.True_, infill=np.bool_(False), lossless=torch.tensor(False), seed=np.arange(3)
    )
    assert (config.early_stop, config.infill, config.lossless, config.seed) == (True, False, False, [0, 1, 2])
    model, ids = trained_like("llada"), np.array([3, 4])
    expected = answer(model, [1, 2], suppress_tokens=[3, 4], bad_words_ids=[[5], [6, 7]], eos_token_id=[EOS, 9])
    found = answer(
        model,
        [1, 2],
        suppress_tokens=ids,
        bad_words_ids=[[np.int64(5)], [np.int64(6), np.int64(7)]],
        eos_token_id=torch.tensor([EOS, 9]),
        do_sample=np.False_,
    )
    assert torch.equal(found.sequences, expected.sequences)
    for wrong in (np.float64(2.5), np.True_, np.array([4, 5])):
        with pytest.raises((TypeError, ValueError), match="`block_length` must be a positive integer"):
            answer(model, [1, 2], block_length=wrong)


# ---- Numbers that decoding could not follow -----------------------------------------------------------------------

UNDEFINED = [
    ({"temperature": 1e-40}, "temperature"),
    ({"temperature": 0.0}, "temperature"),
    ({"temperature": math.inf}, "temperature"),
    ({"temperature": math.nan}, "temperature"),
    ({"temperature": 10**400}, "temperature"),
    ({"temperature": "0.5"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"top_p": math.nan}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_p": -0.1}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"top_k": 5.0}, "top_k"),
    ({"min_p": 2.0}, "min_p"),
    ({"typical_p": 0.0}, "typical_p"),
    ({"typical_p": 1.5}, "typical_p"),
    ({"epsilon_cutoff": 1.5}, "epsilon_cutoff"),
    ({"eta_cutoff": -1.0}, "eta_cutoff"),
    ({"repetition_penalty": 1e38}, "repetition_penalty"),
    ({"repetition_penalty": 1e-40}, "repetition_penalty"),
    ({"repetition_penalty": math.nan}, "repetition_penalty"),
    ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ({"encoder_repetition_penalty": math.inf}, "encoder_repetition_penalty"),
    ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size"),
    ({"no_repeat_ngram_size": 2.5}, "no_repeat_ngram_size"),
    ({"cfg_scale": 1e38, "decoding_method": "llada"}, "cfg_scale"),
    ({"alg_temp": math.inf, "decoding_method": "dream"}, "alg_temp"),
    ({"alg_temp": 0.5, "decoding_method": "dream", "remasking": "origin"}, "alg_temp"),
    ({"max_time": math.nan}, "max_time"),
    ({"max_time": -1}, "max_time"),
    ({"min_new_tokens": -1}, "min_new_tokens"),
    ({"max_new_tokens": 2.5}, "max_new_tokens"),
    ({"num_return_sequences": 0}, "num_return_sequences"),
    ({"exponential_decay_length_penalty": (3, -1.0)}, "exponential_decay_length_penalty"),
    ({"exponential_decay_length_penalty": (3, math.inf)}, "exponential_decay_length_penalty"),
    ({"exponential_decay_length_penalty": 3}, "exponential_decay_length_penalty"),
    ({"exponential_decay_length_penalty": (3, 1.1), "eos_token_id": []}, "exponential_decay_length_penalty"),
    ({"sequence_bias": [[[3], math.nan]]}, "sequence_bias"),
    ({"sequence_bias": [[[3], math.inf]]}, "sequence_bias"),
    ({"sequence_bias": [[[40], 1.0]]}, "sequence_bias"),
    ({"bad_words_ids": [[40]]}, "bad_words_ids"),
    ({"num_beams": 3}, "(?i)beam"),
]


@pytest.mark.parametrize("fields, named", UNDEFINED, ids=str)
def test_a_number_that_decoding_could_not_follow_is_refused_by_generate_and_beforehand(fields, named, scripted):
    chosen = {"do_sample": True} | fields
    with pytest.raises((ValueError, TypeError), match=named):
        answer(scripted, [1, 2], **chosen)
    with pytest.raises((ValueError, TypeError), match=named):
        scripted.check_settings(**({"max_new_tokens": 4, "eos_token_id": EOS} | chosen))
    assert scripted.calls == 0


def test_a_temperature_that_nobody_reads_is_not_looked_at():
    model = trained_like("llada")
    expected = answer(model, [1, 2]).sequences
    model.generation_config.temperature = 0.0
    try:
        assert torch.equal(answer(model, [1, 2], do_sample=False).sequences, expected)
    finally:
        model.generation_config.temperature = None


EXTREME = [
    {"do_sample": True, "temperature": 1e-30},
    {"do_sample": True, "temperature": 1e30},
    {"do_sample": True, "temperature": 2},
    {"do_sample": True, "top_p": 0.0},
    {"do_sample": True, "top_p": 1e-40},
    {"do_sample": True, "min_p": 1.0},
    {"do_sample": True, "typical_p": 1e-40},
    {"repetition_penalty": 1e30},
    {"repetition_penalty": 1e-30},
    {"repetition_penalty": 2},
    {"exponential_decay_length_penalty": (0, 1e20)},
    {"sequence_bias": [[[3], 1e30]]},
    {"decoding_method": "d3llm", "entropy_threshold": -math.inf},
    {"decoding_method": "d3llm", "entropy_threshold": math.inf},
    {"decoding_method": "fast_dllm", "factor": 5e-324},
    {"decoding_method": "fast_dllm", "confidence_threshold": 5e-324},
    {"decoding_method": "entropy_bound", "entropy_bound": math.inf},
    {"decoding_method": "dinfer", "decoder": "credit", "credit_weight": 1e30},
    {"decoding_method": "dinfer", "decoder": "credit", "credit_exponent": 1e30},
]


@pytest.mark.every(3)
@pytest.mark.parametrize("fields", EXTREME, ids=str)
def test_an_extreme_number_that_is_taken_decodes_to_the_end(fields):
    model = ScriptedModel(lambda ids: tables(1, ids.shape[1]).expand(len(ids), -1, -1).clone())
    output = answer(model, [1, 2], max_new_tokens=8, **fields)
    assert output.sequences.shape == (1, 10) and MASK not in output.sequences
    assert model.calls <= 16


@pytest.mark.every(9)
@pytest.mark.parametrize(
    "alg_temp, remasking",
    covering([1e-3, 1e-19, 1e-37, 1e-40, 5e-324, 1e300], ["entropy", "maskgit_plus", "random"], strength=1),
)
def test_any_temperature_of_positions_decodes_as_fast_as_none_and_a_low_one_to_the_same(alg_temp, remasking):
    plain = {"decoding_method": "dream", "remasking": remasking, "max_new_tokens": 12, "early_stop": False, "seed": 2}
    for family in ("llada", "dream"):
        model = trained_like(family)
        expected = answer(model, [1, 2], **plain)
        found = answer(model, [1, 2], alg_temp=alg_temp, **plain)
        assert int(found.num_forwards) == int(expected.num_forwards)
        assert MASK not in found.sequences
        if alg_temp <= 1e-20 and remasking != "random":
            assert torch.equal(found.sequences, expected.sequences)


def test_guidance_that_leaves_float32_is_named():
    def script(ids):
        logits = tables(1, ids.shape[1]).expand(len(ids), -1, -1).clone()
        return torch.where((ids == MASK).all(1)[:, None, None], -logits, logits) * 1e10

    with pytest.raises(ValueError, match=r"logits must be finite .*Lower cfg_scale=1e\+30"):
        answer(ScriptedModel(script), [1, 2], decoding_method="llada", cfg_scale=1e30)


@pytest.mark.parametrize("select", SELECTORS)
@pytest.mark.parametrize("cost", [math.inf, -math.inf, math.nan, 1e38])
def test_every_rule_advances_whatever_positions_cost(select, cost):
    rules = Rules(4, "confidence", select, threshold=-1.0, relaxed_threshold=-1.0, factor=1.0, radius=1, steps=2)
    undecided = torch.tensor([[False, True, True, False, False, True]])
    state = State.start(torch.full((1, 6), 7), undecided, rules)
    state.opened_size[:, 0] = 2
    state.step += 1  # the last of the two steps, in which a schedule decides all
    among = undecided & (torch.arange(6) < 4)
    commits, _ = choose(torch.full((1, 6), cost), torch.full((1, 6), cost), among, state, rules)
    assert commits.any() and not (commits & ~among).any()


# ---- Constraints that transformers filters ------------------------------------------------------------------------


def test_a_stop_token_alone_is_no_bad_word():
    model = ScriptedModel(constant_script([5, EOS, 6, 7], 2))
    expected = answer(model, [1, 2], max_new_tokens=4).sequences
    for words in ([[EOS]], [[EOS], [9]], [[9], [EOS], [8, 8]]):
        assert torch.equal(answer(model, [1, 2], max_new_tokens=4, bad_words_ids=words).sequences, expected)
    chosen = {"max_new_tokens": 4, "bad_words_ids": [[EOS], [9]], "eos_token_id": [9, EOS]}
    assert torch.equal(answer(model, [1, 2], **chosen).sequences, expected)
    banned = answer(model, [1, 2], max_new_tokens=4, bad_words_ids=[[EOS]], eos_token_id=[]).sequences
    assert EOS not in banned


@pytest.mark.full
def test_suppressed_tokens_that_do_not_exist_and_none_at_all_change_nothing():
    model = trained_like("llada")
    expected = answer(model, [1, 2]).sequences
    for name in ("suppress_tokens", "begin_suppress_tokens"):
        for tokens in ([], [-1], [99, 1000], (-100, 32)):
            assert torch.equal(answer(model, [1, 2], **{name: tokens}).sequences, expected)


def test_a_word_of_no_tokens_is_none():
    model = trained_like("llada")
    for words, same in (([[]], None), ([[], [3]], [[3]])):
        expected = answer(model, [1, 2], **({} if same is None else {"bad_words_ids": same})).sequences
        assert torch.equal(answer(model, [1, 2], bad_words_ids=words).sequences, expected)
        model.check_settings(max_new_tokens=4, bad_words_ids=words)


@pytest.mark.parametrize("words", [[], [3], "no", [[-1]]], ids=str)
def test_bad_words_that_are_none_are_refused(words, scripted):
    with pytest.raises((ValueError, TypeError), match="bad_words_ids"):
        answer(scripted, [1, 2], bad_words_ids=words)
    with pytest.raises((ValueError, TypeError), match="bad_words_ids"):
        scripted.check_settings(max_new_tokens=4, bad_words_ids=words)
    assert scripted.calls == 0


# ---- Lengths ------------------------------------------------------------------------------------------------------


def test_no_new_tokens_and_infilling_fill_the_holes_alone():
    model, ids = trained_like("llada"), torch.tensor([[1, MASK, 3, MASK]])
    expected = model.generate(ids, infill=True)
    for chosen in ({"infill": True}, {"infill_mask": ids == MASK}):
        for none in (0, np.int64(0)):
            assert torch.equal(model.generate(ids, max_new_tokens=none, **chosen), expected)
    assert model.check_settings(max_new_tokens=0, infill=True).max_new_tokens is None
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.generate(ids, max_new_tokens=0)


def test_a_config_that_says_minus_one_sets_no_limit():
    config = XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=64)
    assert config.max_position_embeddings == -1
    model = as_diffusion_lm(XLNetLMHeadModel(config).eval(), mask_token_id=63)
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=4).shape == (1, 6)


def test_every_method_is_checked_as_generate_checks_it():
    model = trained_like("llada")
    for method in methods_of(model.traits):
        assert model.check_settings(max_new_tokens=8, decoding_method=method).decoding_method == method
    assert {*NUMBERS, *SAMPLING} <= HONOURED
