"""The oracle itself, where no recorded run vouches for it: choices and windows worked out by hand."""

import math

import oracle_choices as choices
import pytest
import torch
from oracle import Look, Oracle, Rules, Scripted, decode, decode_with_model, look
from tiny import MASK, tables, tiny_model, tiny_prompt


def seen(probabilities: dict[int, float]) -> dict[int, Look]:
    return {position: Look(position, p, 0.0, 1 - p) for position, p in probabilities.items()}


def rules(decoding_method: str = "fast_dllm", **chosen) -> Rules:
    return Rules(decoding_method, **({"max_new_tokens": 12, "mask_token_id": MASK} | chosen))


# ---- choices --------------------------------------------------------------------------------------------------------

P = {5: 0.6, 6: 0.9, 7: 0.8, 9: 0.5, 10: 0.7, 14: 0.3}


@pytest.mark.parametrize(
    "choose, chosen, expected",
    [
        (choices.fast_dllm, {"confidence_threshold": 0.7}, {6, 7, 10}),
        (choices.fast_dllm, {"confidence_threshold": 0.95}, {6}),
        # Ranks need 1/2, 2/3, 3/4 ...: 0.9 and 0.8 pass, 0.7 does not.
        (choices.fast_dllm, {"factor": 1.0}, {6, 7}),
        (choices.fast_dllm, {"factor": 0.1}, {6}),
        (choices.fast_dllm, {"factor": 1.2}, {6, 7, 10}),
        (choices.fast_dllm, {"factor": 7.0}, set(P)),
        (choices.dinfer_threshold, {"confidence_threshold": 0.7}, {6, 7, 10}),
        (choices.dinfer_threshold, {"confidence_threshold": 0.95}, {6}),
        # Runs: 5 6 7, 9 10, 14.
        (choices.dinfer_hierarchy, {"confidence_threshold": 0.85, "low_threshold": 0.4}, {6, 10}),
        (choices.dinfer_hierarchy, {"confidence_threshold": 0.75, "low_threshold": 0.2}, {6, 7, 10, 14}),
        (choices.dinfer_hierarchy, {"confidence_threshold": 0.2, "low_threshold": 0.91}, {6}),
        # Entropies 0.1, 0.2, 0.3, 0.4, 0.5, 0.7 from the surest on.
        (choices.entropy_bound, {"entropy_bound": 0.0}, {6}),
        (choices.entropy_bound, {"entropy_bound": 0.35}, {6, 7, 10}),
        (choices.entropy_bound, {"entropy_bound": 9.0}, set(P)),
        (choices.local_leap, {"confidence_threshold": 0.85, "relaxed_threshold": 0.55, "leap_radius": 1}, {5, 6, 7}),
        (
            choices.local_leap,
            {"confidence_threshold": 0.85, "relaxed_threshold": 0.55, "leap_radius": 4},
            {5, 6, 7, 10},
        ),
        (choices.local_leap, {"confidence_threshold": 0.95, "relaxed_threshold": 0.1, "leap_radius": 4}, {6}),
    ],
)
def test_what_a_forward_commits(choose, chosen, expected):
    assert choose(seen(P), rules(**chosen)) == expected


def test_what_klass_commits():
    calm = {5: 2, 6: 1, 7: 3, 9: 2, 10: 0, 14: 5}
    chosen = rules("klass", confidence_threshold=0.55, kl_history=2)
    assert choices.klass(seen(P), chosen, calm, 2) == {5, 7}
    assert choices.klass(seen(P), chosen, calm, 1) == {6}  # nothing is calm in the first forward of a block
    assert choices.klass(seen(P), rules("klass", confidence_threshold=0.55, kl_history=4), calm, 9) == {6}
    half, sure = torch.tensor([0.5, 0.5]).double(), torch.tensor([0.75, 0.25]).double()
    assert choices.divergence(sure, half) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert choices.divergence(half, half) == 0


def test_equals_are_taken_from_the_left_and_nearly_equals_together():
    assert choices.fast_dllm(seen({4: 0.5, 3: 0.5}), rules(confidence_threshold=0.9)) == {3}
    assert choices.dinfer_threshold(seen({4: 0.5, 3: 0.5 - 9e-6, 2: 0.5 - 2e-5}), rules(confidence_threshold=0.9)) == {
        3,
        4,
    }


def test_credit_is_what_a_token_was_worth_in_the_forwards_before():
    chosen = {"decoder": "credit", "credit_decay": 0.5, "credit_exponent": 2.0, "credit_weight": 1.0}
    oracle = Oracle(Scripted(lambda ids: torch.zeros(13, 4), 3), [0], rules("dinfer", mask_token_id=3, **chosen))
    first = torch.tensor([0.8, 0.1, 0.05, 0.05]).log()
    second = torch.tensor([0.2, 0.6, 0.1, 0.1]).log()
    oracle.recomputed.append([])
    once = oracle.look_with_credit({4: first})[4]
    # exp(log p + log(1 + credit)) = p (1 + credit), renormalised
    weight = 0.8 * (1 + 0.64)
    assert (once.token, once.probability) == (0, pytest.approx(weight / (weight + 0.2)))
    oracle.recomputed.append([])
    twice = oracle.look_with_credit({4: second})[4]
    weights = [0.2 * (1 + 0.5 * 0.64), 0.6 * (1 + 0.36), 0.2]
    assert (twice.token, twice.probability) == (1, pytest.approx(weights[1] / sum(weights)))


