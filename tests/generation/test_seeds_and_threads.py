"""Sampling is a function of the call's seed, and calls do not meet in the model."""

import math
import threading
from itertools import pairwise

import pytest
import torch
from tiny import PAD, ScriptedModel, answer, attributes, left_padded, same_attributes, trained_like


SAMPLING = {"do_sample": True, "temperature": 1.0, "decoding_method": "d3llm", "entropy_threshold": 1.0}


@pytest.mark.every(3)
@pytest.mark.parametrize(
    "chosen",
    [
        SAMPLING,
        SAMPLING | {"top_p": 0.9, "top_k": 8},
        {"decoding_method": "llada", "remasking": "random"},
        {"decoding_method": "dream", "remasking": "origin", "do_sample": True},
        {"decoding_method": "dream", "remasking": "entropy", "alg_temp": 0.5},
    ],
    ids=lambda chosen: " ".join(map(str, chosen.values())),
)
def test_the_same_seed_gives_the_same_answer_and_leaves_the_global_generator_alone(chosen):
    model = trained_like("llada")
    before = torch.get_rng_state()
    first, second = (answer(model, [1, 2, 3], seed=5, **chosen) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.sequences, second.sequences) and torch.equal(first.step_map, second.step_map)


@pytest.mark.full
def test_two_seeds_give_different_answers():
    model = trained_like("dream")
    answers = [answer(model, [1, 2, 3], seed=seed, **SAMPLING).sequences for seed in range(101)]
    different = sum(not torch.equal(a, b) for a, b in pairwise(answers))
    assert different >= 95


@pytest.mark.full
@pytest.mark.parametrize("chosen", [SAMPLING, {"decoding_method": "llada", "remasking": "random"}])
def test_with_a_seed_for_each_row_a_row_draws_what_it_draws_alone(chosen):
    model, seeds = trained_like("llada"), [7, 2**64 + 8, 9, 10, 11, 12, 7]
    prompts = [[1, 2, 3], [4, 5], *[[1, 2, 3]] * 5]
    settings = chosen | {"max_new_tokens": 16, "pad_token_id": PAD, "return_dict_in_generate": True}
    batch = model.generate(**left_padded(prompts), seed=seeds, **settings)
    for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        alone = answer(model, prompt, seed=seed, **chosen)
        assert torch.equal(batch.sequences[row, -16:], alone.sequences[0, -16:])
        assert torch.equal(batch.step_map[row], alone.step_map[0])
    drawn = [(ids[-16:].tolist(), steps.tolist()) for ids, steps in zip(batch.sequences, batch.step_map, strict=True)]
    assert drawn[0] == drawn[6]
    assert any(drawn[0] != other for other in drawn[2:6])  # two of a few answers may happen to be equal


def test_seeds_that_are_not_one_for_each_row_are_refused():
    with pytest.raises(ValueError, match=r"`seed` must be one integer, or one for each row \(got 2 for 1 rows\)"):
        answer(trained_like("llada"), [1, 2, 3], seed=[1, 2])


def test_without_a_seed_the_global_generator_decides():
    model = trained_like("llada")
    answers = []
    for seed in (1, 1, 2, 3, 4, 5):
        torch.manual_seed(seed)
        answers.append(answer(model, [1, 2, 3], **SAMPLING).sequences)
    assert torch.equal(answers[0], answers[1])
    assert any(not torch.equal(answers[0], other) for other in answers[2:])


@pytest.mark.every(3)
@pytest.mark.parametrize("decoding_method", ["d3llm", "dparallel", "llada", "dream"])
def test_greedy_decoding_draws_no_random_number(decoding_method):
    model = trained_like("dream")  # the first test to ask for it makes it, which draws
    before = torch.get_rng_state()
    first, second = (answer(model, [1, 2, 3], decoding_method=decoding_method) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.sequences, second.sequences)


def test_sampled_tokens_follow_the_distribution():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = torch.full((32,), -math.inf)
    logits[:4] = probabilities.log()
    model = ScriptedModel(lambda ids: logits.expand(*ids.shape, -1))
    output = answer(
        model, [1], max_new_tokens=2000, seed=3, do_sample=True, entropy_threshold=math.inf, early_stop=False
    )
    observed = torch.bincount(output.sequences[0, 1:], minlength=32)[:4] / 2000
    torch.testing.assert_close(observed, probabilities, rtol=0, atol=0.04)


# ---- D-09: threads -------------------------------------------------------------------------------------------------


@pytest.mark.full  # as its namesake over all caches, in test_every_cache.py
def test_eight_threads_get_the_answers_of_one_and_change_nothing_on_the_model():
    model = trained_like("llada")
    before = attributes(model)
    jobs = [
        {
            "seed": seed,
            "do_sample": True,
            "max_new_tokens": 3,
            "block_length": 2,
            "kv_cache": ("none", "delayed")[seed % 2],
        }
        for seed in range(200)
    ]
    alone = [answer(model, [1, 2, seed % 20], **job).sequences.tolist() for seed, job in enumerate(jobs)]
    together: list = [None] * len(jobs)

    def work(first: int) -> None:
        for index in range(first, len(jobs), 8):
            together[index] = answer(model, [1, 2, index % 20], **jobs[index]).sequences.tolist()

    threads = [threading.Thread(target=work, args=(first,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
    assert same_attributes(before, attributes(model))
