"""A window that slides with the first undecided position in place of blocks, and thresholds that are relaxed.

`window`, `window_span` and the cache `"sliding"` are those of DSB (arXiv:2602.05992), whose runs are recorded in
`tests/golden/dsb`; `threshold_relaxation` is Streaming-dLLM's (arXiv:2601.17917).
"""

import json
from random import Random

import pytest
import torch
from every_setting import CACHES, METHODS, drawn_cache, drawn_method
from every_setting import NEVER as ALWAYS_KEPT
from places import GOLDEN
from problems import FAMILIES, STOPS, Problem, assert_equal, in_oracle_terms, model_of
from recorded import checkpoint
from thin import covering
from tiny import EOS, MASK, PAD, ScriptedModel, answer, changing_script, left_padded, tables, tiny_model, tiny_prompt

from d3llm_hf import D3LLMGenerationConfig
from d3llm_hf.models import methods as library


WHOLE = {"early_stop": False, "seed": 0, "return_dict_in_generate": True, "eos_token_id": EOS, "pad_token_id": PAD}
COUNTS = ("step_map", "num_forwards", "num_forwards_reference", "positions_computed", "tokens_per_forward")
WINDOWED = [name for name, chosen in METHODS.items() if "window" in library.METHODS[chosen["decoding_method"]]]
KINDS = ("none", "prefix", "dual", "vicinity", "sliding", "dkv")
SLIDING = ("slide", "slide_span")
OPENING = ("block_add_threshold", "block_activation_threshold")
RELAXED = [name for name in WINDOWED if "threshold_relaxation" in library.METHODS[METHODS[name]["decoding_method"]]]
RELAXED.remove("fast_dllm, factor")


# ---- recorded runs --------------------------------------------------------------------------------------------------

CASES = json.loads((GOLDEN / "dsb" / "cases.json").read_text())["cases"]
# The shortest of those without a cache, and of those with one.
BY_DEFAULT = ("DS005", "DS014")


def settings_of(args: dict) -> dict:
    """What to pass to `generate` for a recorded call."""
    span = args["max_block_length"]
    chosen = {"max_new_tokens": args["gen_length"], "block_length": args["block_length"], "window": "slide"}
    if span > 0:
        chosen |= {"window": "slide_span", "window_span": span}
    if args.get("cache"):
        chosen |= {"kv_cache": "sliding", "cache_window": args.get("prefix_window", 24)}
    if args["threshold"] is None:
        return chosen | {"decoding_method": "llada", "steps": args["steps"]}
    return chosen | {"decoding_method": "fast_dllm", "confidence_threshold": args["threshold"]}


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c["id"], marks=() if c["id"] in BY_DEFAULT else pytest.mark.full) for c in CASES],
)
def test_a_recorded_run_of_dsb_is_reproduced_forward_for_forward(case):
    expected = case["expected"]
    output = checkpoint(case["model"]).generate(
        torch.tensor([case["prompt"]]),
        early_stop=False,
        eos_token_id=[],
        return_dict_in_generate=True,
        **settings_of(case["args"]),
    )
    assert output.sequences[0].tolist() == expected["sequence"]
    assert output.step_map[0].tolist() == expected["commit_step"]
    assert int(output.num_forwards) == expected["n_forwards"]
    assert int(output.num_forwards_reference) == expected["returned_count"]
    assert int(output.positions_computed) == sum(end - start for start, end in expected["windows"])


# ---- the slow oracle ------------------------------------------------------------------------------------------------


def drawn(rng: Random, family: str) -> Problem:
    return Problem(
        family, rng.randint(0, 2), tiny_prompt(rng.randint(0, 999), rng.randint(1, 9)), rng.choice(STOPS), PAD,
        rng.randint(1, 24), early_stop=rng.random() < 0.4, layers=2,
    )  # fmt: skip


