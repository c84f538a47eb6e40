"""What decoding promises whatever the model and the settings: it ends, keeps the prompt, and is right about caches."""

import math

import pytest
import torch
from drawn import examples
from families import equal_up_to_rounding
from hypothesis import given
from hypothesis import strategies as st
from oracle import Rules, Scripted, decode
from recorded import checkpoint, recorded_cases
from thin import covering
from tiny import (
    EOS,
    MASK,
    PAD,
    ScriptedModel,
    answer,
    changing_script,
    left_padded,
    tables,
    tiny_model,
    tiny_prompt,
    trained_like,
)

from d3llm_hf import SlotCache
from d3llm_hf.models import decoding


VOCABULARY = 32
WHOLE = {"early_stop": False}
NAN, INF = math.nan, math.inf


# ---- D-01: decoding ends --------------------------------------------------------------------------------------------


@pytest.mark.full
@examples(500)
@given(
    max_new_tokens=st.integers(1, 40) | st.integers(1, 257),
    block_length=st.integers(1, 64),
    entropy_threshold=st.sampled_from([0.0, 0.2, 0.5, 1.0, 1.5, 2.0, math.inf]),
    block_add_threshold=st.floats(0, 1),
    block_activation_threshold=st.floats(0, 1.2),
    shift=st.sampled_from([0, 1]),
    early_stop=st.booleans(),
)
def test_decoding_ends_within_one_forward_a_token_and_leaves_no_mask(max_new_tokens, shift, **chosen):
    model = ScriptedModel(changing_script(tables(3, 260, 8), 7), vocab_size=8, shift=shift)
    output = answer(model, [1, 2, 3], max_new_tokens=max_new_tokens, eos_token_id=6, pad_token_id=5, **chosen)
    assert 1 <= int(output.num_forwards) == model.calls <= max_new_tokens
    assert output.sequences.shape == (1, 3 + max_new_tokens)
    assert not (output.sequences == 7).any()


@pytest.mark.parametrize("shift", [0, 1])
def test_a_hundred_tokens_in_blocks_of_32_take_at_most_a_hundred_forwards(shift):
    model = ScriptedModel(changing_script(tables(3, 104), MASK), shift=shift)
    output = answer(model, [1, 2, 3], max_new_tokens=100, block_length=32, entropy_threshold=0.0, **WHOLE)
    assert int(output.num_forwards) <= 100
    assert output.sequences.shape == (1, 103) and not (output.sequences == MASK).any()


@pytest.mark.parametrize("kv_cache", ["none", "delayed"])
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_an_answer_shorter_than_a_block_is_decoded(family, kv_cache):
    output = answer(trained_like(family), [1, 2, 3], block_length=32, kv_cache=kv_cache, **WHOLE)
    assert output.sequences.shape == (1, 19) and not (output.sequences == MASK).any()
    assert (output.step_map > 0).all()


@pytest.mark.parametrize("shift", [0, 1])
def test_a_model_that_prefers_the_mask_token_never_commits_it(shift):
    def script(ids):
        logits = tables(1, ids.shape[1])[0].expand(len(ids), -1, -1).clone()
        logits[..., MASK] = 50.0
        return logits

    output = answer(ScriptedModel(script, shift=shift), [1, 2], max_new_tokens=20, **WHOLE)
    assert int(output.num_forwards) <= 20 and not (output.sequences == MASK).any()


