"""A row's answer does not depend on the rows beside it, nor on its padding."""

import pytest
import torch
from families import equal_up_to_rounding
from thin import covering
from tiny import EOS, PAD, left_padded, tiny_model, tiny_prompt


# Ten settings a family; with ten prompts each that makes the 200 prompts of the promise.
METHODS = {
    "d3llm": {"decoding_method": "d3llm", "block_length": 8, "entropy_threshold": 0.9},
    "d3llm, early stop": {"decoding_method": "d3llm", "block_length": 5, "entropy_threshold": 1.5, "early_stop": True},
    "d3llm, delayed cache": {
        "decoding_method": "d3llm",
        "block_length": 4,
        "entropy_threshold": 0.9,
        "kv_cache": "delayed",
        "cache_delay": 1,
    },
    "d3llm, delayed cache with refresh": {
        "decoding_method": "d3llm",
        "block_length": 5,
        "entropy_threshold": 1.5,
        "kv_cache": "delayed",
        "cache_delay": 2,
        "cache_refresh_interval": 3,
        "early_stop": True,
    },
    "d3llm, eager blocks, delayed cache": {
        "decoding_method": "d3llm",
        "block_length": 3,
        "entropy_threshold": 0.6,
        "block_add_threshold": 0.0,
        "block_activation_threshold": 0.5,
        "kv_cache": "delayed",
        "cache_delay": 0,
        "cache_refresh_interval": 4,
    },
    "dparallel": {"decoding_method": "dparallel", "block_length": 8, "entropy_threshold": 1.2, "early_stop": True},
    "llada": {"decoding_method": "llada", "block_length": 8, "steps": 11, "early_stop": True},
    "llada, guided": {"decoding_method": "llada", "block_length": 8, "steps": 11, "cfg_scale": 0.7},
    "dream": {"decoding_method": "dream", "steps": 9, "remasking": "topk_margin", "early_stop": True},
    "dream, confidence threshold": {"decoding_method": "dream", "steps": 9, "confidence_threshold": 0.3},
}
NEW = 16
FIELDS = ("step_map", "num_forwards", "num_forwards_reference", "positions_computed", "tokens_per_forward")


def generate(model, prompts, **settings):
    defaults = {"early_stop": False, "max_new_tokens": NEW, "eos_token_id": [EOS, 4], "pad_token_id": PAD}
    return model.generate(**left_padded(prompts), return_dict_in_generate=True, **(defaults | settings))


@pytest.mark.every(12)
@pytest.mark.parametrize("method, family", covering(METHODS, ["llada", "dream"], strength=1, every=4))
def test_rows_alone_and_in_batches_of_2_4_and_8_get_the_same_answer_and_the_same_counts(method, family):
    model = tiny_model(family, seed=list(METHODS).index(method), spread=3.0)
    first = 100 * list(METHODS).index(method) + 50 * (family == "dream")
    prompts = [tiny_prompt(first + index, 1 + index * 7 % 12) for index in range(10)]
    alone = [generate(model, [prompt], **METHODS[method]) for prompt in prompts]
    for size in (2, 4, 8):
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            output = generate(model, batch, **METHODS[method])
            width = max(map(len, batch))
            for row, expected in enumerate(alone[start : start + size]):
                padding = width - len(batch[row])
                assert output.sequences[row, :padding].tolist() == [PAD] * padding
                assert output.sequences[row, padding:].tolist() == expected.sequences[0].tolist()
                for name in FIELDS:
                    assert torch.equal(output[name][row], expected[name][0]), name


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_a_padded_batch_gives_the_logits_of_its_rows_alone(family):
    model = tiny_model(family)
    prompts = [tiny_prompt(seed, 2 + 3 * seed) for seed in range(4)]
    with torch.no_grad():
        together = model(**left_padded(prompts)).logits
        for row, prompt in enumerate(prompts):
            alone = model(input_ids=torch.tensor([prompt])).logits[0]
            assert equal_up_to_rounding(together[row, -len(prompt) :], alone)


@pytest.mark.every(12)
@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize(
    "settings",
    [
        {"decoding_method": "d3llm", "block_length": 4, "kv_cache": "delayed", "do_sample": True, "temperature": 0.9},
        {"decoding_method": "llada", "remasking": "random", "steps": 5},
        {"decoding_method": "dream", "remasking": "origin", "steps": 7, "do_sample": True, "top_p": 0.9},
        {"decoding_method": "dream", "remasking": "maskgit_plus", "steps": 7, "alg_temp": 0.3},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_a_row_that_is_sampled_does_not_depend_on_the_rows_beside_it(settings, family):
    model = tiny_model(family)
    prompts = [tiny_prompt(seed, 2 + 3 * seed) for seed in range(4)]
    alone = generate(model, prompts[:1], seed=7, **settings)
    others = [prompts[1:3], prompts[2:], prompts[3:]]
    for beside in others:
        output = generate(model, [prompts[0], *beside], seed=7, **settings)
        assert output.sequences[0, -NEW:].tolist() == alone.sequences[0, -NEW:].tolist()
        assert output.step_map[0].tolist() == alone.step_map[0].tolist()


def test_rows_of_one_prompt_get_different_samples():
    output = generate(tiny_model("llada"), [tiny_prompt(0, 4)] * 8, do_sample=True, seed=0, decoding_method="d3llm")
    assert len({tuple(row) for row in output.sequences.tolist()}) == 8
