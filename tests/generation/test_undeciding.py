"""Positions that are taken back after they were decided: the laws, shown with a rule of these tests."""

import math
from itertools import pairwise

import pytest
import torch
from listening import Listener
from problems import model_of
from tiny import EOS, MASK, PAD, left_padded, tiny_prompt

from d3llm_hf.models import methods
from d3llm_hf.models.decoding import Rules, State, commit, finished, open_blocks, revise, undecide
from d3llm_hf.models.selection import REVOKERS, cheapest, take_back


NEW = 16


def doubtful(doubt, watched, commits, state, rules):
    """What the model finds too improbable, fewer than the forward before committed, so that decoding ends."""
    gained = (state.step_map == state.forward[:, None]).sum(1)
    return cheapest(-doubt, watched & (doubt > rules.revoke_threshold), gained - 1)


@pytest.fixture(autouse=True)
def rule(monkeypatch):
    """A method that takes back, for these tests only."""
    monkeypatch.setitem(REVOKERS, "doubtful", doubtful)
    monkeypatch.setitem(methods.METHODS, "doubting", {"block_length": 8, "confidence_threshold": 0.3})
    rules = {"score": "confidence", "select": "threshold", "force_best": True}
    rules |= {"revoke": "doubtful", "revoke_threshold": -math.log(0.6)}
    monkeypatch.setitem(methods.RULES, "doubting", rules)


def decode(prompts, family="llada", **chosen):
    settings = {"max_new_tokens": NEW, "eos_token_id": [EOS], "pad_token_id": PAD, "return_dict_in_generate": True}
    settings |= {"decoding_method": "doubting", "early_stop": False}
    return model_of(family, 0, 2).generate(**left_padded(prompts), **(settings | chosen))


PROMPTS = [tiny_prompt(seed, 1 + seed * 5 % 9) for seed in range(5)]


# ---- Nobody is shown what may still change, and decoding ends -------------------------------------------------------


@pytest.mark.parametrize("early_stop", [False, pytest.param(True, marks=pytest.mark.full)])
def test_a_streamed_prefix_never_changes_though_tokens_are_taken_back(early_stop):
    told = Listener(MASK)
    output = decode(PROMPTS, streamer=told, early_stop=early_stop)
    assert int(output.num_revoked.max()) > 0 and not (output.sequences[:, -NEW:] == MASK).any()
    for row in range(len(PROMPTS)):
        final = output.sequences[row, -NEW:].tolist()
        end = final.index(EOS) + 1 if EOS in final else NEW
        assert told.tokens[row] == final[:end]


def test_a_criterion_reads_what_stays():
    read = []

    def look(ids, scores, **kwargs):
        read.append(ids[0, len(PROMPTS[1]) :].tolist())
        return torch.zeros(len(ids), dtype=torch.bool)

    final = decode([PROMPTS[1]], stopping_criteria=[look]).sequences[0, -NEW:].tolist()
    assert len(read) >= 2 and all(text == final[: len(text)] for text in read)
    assert all(len(before) <= len(after) for before, after in pairwise(read))


def test_the_step_map_has_the_forward_that_decided_for_good_and_all_forwards_are_counted():
    output = decode(PROMPTS)
    assert (output.step_map > 0).all() and torch.equal(output.step_map.amax(1), output.num_forwards)
    assert (output.num_forwards <= NEW).all() and torch.equal(output.num_forwards, output.num_forwards_reference)
    assert torch.equal(decode(PROMPTS, decoding_method="fast_dllm").num_revoked, torch.zeros(5, dtype=torch.long))


@pytest.mark.every(16)
@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("chosen", [{}, {"early_stop": True, "max_new_tokens": 11}, {"do_sample": True, "seed": 3}])
def test_a_row_is_in_a_batch_what_it_is_alone(family, chosen):
    seeds = {"seed": [3, 4, 5, 6, 7]} if "seed" in chosen else {}
    together = decode(PROMPTS, family, **chosen | seeds)
    length = chosen.get("max_new_tokens", NEW)
    for row, prompt in enumerate(PROMPTS):
        alone = decode([prompt], family, **chosen | ({"seed": 3 + row} if seeds else {}))
        assert torch.equal(together.sequences[row, -length:], alone.sequences[0, -length:])
        for name in ("step_map", "num_forwards", "positions_computed", "num_revoked"):
            assert torch.equal(together[name][row], alone[name][0])