@pytest.mark.parametrize("remasking, first", [("topk_margin", 1), ("maskgit_plus", 0), ("entropy", 0)])
def test_the_mask_tokens_probability_counts_though_it_is_never_chosen(remasking, first):
    # Of three positions the sure one, 0.6 against a mask token of 0.35, has the smaller margin than 0.5 against 0.2.
    probabilities = torch.full((3, VOCABULARY), 1e-9)
    probabilities[0, [4, MASK, 5]] = torch.tensor([0.6, 0.35, 0.05])
    probabilities[1, [6, 7, 8, 9]] = torch.tensor([0.5, 0.2, 0.2, 0.1])
    probabilities[2, :20] = 0.05
    script = torch.cat([torch.zeros(1, VOCABULARY), probabilities.log()])
    model = ScriptedModel(lambda ids: script.expand(len(ids), -1, -1))
    chosen = {"decoding_method": "dream", "remasking": remasking, "steps": 2, "max_new_tokens": 3}
    output = answer(model, [1], **chosen, **WHOLE)
    assert output.step_map[0].argmin() == first and output.sequences[0, 1:3].tolist() == [4, 6]


# ---- D-02: the state machine on written-down logits ---------------------------------------------------------------


@pytest.mark.every(2)
@pytest.mark.parametrize("add, activation", covering([0.0, 0.25, 0.5, 1.0], [0.0, 0.25, 0.5, 1.0], strength=1))
def test_a_thousand_logit_tables_are_decoded_as_the_oracle_does(add, activation):
    # 16 pairs of thresholds, 64 tables each; the first prompt token names the table, so that rows may leave the batch.
    count, length = 64, 21
    table = tables(count * 3, 2 + length, seed=int(100 * add + 10 * activation)).view(count, 3, 2 + length, VOCABULARY)

    def script(ids: torch.Tensor) -> torch.Tensor:
        return table[ids[:, 0] * 8 + ids[:, 1], (ids == MASK).sum(1) % 3, : ids.shape[1]]

    prompts = torch.tensor([[index // 8, index % 8] for index in range(count)])
    chosen = {"block_length": 6, "entropy_threshold": 0.8, "block_add_threshold": add, "early_stop": True}
    chosen |= {"block_activation_threshold": activation, "decoding_method": "d3llm", "max_new_tokens": length}
    output = ScriptedModel(script).generate(
        prompts, eos_token_id=[EOS, 3], pad_token_id=PAD, return_dict_in_generate=True, **chosen
    )
    for row, prompt in enumerate(prompts.tolist()):
        rules = Rules(**chosen, mask_token_id=MASK, eos_token_ids=(EOS, 3), pad_token_id=PAD)
        expected = decode(Scripted(lambda ids: script(ids[None])[0], MASK), prompt, rules)
        assert output.sequences[row].tolist() == expected.sequence
        assert output.step_map[row].tolist() == expected.step_map
        assert int(output.num_forwards[row]) == expected.forwards
        assert int(output.num_forwards_reference[row]) == expected.reference_forwards


@pytest.mark.full
def test_progress_is_compared_as_the_reference_does_for_every_block_length():
    for size in range(1, 65):
        for fraction in (0.0, 0.05, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95, 1.0, 1.1):
            left = torch.arange(size + 1)
            # `left` positions of the first block, all of the second
            undecided = (torch.arange(2 * size) < left[:, None]) | (torch.arange(2 * size) >= size)
            rules = decoding.Rules(size, "entropy", "threshold", block_add_threshold=fraction)
            state = decoding.State.start(torch.zeros_like(undecided, dtype=torch.long), undecided, rules)
            state.length = torch.full_like(state.length, 2 * size)
            decoding.open_blocks(state, rules, torch.full_like(left, 2 * size))
            reached = [1 - n / size >= fraction or n == 0 for n in range(size + 1)]
            assert (state.open_count == 2).tolist() == reached


@pytest.mark.parametrize("decoding_method", ["d3llm", "dparallel"])
@pytest.mark.parametrize("choices", [1, 2])
def test_an_entropy_equal_to_the_threshold_is_accepted_by_llada_and_not_by_dream(choices, decoding_method):
    def script(ids):
        logits = torch.full((*ids.shape, VOCABULARY), -INF)
        logits[..., :choices] = 0.0
        return logits

    chosen = {"decoding_method": decoding_method, "block_length": 8, "entropy_threshold": math.log(choices), **WHOLE}
    forwards = [
        int(answer(ScriptedModel(script, shift=shift), [1], max_new_tokens=8, **chosen).num_forwards)
        for shift in (0, 1)
    ]
    assert forwards == [1, 8]


def test_equal_entropies_are_decided_from_the_left():
    model = ScriptedModel(lambda ids: torch.zeros(*ids.shape, VOCABULARY))
    chosen = {"entropy_threshold": 0.0, "block_length": 4, "block_add_threshold": 1.0, **WHOLE}
    output = answer(model, [1], max_new_tokens=8, **chosen)
    assert output.step_map[0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


# ---- D-03: the prompt ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoding_method", ["d3llm", "dparallel", "llada", "dream"])
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_a_prompt_of_any_tokens_is_returned_unchanged(family, decoding_method):
    prompts = torch.randint(0, VOCABULARY, (22, 9), generator=torch.Generator().manual_seed(1))
    prompts = torch.cat([prompts, torch.tensor([[MASK] * 9, [MASK] + [5] * 8, [EOS] * 9, [PAD] * 9])])
    output = trained_like(family).generate(
        prompts, attention_mask=torch.ones_like(prompts), decoding_method=decoding_method, max_new_tokens=6
    )
    assert torch.equal(output[:, :9], prompts)
    assert not (output[:, 9:] == MASK).any()


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_stop_tokens_of_the_prompt_do_not_stop_the_answer(family):
    prompt = [EOS, 3, EOS]
    output = answer(trained_like(family), prompt, max_new_tokens=12, early_stop=True, eos_token_id=[EOS, 3])
    assert int(output.num_forwards) > 1
    assert output.step_map[0, 0] > 0


# ---- D-04: the thresholds at one -----------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_block_thresholds_of_one_decode_block_by_block(family):
    for seed in range(10):
        prompt = tiny_prompt(seed, 5)
        both = {"block_length": 6, "entropy_threshold": 1.0, "max_new_tokens": 20, **WHOLE}
        ones = {"block_add_threshold": 1.0, "block_activation_threshold": 1.0}
        several = answer(trained_like(family), prompt, decoding_method="d3llm", **both, **ones)
        single = answer(trained_like(family), prompt, decoding_method="dparallel", **both)
        assert torch.equal(several.sequences, single.sequences)
        assert torch.equal(several.step_map, single.step_map)


# ---- D-05: logits that are no numbers ------------------------------------------------------------------------------


@pytest.mark.every(3)
@pytest.mark.parametrize(
    "where, value",
    [
        ((1, 6, 4), NAN),
        ((1, 6), NAN),
        ((1,), NAN),
        ((1, 6, 4), INF),
        ((1, 6, MASK), INF),
        ((1, 6, MASK), NAN),
        ((1, 6), -INF),
        ((1,), INF),
    ],
    ids=str,
)
@pytest.mark.parametrize("decoding_method", ["d3llm", "llada", "dream"])
def test_logits_that_are_not_finite_stop_at_once_and_name_row_and_forward(where, value, decoding_method):
    def script(ids):
        logits = tables(3, 12)[: len(ids), : ids.shape[1]].clone()
        if len(ids) == 3 and model.calls == 2:
            logits[where] = value
        return logits

    model = ScriptedModel(script)
    prompts = torch.tensor([[1, 2], [3, 4], [5, 6]])
    chosen = {"decoding_method": decoding_method, "max_new_tokens": 8, **WHOLE}
    chosen |= {} if decoding_method == "d3llm" else {"steps": 8}
    chosen |= {"entropy_threshold": 0.0} if decoding_method == "d3llm" else {}
    with pytest.raises(ValueError, match=r"must be finite.* row 1 .*forward 2"):
        model.generate(prompts, **chosen)
    assert model.calls == 2
    model.calls = 10  # the other rows are decoded as ever
    assert model.generate(prompts[:1], **chosen).shape == (1, 10)


def test_single_tokens_of_probability_zero_are_allowed():
    def script(ids):
        logits = tables(1, 12)[:, : ids.shape[1]].clone()
        logits[..., ::2] = -INF
        return logits

    output = answer(ScriptedModel(script), [1, 2], max_new_tokens=8, **WHOLE)
    assert (output.sequences[0, 2:] % 2 == 1).all()


# ---- D-06: the cache -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_a_cache_that_is_refreshed_in_every_forward_changes_no_token(family):
    prompts = [tiny_prompt(seed, 1 + seed % 9) for seed in range(50)]
    chosen = {"block_length": 4, "entropy_threshold": 1.0, "max_new_tokens": 14, "return_dict_in_generate": True}
    model = trained_like(family)
    without = model.generate(**left_padded(prompts), **chosen)
    refreshed = {"kv_cache": "delayed", "cache_delay": 1, "cache_refresh_interval": 1}
    every_time = model.generate(**left_padded(prompts), **chosen, **refreshed)
    assert torch.equal(without.sequences, every_time.sequences)
    assert torch.equal(without.step_map, every_time.step_map)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_after_a_refresh_the_logits_are_those_without_a_cache(family):
    model = tiny_model(family)
    before, after = torch.tensor([tiny_prompt(0, 20)]), torch.tensor([tiny_prompt(1, 20)])
    cache = SlotCache(model.config.num_hidden_layers, 20)
    positions = torch.arange(20)[None]
    with torch.no_grad():
        model(before, position_ids=positions, past_key_values=cache.at(slice(0, 20)))
        window = model(after[:, 12:], position_ids=positions[:, 12:], past_key_values=cache.at(slice(12, 20))).logits
        refreshed = model(after, position_ids=positions, past_key_values=cache.at(slice(0, 20))).logits
        plain = model(after).logits
    assert equal_up_to_rounding(refreshed, plain)
    assert (window - plain[:, 12:]).abs().max() > 1e-2  # the stale keys had mattered


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_a_cached_window_attends_to_each_position_once(family):
    model = tiny_model(family)
    ids, positions = torch.tensor([tiny_prompt(0, 20)]), torch.arange(20)[None]
    cache = SlotCache(model.config.num_hidden_layers, 20)
    with torch.no_grad():
        plain = model(ids, position_ids=positions, past_key_values=cache.at(slice(0, 20))).logits
        for start in (12, 5, 5, 17):  # windows move right, left, and stay
            slots = slice(start, 20)
            again = model(ids[:, slots], position_ids=positions[:, slots], past_key_values=cache.at(slots)).logits
            assert equal_up_to_rounding(again, plain[:, slots])


@pytest.mark.full
@pytest.mark.parametrize("family, floor", covering([("llada", 0.9), ("dream", 0.9)], strength=1, every=2))
def test_the_delayed_cache_saves_positions_and_keeps_most_tokens(family, floor):
    # The floors lie under what was measured (see the assertion's message) and guard against a broken cache only.
    model = checkpoint(f"{family}-tiny-a")
    prompts = sorted({case.prompt for case in recorded_cases() if case.model == f"{family}-tiny-a"})[:10]
    same, computed = 0, [0, 0]
    for prompt in prompts:
        chosen = {"block_length": 8, "max_new_tokens": 48, "eos_token_id": 510, "pad_token_id": 510, **WHOLE}
        without = answer(model, list(prompt), **chosen)
        cached = answer(model, list(prompt), kv_cache="delayed", cache_delay=1, **chosen)
        same += int((without.sequences == cached.sequences)[:, len(prompt) :].sum())
        for index, output in enumerate((cached, without)):
            computed[index] += int(output.positions_computed) / int(output.num_forwards)
    assert computed[0] < computed[1]
    assert same / (48 * len(prompts)) >= floor, f"{same / (48 * len(prompts)):.3f} of the tokens are the same"
