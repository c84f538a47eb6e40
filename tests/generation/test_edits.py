"""Tokens that may still be replaced after they were decided: the laws of editing (LLaDA2.1)."""

import pytest
import torch
from listening import Listener
from places import GOLDEN
from recorded_blocks import checkpoint, of_llada2, recorded_cases
from tiny import PAD, ScriptedModel, answer, left_padded, tiny_prompt, trained_like
from transformers import AutoModelForCausalLM, LogitsProcessor

from d3llm_hf import D3LLMGenerationConfig
from d3llm_hf.models.decoding import State, commit, finished, open_blocks, revise
from d3llm_hf.models.methods import rules_of
from d3llm_hf.models.topology import PLAIN
from d3llm_hf.watch.trace import Recording


CASES = {case.id: case for case in recorded_cases("llada2", of_llada2) if not case.settings.get("do_sample")}
EDITING = [case for case in CASES.values() if case.flags["edits"]]
# Thresholds at which the recorded model changes its mind often.
SETTINGS = {"confidence_threshold": 0.1, "edit_threshold": 0.0, "max_post_steps": 4, "early_stop": False}
WHOLE = {"return_dict_in_generate": True, "pad_token_id": PAD, "eos_token_id": 508, "mask_token_id": 511}


def prompts(count):
    found = list(dict.fromkeys(case.prompt for case in CASES.values()))
    return [list(prompt) for prompt in (found * 2)[:count]]


def decode(rows, **more):
    """Of rows of different lengths, padded on the left."""
    chosen = WHOLE | SETTINGS | {"max_new_tokens": 40, "block_length": 16} | more
    return checkpoint("llada2-tiny-a").generate(**left_padded(rows), **chosen)


# ---- Nobody is shown a token that turns out to be another one ------------------------------------------------------


def test_a_streamed_prefix_never_changes_though_tokens_are_replaced():
    listener = Listener(511)
    rows = [list(case.prompt) for case in EDITING[:4]]
    output = decode(rows, streamer=listener)
    width = max(map(len, rows))
    for row in range(4):
        final = output.sequences[row, width:].tolist()
        assert listener.tokens[row] == final[: len(listener.tokens[row])]
        assert len(listener.tokens[row]) == final.index(508) + 1 if 508 in final else len(final)
    assert listener.replaced > 0


def test_a_stopping_criterion_reads_settled_tokens_only():
    read = []

    def look(ids, scores, **kwargs):
        read.append(ids[0, len(EDITING[0].prompt) :].tolist())
        return torch.zeros(len(ids), dtype=torch.bool)

    final = decode([list(EDITING[0].prompt)], stopping_criteria=[look]).sequences[0, len(EDITING[0].prompt) :].tolist()
    assert len(read) >= 3 and all(text == final[: len(text)] for text in read)


def test_a_trace_ends_with_the_tokens_of_the_answer():
    case = EDITING[0]

    class Plain:
        all_special_ids, clean_up_tokenization_spaces = (), False

        def decode(self, ids, **kwargs):
            return "".join(f"<{token}>" for token in ids)

    ids = torch.tensor([case.prompt])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    chosen = {"max_new_tokens": 40, "block_length": 16, "mask_token_id": 511, "eos_token_id": 508, "pad_token_id": PAD}
    with Recording(checkpoint("llada2-tiny-a"), Plain(), "", inputs, **(SETTINGS | chosen)) as recording:
        forwards = list(recording)
        trace = recording.trace()
    final = decode([list(case.prompt)]).sequences[0, len(case.prompt) :].tolist()
    assert forwards == list(range(1, len(forwards) + 1))
    assert trace.tokens[: trace.lengths[-1]] == final[: trace.lengths[-1]]


# ---- The cache is exact, and rows do not meet -----------------------------------------------------------------------


