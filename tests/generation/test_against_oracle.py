"""The decoder against the slow oracle: tokens, the forward of each token, counts of forwards and positions."""

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from oracle import Decoded, Rules, decode_with_model
from recorded import checkpoint, corrected_cases, recorded_cases
from tiny import EOS, MASK, PAD, tiny_model, tiny_prompt

from d3llm_hf.models.scoring import Sampler


FAMILIES = ("llada", "dream")
FRACTIONS = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.8, 0.95, 1.0])
CORRECTED = [case for case in recorded_cases() if case.id in corrected_cases()]


def examples(count: int):
    """The same examples in every run, so that near-ties cannot make a test fail now and then."""
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )


@cache
def model_of(family: str, seed: int):
    return tiny_model(family, seed, layers=1, spread=(2.0, 3.0, 5.0)[seed])


def assert_equal(output, expected: Decoded) -> None:
    assert output.sequences[0].tolist() == expected.sequence
    assert output.step_map[0].tolist() == expected.step_map
    assert int(output.num_forwards) == expected.forwards
    assert int(output.num_forwards_reference) == expected.reference_forwards
    assert int(output.positions_computed) == expected.positions_computed


@dataclass(frozen=True)
class Problem:
    """A model, a prompt that may hold mask, EOS and pad tokens, and what all methods have in common."""

    family: str
    model_seed: int
    prompt: list[int]
    eos: tuple[int, ...]
    pad: int
    max_new_tokens: int
    early_stop: bool

    @property
    def model(self):
        return model_of(self.family, self.model_seed)

    def generate(self, **chosen):
        return self.model.generate(
            torch.tensor([self.prompt]),
            attention_mask=torch.ones(1, len(self.prompt), dtype=torch.long),
            max_new_tokens=self.max_new_tokens,
            early_stop=self.early_stop,
            eos_token_id=list(self.eos),
            pad_token_id=self.pad,
            return_dict_in_generate=True,
            **chosen,
        )

    def oracle(self, noise=None, **chosen) -> Decoded:
        rules = Rules(
            max_new_tokens=self.max_new_tokens,
            early_stop=self.early_stop,
            eos_token_ids=self.eos,
            pad_token_id=self.pad,
            mask_token_id=MASK,
            noise=noise,
            **chosen,
        )
        return decode_with_model(self.model, self.prompt, rules)

    def compare(self, **chosen) -> None:
        assert_equal(self.generate(**chosen), self.oracle(**chosen))


@st.composite
def problems(draw, longest: int = 24):
    prompt = tiny_prompt(draw(st.integers(0, 999)), draw(st.integers(1, 9)))
    # The first token stays: on a canvas of masks alone all positions are equal, and rounding would decide.
    for position in draw(st.sets(st.integers(1, 8), max_size=2)) & set(range(1, len(prompt))):
        prompt[position] = draw(st.sampled_from([MASK, EOS, PAD]))
    return Problem(
        family=draw(st.sampled_from(FAMILIES)),
        model_seed=draw(st.integers(0, 2)),
        prompt=prompt,
        eos=draw(st.sampled_from([(EOS,), (EOS, 3), (EOS, 3, 7, 11, 13)])),
        pad=draw(st.sampled_from([PAD, EOS])),
        max_new_tokens=draw(st.integers(1, longest)),
        early_stop=draw(st.booleans()),
    )


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


@examples(50)
@given(
    problem=problems(),
    steps=st.integers(1, 40),
    remasking=st.sampled_from(["entropy", "maskgit_plus", "topk_margin"]),
)
def test_dream_with_its_schedule_decodes_as_the_oracle(problem, **chosen):
    problem.compare(decoding_method="dream", **chosen)


@examples(40)
@given(problem=problems(), steps=st.integers(1, 40), confidence_threshold=st.sampled_from([0.05, 0.3, 0.6, 0.9, 1.0]))
def test_dream_with_a_confidence_threshold_decodes_as_the_oracle(problem, **chosen):
    problem.compare(decoding_method="dream", **chosen)


def in_oracle_terms(seed: int, prompt_length: int, highest_first: bool):
    """The library's uniform numbers as the oracle's `noise(forward, position)`."""

    def noise(forward: int, position: int) -> float:
        row, column = torch.zeros(1, dtype=torch.long), torch.tensor([position - prompt_length])
        uniform = float(Sampler(seed).uniform(row, forward - 1, column, Sampler.POSITION).float())
        return -uniform if highest_first else uniform

    return noise


@examples(40)
@given(problem=problems(), block_length=st.integers(1, 12), steps=st.integers(1, 40), seed=st.integers(0, 2**70))
def test_random_remasking_decodes_as_the_oracle_given_the_same_noise(problem, seed, **chosen):
    chosen |= {"decoding_method": "llada", "remasking": "random"}
    noise = in_oracle_terms(seed, len(problem.prompt), highest_first=True)
    assert_equal(problem.generate(seed=seed, **chosen), problem.oracle(noise, **chosen))


@examples(40)
@given(problem=problems(), steps=st.integers(1, 40), seed=st.integers(0, 2**70))
def test_origin_decodes_as_the_oracle_given_the_same_coins(problem, seed, steps):
    chosen = {"decoding_method": "dream", "remasking": "origin", "steps": steps}
    noise = in_oracle_terms(seed, len(problem.prompt), highest_first=False)
    assert_equal(problem.generate(seed=seed, **chosen), problem.oracle(noise, **chosen))


@pytest.mark.parametrize("case", CORRECTED, ids=lambda case: case.id)
def test_where_the_reference_has_a_defect_the_corrected_rule_is_followed(case):
    model = checkpoint(case.model)
    output = model.generate(
        torch.tensor([case.prompt]), pad_token_id=case.eos_token_id, return_dict_in_generate=True, **case.settings
    )
    assert_equal(output, decode_with_model(model, list(case.prompt), case.rules()))
