"""What holds for every decoding method with every cache: it ends, obeys the caches' laws, and rows, threads and errors
do not meet in it.
"""

import threading
from functools import cache as remembered

import pytest
import torch
from drawn import examples
from every_setting import CACHES, METHODS, NEVER, PAIRS
from hypothesis import given
from hypothesis import strategies as st
from problems import FAMILIES, model_of
from thin import covering
from tiny import (
    EOS,
    PAD,
    ScriptedModel,
    answer,
    attributes,
    changing_script,
    left_padded,
    same_attributes,
    tables,
    tiny_prompt,
    trained_like,
)


WHOLE = {"early_stop": False, "seed": 0, "return_dict_in_generate": True, "eos_token_id": EOS, "pad_token_id": PAD}
CACHED = [pair for pair in PAIRS if pair[1] != "none"]
FIELDS = ("step_map", "num_forwards", "num_forwards_reference", "positions_computed", "tokens_per_forward")


def several_rows(family: str, layers: int, **chosen):
    """Decodes a padded batch of four."""
    inputs = left_padded([tiny_prompt(seed, 1 + 2 * seed) for seed in range(4)])
    return model_of(family, 1, layers).generate(**inputs, max_new_tokens=14, **WHOLE | chosen)


@remembered
def without_a_cache(method: str, family: str, layers: int = 2):
    return several_rows(family, layers, **METHODS[method] | {"kv_cache": "none"})


def same_answer(first, second) -> bool:
    return torch.equal(first.sequences, second.sequences) and torch.equal(first.step_map, second.step_map)


# ---- D-01: decoding ends --------------------------------------------------------------------------------------------


@st.composite
def settings_of_any_method(draw, longest: int) -> dict:
    """Any pair of a method and a cache, with settings of its own."""
    fraction = st.floats(0, 1)
    method, cache = draw(st.sampled_from(PAIRS))
    chosen = METHODS[method] | CACHES[cache]
    drawn = {
        "block_length": st.integers(1, 64),
        "steps": st.integers(1, longest),
        "entropy_threshold": st.sampled_from([0.0, 0.2, 0.5, 1.0, 1.5, 2.0, float("inf")]),
        "confidence_threshold": st.floats(0.01, 1),
        "low_threshold": st.floats(0.01, 1),
        "relaxed_threshold": st.floats(0.01, 1),
        "factor": st.floats(0.01, 4),
        "entropy_bound": st.floats(0, 20),
        "leap_radius": st.integers(0, 70),
        "block_add_threshold": fraction,
        "cache_delay": st.integers(0, 6),
        "cache_refresh_interval": st.integers(1, 300),
        "cache_warmup": st.integers(0, 6),
        "cache_window": st.integers(0, 20),
    }
    # A lower threshold is not above the other one.
    chosen = {name: draw(drawn[name]) if name in drawn else value for name, value in chosen.items()}
    for low in ("low_threshold", "relaxed_threshold"):
        if low in chosen:
            chosen[low] = min(chosen[low], chosen["confidence_threshold"])
    return chosen


@pytest.mark.full
@examples(200)
@given(
    data=st.data(),
    max_new_tokens=st.integers(1, 40) | st.integers(1, 257),
    shift=st.sampled_from([0, 1]),
    early_stop=st.booleans(),
)
def test_every_method_ends_within_one_forward_a_token_and_leaves_no_mask(data, max_new_tokens, shift, early_stop):
    chosen = data.draw(settings_of_any_method(max_new_tokens))
    model = ScriptedModel(changing_script(tables(3, 260, 8), 7), vocab_size=8, shift=shift)
    chosen |= {"max_new_tokens": max_new_tokens, "eos_token_id": 6, "pad_token_id": 5, "seed": 1}
    output = answer(model, [1, 2, 3], early_stop=early_stop, **chosen)
    assert 1 <= int(output.num_forwards) == model.calls <= max_new_tokens
    assert output.sequences.shape == (1, 3 + max_new_tokens)
    assert not (output.sequences == 7).any()


# ---- D-06: laws of the caches ---------------------------------------------------------------------------------------


@pytest.mark.every(3)
@pytest.mark.parametrize("method, cache, family", covering(CACHED, FAMILIES, strength=1, every=2))
def test_a_cache_that_is_refreshed_in_every_forward_changes_nothing(method, cache, family):
    refreshed = METHODS[method] | CACHES[cache] | {"cache_refresh_interval": 1}
    assert same_answer(several_rows(family, 2, **refreshed), without_a_cache(method, family))


@pytest.mark.every(3)
@pytest.mark.parametrize("method, cache, family", covering(METHODS, ["delayed", "dkv"], FAMILIES, strength=1, every=2))
def test_a_cache_whose_delay_never_ends_changes_nothing(method, cache, family):
    endless = {"kv_cache": cache, "cache_delay": NEVER, "cache_refresh_interval": NEVER}
    assert same_answer(several_rows(family, 2, **METHODS[method] | endless), without_a_cache(method, family))


