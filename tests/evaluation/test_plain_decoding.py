"""The plain loops that the bench compares with: their tokens are `generate`'s, their cost is the reference's."""

import pytest
import torch
from tiny import EOS, PAD, left_padded, tiny_prompt, trained_like

from d3llm_hf.evaluation.plain_decoding import plain_generate


LLADA = {"decoding_method": "llada", "block_length": 8}
DPARALLEL = {"decoding_method": "dparallel", "block_length": 8, "entropy_threshold": 0.9}
D3LLM = {"decoding_method": "d3llm", "block_length": 8, "entropy_threshold": 0.9}
DELAYED = D3LLM | {"kv_cache": "delayed"}
STOP = {"eos_token_id": EOS, "pad_token_id": PAD}


def both(model, prompts, stop=None, **settings):
    """What `generate` and the plain loop give for the same arguments."""
    inputs = left_padded(prompts) | {"max_new_tokens": 21} | (stop or {"pad_token_id": PAD}) | settings
    ours = model.generate(**inputs, return_dict_in_generate=True, **({} if stop else {"eos_token_id": None}))
    return ours, plain_generate(model, **inputs)


@pytest.fixture
def endless(monkeypatch):
    """A model without a stop token."""

    def make(seed):
        model = trained_like("llada", seed)
        monkeypatch.setattr(model.generation_config, "eos_token_id", None)
        return model

    return make


@pytest.mark.parametrize(
    "settings",
    [
        LLADA,
        LLADA | {"steps": 8},
        LLADA | {"steps": 2},
        DPARALLEL,
        DPARALLEL | {"entropy_threshold": 0.0},
        D3LLM,
        D3LLM | {"block_add_threshold": 0.0, "block_activation_threshold": 0.5},
        D3LLM | {"block_add_threshold": 1.0, "block_activation_threshold": 2.0, "early_stop": False},
        DELAYED,
        DELAYED | {"cache_delay": 0},
        DELAYED | {"cache_delay": 1, "cache_refresh_interval": 3},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
@pytest.mark.parametrize("stop", [None, STOP], ids=["endless", "stopping"])
def test_the_plain_loop_gives_the_tokens_of_generate_in_as_many_forwards(endless, settings, stop):
    stopped = 0
    for seed in range(2):
        model = trained_like("llada", seed) if stop else endless(seed)
        prompts = [tiny_prompt(seed, 5), tiny_prompt(seed + 10, 9), tiny_prompt(seed + 20, 7)]
        ours, plain = both(model, prompts, stop, **settings)
        assert plain.sequences.tolist() == ours.sequences.tolist()
        assert plain.num_forwards.tolist() == ours.num_forwards.tolist()
        stopped += int((plain.sequences[:, 9:] == EOS).any(1).sum())
    assert stop is None or stopped


def test_without_a_cache_every_forward_is_over_the_whole_canvas(endless):
    ours, plain = both(endless(0), [tiny_prompt(0, 5), tiny_prompt(1, 9)], **D3LLM)
    assert plain.positions_computed.tolist() == [
        (5 + 21) * int(plain.num_forwards[0]),
        30 * int(plain.num_forwards[1]),
    ]
    assert plain.positions_computed.tolist() == ours.positions_computed.tolist()
