"""What comes beside the prompt has the prompt's shape, or is refused with both."""

import re

import pytest
import torch
from others import ENCODERS
from tiny import MASK, tiny_model

from d3llm_hf import as_diffusion_lm, is_greedy, log_likelihood


MODEL = tiny_model("llada")
IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
SHAPES = ((3, 3), (2, 2), (2, 4), (2,), (3,), (2, 1, 3, 3))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["attention_mask", "position_ids", "infill_mask"])
def test_an_input_that_does_not_fit_the_prompt_is_refused_with_both_shapes(name, shape):
    with pytest.raises(ValueError, match=re.escape(f"of `input_ids`, (2, 3) (got {shape})")) as caught:
        MODEL.generate(IDS, max_new_tokens=4, **{name: torch.ones(shape, dtype=torch.long)})
    assert f"`{name}` must have the shape" in str(caught.value)


@pytest.mark.parametrize("name", ["attention_mask", "infill_mask"])
def test_one_row_is_not_spread_over_all(name):
    with pytest.raises(ValueError, match=rf"`{name}` must have the shape .*of `input_ids`, .2, 3. .got .1, 3."):
        MODEL.generate(IDS, max_new_tokens=4, **{name: torch.ones(1, 3, dtype=torch.long)})


def test_token_types_have_to_fit_where_the_model_has_them():
    model = as_diffusion_lm(ENCODERS[0].tiny(), mask_token_id=MASK)
    for shape in ((1, 3), (2, 4)):
        with pytest.raises(ValueError, match=r"`token_type_ids` must have the shape .B, P. of `input_ids`, .2, 3."):
            model.generate(IDS, max_new_tokens=4, token_type_ids=torch.ones(shape, dtype=torch.long))


@pytest.mark.parametrize("shape", [(1, 2), (2, 3)], ids=str)
def test_an_attention_mask_has_to_fit_embeddings_too(shape):
    embeds = MODEL.get_input_embeddings()(IDS[:1]).detach()
    mask = torch.ones(shape, dtype=torch.long)
    with pytest.raises(ValueError, match=r"`attention_mask` must have the shape .B, P. of `inputs_embeds`, .1, 3."):
        MODEL.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=4)
    with pytest.raises(
        ValueError, match=r"`input_ids` must have the shape .B, P. of `inputs_embeds`, .1, 3. .got .2, 3."
    ):
        MODEL.generate(IDS, inputs_embeds=embeds, max_new_tokens=4)


@pytest.mark.parametrize("shape", [(3, 16), (1, 3, 8)], ids=str)
def test_embeddings_have_the_models_width(shape):
    with pytest.raises(ValueError, match=r"`inputs_embeds` must .*got "):
        MODEL.generate(inputs_embeds=torch.zeros(shape), max_new_tokens=4)


def test_a_prompt_is_a_table_of_rows():
    with pytest.raises(ValueError, match=r"`input_ids` must have the shape .B, P. .got .3,.."):
        MODEL.generate(IDS[0], max_new_tokens=4)
    with pytest.raises(TypeError, match=r"`input_ids` must be a tensor .got list"):
        MODEL.generate([[1, 2, 3]], max_new_tokens=4)
    with pytest.raises(TypeError, match=r"`attention_mask` must be a tensor .got list"):
        MODEL.generate(IDS, attention_mask=[[1, 1, 1], [1, 1, 1]], max_new_tokens=4)


def test_what_fits_is_taken():
    found = MODEL.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, pad_token_id=29)
    shared = MODEL.generate(IDS, position_ids=torch.arange(3)[None], max_new_tokens=4, pad_token_id=29)
    assert torch.equal(found, shared)
    sampled = MODEL.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, num_return_sequences=2, do_sample=True
    )
    assert sampled.shape == (4, 7)


@pytest.mark.parametrize("score", [log_likelihood, is_greedy])
def test_likelihoods_name_both_shapes(score):
    completion = torch.tensor([[False, False, True]] * 2)
    for shape in ((1, 3), (2, 4), (2,)):
        for name in ("completion_mask", "attention_mask"):
            table = torch.ones(shape, dtype=torch.bool)
            given = {"completion_mask": completion, "attention_mask": torch.ones(2, 3), name: table}
            with pytest.raises(ValueError, match=rf"`{name}` must have the shape .*got .* with `input_ids` of .2, 3."):
                score(MODEL, IDS, **given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.float16], ids=str)
def test_a_prompt_is_of_integers(dtype):
    with pytest.raises(TypeError, match=rf"`input_ids` must hold integers .got a tensor of {dtype}"):
        MODEL.generate(IDS.to(dtype), max_new_tokens=4)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
def test_integers_of_any_width_are_tokens(dtype):
    expected = MODEL.generate(IDS, max_new_tokens=4)
    assert torch.equal(MODEL.generate(IDS.to(dtype), max_new_tokens=4), expected)


def test_embeddings_are_of_floating_point():
    with pytest.raises(
        TypeError, match=r"`inputs_embeds` must hold floating-point numbers .got a tensor of torch.int64"
    ):
        MODEL.generate(inputs_embeds=torch.ones(1, 3, 16, dtype=torch.long), max_new_tokens=4)


@pytest.mark.parametrize("row", [[0, -1, 1], [0.5, 1, 1], [float("nan"), 1, 1], [1, 1, 2], [0, -1e9, 0]], ids=str)
def test_a_mask_holds_zeros_and_ones(row):
    with pytest.raises(ValueError, match="`attention_mask` must hold ones for tokens and zeros for padding"):
        MODEL.generate(IDS[:1], max_new_tokens=4, attention_mask=torch.tensor([row]))
    for ask in (log_likelihood, is_greedy):
        with pytest.raises(ValueError, match="`attention_mask` must hold ones for tokens"):
            ask(MODEL, IDS[:1], torch.tensor([[False, True, False]]), attention_mask=torch.tensor([row]))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32], ids=str)
def test_a_mask_may_be_of_any_type(dtype):
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    expected = MODEL.generate(IDS, max_new_tokens=4, attention_mask=mask)
    assert torch.equal(MODEL.generate(IDS, max_new_tokens=4, attention_mask=mask.to(dtype)), expected)


@pytest.mark.parametrize("config", [{}, {"max_new_tokens": 4}, "generation_config.json"], ids=str)
def test_a_generation_config_is_one(config):
    for given in ({"generation_config": config}, {"generation_config": config, "decoding_method": "llada"}):
        with pytest.raises(TypeError, match=r"`generation_config` must be a `GenerationConfig` .got (dict|str)"):
            MODEL.generate(IDS, **given)
    with pytest.raises(TypeError, match="`generation_config` must be a `GenerationConfig`"):
        MODEL.generate(IDS, config)


@pytest.mark.parametrize("streamer", [5, print, [1]], ids=["number", "function", "list"])
def test_a_streamer_can_be_told_something(streamer):
    with pytest.raises(TypeError, match="`streamer` must have the methods `put` and `end`"):
        MODEL.generate(IDS[:1], max_new_tokens=4, streamer=streamer)