@pytest.mark.full
def test_an_exact_cache_changes_nothing_alone_and_rows_are_what_they_are_in_a_batch():
    rows = prompts(20)
    alone = [decode([row], kv_cache="exact") for row in rows]
    for row, cached in zip(rows, alone, strict=True):
        plain = decode([row], kv_cache="none")
        assert torch.equal(plain.sequences, cached.sequences) and torch.equal(plain.step_map, cached.step_map)
        assert torch.equal(plain.num_forwards, cached.num_forwards)
        assert cached.positions_computed <= plain.positions_computed
    assert len({len(row) for row in rows}) > 4
    for start in range(0, 20, 4):
        for kv_cache in ("exact", "none"):
            together = decode(rows[start : start + 4], kv_cache=kv_cache)
            for index, single in enumerate(alone[start : start + 4]):
                assert torch.equal(together.sequences[index, -40:], single.sequences[0, -40:])
                assert torch.equal(together.step_map[index], single.step_map[0])
                assert together.num_forwards[index] == single.num_forwards[0]


@pytest.mark.every(6)
@pytest.mark.parametrize("family", ["llada", "Dream"])
@pytest.mark.parametrize(
    "cache",
    [
        {"kv_cache": "prefix", "cache_refresh_interval": 1},
        {"kv_cache": "dual", "cache_refresh_interval": 1},
        {"kv_cache": "delayed", "cache_refresh_interval": 1},
        {"kv_cache": "dkv", "cache_refresh_interval": 1},
    ],
    ids=lambda cache: cache["kv_cache"],
)
def test_models_that_see_everything_edit_too_and_a_cache_that_keeps_nothing_changes_nothing(family, cache):
    chosen = {"decoding_method": "llada2", "block_length": 5, "confidence_threshold": 0.3, "edit_threshold": 0.0}
    chosen |= {"max_post_steps": 3, "early_stop": False}
    model, prompt = trained_like(family, 1), tiny_prompt(2, 5)
    plain, cached = answer(model, prompt, **chosen), answer(model, prompt, **chosen | cache)
    assert torch.equal(plain.sequences, cached.sequences) and torch.equal(plain.step_map, cached.step_map)
    fixed = answer(model, prompt, **chosen | {"edit_threshold": None, "max_post_steps": None})
    assert plain.num_forwards > fixed.num_forwards


# ---- Decoding ends --------------------------------------------------------------------------------------------------


def restless():
    """A model that wants another token everywhere at each call."""
    calls = []

    def script(ids):
        calls.append(None)
        wanted = torch.full(ids.shape, 3 + len(calls) % 7)
        return torch.nn.functional.one_hot(wanted, 32).float() * 8

    return script


@pytest.mark.parametrize("max_post_steps", [0, 1, 5])
@pytest.mark.parametrize("early_stop", [True, False])
def test_no_block_is_looked_at_more_often_than_allowed(max_post_steps, early_stop):
    chosen = {"decoding_method": "llada2", "block_length": 4, "min_commits": 2, "confidence_threshold": 1.0}
    chosen |= {"edit_threshold": 0.5, "max_post_steps": max_post_steps, "early_stop": early_stop}
    output = answer(ScriptedModel(restless()), tiny_prompt(0, 3), max_new_tokens=10, **chosen)
    assert int(output.num_forwards) == 2 + 2 + 1 + 3 * max_post_steps
    assert int(output.num_forwards_reference) == int(output.num_forwards)
    last = 3 + int(output.num_forwards) % 7
    assert output.sequences[0, -2:].tolist() == [last, last]  # what the last forward wanted


def test_a_block_that_is_sure_of_itself_is_looked_at_once():
    model = ScriptedModel(lambda ids: torch.nn.functional.one_hot(torch.full(ids.shape, 5), 32).float() * 20)
    chosen = {"decoding_method": "llada2", "block_length": 4, "edit_threshold": 0.5}
    output = answer(model, tiny_prompt(0, 3), max_new_tokens=12, **chosen)
    assert (int(output.num_forwards), output.step_map[0].tolist()) == (6, [1] * 4 + [3] * 4 + [5] * 4)


@pytest.mark.full
@pytest.mark.every(2)
@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_every_row_ends_when_tokens_are_drawn(temperature):
    chosen = {"do_sample": True, "temperature": temperature, "edit_threshold": 0.3, "max_post_steps": 3}
    output = decode(prompts(4), seed=[3, 4, 5, 6], **chosen)
    blocks = 4  # of 16 tokens: 40, and those of a prompt in the first
    assert int(output.num_forwards.max()) <= blocks * (16 + 3)
    assert not (output.sequences[:, -40:] == 511).any()
    for index, row in enumerate(prompts(4)):
        alone = decode([row], seed=[3 + index], **chosen)
        assert torch.equal(alone.sequences[0, -40:], output.sequences[index, -40:])


