"""Calls that come and go between forwards: what a row gets does not depend on who shares them with it."""

import copy
from functools import cache
from random import Random

import pytest
import torch
from drawn import examples
from every_setting import CACHES, METHODS, PAIRS, drawn_cache, drawn_method
from hypothesis import given
from hypothesis import strategies as st
from places import GOLDEN
from recorded_blocks import checkpoint
from tiny import EOS, MASK, PAD, ScriptedModel, left_padded, tables, tiny_prompt, trained_like
from transformers import CompileConfig, StoppingCriteria

from d3llm_hf import ReFusionForCausalLM
from d3llm_hf.models.at_work import RowsAtWork, narrower


FIELDS = (
    "sequences",
    "step_map",
    "num_forwards",
    "num_forwards_reference",
    "num_store_forwards",
    "positions_computed",
    "num_revoked",
)
SMALL = {"mask_token_id": MASK}  # of models whose vocabulary was cut
BLOCKS = {
    "sdar": ("sdar-tiny-a", {"decoding_method": "sdar", "confidence_threshold": 0.6}),
    "sdar, no cache": ("sdar-tiny-a", {"decoding_method": "sdar", "steps": 2, "kv_cache": "none"}),
    "llada2": ("llada2-tiny-a", {"confidence_threshold": 0.6, "block_length": 8} | SMALL),
    "llada2.1": ("llada2-tiny-a", {"edit_threshold": 0.3, "confidence_threshold": 0.4} | SMALL),
    "fast_dllm_v2": ("fdv2-tiny-a", {"confidence_threshold": 0.5} | SMALL),
    "fast_dllm_v2, inside blocks": ("fdv2-tiny-a", {"kv_cache": "exact_dual"} | SMALL),
    "d2f": ("d2f-llada-tiny-a-lora", {"decoding_method": "d2f", "block_length": 4, "confidence_threshold": 0.5}),
    "refusion": ("refusion-tiny-a", {"slot_size": 4, "slot_threshold": 0.3, "token_threshold": 0.3}),
}
FURTHER = {
    "lossless": METHODS["llada, one token a forward"] | {"lossless": True, "draft_length": 3},
    "lossless, random": METHODS["llada, random"] | {"lossless": True, "draft_length": 2},
    "lookahead": METHODS["dparallel"] | {"lookahead": 2, "lookahead_threshold": 0.2},
    "lookahead, sliding": METHODS["fast_dllm"] | {"lookahead": 2, "window": "slide"},
    "sliding window": METHODS["fast_dllm"] | {"window": "slide", "kv_cache": "sliding"},
    "sliding span": METHODS["dparallel"] | {"window": "slide_span", "window_span": 7},
    "suffix": METHODS["d3llm"] | {"suffix_length": 3},
    "suffix, cached": METHODS["fast_dllm"] | {"suffix_length": 2, "kv_cache": "prefix"},
    "guided": METHODS["llada"] | {"cfg_scale": 0.7},
    "random positions": {"decoding_method": "dream", "block_length": 5, "steps": 9, "alg_temp": 0.4},
    "coins": {"decoding_method": "dream", "block_length": 5, "steps": 6, "remasking": "origin"},
    "wino": {"decoding_method": "wino", "block_length": 6, "confidence_threshold": 0.3, "threshold_back": 0.5},
    "relaxed": METHODS["fast_dllm"] | {"threshold_relaxation": 0.5},
}
CACHED_PAIRS = [pair for pair in PAIRS if pair[1] != "none"]
DRAWS = {"do_sample": True, "temperature": 0.8, "top_p": 0.9}


@cache
def exact(name: str):
    """A small model in float64: how its sums round, which depends on what shares a forward, decides nothing."""
    if name == "refusion-tiny-a":
        model = ReFusionForCausalLM.from_pretrained(GOLDEN / name).eval()
        model.generation_config = type(model.generation_config)()
        return model.double()
    model = copy.deepcopy(trained_like(name) if name in ("llada", "dream") else checkpoint(name)).double()
    return model.float() if name == "llada2-tiny-a" else model  # its experts add up in float32