def drawn_window(rng: Random, name: str, window: str) -> dict:
    """Settings of a method whose window slides, or whose threshold is relaxed in blocks."""
    chosen = drawn_method(rng, name) | {"window": window}
    if window == "slide_span" and rng.random() < 0.6:
        chosen["window_span"] = rng.randint(1, 12)
    if window != "blocks":
        chosen = {key: value for key, value in chosen.items() if key not in OPENING}
    if name in RELAXED and (window == "blocks" or rng.random() < 0.5):
        chosen["threshold_relaxation"] = rng.choice([0.2, 0.5, 0.9, 1.0])
    return chosen


@pytest.mark.every(6)
@pytest.mark.parametrize("name, cache", covering(WINDOWED, KINDS, strength=1))
def test_a_window_that_slides_decides_what_the_oracle_decides(name, cache):
    rng = Random(f"{name} {cache} window")
    for window, family in zip(SLIDING, rng.sample(FAMILIES, 2), strict=True):
        problem, seed = drawn(rng, family), rng.randint(0, 2**70)
        chosen = drawn_window(rng, name, window) | drawn_cache(rng, cache)
        expected = problem.oracle(in_oracle_terms(seed, len(problem.prompt)), **chosen)
        assert_equal(problem.generate(seed=seed, **chosen), expected)


@pytest.mark.every(8)
@pytest.mark.parametrize("name, family", covering(RELAXED, FAMILIES, strength=1))
def test_a_relaxed_threshold_in_blocks_decides_what_the_oracle_decides(name, family):
    rng = Random(f"{name} {family} relaxed")
    for _ in range(2):
        problem = drawn(rng, family)
        chosen = drawn_window(rng, name, "blocks")
        assert_equal(problem.generate(**chosen), problem.oracle(**chosen))


# ---- laws -----------------------------------------------------------------------------------------------------------


def batch(family: str, **chosen):
    inputs = left_padded([tiny_prompt(seed, 1 + 2 * seed) for seed in range(3)])
    return model_of(family, 1, 2).generate(**inputs, **WHOLE | {"max_new_tokens": 14} | chosen)


def assert_same(output, expected, names=COUNTS) -> None:
    assert torch.equal(output.sequences, expected.sequences)
    for name in names:
        assert torch.equal(output[name], expected[name]), name


def sliding(name: str, window: str = "slide_span", **more) -> dict:
    return {n: v for n, v in METHODS[name].items() if n not in OPENING} | {"window": window} | more


@pytest.mark.every(12)
@pytest.mark.parametrize("name, window", covering(WINDOWED, SLIDING, strength=1))
def test_a_window_as_long_as_the_answer_is_one_block(name, window):
    one = {key: value for key, value in METHODS[name].items() if key not in OPENING} | {"block_length": 14}
    family = FAMILIES[WINDOWED.index(name) % 2]
    assert_same(batch(family, **one | {"window": window}), batch(family, **one))


@pytest.mark.every(12)
@pytest.mark.parametrize("name, cache", covering(WINDOWED, KINDS, strength=1))
def test_a_row_is_the_same_alone_and_in_a_batch(name, cache):
    window = SLIDING[(WINDOWED.index(name) + KINDS.index(cache)) % 2]
    chosen, prompts = sliding(name, window) | CACHES[cache], [tiny_prompt(seed, 1 + 2 * seed) for seed in range(4)]
    chosen |= WHOLE | {"max_new_tokens": 14, "early_stop": True, "threshold_relaxation": 0.5}
    if name not in RELAXED:
        del chosen["threshold_relaxation"]
    model = model_of("dream", 2, 2)
    together = model.generate(**left_padded(prompts), **chosen | {"seed": [0] * 4})
    for row, prompt in enumerate(prompts):
        alone = model.generate(**left_padded([prompt]), **chosen)
        assert together.sequences[row, -14:].tolist() == alone.sequences[0, -14:].tolist()
        for field in COUNTS:
            assert together[field][row].tolist() == alone[field][0].tolist(), field