@pytest.mark.every(3)
@pytest.mark.parametrize("kv_cache", ["prefix", "dual", "delayed", "dkv"])
def test_a_cache_that_keeps_nothing_changes_nothing(kv_cache):
    plain = decode(PROMPTS)
    cached = decode(PROMPTS, kv_cache=kv_cache, cache_refresh_interval=1)
    assert torch.equal(plain.sequences, cached.sequences) and torch.equal(plain.step_map, cached.step_map)
    assert torch.equal(plain.num_revoked, cached.num_revoked)


@pytest.mark.full
@pytest.mark.parametrize("kv_cache", ["prefix", "dual", "delayed", "dkv"])
def test_with_any_cache_every_row_ends(kv_cache):
    output = decode(PROMPTS, kv_cache=kv_cache)
    assert (output.num_forwards <= NEW).all() and not (output.sequences[:, -NEW:] == MASK).any()


def test_promises_about_the_text_hold():
    output = decode(PROMPTS, no_repeat_ngram_size=2, bad_words_ids=[[7]])
    assert int(output.num_revoked.max()) > 0
    for row, prompt in enumerate(PROMPTS):
        text = prompt + output.sequences[row, -NEW:].tolist()
        new = set(pairwise(text[len(prompt) - 1 :]))
        assert len(new) == NEW and not new & set(pairwise(prompt)) and 7 not in text[len(prompt) :]


# ---- The rules, by hand ---------------------------------------------------------------------------------------------


def test_what_is_taken_back_is_a_mask_again_and_its_block_stays_open():
    rules = Rules(block_length=2, score="confidence", select="threshold", revoke="doubtful", revoke_threshold=0.5)
    state = State.start(torch.full((1, 4), MASK), torch.ones(1, 4, dtype=torch.bool), rules)

    def step(commits, tokens, doubt):
        open_blocks(state, rules, torch.tensor([4]))
        marked, wanted, cost = torch.tensor([commits]).bool(), torch.tensor([tokens]), torch.tensor([doubt])
        revoked = take_back(cost, marked, state, rules)
        state.forward += 1
        commit(state, marked, wanted)
        undecide(state, revoked, MASK)
        revise(state, rules, marked, wanted, cost)

    step([1, 0, 0, 0], [5, 0, 0, 0], [9.0] * 4)
    assert (state.tokens.tolist(), state.unsettled.tolist()) == (
        [[5, MASK, MASK, MASK]],
        [[True, False, False, False]],
    )
    state.step_map[0, 2:] = state.forward  # as if more had been committed, so that one may be taken back
    step([0, 1, 0, 0], [5, 6, 0, 0], [0.6, 0.0, 0.0, 0.0])
    assert state.tokens.tolist() == [[MASK, 6, MASK, MASK]] and state.step_map[0, :2].tolist() == [-1, 2]
    assert (state.undecided[0, :2].tolist(), state.unsettled[0, :2].tolist()) == ([True, False], [False, True])
    assert (state.changed[0, :2].tolist(), state.revoked.tolist()) == ([True, True], [1])
    assert not finished(state, rules, torch.tensor([4])).any()
    step([1, 0, 0, 0], [7, 6, 0, 0], [0.0, 0.4, 0.0, 0.0])
    assert (state.tokens.tolist(), state.unsettled.any()) == ([[7, 6, MASK, MASK]], torch.tensor(False))
    step([0, 0, 1, 0], [7, 6, 8, 0], [9.0] * 4)  # nothing of a block that is through is looked at
    assert (state.tokens.tolist(), state.open_count.tolist()) == ([[7, 6, 8, MASK]], [2])


def test_a_row_ends_early_once_all_before_its_stop_token_is_decided_though_its_block_is_not():
    rules = Rules(block_length=4, score="confidence", select="threshold", revoke="doubtful", early_stop=True)
    state = State.start(torch.full((1, 4), MASK), torch.ones(1, 4, dtype=torch.bool), rules)
    commit(state, torch.tensor([[True, True, False, False]]), torch.tensor([[5, EOS, 0, 0]]))
    revise(state, rules, state.changed, state.tokens, torch.zeros(1, 4))
    stop = state.stop(torch.tensor([EOS]), torch.ones(1, 4, dtype=torch.bool))
    assert state.unsettled.any() and finished(state, rules, stop).tolist() == [True]
    undecide(state, torch.tensor([[True, False, False, False]]), MASK)
    assert finished(state, rules, stop).tolist() == [False]
