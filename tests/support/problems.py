"""Random decoding problems, for library and oracle alike: a model, a prompt, and what all methods have in common."""

from dataclasses import dataclass
from functools import cache

import torch
from hypothesis import strategies as st
from oracle import Decoded, Rules, decode_with_model
from tiny import EOS, MASK, PAD, tiny_model, tiny_prompt

from d3llm_hf.models.scoring import Sampler


FAMILIES = ("llada", "dream")
STOPS = ((EOS,), (EOS, 3), (EOS, 3, 7, 11, 13))


@cache
def model_of(family: str, seed: int, layers: int):
    return tiny_model(family, seed, layers=layers, spread=(2.0, 3.0, 5.0)[seed])


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
    layers: int = 1

    @property
    def model(self):
        return model_of(self.family, self.model_seed, self.layers)

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
        eos=draw(st.sampled_from(STOPS)),
        pad=draw(st.sampled_from([PAD, EOS])),
        max_new_tokens=draw(st.integers(1, longest)),
        early_stop=draw(st.booleans()),
    )


def in_oracle_terms(seed: int, prompt_length: int):
    """The library's uniform numbers as the oracle's `noise(forward, position)`."""

    def noise(forward: int, position: int) -> float:
        row, column = torch.zeros(1, dtype=torch.long), torch.tensor([position - prompt_length])
        return float(Sampler(seed).uniform(row, forward - 1, column, Sampler.POSITION).float())

    return noise