@pytest.mark.every(8)
@pytest.mark.parametrize("cache, family", covering([c for c in KINDS if c != "none"], FAMILIES, strength=1))
def test_a_cache_that_is_refreshed_in_every_forward_changes_nothing(cache, family):
    chosen = sliding("fast_dllm", block_length=4)
    refreshed = batch(family, **chosen | CACHES[cache] | {"cache_refresh_interval": 1})
    assert_same(refreshed, batch(family, **chosen), ("step_map", "num_forwards"))


def test_a_cache_of_a_window_computes_fewer_positions_and_all_of_them_once_a_window_is_decided():
    model, chosen = tiny_model("llada", 1), WHOLE | sliding("fast_dllm", block_length=4, confidence_threshold=0.99)
    inputs = {"input_ids": torch.tensor([tiny_prompt(1, 9)]), "max_new_tokens": 12}
    without, cached = model.generate(**inputs, **chosen), {}
    for width in (0, 3):
        cached[width] = model.generate(**inputs, **chosen, kv_cache="sliding", cache_window=width)
    assert int(cached[0].positions_computed) < int(cached[3].positions_computed) < int(without.positions_computed)
    kept = model.generate(**inputs, **chosen | {"kv_cache": "sliding", "cache_refresh_interval": ALWAYS_KEPT})
    assert int(kept.positions_computed) < int(without.positions_computed)


@pytest.mark.every(2)
@pytest.mark.parametrize("window", SLIDING)
def test_holes_are_filled_in_a_window_over_what_is_missing(window):
    inputs = left_padded([tiny_prompt(seed, 9) for seed in range(3)])
    holes = torch.rand(3, 9, generator=torch.Generator().manual_seed(0)) < 0.6
    chosen = WHOLE | sliding("fast_dllm", window) | {"infill_mask": holes, "kv_cache": "sliding", "cache_window": 2}
    for family in FAMILIES:
        model = tiny_model(family, 1)
        output = model.generate(**inputs, **chosen)
        assert not (output.sequences == MASK).any()
        assert torch.equal(output.sequences[~holes], inputs["input_ids"][~holes])
        for row in range(3):
            one = {"infill_mask": holes[row : row + 1]}
            alone = model.generate(inputs["input_ids"][row : row + 1], **chosen | one)
            assert alone.sequences[0].tolist() == output.sequences[row].tolist()
            assert int(alone.positions_computed) == int(output.positions_computed[row])


def test_with_a_suffix_a_forward_sees_so_many_positions_behind_the_window():
    prompt, count = [1, 2, 3], 16
    model = ScriptedModel(changing_script(tables(5, 32), MASK))
    chosen = WHOLE | sliding("fast_dllm", block_length=4) | {"suffix_length": 2}
    output = answer(model, prompt, **chosen | {"max_new_tokens": count})
    steps, seen = output.step_map[0].tolist(), 0
    for forward in range(1, int(output.num_forwards) + 1):
        first = next(column for column, step in enumerate(steps) if step >= forward)
        seen += min(first + 4 + 2, count) + len(prompt)
    assert int(output.positions_computed) == seen


@pytest.mark.full
def test_a_window_of_one_position_is_left_to_right_as_a_block_of_one():
    one, chosen = {"block_length": 1}, METHODS["fast_dllm"] | WHOLE
    expected = batch("llada", **chosen | one)
    assert_same(batch("llada", **chosen | one | {"window": "slide"}), expected)
    assert_same(batch("llada", **chosen | {"window": "slide_span", "window_span": 1}), expected, ("step_map",))
    rules = D3LLMGenerationConfig(decoding_method="fast_dllm", window="slide_span", window_span=1).rules(8)
    assert rules.left_to_right


@pytest.mark.full
def test_lossless_decoding_gives_the_tokens_of_the_same_window():
    for window in SLIDING:
        chosen = {"decoding_method": "llada", "block_length": 4, "window": window, "max_new_tokens": 12}
        without, found = batch("llada", **chosen), batch("llada", **chosen, lossless=True)
        assert torch.equal(without.sequences, found.sequences)
        assert (found.num_forwards <= without.num_forwards).all()


