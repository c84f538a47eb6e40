"""The decoder against the slow oracle: tokens, the forward of each token, counts of forwards and positions."""

import pytest
import torch
from drawn import examples
from hypothesis import given
from hypothesis import strategies as st
from oracle import decode_with_model
from problems import assert_equal, in_oracle_terms, problems
from recorded import checkpoint, corrected_cases, recorded_cases
from thin import some_of


FRACTIONS = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.8, 0.95, 1.0])
CORRECTED = [case for case in recorded_cases() if case.id in corrected_cases()]


@examples(80)
@given(
    problem=problems(),
    block_length=st.integers(1, 12),
    entropy_threshold=st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.3, 1.8, 2.5, float("inf")]),
    block_add_threshold=FRACTIONS,
    block_activation_threshold=FRACTIONS | st.just(1.5),
)
def test_d3llm_without_a_cache_decodes_as_the_oracle(problem, **chosen):
    problem.compare(decoding_method="d3llm", **chosen)


@pytest.mark.full
@examples(150)
@given(
    problem=problems(),
    block_length=st.integers(1, 9),
    entropy_threshold=st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.3, 1.8, 2.5, float("inf")]),
    block_add_threshold=FRACTIONS,
    block_activation_threshold=FRACTIONS,
    cache_delay=st.integers(0, 5),
    cache_refresh_interval=st.sampled_from([1, 2, 3, 5, 10_000]),
)
def test_d3llm_with_the_delayed_cache_decodes_as_the_oracle(problem, **chosen):
    problem.compare(decoding_method="d3llm", kv_cache="delayed", **chosen)


@examples(50)
@given(
    problem=problems(),
    block_length=st.integers(1, 12),
    entropy_threshold=st.sampled_from([0.0, 0.3, 0.6, 0.9, 1.3, 1.8, 2.5, float("inf")]),
    cfg_scale=st.sampled_from([0.0, 0.0, 0.5, 1.5]),
)
def test_dparallel_decodes_as_the_oracle(problem, **chosen):
    problem.compare(decoding_method="dparallel", **chosen)


@examples(50)
@given(
    problem=problems(),
    block_length=st.integers(1, 12),
    steps=st.integers(1, 40),
    cfg_scale=st.sampled_from([0.0, 0.0, 0.5, 1.5]),
)
def test_llada_with_its_quota_decodes_as_the_oracle(problem, **chosen):
    problem.compare(decoding_method="llada", **chosen)


@pytest.mark.full
@examples(50)
@given(
    problem=problems(),
    steps=st.integers(1, 40),
    remasking=st.sampled_from(["entropy", "maskgit_plus", "topk_margin"]),
)
def test_dream_with_its_schedule_decodes_as_the_oracle(problem, **chosen):
    problem.compare(decoding_method="dream", **chosen)


@pytest.mark.full
@examples(40)
@given(problem=problems(), steps=st.integers(1, 40), confidence_threshold=st.sampled_from([0.05, 0.3, 0.6, 0.9, 1.0]))
def test_dream_with_a_confidence_threshold_decodes_as_the_oracle(problem, **chosen):
    problem.compare(decoding_method="dream", **chosen)


@pytest.mark.full
@examples(40)
@given(problem=problems(), block_length=st.integers(1, 12), steps=st.integers(1, 40), seed=st.integers(0, 2**70))
def test_random_remasking_decodes_as_the_oracle_given_the_same_noise(problem, seed, **chosen):
    chosen |= {"decoding_method": "llada", "remasking": "random"}
    noise = in_oracle_terms(seed, len(problem.prompt))
    assert_equal(problem.generate(seed=seed, **chosen), problem.oracle(noise, **chosen))


@pytest.mark.full
@examples(40)
@given(problem=problems(), steps=st.integers(1, 40), seed=st.integers(0, 2**70))
def test_origin_decodes_as_the_oracle_given_the_same_coins(problem, seed, steps):
    chosen = {"decoding_method": "dream", "remasking": "origin", "steps": steps}
    noise = in_oracle_terms(seed, len(problem.prompt))
    assert_equal(problem.generate(seed=seed, **chosen), problem.oracle(noise, **chosen))


@pytest.mark.every(9)
@pytest.mark.parametrize("case", some_of(CORRECTED, every=6), ids=lambda case: case.id)
def test_where_the_reference_has_a_defect_the_corrected_rule_is_followed(case):
    model = checkpoint(case.model)
    output = model.generate(
        torch.tensor([case.prompt]), pad_token_id=case.eos_token_id, return_dict_in_generate=True, **case.settings
    )
    assert_equal(output, decode_with_model(model, list(case.prompt), case.rules()))
