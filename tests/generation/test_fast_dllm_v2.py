"""What holds for Fast-dLLM v2's method whatever the prompt, on its small trained model."""

from itertools import pairwise

import pytest
import torch
from recorded_blocks import checkpoint
from tiny import tiny_model

from d3llm_hf import D3LLMGenerationConfig


MASK, STOP, PAD = 511, 510, 509
TOKENS = {"mask_token_id": MASK, "eos_token_id": STOP, "pad_token_id": PAD}
FIELDS = ("step_map", "num_forwards", "num_forwards_reference", "num_store_forwards")
# A prompt within a block, one that is a block, one that is three and one that ends in the second.
LENGTHS = (3, 8, 24, 13)


def prompts(lengths=LENGTHS):
    """Periodic texts, which the model continues with more or less certainty."""
    return [[(7 * row + 3 * (index % (3 + row))) % 97 + 5 for index in range(n)] for row, n in enumerate(lengths)]


def padded(texts):
    width = max(map(len, texts))
    ids = torch.tensor([[PAD] * (width - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
    return {"input_ids": ids, "attention_mask": mask}


def generate(texts, **chosen):
    settings = TOKENS | {"max_new_tokens": 21, "block_length": 8, "sub_block_length": 4, "confidence_threshold": 0.8}
    inputs = padded(texts) if len(texts) > 1 else {"input_ids": torch.tensor(texts, dtype=torch.long)}
    return checkpoint("fdv2-tiny-a").generate(**inputs, **(settings | {"return_dict_in_generate": True} | chosen))


def row_of(output, row, length):
    return [output.sequences[row, -length:].tolist(), *(getattr(output, name)[row].tolist() for name in FIELDS)]


@pytest.mark.every(24)
@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("kv_cache", ["exact", "none", "exact_dual"])
def test_a_row_is_decided_in_a_padded_batch_as_alone(kv_cache, early_stop):
    chosen = {"kv_cache": kv_cache, "early_stop": early_stop}
    together = generate(prompts(), **chosen)
    for row, text in enumerate(prompts()):
        assert row_of(together, row, 21) == row_of(generate([text], **chosen), 0, 21)


@pytest.mark.every(4)
@pytest.mark.parametrize(
    "settings", [{}, {"block_length": 16}, {"sub_block_length": 8}, {"confidence_threshold": 0.3}]
)
def test_the_exact_cache_changes_nothing(settings):
    settings = settings | {"early_stop": False}
    kept, computed = (generate(prompts(), kv_cache=kind, **settings) for kind in ("exact", "none"))
    for row in range(len(LENGTHS)):
        assert row_of(kept, row, 21) == row_of(computed, row, 21)
    assert (kept.positions_computed < computed.positions_computed).all()


@pytest.mark.every(4)
@pytest.mark.parametrize("new_tokens", range(1, 18, 4))
def test_fewer_tokens_are_the_first_of_more(new_tokens):
    few, many = generate(prompts(), max_new_tokens=new_tokens), generate(prompts())
    assert torch.equal(few.sequences[:, -new_tokens:], many.sequences[:, -21:][:, :new_tokens])
    assert torch.equal(few.step_map, many.step_map[:, :new_tokens])


def test_a_block_that_is_one_part_is_decided_in_the_order_of_certainty():
    """Against a loop that computes everything anew, and knows of no cache, batch or block behind the present one."""
    model, text = checkpoint("fdv2-tiny-a"), prompts()[3]
    output = generate([text], sub_block_length=8, early_stop=False)
    ids, steps, step = list(text), [], 0
    while len(steps) < 21:
        step += 1
        if len(ids) % 8 == 0:
            ids.append(int(logits_of(model, ids)[-1, :MASK].argmax()))
            steps.append(step)
            continue
        undecided = list(range(len(ids), -(-len(ids) // 8) * 8))
        ids, decided = ids + [MASK] * len(undecided), {}
        step -= 1
        while undecided:
            step += 1
            probability, token = logits_of(model, ids).softmax(-1)[[at - 1 for at in undecided]].max(-1)
            surest = int(probability.argmax())
            for place, at in enumerate(undecided):
                if place == surest or probability[place] > 0.8:
                    ids[at], decided[at] = int(token[place]), step
            undecided = [at for at in undecided if at not in decided]
        steps += [decided[at] for at in sorted(decided)]
    assert output.sequences[0, len(text) :].tolist() == ids[len(text) :][:21]
    assert output.step_map[0].tolist() == steps[:21]


@torch.no_grad()
def logits_of(model, ids):
    block = torch.arange(len(ids)) // 8
    return model(torch.tensor([ids]), attention_mask=(block[:, None] >= block)[None, None]).logits[0]


def test_forwards_that_only_store_are_counted():
    output = generate(prompts(), early_stop=False, max_new_tokens=16)
    # Blocks of the answer that begin behind a whole one: all but the one that the prompt has begun.
    assert output.num_store_forwards.tolist() == [2, 2, 2, 2]
    stores = [output.step_map[row, -length % 8 :: 8].tolist() for row, length in enumerate(LENGTHS)]
    for row, steps in enumerate(stores):
        assert [(output.step_map[row] == step).sum().item() for step in steps] == [1, 1]
    other = generate(prompts(), decoding_method="d3llm", **dict.fromkeys(("sub_block_length", "confidence_threshold")))
    assert other.num_store_forwards.tolist() == [0, 0, 0, 0]


def test_a_forward_of_the_sub_block_cache_runs_over_the_sub_block():
    settings = {"confidence_threshold": 1.0, "early_stop": False, "max_new_tokens": 8}
    kept, dual = (generate([prompts()[2]], kv_cache=kind, **settings) for kind in ("exact", "exact_dual"))
    assert (int(kept.num_forwards), int(dual.num_forwards)) == (8, 8)
    assert int(kept.positions_computed) == 24 + 7 * 8
    in_second = dual.step_map[0, 4:]
    until_first = int((in_second <= in_second[0]).sum())  # forwards until the first slot of the second part is decided
    assert int(dual.positions_computed) == 24 + 8 + 2 * 4 + until_first * 8 + (4 - until_first) * 4


@pytest.mark.every(3)
@pytest.mark.parametrize("kv_cache", ["exact", "none", "exact_dual"])
def test_an_empty_prompt_is_continued_alone_and_in_a_batch(kv_cache):
    alone, together = (generate(texts, kv_cache=kv_cache, early_stop=False) for texts in ([[]], [[], *prompts()]))
    assert (alone.step_map > 0).all()
    assert int(alone.num_store_forwards) == 2  # not the first forward, which has nothing to store
    assert row_of(alone, 0, 21) == row_of(together, 0, 21)


@pytest.mark.full
def test_drawn_tokens_repeat_with_their_seed():
    chosen = {"do_sample": True, "temperature": 1.5, "top_p": 0.95}
    first, again, other = (generate(prompts(), seed=seed, **chosen).sequences for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_the_method_runs_where_every_position_sees_all_others(family):
    chosen = {"decoding_method": "fast_dllm_v2", "block_length": 4, "sub_block_length": 2, "eos_token_id": None}
    output = tiny_model(family).generate(
        torch.tensor([[1, 2, 3]]), max_new_tokens=7, return_dict_in_generate=True, **chosen
    )
    assert (output.step_map > 0).all() and int(output.num_store_forwards) == 0
    parts = output.step_map[0].split(2)
    assert all(earlier.max() < later.min() for earlier, later in pairwise(parts))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"sub_block_length": 3}, r"`sub_block_length` must divide `block_length` .got 3 and 8.* Pass a divisor"),
        ({"sub_block_length": 0}, r"`sub_block_length` must be a positive integer"),
        ({"kv_cache": "dual"}, r"must be one of \['none', 'exact', 'exact_dual'\] .* .got 'dual'"),
        (
            {"decoding_method": "llada", "sub_block_length": None, "confidence_threshold": None}
            | {"kv_cache": "exact_dual"},
            r"must be one of \['none', 'exact'\] .* decoding_method=\"llada\".* .got 'exact_dual'",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        generate(prompts(), **settings)


@pytest.mark.parametrize("kind", ["exact", "exact_dual"])
def test_caches_of_finished_blocks_are_refused_where_every_position_sees_all_others(kind):
    with pytest.raises(ValueError, match=f'`kv_cache` must not be "{kind}" where all positions see one another'):
        D3LLMGenerationConfig(decoding_method="fast_dllm_v2", kv_cache=kind).rules(8)
