"""KLASS: positions whose distribution stays as it is, and the memory that knows it."""

from itertools import pairwise

import pytest
import torch
from problems import model_of
from recorded_training_free import recorded_runs
from tiny import EOS, MASK, PAD, left_padded, tiny_prompt

from d3llm_hf.models.decoding import Rules, State
from d3llm_hf.models.drift import Drift
from d3llm_hf.models.selection import choose


# Not compared, see tests/golden/README.md.
OTHERS = ("KL014", "KD005")
RUNS = [run for suite in ("klass", "klass_dream") for run in recorded_runs(suite, without=OTHERS)]
KLASS = {"decoding_method": "klass", "block_length": 5, "confidence_threshold": 0.4, "kl_threshold": 0.3}


# ---- Recorded runs --------------------------------------------------------------------------------------------------


@pytest.mark.every(8)
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.id)
def test_a_recorded_run_is_reproduced_token_for_token_and_forward_for_forward(run):
    args = run.args
    chosen = {"confidence_threshold": args["conf_threshold"], "kl_threshold": args["kl_threshold"]}
    chosen |= {"kl_history": args["kl_history_length"], "block_length": args.get("block_length", run.length)}
    run.assert_matches(run.generate(decoding_method="klass", **chosen))


def test_no_recorded_run_is_left_out_by_accident():
    assert len(RUNS) == 13 and all(run.args["unmask_strategy"] == "all" for run in RUNS)


# ---- Laws -----------------------------------------------------------------------------------------------------------


def decode(prompts, family="llada", **chosen):
    settings = {"max_new_tokens": 14, "eos_token_id": [EOS], "pad_token_id": PAD, "return_dict_in_generate": True}
    return model_of(family, 2, 2).generate(**left_padded(prompts), **(settings | KLASS | chosen))


@pytest.mark.parametrize("family", ["llada", pytest.param("dream", marks=pytest.mark.full)])
@pytest.mark.parametrize("kv_cache", ["none", pytest.param("dual", marks=pytest.mark.full)])
def test_a_row_remembers_nothing_of_the_rows_beside_it(family, kv_cache):
    prompts = [tiny_prompt(seed, 1 + seed * 5 % 9) for seed in range(5)]
    together = decode(prompts, family, kv_cache=kv_cache)
    assert len(set(together.num_forwards.tolist())) > 1  # rows leave, and the others keep their memory
    for row, prompt in enumerate(prompts):
        alone = decode([prompt], family, kv_cache=kv_cache)
        assert torch.equal(together.sequences[row, -14:], alone.sequences[0, -14:])
        for name in ("step_map", "num_forwards", "positions_computed"):
            assert torch.equal(together[name][row], alone[name][0])


@pytest.mark.parametrize("length", [1, pytest.param(13, marks=pytest.mark.full)])
def test_where_nothing_is_ever_calm_it_decides_one_token_a_forward_as_llada_does(length):
    prompts = [tiny_prompt(3, 4), tiny_prompt(4, 7)]
    restless = decode(prompts, max_new_tokens=length, kl_threshold=1e-30, early_stop=False)
    plain = {"decoding_method": "llada", "confidence_threshold": None, "kl_threshold": None, "early_stop": False}
    plain = decode(prompts, max_new_tokens=length, **plain)
    assert torch.equal(restless.sequences, plain.sequences) and torch.equal(restless.step_map, plain.step_map)
    assert restless.num_forwards.tolist() == [length, length]


@pytest.mark.full
def test_a_longer_history_is_more_careful():
    prompts = [tiny_prompt(seed, 5) for seed in range(4)]
    forwards = [decode(prompts, kl_history=history, early_stop=False).num_forwards for history in (1, 2, 4, 9)]
    assert all(bool((bold <= careful).all()) for bold, careful in pairwise(forwards))
    assert forwards[-1].tolist() == [14] * 4  # longer than a block: never


def test_a_cache_also_recomputes_the_block_whose_history_begins():
    chosen = {"kl_threshold": 1e-30, "early_stop": False, "max_new_tokens": 10, "kv_cache": "dual"}
    computed = int(decode([tiny_prompt(1, 6)], **chosen).positions_computed)
    # Two blocks of five: 16 slots in the first forward of each; of the first block's others both, then the last one.
    assert computed == 16 + 4 * 10 + 16 + 4 * 5


# ---- The memory, by hand --------------------------------------------------------------------------------------------


