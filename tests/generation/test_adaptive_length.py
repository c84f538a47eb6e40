"""A canvas that grows and shrinks with what the model predicts on it (rho-EOS, and DAEDAL's first stage)."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from every_setting import CACHES, METHODS, go_together
from problems import FAMILIES, STOPS, model_of
from recorded_training_free import recorded_runs
from thin import covering
from tiny import EOS, MASK, PAD, ScriptedModel, answer, left_padded, tiny_model, tiny_prompt
from transformers.generation import CompileConfig

from d3llm_hf import D3LLMGenerationConfig
from d3llm_hf.models.adaptive_length import AdaptiveLength
from d3llm_hf.models.decoding import Rules, State
from d3llm_hf.models.methods import LENGTHS


STOP = list(STOPS[-1])  # of a vocabulary of 32 five, so that random models predict some
WHOLE = {"early_stop": False, "seed": 0, "return_dict_in_generate": True, "eos_token_id": EOS, "pad_token_id": PAD}
ADAPTIVE = {"length": "adaptive", "initial_length": 7, "length_step": 2}
FAST = METHODS["fast_dllm"]
COUNTS = ("step_map", "num_forwards", "positions_computed", "tokens_per_forward", "canvas_length")
IN_ORDER = [name for name in METHODS if not name.startswith("dream") and "steps" not in METHODS[name]]


# ---- Recorded runs --------------------------------------------------------------------------------------------------

RUNS = [("rho_eos", run) for run in recorded_runs("rho_eos")] + [("daedal", run) for run in recorded_runs("daedal")]
SCHEDULE = {"const": "constant", "linear": "linear", "exp": "exponential"}


@pytest.mark.every(4)
@pytest.mark.parametrize("suite, run", RUNS, ids=lambda value: getattr(value, "id", value))
def test_a_recorded_run_is_reproduced_token_for_token_and_forward_for_forward(suite, run):
    args, limit = run.args, run.args["max_gen_length"]
    chosen = {"decoding_method": "fast_dllm", "confidence_threshold": args["high_conf_threshold"]}
    chosen |= {"block_length": args["block_length"], "initial_length": args["initial_gen_length"]}
    chosen |= {"length": "adaptive"}
    chosen |= {"length_step": args["expansion_factor"], "length_window": args["eos_check_tokens"]}
    if suite == "rho_eos":
        chosen |= {"length_rule": "rho_eos_tail", "length_schedule": SCHEDULE[args["scheduler"]]}
        chosen |= {"length_low": args["low_density_threshold"], "length_high": args["high_density_threshold"]}
    else:
        chosen |= {"length_rule": "daedal", "length_low": args["eos_confidence_threshold"]}
    output = run.generate(**chosen, max_new_tokens=limit, eos_token_id=510)
    # What was cut off, or never came, is padded here with the stop token that DAEDAL gives behind its canvas.
    padding = len(run.prompt) + limit - len(run.sequence)
    whole = replace(run, sequence=run.sequence + [510] * padding, commit_step=run.commit_step + [-1] * padding)
    whole.assert_matches(output)
    assert int(output.positions_computed) == sum(len(run.prompt) + length for length in run.canvas_lengths[:-1])


def test_no_recorded_run_is_left_out_by_accident():
    assert len(RUNS) == 9


# ---- A slow oracle of the share -------------------------------------------------------------------------------------


def slowly(model, prompt, limit, threshold, block, stops, early_stop, initial, low=0.4, high=0.6, step=8):
    """rho-EOS by the share, on lists: the canvas, the forward of each commit, and positions computed."""
    canvas, when, computed, forward = [MASK] * initial, {}, 0, 0
    while True:
        forward += 1
        computed += len(prompt) + len(canvas)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + canvas])).logits[0].double()
        logits = logits.roll(model.logit_shift, 0)[len(prompt) :]
        shown = logits.clone()
        shown[:, MASK] = -math.inf
        best, sure = shown.argmax(-1).tolist(), logits.softmax(-1).gather(1, shown.argmax(-1, keepdim=True))[:, 0]
        # 1. Decide what is sure in the first block that is not full
        first = canvas.index(MASK) // block * block
        inside = [i for i in range(first, min(first + block, len(canvas))) if canvas[i] == MASK]
        chosen = [i for i in inside if sure[i] >= threshold] or [max(inside, key=lambda i: (float(sure[i]), -i))]
        for i in chosen:
            canvas[i], when[i] = best[i], forward
        # 2. Change the length
        left = [i for i, token in enumerate(canvas) if token == MASK]
        stopped = next((i for i, token in enumerate(canvas) if token in stops), None) if early_stop else None
        if left and forward <= 64:
            writing = [i for i in left if best[i] not in stops]
            share = 1 - len(writing) / len(left)
            if share < low and stopped is None:
                more = min(8, 2 ** (math.ceil(round((low - share) / 0.1, 5)) - 1)) * step
                canvas += [MASK] * (min(limit, len(canvas) + more) - len(canvas))
            if share > high:
                fewer = min(8, 2 ** (math.ceil(round((share - high) / 0.1, 5)) - 1)) * step
                needed = writing + [i for i in range(len(canvas)) if canvas[i] != MASK]
                needed = [i for i in needed if stopped is None or i <= stopped]
                keep = max(needed, default=-1) + 1 + math.ceil(round(len(writing) * high / (1 - high), 5))
                canvas = canvas[: max(1, len(canvas) - fewer, min(len(canvas), keep))]
                when = {i: at for i, at in when.items() if i < len(canvas)}
        # 3. Until nothing is left to decide
        if MASK not in (canvas if stopped is None else canvas[: stopped + 1]):
            return canvas, when, computed, forward


@pytest.mark.every(3)
@pytest.mark.parametrize("seed", range(24))
def test_a_canvas_is_as_long_as_the_oracle_makes_it(seed):
    model, limit = model_of(FAMILIES[seed % 2], seed % 3, 1), 12 + seed
    prompt, stops = tiny_prompt(seed, 2 + seed % 5), STOP if seed % 4 else [*STOP, 1, 2, 4, 5]
    initial, early_stop, threshold = 3 + seed % 9, bool(seed % 3), (0.3, 0.6, 0.9)[seed % 3]
    output = answer(
        model, prompt, decoding_method="fast_dllm", confidence_threshold=threshold, block_length=4,
        eos_token_id=stops, pad_token_id=PAD, max_new_tokens=limit, early_stop=early_stop, length="adaptive",
        initial_length=initial, return_dict_in_generate=True,
    )  # fmt: skip
    canvas, when, computed, forwards = slowly(model, prompt, limit, threshold, 4, stops, early_stop, initial)
    assert output.step_map[0].tolist() == [when.get(i, -1) for i in range(limit)]
    found = output.sequences[0, len(prompt) :].tolist()
    end = next((i + 1 for i, token in enumerate(canvas) if token in stops), len(canvas))
    assert found == canvas[:end] + [PAD] * (limit - end)
    assert (int(output.num_forwards), int(output.positions_computed)) == (forwards, computed)
    assert int(output.canvas_length) == len(canvas)


# ---- Laws -----------------------------------------------------------------------------------------------------------


def rule_settings(rule: str) -> dict:
    return ADAPTIVE | {"length_rule": rule} | ({} if rule == "rho_eos" else {"length_window": 3})


@pytest.mark.every(32)
@pytest.mark.parametrize("name, rule, family", covering(IN_ORDER, LENGTHS, FAMILIES))
def test_a_row_is_as_long_in_a_batch_as_alone(name, rule, family):
    prompts = [tiny_prompt(seed, 1 + 2 * seed) for seed in range(3)]
    chosen = METHODS[name] | {"kv_cache": "none"} | WHOLE | {"max_new_tokens": 24, "eos_token_id": STOP}
    chosen, model = chosen | {"early_stop": len(name) % 2 == 0} | rule_settings(rule), model_of(family, 2, 2)
    together = model.generate(**left_padded(prompts), **chosen | {"seed": [0] * 3})
    for row, prompt in enumerate(prompts):
        alone = model.generate(**left_padded([prompt]), **chosen)
        assert together.sequences[row, -24:].tolist() == alone.sequences[0, -24:].tolist()
        for field in COUNTS:
            assert together[field][row].tolist() == alone[field][0].tolist(), field
        assert not (alone.sequences == MASK).any()
        assert 1 <= int(alone.canvas_length) <= 24 and int(alone.num_forwards) <= 24 + 64


@pytest.mark.full
@pytest.mark.parametrize("rule", LENGTHS)
def test_every_row_ends_whatever_the_model_says(rule):
    for seed in range(24):
        model, limit = model_of(FAMILIES[seed % 2], seed % 3, 1), 1 + seed
        chosen = METHODS[IN_ORDER[seed % len(IN_ORDER)]] | WHOLE | {"eos_token_id": list(range(seed % 29 + 1))}
        chosen |= rule_settings(rule) | {"initial_length": 1 + seed % limit, "kv_cache": "none"}
        output = answer(model, tiny_prompt(seed, 4), **chosen, max_new_tokens=limit)
        assert not (output.sequences == MASK).any() and int(output.num_forwards) <= limit + 64
        assert 1 <= int(output.canvas_length) <= limit


@pytest.mark.every(12)
@pytest.mark.parametrize("cache", [name for name in CACHES if name != "none"])
@pytest.mark.parametrize("rule", ["rho_eos", "daedal"])
def test_a_cache_that_keeps_nothing_changes_nothing(cache, rule):
    name = "llada, random" if cache == "dkv_greedy" else "fast_dllm"
    assert go_together(METHODS[name], cache)
    chosen = {n: v for n, v in METHODS[name].items() if n != "steps"} | WHOLE | rule_settings(rule)
    prompt = left_padded([tiny_prompt(seed, 4 + seed) for seed in range(2)])
    kept = {n: v for n, v in CACHES[cache].items() if n not in ("cache_delay", "cache_warmup")}
    for family in FAMILIES:
        base, same = (
            model_of(family, 2, 2).generate(**prompt, **chosen | more, max_new_tokens=20)
            for more in ({"kv_cache": "none"}, kept | {"cache_refresh_interval": 1})
        )
        for field in ("sequences", "step_map", "canvas_length", "num_forwards"):
            assert torch.equal(base[field], same[field]), field


@pytest.mark.parametrize("rule", LENGTHS)
def test_what_was_streamed_is_never_taken_back(rule):
    class Reader:
        supports_batch = True

        def __init__(self):
            self.texts, self.drafts = {}, 0

        def put(self, value, row=None):
            if row is not None:
                self.texts.setdefault(row, []).extend(value.tolist())

        def put_draft(self, value, row):
            self.drafts = max(self.drafts, len(value) + len(self.texts.get(row, [])))

        def end(self):
            pass

    for seed in range(3):
        reader, prompts = Reader(), [tiny_prompt(seed + i, 3 + i) for i in range(3)]
        chosen = FAST | WHOLE | rule_settings(rule) | {"eos_token_id": STOP, "early_stop": True}
        output = model_of("llada", seed, 1).generate(
            **left_padded(prompts), **chosen, max_new_tokens=20, streamer=reader
        )
        for row, tokens in enumerate(output.sequences[:, -20:].tolist()):
            told = reader.texts.get(row, [])
            assert told == tokens[: len(told)] and set(tokens[len(told) :]) <= {PAD}
        assert reader.drafts <= 20


@pytest.mark.full
def test_a_streamer_of_one_row_sees_the_canvas_as_long_as_it_is():
    class Reader:
        told, lengths = 0, ()

        def put(self, value):
            self.told += len(value) if value.ndim == 1 else 0  # the prompt comes as a batch

        def put_draft(self, value):
            self.lengths += (self.told + len(value),)

        def end(self):
            pass

    reader = Reader()
    output = answer(writer(9), [1], **SLOW, **ADAPTIVE, max_new_tokens=40, streamer=reader)
    # A token a forward. None of 6 undecided positions would be a stop token: 16 more, of which 14 would be.
    assert reader.lengths[0] == 7 + 16 and max(reader.lengths) == 23
    assert reader.told == int(output.canvas_length) == 9


# ---- Models that know what they write -------------------------------------------------------------------------------


def writer(length: int, sureness: float = 20.0) -> ScriptedModel:
    """Sure of an answer of `length` tokens behind a prompt of one, and of stop tokens behind it."""

    def script(ids):
        wanted = torch.where(torch.arange(ids.shape[1]) <= length, 7, EOS)
        return torch.nn.functional.one_hot(wanted, 32).float().expand(len(ids), -1, -1) * sureness

    return ScriptedModel(script)


SLOW = {"decoding_method": "fast_dllm", "block_length": 8, "confidence_threshold": 1.0} | WHOLE | {"early_stop": True}


def test_a_canvas_grows_to_what_the_model_writes_and_no_further():
    for rule, longest in (("rho_eos", 120), ("daedal", 58)):
        chosen = {"length": "adaptive", "initial_length": 8, "length_rule": rule}
        output = answer(writer(40), [1], **SLOW | chosen, max_new_tokens=200)
        assert output.sequences[0].tolist() == [1] + [7] * 40 + ([EOS] if rule == "daedal" else []) + [PAD] * (
            160 - (rule == "daedal")
        )
        assert 40 <= int(output.canvas_length) <= longest
        fixed = answer(writer(40), [1], **SLOW, max_new_tokens=200)
        assert int(output.positions_computed) < int(fixed.positions_computed) / 2


def test_a_canvas_shrinks_and_a_forward_costs_what_it_has_left():
    output = answer(writer(4), [1], **SLOW, length="adaptive", max_new_tokens=64)
    # One token a forward. Of 63 undecided positions 60 would be stop tokens: 5 tenths too many, and 64 fewer would do;
    # 3 that are text keep 5 that are not, of 2 it is 3, of 1 it is 2.
    assert output.step_map[0, :5].tolist() == [1, 2, 3, 4, -1]
    assert int(output.canvas_length) == 4
    assert int(output.positions_computed) == (1 + 64) + (1 + 9) + (1 + 7) + (1 + 6)
    assert output.sequences[0].tolist() == [1, 7, 7, 7, 7] + [PAD] * 60


def test_a_longer_answer_than_the_limit_fills_it():
    output = answer(writer(500), [1], **SLOW, length="adaptive", initial_length=8, max_new_tokens=30)
    assert output.sequences[0].tolist() == [1] + [7] * 30 and int(output.canvas_length) == 30


@pytest.mark.parametrize("least", [{"min_new_tokens": 9}, {"min_length": 10}])
def test_an_answer_has_the_tokens_that_it_must_have(least):
    output = answer(writer(3), [1], **SLOW, **least, length="adaptive", initial_length=2, max_new_tokens=30)
    text = output.sequences[0, 1:].tolist()
    assert EOS not in text[:9] and PAD not in text[:9] and int(output.canvas_length) >= 9


@pytest.mark.full
def test_constraints_samples_and_guidance_hold_on_a_canvas_that_changes():
    for family in FAMILIES:
        model, chosen = tiny_model(family, 1, spread=1.0), FAST | WHOLE | ADAPTIVE | {"max_new_tokens": 20}
        once = answer(model, tiny_prompt(1, 4), **chosen, no_repeat_ngram_size=2).sequences[0].tolist()
        once = once[: once.index(EOS, 4)] if EOS in once[4:] else [t for t in once if t != PAD]
        assert len(set(pairwise(once))) == len(once) - 1
        drawn = [answer(model, [1, 2], **chosen, do_sample=True, cfg_scale=0.5) for _ in range(2)]
        assert torch.equal(drawn[0].sequences, drawn[1].sequences)
        assert not (drawn[0].sequences == MASK).any()


def test_nothing_remembers_a_length_that_was_fixed():
    base, same = (answer(model_of("llada", 1, 1), [3, 4], **FAST | WHOLE | more, max_new_tokens=9) for more in FIXED)
    assert torch.equal(base.step_map, same.step_map) and base.canvas_length.tolist() == [9]


FIXED: tuple[dict, dict] = ({}, {"length": "fixed"})


# ---- The rule, by hand ----------------------------------------------------------------------------------------------


def start(rule: str, length: int, limit: int, **more):
    rules = Rules(block_length=4, score="confidence", select="threshold", length_rule=rule, initial_length=length)
    rules = replace(rules, **{name: value for name, value in LENGTHS[rule].items() if hasattr(rules, name)} | more)
    state = State.start(torch.full((1, limit), MASK), torch.ones(1, limit, dtype=torch.bool), rules)
    canvas = type("Canvas", (), {"mask_token_id": MASK})()
    adaptive = AdaptiveLength(rules, torch.tensor([EOS]), canvas, least=1)
    adaptive.begin(state)
    return adaptive, state


def told(adaptive, state, stops: list[bool], sureness: float = 1.0):
    """Changes the length after a forward that predicts stop tokens there."""
    limit = state.tokens.shape[1]
    adaptive.stops = torch.tensor([stops + [False] * (limit - len(stops))])
    adaptive.sureness = adaptive.stops.float() * sureness
    state.step = state.step + 1
    adaptive.change(state, torch.tensor([limit]))
    return int(state.length)


@pytest.mark.parametrize(
    "schedule, stops, expected",
    [
        ("constant", 0, 22), ("linear", 0, 28), ("exponential", 0, 36),  # 4 tenths too few
        ("exponential", 2, 24), ("linear", 2, 24), ("exponential", 5, 20), ("constant", 3, 22),
    ],
)  # fmt: skip
def test_a_canvas_grows_by_steps_for_each_tenth(schedule, stops, expected):
    adaptive, state = start("rho_eos", 20, 100, length_schedule=schedule, length_step=2)
    state.undecided[:, 10:] = False  # ten are left, of which so many would be stop tokens
    state.undecided[:, 20:] = False
    assert told(adaptive, state, [True] * stops + [False] * (20 - stops)) == expected


def test_a_canvas_is_cut_behind_what_is_needed():
    adaptive, state = start("rho_eos", 20, 40)
    state.undecided[0, 3] = False
    stops = [False] * 2 + [True] * 18
    # 17 of 19 would be stop tokens, 3 tenths too many: 32 fewer, but the decided one stays, and 3 behind it for 2 that
    # are text.
    assert told(adaptive, state, stops) == 7
    assert state.undecided[0].tolist() == [True] * 3 + [False] + [True] * 3 + [False] * 33
    assert told(adaptive, state, stops) == 7


def test_rho_eos_as_its_code_has_it_cuts_what_is_decided_and_leaves_a_full_canvas_alone():
    adaptive, state = start("rho_eos_tail", 20, 40, length_window=4)
    assert state.held.tolist() == [True]
    state.undecided[0, 15], state.tokens[0, 15], state.step_map[0, 15] = False, 5, 1
    assert told(adaptive, state, [False] * 16 + [True] * 4, sureness=0.65) == 12
    assert state.tokens[0, 15] == MASK and state.step_map[0, 15] == -1
    assert told(adaptive, state, [False] * 12) == 40  # 4 tenths too few: 64 more
    assert not state.finding.any() and not state.held.any()
    assert told(adaptive, state, [True] * 40) == 40


def test_a_length_is_found_after_64_forwards_at_the_latest():
    adaptive, state = start("rho_eos", 4, 4000)
    for _ in range(64):
        told(adaptive, state, [False] * 4000)
    assert int(state.length) == 4000 and not state.finding.any()


def test_daedal_grows_before_it_decides_and_then_gives_stop_tokens_behind_the_canvas():
    adaptive, state = start("daedal", 4, 20, length_step=3, length_window=4)
    state.step = state.step - 1  # counted by `told`; a forward that only measures is no step
    assert told(adaptive, state, [False] * 4) == 7 and int(state.step) == -1
    assert adaptive.permitted(torch.ones(1, 20, dtype=torch.bool), state).sum() == 0
    assert told(adaptive, state, [False] * 5 + [True] * 2) == 7
    assert state.tail.tolist() == [2] and state.tokens[0, 6:10].tolist() == [MASK, EOS, EOS, MASK]
    assert adaptive.permitted(state.undecided, state).sum() == 7
    assert not state.undecided[0, 7:].any() and state.stop(torch.tensor([EOS]), state.undecided | True).item() == 20


# ---- Settings -------------------------------------------------------------------------------------------------------

REFUSED = [
    ({"length": "long"}, '`length` must be "fixed" or "adaptive"'),
    ({"length": "fixed", "initial_length": 4}, '`initial_length` is not used by length="fixed"'),
    ({"length_rule": "daedal", "length": None}, '`length_rule` is not used by length="fixed"'),
    ({"length_rule": "daedal", "length_high": 0.9}, '`length_high` is not used by length_rule="daedal"'),
    ({"length_window": 4}, '`length_window` is not used by length_rule="rho_eos"'),
    ({"length_rule": "mine"}, "`length_rule` must be one of"),
    ({"length_schedule": "mine"}, "`length_schedule` must be one of"),
    ({"length_low": 0.7}, "`length_low` must be at most `length_high`"),
    ({"length_low": 1.5}, "`length_low` must be a fraction"),
    ({"length_step": 0}, "`length_step` must be a positive integer"),
    ({"initial_length": 99}, "`initial_length` must be at most `max_new_tokens`"),
    ({"eos_token_id": []}, "needs an `eos_token_id`"),
    ({"decoding_method": "dream"}, "does not go together with decoding_method='dream'"),
    ({"decoding_method": "llada", "steps": 4}, "does not go together with steps=4"),
    ({"suffix_length": 4}, "does not go together with suffix_length=4"),
    ({"decoding_method": "llada", "lossless": True}, "does not go together with lossless=True"),
    ({"lookahead": 1}, "does not go together with lookahead=1"),
    ({"length_rule": "rho_eos_tail", "kv_cache": "dual"}, "does not go together with kv_cache='dual'"),
    ({"forced_eos_token_id": EOS}, "does not go together with forced_eos_token_id="),
    ({"infill": True}, "cannot be combined with infilling"),
    ({"compile_config": CompileConfig()}, "`compile_config` does not go together with `length="),
]


@pytest.mark.parametrize("chosen, message", REFUSED, ids=str)
def test_what_has_no_meaning_with_an_adaptive_length_is_refused(chosen, message):
    model = writer(4)
    with pytest.raises(ValueError, match=message):
        answer(model, [1, MASK, 2], **{"decoding_method": "fast_dllm", "length": "adaptive"} | chosen)
    assert not model.calls


def test_a_call_may_leave_the_length_of_a_checkpoint_or_follow_another_rule():
    model = tiny_model("llada", 1)
    own = {"length": "adaptive", "initial_length": 4, "length_rule": "rho_eos_tail", "length_window": 5}
    model.generation_config = D3LLMGenerationConfig(decoding_method="fast_dllm", block_length=4, **own)
    prompt = left_padded([tiny_prompt(1, 5)])
    found = model.generate(**prompt, **WHOLE, max_new_tokens=8, length="fixed")
    assert int(found.positions_computed) == 13 * int(found.num_forwards) and found.canvas_length.tolist() == [8]
    found = model.generate(**prompt, **WHOLE, max_new_tokens=8, length_rule="rho_eos")
    assert found.canvas_length.tolist() != [0]
    found = model.generate(**prompt, **WHOLE, max_new_tokens=8, decoding_method="llada")
    assert found.canvas_length.tolist() == [8]
