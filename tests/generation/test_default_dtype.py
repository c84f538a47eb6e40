"""What is computed does not depend on torch's defaults: nothing is made in the default dtype, or on its device."""

from contextlib import contextmanager

import pytest
import torch
from every_setting import CACHES, METHODS
from thin import covering
from tiny import EOS, PAD, left_padded, tiny_prompt, trained_like

from d3llm_hf import LLaDAConfig, LLaDAModelLM, is_greedy, log_likelihood
from d3llm_hf.models.methods import LENGTHS
from trainers.distill.noisy_views import draw_view
from trainers.sft.masking import draw_answer_mask, generator_for


DEFAULTS = [torch.bfloat16, torch.float16, torch.float64]
OPTIONS = {
    "sampling": {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "min_p": 0.01, "seed": 3},
    "guided": {"cfg_scale": 0.5},
    "constrained": {
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[5], [6, 7]],
        "repetition_penalty": 1.3,
        "sequence_bias": [[[3], 0.5]],
        "exponential_decay_length_penalty": (2, 1.1),
        "min_new_tokens": 3,
    },
    "few positions": {"suffix_length": 4},
    **{
        f"length of {rule}": {"decoding_method": "fast_dllm", "length": "adaptive", "initial_length": 5}
        | {"length_rule": rule, "length_step": 2, "eos_token_id": [EOS, 3, 7, 11, 13]}
        for rule in LENGTHS
    },
    "random order": {"decoding_method": "dream", "alg_temp": 0.4, "seed": 1},
    "lossless": {"decoding_method": "llada", "lossless": True},
    **{
        f"{name} cache": {"decoding_method": "d3llm"} | cache for name, cache in CACHES.items() if "greedy" not in name
    },
    **METHODS,
}


@contextmanager
def default(dtype=torch.float32, device="cpu"):
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def decoded(family, options):
    inputs = left_padded([tiny_prompt(0, 3), tiny_prompt(1, 5)])
    with torch.device("cpu"):
        model = trained_like(family)
    chosen = {"max_new_tokens": 12, "eos_token_id": EOS, "pad_token_id": PAD, "seed": 5} | options
    return lambda: model.generate(**inputs, return_dict_in_generate=True, **chosen)


def same(one, other) -> bool:
    return all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in list(one))


@pytest.mark.every(12)
@pytest.mark.parametrize("name, family", covering(OPTIONS, ["llada", "dream"], strength=1, every=4))
def test_decoding_is_the_same_whatever_the_default_dtype_or_device_is(name, family):
    decode = decoded(family, OPTIONS[name])
    expected = decode()
    for dtype in DEFAULTS:
        with default(dtype):
            assert same(decode(), expected)
    with default(device="meta"):  # what were made there could not be computed with
        assert same(decode(), expected)


@pytest.mark.parametrize("ask", [log_likelihood, is_greedy])
def test_likelihoods_are_the_same_whatever_the_default_dtype_or_device_is(ask):
    model, ids = trained_like("llada"), torch.tensor([tiny_prompt(0, 6), tiny_prompt(1, 6)])
    completion = torch.zeros_like(ids, dtype=torch.bool)
    completion[:, 3:] = True

    def values():
        found = ask(model, ids, completion)
        return [found] if ask is is_greedy else [found.mean, found.standard_error]

    expected = values()
    for settings in [{"dtype": dtype} for dtype in DEFAULTS] + [{"device": "meta"}]:
        with default(**settings):
            found = values()
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_masks_of_training_are_the_same_whatever_the_default_dtype_or_device_is():
    learnt, lengths = torch.ones(4, 8, dtype=torch.bool), torch.tensor([8, 6, 5, 8])
    step_map = torch.tensor([1, 3, 2, 2, 5, 4, -1, 0])
    view = {"content_length": 8, "canvas_length": 8, "window": 4, "noise_range": (0.2, 0.9)}

    def drawn():
        mask = draw_answer_mask(
            learnt, lengths, generator_for(1), min_mask_ratio=0.1, suffix_fraction=0.5, suffix_window=2
        )
        views = [draw_view(step_map, generator_for(2), objective=kind, **view) for kind in ("trajectory", "random")]
        return [mask.hidden, mask.weights, *(table for each in views for table in (each.masked, each.complement))]

    expected = drawn()
    for settings in [{"dtype": dtype} for dtype in DEFAULTS] + [{"device": "meta"}]:
        with default(**settings):
            found = drawn()
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other) and one.dtype == other.dtype


def test_a_model_made_in_another_default_dtype_turns_by_exact_angles():
    sizes = {"d_model": 16, "n_layers": 1, "n_heads": 2, "vocab_size": 32, "mask_token_id": 31}
    expected = LLaDAModelLM(LLaDAConfig(**sizes)).model.rotary_emb.inv_freq
    for dtype in DEFAULTS:
        with default(dtype):
            found = LLaDAModelLM(LLaDAConfig(**sizes)).model.rotary_emb.inv_freq
        assert found.dtype == torch.float32 and torch.equal(found, expected)
