"""Block-causal decoding: what holds for every prompt, and every service that other models have."""

import copy
import math

import pytest
import torch
from drawn import examples
from hypothesis import given
from hypothesis import strategies as st
from oracle_blocks import BlockRules, decode_blocks
from recorded_blocks import checkpoint, up_to_stop
from thin import covering

from d3llm_hf import D3LLMGenerationConfig, SDARForCausalLM, log_likelihood


MASK, STOPS, PAD = 511, [510, 509], 3
METHODS = {
    "static": {"steps": 3},
    "dynamic": {"confidence_threshold": 0.8, "steps": 2},
    "sequential": {"remasking": "sequential", "steps": 2},
    "entropy sum": {"entropy_bound": 0.35},
    "d3llm": {"decoding_method": "d3llm", "entropy_threshold": 0.6},
    "d3llm, all blocks": {"decoding_method": "d3llm", "entropy_threshold": 0.2, "block_add_threshold": 0.0},
    "dparallel": {"decoding_method": "dparallel", "entropy_threshold": 0.8},
    "fast_dllm": {"decoding_method": "fast_dllm", "confidence_threshold": 0.7},
    "entropy_bound": {"decoding_method": "entropy_bound", "entropy_bound": 0.3},
    "local_leap": {"decoding_method": "local_leap"},
    "klass": {"decoding_method": "klass", "confidence_threshold": 0.5, "kl_threshold": 0.5},
    "dinfer": {"decoding_method": "dinfer"},
    "llada": {"decoding_method": "llada"},
    "dream": {"decoding_method": "dream", "steps": 6},
}
PROMPTS = [[100, 105, 110, 115, 120, 125], [7, 9], [40, 41, 42, 43, 40, 41, 42, 43], list(range(60, 73)), [300]]


@pytest.fixture(scope="module")
def sdar():
    return checkpoint("sdar-tiny-a")


