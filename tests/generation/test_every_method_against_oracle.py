"""Every decoding method with every cache against the slow oracle, on models whose keys depend on the context."""

from random import Random

import pytest
from every_setting import METHODS, PAIRS, drawn_cache, drawn_method
from problems import FAMILIES, STOPS, Problem, assert_equal, in_oracle_terms
from thin import covering
from tiny import EOS, MASK, PAD, tiny_prompt


EXAMPLES = 2


def drawn_problem(rng: Random, family: str, longest: int = 24) -> Problem:
    prompt = tiny_prompt(rng.randint(0, 999), rng.randint(1, 9))
    # The first token stays: on a canvas of masks alone all positions are equal, and rounding would decide.
    for position in range(1, len(prompt)):
        if rng.random() < 0.1:
            prompt[position] = rng.choice([MASK, EOS, PAD])
    return Problem(
        family=family,
        model_seed=rng.randint(0, 2),
        prompt=prompt,
        eos=rng.choice(STOPS),
        pad=rng.choice([PAD, EOS]),
        max_new_tokens=rng.randint(1, longest),
        early_stop=rng.random() < 0.4,
        layers=2,
    )


@pytest.mark.every(6)
@pytest.mark.parametrize("method, cache, family", covering(PAIRS, FAMILIES, strength=1))
def test_a_method_with_a_cache_decodes_as_the_oracle(method, cache, family):
    rng = Random(f"{method} {cache} {family}")
    for _ in range(EXAMPLES):
        problem, seed = drawn_problem(rng, family), rng.randint(0, 2**70)
        chosen = drawn_method(rng, method) | drawn_cache(rng, cache)
        expected = problem.oracle(in_oracle_terms(seed, len(problem.prompt)), **chosen)
        assert_equal(problem.generate(seed=seed, **chosen), expected)


# What `generate` does where a setting is left out, and that setting.
DEFAULTS = [
    ({"decoding_method": "fast_dllm"}, {"confidence_threshold": 0.9, "kv_cache": "none"}),
    (METHODS["dinfer, credit"], {"credit_decay": 0.8, "credit_exponent": 0.2, "credit_weight": 0.7}),
    (
        {"decoding_method": "local_leap"},
        {"confidence_threshold": 0.9, "relaxed_threshold": 0.75, "leap_radius": 4},
    ),
    ({"decoding_method": "dkv"}, {"kv_cache": "dkv", "cache_delay": 1, "cache_refresh_interval": 8}),
    (
        {"decoding_method": "llada", "remasking": "random", "kv_cache": "dkv_greedy"},
        {"cache_delay": 1, "cache_refresh_interval": 2, "cache_window": 4},
    ),
    (
        {"decoding_method": "dparallel", "entropy_threshold": 0.9, "kv_cache": "vicinity"},
        {"cache_warmup": 4, "cache_window": 16},
    ),
]


@pytest.mark.every(12)
@pytest.mark.parametrize("index, family", covering(range(len(DEFAULTS)), FAMILIES, strength=1))
def test_a_setting_that_is_left_out_has_its_documented_value(index, family):
    given, left_out = DEFAULTS[index]
    for seed in range(2):
        problem = Problem(family, 2, tiny_prompt(seed, 24), (EOS,), PAD, 48, early_stop=False, layers=2)
        expected = problem.oracle(in_oracle_terms(seed, len(problem.prompt)), **(given | left_out))
        assert_equal(problem.generate(seed=seed, **given), expected)