# ---- The rules, by hand ---------------------------------------------------------------------------------------------


def rules(**chosen):
    values = {"early_stop": True, "cfg_scale": 0.0, "kv_cache": "none", "suffix_length": None, "temperature": None}
    values |= {"block_length": 2, "steps": None, "confidence_threshold": 0.95, "min_commits": 1}
    return rules_of("llada2", values | {"edit_threshold": 0.5, "max_post_steps": 2} | chosen, 4, PLAIN)


def start(decoding):
    state = State.start(torch.full((1, 4), 31), torch.ones(1, 4, dtype=torch.bool), decoding)
    state.forward += 1
    return state


def step(state, decoding, commits, tokens, costs):
    """One forward with the given commits, tokens and costs, each of four positions."""
    open_blocks(state, decoding, torch.tensor([4]))
    marked, wanted = torch.tensor([commits]).bool(), torch.tensor([tokens])
    commit(state, marked, wanted)
    revise(state, decoding, marked, wanted, torch.tensor([costs]))
    state.forward += 1
    return state


SURE, UNSURE = 0.1, 0.6931472  # the second is a probability of one half, which is not more than that


def test_a_decided_token_gives_way_to_a_surer_one_and_the_first_commit_stays_in_the_step_map():
    decoding = rules()
    state = step(start(decoding), decoding, [1, 0, 0, 0], [5, 5, 5, 5], [SURE] * 4)
    assert (state.tokens.tolist(), state.unsettled.tolist()) == ([[5, 31, 31, 31]], [[True, False, False, False]])
    state = step(state, decoding, [0, 1, 0, 0], [6, 7, 6, 6], [SURE] * 4)
    assert (state.tokens.tolist(), state.step_map.tolist()) == ([[6, 7, 31, 31]], [[1, 2, -1, -1]])
    assert state.changed.tolist() == [[True, True, False, False]] and int(state.reviews[0, 0]) == 0
    state = step(state, decoding, [0, 0, 0, 0], [8, 8, 8, 8], [UNSURE, SURE, SURE, SURE])
    assert (state.tokens.tolist(), state.open_count.tolist()) == ([[6, 8, 31, 31]], [1])
    state = step(state, decoding, [0, 0, 0, 0], [6, 8, 8, 8], [SURE] * 4)
    assert (state.unsettled.any(), state.pending.tolist()) == (torch.tensor(False), [[False, False, True, True]])
    state = step(state, decoding, [0, 0, 1, 0], [9, 9, 9, 9], [SURE] * 4)
    assert (state.tokens.tolist(), state.open_count.tolist()) == ([[6, 8, 9, 31]], [2])  # nothing finished is edited


def test_a_row_goes_on_until_the_block_of_its_stop_token_is_settled():
    decoding = rules()
    state = step(start(decoding), decoding, [1, 1, 0, 0], [5, 30, 5, 5], [SURE] * 4)
    stop = state.stop(torch.tensor([30]), torch.ones(1, 4, dtype=torch.bool))
    assert (stop.tolist(), finished(state, decoding, stop).tolist()) == ([1], [False])
    state = step(state, decoding, [0, 0, 0, 0], [5, 6, 5, 5], [SURE] * 4)  # the stop token is taken back
    assert state.stop(torch.tensor([30]), torch.ones(1, 4, dtype=torch.bool)).tolist() == [4]
    state = step(state, decoding, [0, 0, 0, 0], [5, 30, 5, 5], [SURE] * 4)
    assert finished(state, decoding, torch.tensor([1])).tolist() == [True]  # the last of two looks
    assert not finished(state, rules(early_stop=False), torch.tensor([1])).any()