def drawn_settings(rng: Random, kinds) -> tuple[str, dict]:
    """A model and settings of some method and cache."""
    kind = rng.choice(kinds)
    family = rng.choice(["llada", "dream"])
    if kind in ("pair", "cached"):
        method, cached = rng.choice(PAIRS if kind == "pair" else CACHED_PAIRS)
        chosen = drawn_method(rng, method) | drawn_cache(rng, cached) if rng.random() < 0.5 else None
        if chosen is not None and cached == "dkv_greedy":
            chosen["remasking"] = "random"
        settings = chosen or METHODS[method] | CACHES[cached]
    elif kind == "further":
        name = rng.choice(sorted(FURTHER))
        family, settings = "llada" if name == "wino" else family, FURTHER[name]
    else:
        family, settings = BLOCKS[rng.choice(sorted(BLOCKS))]
    draws = rng.random() < 0.3 and not settings.get("lossless") and not settings.get("lookahead")
    return family, settings | (DRAWS if draws else {}) | {"early_stop": rng.random() < 0.6}


def arguments(rng: Random, settings: dict, **more) -> dict:
    """A call of one or two prompts."""
    prompts = [tiny_prompt(rng.randrange(1000), rng.choice([1, 2, 3, 5, 9, 14])) for _ in range(rng.choice([1, 1, 2]))]
    length = rng.choice([8, 8, 12, 16, 24])
    seed = rng.choice([rng.randrange(2**40), [rng.randrange(2**40) for _ in prompts]])
    ends = {"eos_token_id": [EOS, 4], "pad_token_id": PAD, "return_dict_in_generate": True}
    return left_padded(prompts) | {"max_new_tokens": length, "seed": seed} | ends | settings | more


def run(rows: RowsAtWork, coming: dict[int, list], leaving: dict, limit: int = 4) -> None:
    """Steps until all has ended; calls come before certain forwards, wait for room and kin, and some leave.

    Args:
        coming: calls by the number of forwards before which they come.
        leaving: forwards of its own after which a call leaves.
    """
    waiting, made, age = [], 0, {}
    while waiting or rows.size or any(number >= made for number in coming):
        waiting += coming.get(made, [])
        while waiting and rows.size < limit and rows.takes(waiting[0]):
            rows.admit(waiting.pop(0))
        for call in list(rows.calls):
            age[call] = age.get(call, -1) + 1
            if leaving.get(call) == age[call]:
                rows.leave(call, RuntimeError("left"))
        if rows.size:
            rows.step()
        made += 1


def check_shared(seed: int, kinds=("pair", "pair", "further", "blocks")) -> int:
    """Calls that come and go as `seed` says have what they have alone; returns how many shared forwards."""
    rng = Random(seed)
    name, settings = drawn_settings(rng, kinds)
    model = exact(name)
    given = [arguments(rng, settings) for _ in range(rng.randint(2, 5))]
    calls = [model.prepare(**each) for each in given]
    coming: dict[int, list] = {}
    for call in calls:
        coming.setdefault(rng.choice([0, 1, 1, 2, 3, 5, 9]), []).append(call)
    leaving = {call: rng.randint(0, 6) for call in calls if rng.random() < 0.25}
    most, step = 0, RowsAtWork.step
    with model.rows_at_work(calls[0]) as rows:

        def counted():
            nonlocal most
            most = max(most, len(rows.calls))
            step(rows)

        rows.step = counted
        run(rows, coming, leaving)
    for call, each in zip(calls, given, strict=True):
        if call.error is not None:
            assert str(call.error) == "left" and call in leaving
            continue
        call.check()
        found, alone = model._result(call), model.generate(**each)
        for field in FIELDS:
            assert torch.equal(found[field], alone[field]), (name, settings, field)
        rates = found.tokens_per_forward_reference, alone.tokens_per_forward_reference
        assert (rates[0] is None) == (rates[1] is None) and (rates[0] is None or torch.equal(*rates))
    return most


@pytest.mark.full
@examples(500)
@given(st.integers(0, 2**32))
def test_what_a_row_gets_does_not_depend_on_who_comes_and_goes_beside_it(seed):
    check_shared(seed)