def left_padded(prompts):
    width = max(map(len, prompts))
    ids = [[PAD] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def decode(model, prompts, **chosen):
    settings = {"max_new_tokens": 11, "pad_token_id": PAD, "eos_token_id": STOPS, "return_dict_in_generate": True}
    return model.generate(**left_padded(prompts), **(settings | chosen))


def answers(output, prompts):
    return output.sequences[:, max(map(len, prompts)) :].tolist()


COUNTS = ("num_forwards", "num_forwards_reference", "tokens_per_forward")


@pytest.mark.every(6)
@pytest.mark.parametrize("name, block_length", covering(METHODS, [1, 3, 4, 16], strength=1))
def test_kept_blocks_change_nothing_and_rows_do_not_depend_on_each_other(sdar, name, block_length):
    chosen = METHODS[name] | {"block_length": block_length}
    plain = decode(sdar, PROMPTS, kv_cache="none", **chosen)
    kept = decode(sdar, PROMPTS, **chosen)
    assert torch.equal(plain.sequences, kept.sequences)
    assert torch.equal(plain.step_map, kept.step_map)
    assert (kept.positions_computed <= plain.positions_computed).all()
    for row, prompt in enumerate(PROMPTS):
        alone = decode(sdar, [prompt], **chosen)
        assert answers(alone, [prompt])[0] == answers(kept, PROMPTS)[row]
        assert alone.step_map[0].tolist() == kept.step_map[row].tolist()
        for count in (*COUNTS, "positions_computed"):
            assert getattr(alone, count)[0] == getattr(kept, count)[row], count


tokens = st.integers(min_value=0, max_value=500)
prompts_drawn = st.lists(tokens, min_size=1, max_size=19)


@pytest.mark.full
@examples(200)
@given(
    prompts=st.lists(prompts_drawn, min_size=1, max_size=8), new=st.integers(1, 14), name=st.sampled_from([*METHODS])
)
def test_any_prompts_and_lengths_get_the_same_with_kept_blocks(prompts, new, name):
    model = checkpoint("sdar-tiny-a")
    plain = decode(model, prompts, max_new_tokens=new, kv_cache="none", **METHODS[name])
    kept = decode(model, prompts, max_new_tokens=new, **METHODS[name])
    assert plain.sequences.tolist() == kept.sequences.tolist()
    assert kept.sequences.shape[1] == max(map(len, prompts)) + new
    assert not (kept.sequences[:, -new:] == MASK).any()


# Checkpoint -> its own rule, and ours over several blocks; a D2F adapter has no other than its own.
OTHERS = {
    "llada2-tiny-a": [
        {"confidence_threshold": 0.8},
        {"confidence_threshold": 0.8, "edit_threshold": 0.5, "block_length": 8},
        {"decoding_method": "d3llm", "entropy_threshold": 0.6, "block_length": 8},
    ],
    "fdv2-tiny-a": [
        {"confidence_threshold": 0.8, "block_length": 8, "sub_block_length": 4},
        {"decoding_method": "d3llm", "entropy_threshold": 0.6, "block_length": 8},
    ],
    "d2f-llada-tiny-a-lora": [{"decoding_method": "d2f", "confidence_threshold": 0.8, "block_length": 8}],
    "d2f-dream-tiny-a-lora": [{"decoding_method": "d2f", "confidence_threshold": 0.8, "block_length": 8}],
}


@pytest.mark.full
@pytest.mark.parametrize("name", OTHERS)
@examples(200)
@given(st.lists(prompts_drawn, min_size=1, max_size=8), st.integers(1, 20), st.integers(0, 2))
def test_kept_blocks_change_nothing_in_other_families(name, prompts, new, place):
    model, chosen = checkpoint(name), OTHERS[name][place % len(OTHERS[name])]
    settings = {"max_new_tokens": new, "mask_token_id": MASK, "eos_token_id": [508, 510]} | chosen
    plain, kept = (decode(model, prompts, kv_cache=cache, **settings) for cache in ("none", "exact"))
    assert plain.sequences.tolist() == kept.sequences.tolist()
    assert plain.step_map.tolist() == kept.step_map.tolist()
    alone = decode(model, prompts[-1:], **settings)
    assert answers(alone, prompts[-1:])[0] == answers(kept, prompts)[-1]


@pytest.mark.every(2)
@pytest.mark.parametrize("name, block_length", covering(["static", "dynamic", "sequential"], [2, 4, 7], strength=1))
def test_sdars_rule_is_that_of_the_plain_loop_with_or_without_forwards_that_only_store(sdar, name, block_length):
    chosen = METHODS[name] | {"block_length": block_length}
    output = decode(sdar, PROMPTS, **chosen)
    for row, prompt in enumerate(PROMPTS):
        rules = BlockRules(
            11,
            block_length,
            chosen["steps"],
            MASK,
            tuple(STOPS),
            chosen.get("confidence_threshold"),
            name == "sequential",
        )
        wanted = decode_blocks(sdar, prompt, rules)
        answer = up_to_stop(wanted.answer, STOPS)
        assert answers(output, PROMPTS)[row] == answer + [PAD] * (11 - len(answer))
        assert output.step_map[row, : len(answer)].tolist() == wanted.decided_after[: len(answer)]
        assert int(output.num_forwards[row]) == wanted.forwards
        assert int(output.num_forwards_reference[row]) == wanted.forwards + wanted.separate_stores


class Seeing(SDARForCausalLM):
    """SDAR's weights in a model whose positions all see one another."""

    block_alignment = None


@pytest.mark.every(3)
@pytest.mark.parametrize("name", [name for name in METHODS if "decoding_method" in METHODS[name]])
def test_a_block_as_long_as_the_text_is_full_attention(sdar, name):
    full = Seeing(copy.deepcopy(sdar.config)).eval()
    full.load_state_dict(sdar.state_dict())
    prompt, chosen = PROMPTS[0], METHODS[name] | {"early_stop": False}
    blocks = decode(sdar, [prompt], block_length=len(prompt) + 11, **chosen)
    seen = decode(full, [prompt], block_length=11, **chosen)
    assert answers(blocks, [prompt]) == answers(seen, [prompt])
    assert torch.equal(blocks.step_map, seen.step_map)


def test_kept_blocks_are_not_computed_again(sdar):
    prompt = [(37 * i) % 500 for i in range(64)]
    kept = decode(sdar, [prompt], max_new_tokens=16, steps=4, early_stop=False)
    # The prompt once, beside the first block; then each block in its forwards, and once more while it is stored.
    assert int(kept.num_forwards) == 16
    assert int(kept.positions_computed) == 64 + 16 * 4 + 3 * 4
    plain = decode(sdar, [prompt], max_new_tokens=16, steps=4, early_stop=False, kv_cache="none")
    assert int(plain.positions_computed) == sum(4 * (64 + end) for end in (4, 8, 12, 16))


# Services


def test_a_checkpoint_without_settings_decodes_by_its_own_rule(sdar):
    config = sdar.check_settings(max_new_tokens=8)
    rules = config.rules(8, sdar.traits)
    assert (rules.block_length, rules.kv_cache, rules.select) == (4, "exact", "quota_or_threshold")
    assert config.rules(8, sdar.traits).threshold == -math.inf


@pytest.mark.parametrize("name", ["dynamic", "d3llm"])
def test_what_is_streamed_is_the_answer(sdar, name):
    prompt = torch.tensor([PROMPTS[0]])
    chosen = METHODS[name] | {"max_new_tokens": 11, "eos_token_id": STOPS, "pad_token_id": PAD}
    seen = []

    class Tokens:
        def put(self, value):
            seen.extend(value.flatten().tolist())

        def end(self):
            seen.append("end")

    output = sdar.generate(prompt, streamer=Tokens(), **chosen)
    answer = up_to_stop(output[0, prompt.shape[1] :].tolist(), STOPS)
    assert seen[-1] == "end" and seen[-1 - len(answer) : -1] == answer


def test_samples_follow_their_seeds_whatever_lies_beside(sdar):
    chosen = {"do_sample": True, "temperature": 0.9, "top_p": 0.9, "seed": [5, 6, 7, 8, 9]}
    together = answers(decode(sdar, PROMPTS, **chosen), PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        alone = decode(sdar, [prompt], **(chosen | {"seed": [chosen["seed"][row]]}))
        assert answers(alone, [prompt])[0] == together[row]
    assert answers(decode(sdar, PROMPTS, **(chosen | {"seed": 1})), PROMPTS) != together


def test_confidence_is_that_at_the_temperature_before_top_k(sdar):
    # Drawn of one token the text is the greedy one, and a temperature makes it surer, so that more is decided at once.
    chosen = {"confidence_threshold": 0.8, "early_stop": False, "max_new_tokens": 16}
    greedy = decode(sdar, [PROMPTS[0]], **chosen)
    same = decode(sdar, [PROMPTS[0]], do_sample=True, top_k=1, temperature=1.0, **chosen)
    assert torch.equal(greedy.sequences, same.sequences) and torch.equal(greedy.step_map, same.step_map)
    colder = decode(sdar, [PROMPTS[0]], do_sample=True, top_k=1, temperature=0.05, **chosen)
    assert int(colder.num_forwards) <= int(greedy.num_forwards)


def test_a_criterion_sees_no_token_that_was_not_asked_for(sdar):
    lengths = []

    def never(ids, scores, **kwargs):
        lengths.append(ids.shape[1])
        return torch.zeros(len(ids), dtype=torch.bool)

    decode(sdar, [PROMPTS[0]], max_new_tokens=5, stopping_criteria=[never], early_stop=False)
    assert max(lengths) == len(PROMPTS[0]) + 5


def test_guidance_and_embeddings_are_decoded_without_kept_blocks(sdar):
    guided = decode(sdar, PROMPTS[:2], cfg_scale=0.5)
    assert guided.sequences.shape == (2, 6 + 11)
    embeds = sdar.get_input_embeddings()(torch.tensor([PROMPTS[0]]))
    settings = {"max_new_tokens": 11, "pad_token_id": PAD, "eos_token_id": STOPS}
    assert sdar.generate(inputs_embeds=embeds, **settings).tolist() == answers(
        decode(sdar, [PROMPTS[0]]), [PROMPTS[0]]
    )


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_cache": "dual"}, r"`kv_cache` must be one of \['none', 'exact'\]"),
        ({"decoding_method": "dkv"}, r"must be one of \['none', 'exact'\].*with another method"),
        ({"suffix_length": 2}, "`suffix_length` does not apply to block-causal attention: no forward sees"),
        ({"decoding_method": "fast_dllm", "window": "slide"}, "`window` does not apply to block-causal attention"),
        ({"lookahead": 1}, "`lookahead` does not apply to block-causal attention"),
        ({"decoding_method": "llada", "lossless": True}, "`lossless` does not apply to block-causal attention"),
        ({"cfg_scale": 1.0, "kv_cache": "exact"}, '`cfg_scale` needs kv_cache="none"'),
        ({"entropy_bound": 0.1, "confidence_threshold": 0.9}, "`entropy_bound` takes the place"),
        ({"remasking": "sequential", "confidence_threshold": 0.9}, 'not used by remasking="sequential"'),
        ({"remasking": "entropy"}, r"`remasking` must be one of \['low_confidence', 'sequential'\]"),
        ({"infill": True}, "need a model that sees the text behind a hole"),
    ],
)
def test_what_has_no_meaning_for_blocks_is_refused(sdar, settings, message):
    with pytest.raises(ValueError, match=message):
        decode(sdar, [[5, MASK, 7]], **settings)