def test_a_look_counts_the_mask_token_in_but_never_takes_it():
    row = torch.tensor([0.3, 0.2, 0.5]).log()
    only = look({0: row}, mask_token_id=2)[0]
    entropy = -sum(p * math.log(p) for p in (0.3, 0.2, 0.5))
    assert only.token == 0
    assert (only.probability, only.margin) == (pytest.approx(0.3), pytest.approx(-0.2))
    assert only.entropy == pytest.approx(entropy)


# ---- windows --------------------------------------------------------------------------------------------------------

LEFT_TO_RIGHT = torch.arange(40, 0, -1)[:, None] * torch.nn.functional.one_hot(torch.tensor(1), 32)


def slots_of(**chosen) -> list[list[int]]:
    """Slots recomputed for a prompt of 3 and 12 new tokens in blocks of 4, decided one by one from the left."""
    script = Scripted(lambda ids: LEFT_TO_RIGHT[: len(ids)].float() / 8, MASK)
    chosen = {"block_length": 4, "noise": lambda forward, position: position / 100} | chosen
    decoded = decode(script, [1, 2, 3], rules("llada", **chosen))
    assert decoded.step_map == list(range(1, 13))
    return decoded.recomputed


ALL = list(range(15))


def test_windows_of_blocks():
    assert slots_of() == [ALL] * 12
    behind, block = [list(range(start, 15)) for start in (3, 7, 11)], [[3, 4, 5, 6], [7, 8, 9, 10], [11, 12, 13, 14]]
    assert slots_of(kv_cache="prefix") == [slots for rest in behind for slots in (ALL, rest, rest, rest)]
    assert slots_of(kv_cache="dual") == [slots for rest in block for slots in (ALL, rest, rest, rest)]
    refreshed = slots_of(kv_cache="dual", cache_refresh_interval=2)
    assert refreshed == [slots for rest in block for slots in (ALL, rest, ALL, rest)]
    near = slots_of(kv_cache="vicinity", cache_warmup=3, cache_window=2)
    assert near[:3] == [ALL] * 3 and near[3] == list(range(1, 9))
    assert near[4] == ALL and near[5] == near[7] == list(range(5, 13)) and near[11] == list(range(9, 15))


def test_slots_of_single_positions():
    kept_at_once = slots_of(kv_cache="dkv", cache_delay=0)
    # Forward 1 decides slot 3; the prompt counts as decided by it, and in forward 2 both are kept.
    assert kept_at_once[0] == ALL and kept_at_once[1] == ALL[4:] and kept_at_once[3] == ALL[6:]
    assert kept_at_once[4] == ALL and kept_at_once[5] == ALL[8:]
    delayed = slots_of(kv_cache="dkv", cache_delay=1)
    assert delayed[1] == ALL and delayed[2] == ALL[4:] and delayed[3] == ALL[5:]
    assert slots_of(kv_cache="dkv", cache_delay=1, cache_refresh_interval=2)[2] == ALL
    greedy = slots_of(kv_cache="dkv_greedy", remasking="random", cache_delay=1, cache_window=0)
    assert greedy[:5] == [ALL, [3, 4], [4, 5], [5, 6], ALL]
    greedy = slots_of(kv_cache="dkv_greedy", remasking="random", cache_delay=2, cache_window=3)
    assert greedy[1] == [2, 3, 4, 5] and greedy[2] == [3, 4, 5, 6] and greedy[3] == [4, 5, 6, 7]


def test_under_a_shift_the_slots_that_predict_are_recomputed_too():
    chosen = {"max_new_tokens": 8, "block_length": 4, "mask_token_id": MASK, "eos_token_ids": ()}
    model, prompt = tiny_model("dream"), tiny_prompt(0, 5)
    for kv_cache, expected in (("prefix", list(range(4, 13))), ("dual", [4, 5, 6, 7, 8])):
        decoded = decode_with_model(model, prompt, Rules("llada", kv_cache=kv_cache, **chosen))
        assert decoded.recomputed[1] == expected
    vicinity = Rules("llada", kv_cache="vicinity", cache_warmup=0, cache_window=2, **chosen)
    assert decode_with_model(model, prompt, vicinity).recomputed[1] == list(range(2, 11))
    noise = {"remasking": "random", "noise": lambda forward, position: -position}
    greedy = Rules("llada", kv_cache="dkv_greedy", cache_delay=0, cache_window=0, **chosen, **noise)
    assert decode_with_model(model, prompt, greedy).recomputed[1] == [6, 7]


def test_steps_are_shared_out_over_the_blocks_of_dreams_schedule():
    table = tables(1, 20)[0]
    chosen = {"max_new_tokens": 10, "block_length": 4, "remasking": "entropy"}
    decoded = decode(Scripted(lambda ids: table[: len(ids)], MASK), [1], rules("dream", steps=5, **chosen))
    assert decoded.forwards == 5
    # Blocks of 4, 4 and 2 in 2, 2 and 1 steps: half of a block goes first, a little less rounds down to one.
    assert [decoded.step_map.count(step) for step in range(1, 6)] == [1, 3, 1, 3, 2]
    decoded = decode(Scripted(lambda ids: table[: len(ids)], MASK), [1], rules("dream", **chosen))
    assert decoded.forwards == 10


def test_without_steps_the_quota_is_one_token_a_forward():
    table = tables(1, 20)[0]
    decoded = decode(Scripted(lambda ids: table[: len(ids)], MASK), [1], rules("llada", block_length=5))
    assert sorted(decoded.step_map) == list(range(1, 13))