@pytest.mark.every(8)
@pytest.mark.parametrize("name", [*FURTHER, *BLOCKS])
def test_a_call_that_joins_in_mid_run_gets_what_it_gets_alone(name):
    family, settings = BLOCKS.get(name, ("llada", FURTHER.get(name)))
    model, rng = exact(family), Random(name)
    given = [arguments(rng, settings) | {"max_new_tokens": 16} for _ in range(3)]
    calls = [model.prepare(**each) for each in given]
    with model.rows_at_work(calls[0]) as rows:
        run(rows, {0: calls[:1], 1: calls[1:2], 2: calls[2:]}, {}, limit=9)
    for call, each in zip(calls, given, strict=True):
        found, alone = model._result(call), model.generate(**each)
        assert all(torch.equal(found[field], alone[field]) for field in FIELDS)


@pytest.mark.full
def test_most_of_the_drawn_calls_do_share_forwards():
    assert sum(check_shared(seed) > 1 for seed in range(3)) >= 1


def test_rows_that_recompute_little_go_apart_from_those_that_recompute_much_where_that_is_less_work():
    assert narrower([100, 20, 100, 20]) is None
    assert narrower([300, 20, 20, 300, 20]) == [1, 2, 4]
    assert narrower([300] * 9) is None and narrower([5]) is None


def test_in_two_forwards_a_row_gets_what_it_gets_in_one(monkeypatch):
    monkeypatch.setattr("d3llm_hf.models.at_work.FORWARD", 0)
    for seed in range(2):
        check_shared(seed, ["cached", "cached", "blocks"])


# ---- What does not go together -------------------------------------------------------------------------------------


class Never(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(len(input_ids), dtype=torch.bool)


def call_of(prompt=(1, 2, 3), **settings):
    ids = torch.tensor([list(prompt)])
    plain = {"max_new_tokens": 8, "eos_token_id": EOS, "pad_token_id": PAD, "decoding_method": "llada"}
    return exact("llada").prepare(ids, attention_mask=torch.ones_like(ids), **plain | settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"decoding_method": "dparallel"},
        {"remasking": "entropy"},
        {"do_sample": True},
        {"eos_token_id": 5},
        {"pad_token_id": 6},
        {"repetition_penalty": 1.3},
        {"compile_config": CompileConfig(), "prompt": [1, 2]},
    ],
    ids=str,
)
def test_calls_of_other_rules_or_that_read_texts_do_not_join(settings):
    other = call_of(**settings)
    with exact("llada").rows_at_work(other) as rows:
        rows.admit(call_of())
        assert not rows.takes(other)
        with pytest.raises(ValueError, match="of the kind of those at work"):
            rows.admit(other)
        rows.leave(rows.calls[0], RuntimeError())
        assert rows.takes(other) and rows.size == 0


def test_what_does_not_change_the_rules_may_join_even_at_another_temperature_of_its_own():
    first, rest = call_of(do_sample=True, temperature=0.5), {"do_sample": True, "seed": 3, "max_new_tokens": 12}
    with exact("llada").rows_at_work(first) as rows:
        rows.admit(first)
        assert not rows.takes(call_of(**rest, temperature=0.6))
        assert not rows.takes(call_of(**rest))  # blocks of 12
        assert rows.takes(call_of(**rest | {"max_new_tokens": 8}, temperature=0.5, stopping_criteria=[Never()]))


def test_a_model_that_does_not_read_padding_lets_nobody_join():
    model = exact("llada")
    calls = [call_of(), call_of()]
    try:
        model.supports_padding = False
        with model.rows_at_work(calls[0]) as rows:
            rows.admit(calls[0])
            assert not rows.takes(calls[1])
    finally:
        del model.supports_padding


# ---- Faults are the call's own -------------------------------------------------------------------------------------