@pytest.mark.parametrize("implementation", ["flex_attention", "flash_attention_2"])
def test_attention_without_a_mask_for_each_position_is_refused(implementation):
    model = SDARForCausalLM(copy.deepcopy(checkpoint("sdar-tiny-a").config))
    model.config._attn_implementation_internal = implementation
    with pytest.raises(ValueError, match=f"got attention implementation '{implementation}'"):
        model.generate(torch.tensor([[1, 2]]), max_new_tokens=4, pad_token_id=PAD)


def test_an_exact_cache_is_refused_where_all_positions_see_one_another(sdar):
    with pytest.raises(ValueError, match='must not be "exact" where all positions see one another'):
        D3LLMGenerationConfig(kv_cache="exact").rules(8)


def test_a_forward_that_takes_no_mask_is_refused():
    class Blind(SDARForCausalLM):
        def forward(self, input_ids=None, position_ids=None, logits_to_keep=0):
            return super().forward(input_ids, position_ids=position_ids, logits_to_keep=logits_to_keep)

    with pytest.raises(ValueError, match="needs an `attention_mask`"):
        Blind(copy.deepcopy(checkpoint("sdar-tiny-a").config)).generate(
            torch.tensor([[1, 2]]), max_new_tokens=4, pad_token_id=PAD
        )


def test_likelihood_and_training_of_blocks_are_refused(sdar):
    with pytest.raises(ValueError, match="must see the whole text"):
        log_likelihood(sdar, torch.tensor([[1, 2, 3]]), torch.tensor([[False, True, True]]))
