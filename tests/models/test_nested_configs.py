"""Models whose config keeps the text part's in one of its own are adapted, decoded and scored like others."""

import copy

import pytest
import torch
from tiny import EOS, MASK, PAD, answer, left_padded
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

from d3llm_hf import as_diffusion_lm, is_greedy, log_likelihood
from d3llm_hf.evaluation.sweep.sweep import _check_length
from d3llm_hf.models.text_config import text_config, text_setting
from d3llm_hf.watch.chat import Chat


TEXT = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "eos_token_id": EOS, "pad_token_id": PAD,
    "bos_token_id": None, "initializer_range": 0.5,
}  # fmt: skip
SIGHT = {
    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip


def nested(**text):
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**SIGHT), text_config=Qwen2Config(**(TEXT | text)), image_token_index=28
    )
    return LlavaForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def model():
    return as_diffusion_lm(nested(), mask_token_id=MASK, bidirectional=True)


def test_settings_are_those_of_the_text_part(model):
    assert (model.supports_slot_cache, model.supports_padding, model.max_positions) == (True, True, 64)
    assert text_config(model.config).is_causal is False
    assert text_setting(model.config, "vocab_size") == 32 and text_setting(model.config, "made_up") is None
    assert model.config.mask_token_id == MASK


def test_it_decodes_with_and_without_a_cache_and_in_a_padded_batch(model):
    chosen = {"block_length": 4, "decoding_method": "llada", "early_stop": False}
    plain = answer(model, [1, 2, 3], **chosen).sequences
    for cache in ("dual", "prefix"):
        found = answer(model, [1, 2, 3], kv_cache=cache, cache_refresh_interval=1, **chosen).sequences
        assert torch.equal(found, plain)
    inputs = left_padded([[1, 2, 3], [4]])
    together = model.generate(**inputs, max_new_tokens=16, eos_token_id=EOS, pad_token_id=PAD, **chosen)
    assert torch.equal(together[0], plain[0])


def test_positions_end_where_those_of_the_text_part_do(model):
    with pytest.raises(ValueError, match=r"must fit into the model's 64 positions .got 3 \+ 62 = 65"):
        answer(model, [1, 2, 3], max_new_tokens=62)
    with pytest.raises(ValueError, match="`input_ids` must fit into the model's 64 positions"):
        log_likelihood(model, torch.ones(1, 65, dtype=torch.long), torch.ones(1, 65, dtype=torch.bool))
    with pytest.raises(ValueError, match="room for the longest prompt in the model's 64 positions"):
        _check_length(model, [[1, 2, 3]], 62)
    assert Chat._positions.fget(type("Talk", (), {"model": model})()) == 64


def test_it_is_scored(model):
    ids, completion = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[False, False, True, True]])
    assert log_likelihood(model, ids, completion, num_samples=4).mean.isfinite().all()
    assert is_greedy(model, ids, completion).shape == (1,)


def test_a_nested_decoder_is_refused_where_it_is_causal_and_stays_as_it_was():
    causal = nested()
    before = copy.deepcopy(causal.config.to_dict())
    with pytest.raises(ValueError, match="Attention must not be causal"):
        as_diffusion_lm(causal, mask_token_id=MASK)
    with pytest.raises(ValueError, match="`logit_shift` must be 0 or 1"):
        as_diffusion_lm(causal, mask_token_id=MASK, bidirectional=True, logit_shift=3)
    with pytest.raises(ValueError, match="inside the vocabulary of 32 tokens"):
        as_diffusion_lm(causal, mask_token_id=32, bidirectional=True)
    assert causal.config.to_dict() == before


def test_a_window_of_the_text_part_is_seen():
    windows = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    assert not as_diffusion_lm(nested(**windows), mask_token_id=MASK, bidirectional=True).supports_slot_cache


def test_the_mask_token_may_stand_in_the_text_part():
    assert as_diffusion_lm(nested(mask_token_id=7), bidirectional=True).config.mask_token_id == 7