class Broken(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        raise RuntimeError("of the criterion")


class Streamer:
    """Counts what it is told, and raises at its n-th forward or at its end."""

    supports_batch = True

    def __init__(self, forwards: int = 99, at_end: bool = False):
        self.forwards, self.at_end, self.told, self.errors = forwards, at_end, [], []

    def put(self, value, row=None):
        self.told += [] if row is None else value.tolist()

    def end_step(self):
        self.forwards -= 1
        if not self.forwards:
            raise RuntimeError("of the streamer")

    def fail(self, error):
        self.errors.append(error)

    def end(self):
        self.told.append("end")
        if self.at_end:
            raise RuntimeError("of the end")


@pytest.mark.parametrize(
    "fault",
    [{"stopping_criteria": [Broken()]}, {"streamer": Streamer(2)}, {"streamer": Streamer(at_end=True)}],
    ids=["criterion", "streamer", "end"],
)
def test_an_error_of_one_calls_criterion_or_streamer_ends_this_call_alone(fault):
    heard = Streamer()
    good, bad = call_of(streamer=heard), call_of([4, 5], **fault)
    with exact("llada").rows_at_work(good) as rows:
        run(rows, {0: [good], 1: [bad]}, {})
    good.check()
    ids = torch.tensor([[1, 2, 3]])
    alone = exact("llada").generate(ids, max_new_tokens=8, eos_token_id=EOS, pad_token_id=PAD, decoding_method="llada")
    assert torch.equal(good.answers()[0], alone)
    assert heard.told[-1] == "end" and heard.errors == []
    with pytest.raises(RuntimeError, match="of the "):
        bad.check()


def test_logits_that_are_no_numbers_end_the_calls_whose_rows_have_them():
    table = tables(17, 40)

    def script(ids):
        logits = table[(ids == 31).sum(1) % len(table), : ids.shape[1]].clone()
        logits[(ids == 7).any(1)] = float("nan")
        return logits

    model = ScriptedModel(script)
    plain = {"max_new_tokens": 8, "pad_token_id": PAD, "suppress_tokens": [7], "decoding_method": "llada"}
    good, bad = (model.prepare(torch.tensor([prompt]), **plain) for prompt in ([1, 2, 3], [1, 7, 3]))
    with model.rows_at_work(good) as rows:
        run(rows, {0: [good], 2: [bad]}, {})
    assert good.ended is not None and good.error is None
    with pytest.raises(ValueError, match="row 0 of the batch in forward 1"):
        bad.check()


def test_whatever_ends_the_work_ends_the_streams():
    streamers = Streamer(), Streamer()
    calls = [call_of(streamer=each) for each in streamers]
    with pytest.raises(KeyboardInterrupt), exact("llada").rows_at_work(calls[0]) as rows:
        rows.admit(calls[0])
        rows.step()
        rows.admit(calls[1])
        raise KeyboardInterrupt
    assert all(each.told[-1] == "end" and len(each.errors) == 1 for each in streamers)


# ---- Memory --------------------------------------------------------------------------------------------------------


def test_places_and_widths_are_those_of_the_rows_at_work_whoever_came_before():
    with exact("llada").rows_at_work(call_of()) as rows:
        stays = call_of(max_new_tokens=16, block_length=4)
        rows.admit(stays)
        for number in range(6):
            guest = call_of(range(1, 2 + 3 * number), max_new_tokens=24, block_length=4, kv_cache="none")
            rows.admit(guest)
            rows.step()
            assert len(rows.ledger.tokens) == 2 and rows.canvas.prompt_length == max(3, 1 + 3 * number)
            rows.leave(guest, RuntimeError())
        rows.admit(call_of([5], block_length=4))
        assert rows.canvas.length == 3 + 16 and len(rows.ledger.tokens) == 2


@pytest.mark.every(4)
@pytest.mark.parametrize("name", ["sliding window", "random positions", "suffix", "sdar", "d2f", "refusion"])
def test_a_call_that_is_made_like_another_is_what_its_own_preparation_makes_of_it(name):
    family, settings = BLOCKS.get(name, ("llada", FURTHER.get(name)))
    model, prompts = exact(family), [tiny_prompt(1, 5), tiny_prompt(2, 9)]
    more = {"max_new_tokens": 12, "eos_token_id": EOS, "pad_token_id": PAD} | settings
    first, second = (model.prepare(**left_padded([prompt]), **more, seed=[7]) for prompt in prompts)
    alike = first.like(model, prompts[1], [7])
    assert alike.kind == second.kind and alike.rules == second.rules
    for call in (second, alike):
        with model.rows_at_work(call) as rows:
            run(rows, {0: [call]}, {})
    assert torch.equal(second.answers()[0], alike.answers()[0])
    with pytest.raises(ValueError, match="without stopping criteria"):
        call_of(stopping_criteria=[Never()]).like(exact("llada"), [1], 0)


def test_what_says_how_a_call_goes_on_has_no_effect_on_its_preparation():
    for name in ("tokenizer", "synced_gpus", "custom_generate"):
        with pytest.raises(ValueError, match=f"`{name}` has no effect"):
            call_of(**{name: True})