def start(length=3):
    rules = Rules(block_length=length, score="confidence", select="stability", kl_threshold=0.1, kl_history=2)
    return rules, State.start(torch.full((1, length), MASK), torch.ones(1, length, dtype=torch.bool), rules)


def at(*columns):
    return torch.zeros(len(columns), dtype=torch.long), torch.tensor(columns)


@pytest.mark.parametrize("size", [1, 8])
def test_divergence_is_that_of_this_forward_from_the_one_before(size):
    _, state = start(2)
    before, now = torch.tensor([[0.5, 0.25, 0.25], [0.9, 0.05, 0.05]]), torch.tensor([[0.25, 0.5, 0.25]] * 2)
    known = float((now[0] * (now[0] / before[0]).log()).sum())
    for threshold, expected in ((known * 1.01, [[1, 0]]), (known * 0.99, [[0, 0]])):
        drift, state.calm = Drift(threshold), torch.zeros(1, 2, dtype=torch.long)
        state.calm = drift(before.log(), state, at(0, 1), size)
        assert state.calm.tolist() == [[0, 0]]  # nothing is known before the first
        state.calm = drift(now.log() + 3.0, state, at(0, 1), size)
        assert state.calm.tolist() == expected


def test_what_was_not_scored_in_the_forward_before_is_new_again():
    _, state = start()
    drift, same = Drift(0.1), torch.tensor([[0.2, 0.8]]).log()
    for columns, expected in (((0, 1), [0, 0, 0]), ((0, 1, 2), [1, 1, 0]), ((0, 2), [2, 1, 1]), ((1, 2), [2, 0, 2])):
        state.calm = drift(same.repeat(len(columns), 1), state, at(*columns), 8)
        assert state.calm[0].tolist() == expected


def test_what_is_no_distribution_is_not_calm():
    _, state = start(1)
    drift = Drift(float("inf"))
    for logits in ([0.0, 1.0], [0.0, float("nan")], [0.0, 1.0]):
        state.calm = drift(torch.tensor([logits]), state, at(0), 8)
        assert state.calm.tolist() == [[0]]
    state.calm = drift(torch.tensor([[float("-inf"), 1.0]]), state, at(0), 8)  # a token that is ruled out
    assert state.calm.tolist() == [[1]]


# ---- The rule, by hand ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "calm, step, expected",
    [
        ([2, 2, 2], 1, [True, False, True]),
        ([2, 2, 1], 1, [True, False, False]),
        ([1, 9, 1], 1, [False, False, True]),  # nothing ready: the surest
        ([2, 2, 2], 0, [False, False, True]),  # nor in the first forward of a block, whatever came before
    ],
)
def test_what_is_sure_and_calm_is_committed_and_else_the_surest(calm, step, expected):
    rules, state = start()
    rules = Rules(**vars(rules) | {"threshold": 0.5, "inclusive": False})
    state.calm, state.step = torch.tensor([calm]), torch.tensor([step])
    cost = torch.tensor([[0.4, 0.5, 0.1]])
    commits, forced = choose(cost, cost, state.undecided, state, rules)
    assert commits[0].tolist() == expected and not forced.any()


def test_every_row_is_chosen_for_by_itself():
    rules, state = start()
    state = State.cat([state, state])
    state.calm = torch.tensor([[2, 2, 2], [0, 0, 0]])
    state.step = torch.tensor([1, 1])
    cost = torch.tensor([[0.4, 0.5, 0.1]] * 2)
    rules = Rules(**vars(rules) | {"threshold": 9.0})
    commits, _ = choose(cost, cost, state.undecided, state, rules)
    assert commits.tolist() == [[True, True, True], [False, False, True]]


# ---- Settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chosen, rule",
    [
        ({"kl_threshold": 0.0}, r"`kl_threshold` must be a positive number \(nats\) \(got 0.0\)"),
        ({"kl_history": 0}, r"`kl_history` must be a positive integer \(forwards\) \(got 0\)"),
        ({"steps": 4}, r'`steps` is not used by decoding_method="klass"'),
        ({"decoding_method": "fast_dllm", "kl_history": 2}, r'is not used by decoding_method="fast_dllm"'),
        ({"kv_cache": "dkv_greedy"}, r'`?kv_cache="dkv_greedy" needs remasking="random"'),
    ],
)
def test_settings_without_a_meaning_are_refused(chosen, rule):
    with pytest.raises(ValueError, match=rule):
        decode([[5, 6, 7]], **chosen)
