"""The plain loops that the bench compares with: their tokens are `generate`'s, their cost is the reference's."""

import pytest
import torch
from tiny import PAD, left_padded, tiny_prompt, trained_like

from d3llm_hf.bench import plain_decoding
from d3llm_hf.bench.plain_decoding import plain_generate


LLADA = {"decoding_method": "llada", "block_length": 4}
DPARALLEL = {"decoding_method": "dparallel", "block_length": 4, "entropy_threshold": 0.9}
D3LLM = {"decoding_method": "d3llm", "block_length": 4, "entropy_threshold": 0.9}
DELAYED = D3LLM | {"kv_cache": "delayed"}
PROMPTS = [tiny_prompt(0, 5), tiny_prompt(10, 9), tiny_prompt(20, 7)]


def both(monkeypatch, stop=None, seed=0, **settings):
    """What `generate` and the plain loop give for the same arguments."""
    model = trained_like("llada", seed)
    monkeypatch.setattr(model.generation_config, "eos_token_id", stop)
    inputs = left_padded(PROMPTS) | {"max_new_tokens": 13, "pad_token_id": PAD, "eos_token_id": stop} | settings
    return model.generate(**inputs, return_dict_in_generate=True), plain_generate(model, **inputs)


@pytest.mark.every(6)
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
@pytest.mark.parametrize("stops", [False, True], ids=["endless", "stopping"])
def test_the_plain_loop_gives_the_tokens_of_generate_in_as_many_forwards(monkeypatch, settings, stops):
    ours, plain = both(monkeypatch, **settings)
    if stops:
        stop = int(plain.sequences[0, 9 + 7])
        ours, plain = both(monkeypatch, stop=[stop], **settings)
        assert (plain.sequences[:, 9:] == stop).any()
    assert plain.sequences.tolist() == ours.sequences.tolist()
    assert plain.num_forwards.tolist() == ours.num_forwards.tolist()
    assert plain.positions_computed.tolist() == ours.positions_computed.tolist()


def test_without_a_cache_every_forward_is_over_the_whole_canvas(monkeypatch):
    _, plain = both(monkeypatch, **D3LLM)
    assert plain.positions_computed.tolist() == [
        (len(prompt) + 13) * forwards for prompt, forwards in zip(PROMPTS, plain.num_forwards.tolist(), strict=True)
    ]


def test_statistics_are_taken_in_float64_at_every_position_of_the_canvas(monkeypatch):
    seen = []
    entropies = plain_decoding.entropies
    monkeypatch.setattr(plain_decoding, "entropies", lambda logits: (seen.append(logits), entropies(logits))[1])
    both(monkeypatch, **DELAYED)
    assert {tuple(logits.shape) for logits in seen} == {(len(prompt) + 13, 32) for prompt in PROMPTS}
    assert entropies(seen[0]).dtype == torch.float64
    assert any(logits[0].isinf().all() for logits in seen)  # what the cache holds was not forwarded, yet is scored


def test_without_a_pad_token_the_stop_token_fills_what_follows_it():
    model = trained_like("llada")
    inputs = left_padded(PROMPTS[:1]) | {"max_new_tokens": 8} | D3LLM
    length = inputs["input_ids"].shape[1]
    stopped = 0
    for stop in set(plain_generate(model, **inputs).sequences[0, length:].tolist()):
        answer = plain_generate(model, **inputs, eos_token_id=stop).sequences[0, length:].tolist()
        if stop in answer:  # a stop token that comes early may change what is decided later
            stopped += 1
            assert set(answer[answer.index(stop) :]) == {stop}
    assert stopped  # what the first forward decides stays


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"decoding_method": "dream"}, r"`decoding_method` must be one of .*got 'dream'"),
        (DPARALLEL | {"kv_cache": "dual"}, r"`kv_cache` of a plain dparallel must be one of \['none'\] \(got 'dual'"),
        (LLADA | {"entropy_threshold": 0.1}, r"`entropy_threshold` is not a setting of a plain llada"),
        (LLADA | {"remasking": "random"}, r"`remasking` is not a setting of a plain llada .*got 'random'"),
    ],
)
def test_what_the_loops_of_the_reference_do_not_have_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        plain_generate(trained_like("llada"), torch.tensor([[1, 2]]), max_new_tokens=4, **settings)


def test_a_model_with_shifted_logits_is_refused():
    with pytest.raises(ValueError, match="`model` must predict token i in logits row i"):
        plain_generate(trained_like("dream"), torch.tensor([[1, 2]]), max_new_tokens=4)