@pytest.mark.every(3)
@pytest.mark.parametrize("method, family", covering(METHODS, FAMILIES, strength=1, every=2))
def test_a_prefix_cache_has_nothing_to_keep_where_one_block_is_everything(method, family):
    nothing = torch.zeros(1, 0, dtype=torch.long)
    chosen = {"max_new_tokens": 12} | METHODS[method] | WHOLE
    if "block_length" in chosen:
        chosen["block_length"] = 12
    without, cached = (
        model_of(family, 1, 2).generate(nothing, attention_mask=nothing, **chosen | {"kv_cache": kv_cache})
        for kv_cache in ("none", "prefix")
    )
    assert same_answer(cached, without)


@pytest.mark.every(3)
@pytest.mark.parametrize("method, cache, family", covering(CACHED, FAMILIES, strength=1, every=2))
def test_where_keys_do_not_depend_on_the_context_no_cache_changes_anything(method, cache, family):
    # Keys of a model of one layer are those of the token and its position: a kept one is stale only if it is of a
    # token that has been decided since.
    cached = {name: NEVER if name == "cache_refresh_interval" else value for name, value in CACHES[cache].items()}
    output, without = several_rows(family, 1, **METHODS[method] | cached), without_a_cache(method, family, 1)
    assert same_answer(output, without)
    assert (output.positions_computed <= without.positions_computed).all()


@pytest.mark.every(6)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cache", [cache for cache in CACHES if cache != "none"])
def test_a_cache_computes_fewer_positions(cache, family):
    method = "llada, random" if cache == "dkv_greedy" else "fast_dllm"
    chosen = {"max_new_tokens": 32} | METHODS[method] | WHOLE | {"block_length": 8}
    cached, without = (
        answer(model_of(family, 1, 2), tiny_prompt(0, 12), **chosen | CACHES[name]) for name in (cache, "none")
    )
    per_forward = [float(output.positions_computed / output.num_forwards) for output in (cached, without)]
    assert per_forward[0] < per_forward[1]


# ---- D-07: rows of a batch ------------------------------------------------------------------------------------------


@pytest.mark.every(6)
@pytest.mark.parametrize("method, cache", covering(PAIRS, strength=1, every=2))
def test_rows_alone_and_in_batches_of_2_4_and_8_get_the_same_answer_and_the_same_counts(method, cache):
    # Every method and every cache meets both families.
    family = FAMILIES[(list(METHODS).index(method) + list(CACHES).index(cache)) % 2]
    model, first = model_of(family, 1, 2), 10 * PAIRS.index((method, cache))
    prompts = [tiny_prompt(first + index, 1 + index * 5 % 11) for index in range(8)]
    chosen = METHODS[method] | CACHES[cache] | WHOLE | {"max_new_tokens": 9, "eos_token_id": [EOS, 4]}
    chosen |= {"early_stop": True}
    # Random numbers belong to rows: only the first row of a batch has those of a row alone.
    compared = 1 if chosen.get("remasking") == "random" else 4
    alone = [model.generate(**left_padded([prompt]), **chosen) for prompt in prompts[:compared]]
    for size in (2, 4, 8):
        batch = prompts[:size]
        output, width = model.generate(**left_padded(batch), **chosen), max(map(len, batch))
        for row, expected in enumerate(alone[:size]):
            padding = width - len(batch[row])
            assert output.sequences[row, padding:].tolist() == expected.sequences[0].tolist()
            for name in FIELDS:
                assert torch.equal(output[name][row], expected[name][0]), name


# ---- D-09: threads --------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize("calls", [64, 200])
def test_eight_threads_over_all_caches_get_the_answers_of_one_and_change_nothing_on_the_model(calls):
    model = trained_like("dream")
    before = attributes(model)
    jobs = []
    for seed in range(calls):
        method, cache = PAIRS[seed * 7 % len(PAIRS)]
        sampling = {} if seed % 3 else {"do_sample": True}
        jobs.append(METHODS[method] | CACHES[cache] | sampling | {"seed": seed, "max_new_tokens": 5})
        jobs[-1].update({"block_length": 2} if "block_length" in jobs[-1] else {})
    prompts = [[1, 2, seed % 20] for seed in range(calls)]
    alone = [answer(model, prompt, **job).sequences.tolist() for prompt, job in zip(prompts, jobs, strict=True)]
    together: list = [None] * len(jobs)

    def work(first: int) -> None:
        for index in range(first, len(jobs), 8):
            together[index] = answer(model, prompts[index], **jobs[index]).sequences.tolist()

    threads = [threading.Thread(target=work, args=(first,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone
    assert same_attributes(before, attributes(model))


# ---- D-14: errors in the middle -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache, at", covering(CACHES, [1, 2, 4], strength=1, every=2))
def test_an_error_in_a_forward_passes_through_and_the_next_call_works(cache, at):
    model, method = trained_like("llada"), "llada, random" if cache == "dkv_greedy" else "llada"
    chosen = METHODS[method] | CACHES[cache] | WHOLE
    expected = answer(model, [1, 2, 3], **chosen)
    before, calls = attributes(model), []

    def run_out(module, args):
        calls.append(1)
        if len(calls) == at:
            raise torch.OutOfMemoryError("no memory left")

    hook = model.lm_head.register_forward_pre_hook(run_out)
    with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
        answer(model, [1, 2, 3], **chosen)
    hook.remove()
    assert len(calls) == at
    assert same_attributes(before, attributes(model))
    assert same_answer(answer(model, [1, 2, 3], **chosen), expected)