def test_a_relaxation_of_nothing_changes_nothing_and_more_of_it_decides_no_less():
    assert_same(batch("llada", **METHODS["d3llm"], threshold_relaxation=0.0), batch("llada", **METHODS["d3llm"]))
    # A model that is equally sure of all: with the threshold above it one token a forward, until enough is decided.
    model = ScriptedModel(changing_script(torch.zeros(1, 16, 32).index_fill(2, torch.tensor([7]), 4.2), MASK))
    forwards = [
        int(answer(model, [1], **WHOLE, decoding_method="fast_dllm", block_length=8, threshold_relaxation=relaxation,
                   max_new_tokens=8, confidence_threshold=0.9).num_forwards)
        for relaxation in (0.0, 0.5, 1.0)
    ]  # fmt: skip
    # Of 32 tokens one has a probability of 0.683 (4.2 nats above 31 others): 0.9 * (1 - share / 2) falls under it with
    # four of eight decided, and 0.9 * (1 - share) with two.
    assert forwards == [8, 5, 3]


# ---- settings -------------------------------------------------------------------------------------------------------

REFUSED = [
    ({"window": "rolling"}, r"`window` must be one of \['blocks', 'slide', 'slide_span'\]"),
    ({"window_span": 0}, "`window_span` must be a positive integer"),
    ({"threshold_relaxation": 1.5}, r"`threshold_relaxation` must be a fraction in \[0, 1\]"),
    ({"window_span": 8}, '`window_span` is not used by window="blocks"'),
    ({"window": "slide", "window_span": 8}, '`window_span` is not used by window="slide"'),
    ({"decoding_method": "d3llm", "window": "slide", "block_add_threshold": 0.5}, "`block_add_threshold` is not used"),
    ({"window": "slide", "kv_cache": "delayed"}, '`kv_cache` must not be "delayed" with window="slide"'),
    ({"window": "slide", "kv_cache": "dual", "suffix_length": 2}, '`suffix_length` with window="slide" needs'),
    ({"factor": 1.0, "threshold_relaxation": 0.3}, "`threshold_relaxation` is not used with `factor`"),
    ({"decoding_method": "dream", "window": "slide"}, '`window` is not used by decoding_method="dream"'),
    ({"decoding_method": "llada", "threshold_relaxation": 0.3}, "`threshold_relaxation` is not used by"),
]  # fmt: skip


@pytest.mark.parametrize("chosen, message", REFUSED, ids=str)
def test_what_has_no_meaning_with_a_window_is_refused(chosen, message):
    model = ScriptedModel(changing_script(tables(2, 32), MASK))
    with pytest.raises(ValueError, match=message):
        answer(model, [1], **{"decoding_method": "fast_dllm"} | chosen)
    assert not model.calls


@pytest.mark.full
def test_a_call_takes_the_place_of_what_a_checkpoint_says_of_another_window():
    model = tiny_model("llada", 1)
    prompt = left_padded([tiny_prompt(1, 5)])
    model.generation_config = D3LLMGenerationConfig(decoding_method="d3llm", block_length=4, block_add_threshold=0.5)
    found = model.generate(**prompt, **WHOLE, max_new_tokens=8, window="slide_span")
    chosen = {"decoding_method": "d3llm", "block_length": 4, "window": "slide_span"}
    assert_same(found, model.generate(**prompt, **WHOLE, max_new_tokens=8, **chosen))
    model.generation_config = D3LLMGenerationConfig(decoding_method="fast_dllm", window="slide_span", window_span=9)
    found = model.generate(**prompt, **WHOLE, max_new_tokens=8, window="slide")
    assert_same(
        found, model.generate(**prompt, **WHOLE, max_new_tokens=8, decoding_method="fast_dllm", window="slide")
    )