def test_without_looks_a_block_is_settled_once_it_is_decided():
    decoding = rules(max_post_steps=0)
    state = step(start(decoding), decoding, [1, 0, 0, 0], [5, 5, 5, 5], [SURE] * 4)
    state = step(state, decoding, [0, 1, 0, 0], [6, 6, 6, 6], [SURE] * 4)
    assert (state.tokens.tolist(), state.unsettled.any()) == ([[6, 6, 31, 31]], torch.tensor(False))


# ---- Settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chosen, rule",
    [
        (
            {"steps": 4, "edit_threshold": 0.9},
            r"`steps` is not used with `edit_threshold`.*\(got 4 and 0.9\). Pass `min",
        ),
        ({"steps": 4, "min_commits": 2}, r"`min_commits` takes the place of `steps` \(got 2 and 4\)"),
        ({"max_post_steps": 4}, r"`max_post_steps` needs `edit_threshold`.*\(got 4\). Set both"),
        ({"edit_threshold": 1.5}, r"`edit_threshold` must be a probability in \[0, 1\] \(got 1.5\)"),
        ({"edit_threshold": 0.5, "max_post_steps": -1}, r"`max_post_steps` must be a non-negative integer"),
        ({"min_commits": 0}, r"`min_commits` must be a positive integer \(positions\) \(got 0\)"),
        ({"edit_threshold": 0.5, "no_repeat_ngram_size": 2}, r"`edit_threshold` cannot be combined.*NoRepeatNGram"),
        ({"edit_threshold": 0.5, "repetition_penalty": 2.0}, r"`edit_threshold` cannot be combined.*RepetitionPen"),
        ({"edit_threshold": 0.5, "bad_words_ids": [[5, 6]]}, r"`edit_threshold` cannot be combined.*NoBadWords"),
        ({"edit_threshold": 0.5, "lossless": True}, r'`lossless` is not used by decoding_method="llada2"'),
    ],
)
def test_settings_that_say_different_things_are_refused(chosen, rule):
    with pytest.raises(ValueError, match=rule):
        decode([[5, 6, 7]], **dict.fromkeys(SETTINGS) | {"decoding_method": None} | chosen)


def test_what_a_call_chooses_takes_the_place_of_what_the_checkpoint_has():
    model = checkpoint("llada2-tiny-a")
    own, kept = D3LLMGenerationConfig(min_commits=2), model.generation_config
    try:
        model.generation_config = own
        assert model.check_settings(max_new_tokens=8, mask_token_id=511, steps=4).min_commits is None
        model.generation_config = D3LLMGenerationConfig(steps=4)
        assert model.check_settings(max_new_tokens=8, mask_token_id=511, min_commits=2).steps is None
        assert model.check_settings(max_new_tokens=8, mask_token_id=511, edit_threshold=0.9).steps is None
        model.generation_config = D3LLMGenerationConfig(edit_threshold=0.9)
        with pytest.raises(ValueError, match=r"`steps` is not used with `edit_threshold`"):
            model.check_settings(max_new_tokens=8, mask_token_id=511, steps=4)
    finally:
        model.generation_config = kept


def test_banned_and_forced_tokens_hold_for_edits_as_well():
    plain = decode([list(EDITING[0].prompt)]).sequences[0, -40:]
    often = int(plain.mode().values)
    without = decode([list(EDITING[0].prompt)], bad_words_ids=[[often]], min_new_tokens=40).sequences[0, -40:]
    assert often not in without.tolist() and 508 not in without.tolist()


def test_a_processor_of_the_caller_sees_what_stands_before_an_edit():
    seen = []

    class Looking(LogitsProcessor):
        def __call__(self, ids, scores):
            seen.append(ids.shape[1])
            return scores

    prompt = list(EDITING[0].prompt)
    output = decode([prompt], logits_processor=[Looking()])
    assert torch.equal(output.sequences, decode([prompt]).sequences)
    assert len(seen) > 40 and max(seen) < len(prompt) + 40 + 16


def test_the_models_own_method_needs_no_name(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "llada2-tiny-a")
    config = model.check_settings(max_new_tokens=8, mask_token_id=511)
    assert config.method_of(model.traits) == "llada2"
    found = config.rules(8, model.traits)
    assert (found.block_length, found.kv_cache, found.min_commits, found.edit_threshold) == (32, "exact", 1, None)
