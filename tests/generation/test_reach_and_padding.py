"""What a short probe cannot see of a stock model: windows, causal blocks, padding that is not read."""

import pytest
import torch
from others import DECODERS, ENCODERS
from tiny import MASK, answer, left_padded
from transformers import (
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2ForCausalLM,
    Starcoder2Config,
    Starcoder2ForCausalLM,
)

from d3llm_hf import D3LLMGenerationMixin, as_diffusion_lm, is_greedy, log_likelihood
from d3llm_hf.models.cache_name import CACHE
from d3llm_hf.models.locality import limited_reach


QWEN2, BERT = DECODERS[0], ENCODERS[0]
SIZES = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 29, "eos_token_id": 30,
    "bos_token_id": None, "is_causal": False,
}  # fmt: skip
WINDOWED = {
    "mistral": (MistralForCausalLM, MistralConfig, {}),
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 2}),
    "phi3": (Phi3ForCausalLM, Phi3Config, {}),
    "starcoder2": (Starcoder2ForCausalLM, Starcoder2Config, {}),
}
PADDED = left_padded([[1, 2, 3, 4], [5, 6]])
EVEN = {"input_ids": torch.tensor([[1, 2], [5, 6]]), "attention_mask": torch.ones(2, 2, dtype=torch.long)}


def build(name: str, **overrides):
    model_class, config_class, more = WINDOWED[name]
    torch.manual_seed(0)
    model = model_class(config_class(**(SIZES | more | overrides))).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(20 if weight.ndim > 1 else 1)
    return model


# ---- windows -------------------------------------------------------------------------------------------------------


@pytest.mark.every(3)
@pytest.mark.parametrize("name", WINDOWED)
def test_a_sliding_window_is_seen_without_layer_types(name):
    model = as_diffusion_lm(build(name, sliding_window=4), mask_token_id=MASK)
    assert not model.supports_slot_cache
    with pytest.raises(ValueError, match=r"`kv_cache` must be \"none\" .*sliding_window=4 says that some layer"):
        answer(model, [1, 2, 3], kv_cache="dual")
    assert answer(model, [1, 2, 3]).sequences.shape == (1, 19)


@pytest.mark.every(4)
@pytest.mark.parametrize("name", WINDOWED)
def test_without_a_window_a_cache_that_is_always_refreshed_gives_the_tokens_of_none(name):
    model = as_diffusion_lm(build(name, sliding_window=None), mask_token_id=MASK)
    assert model.supports_slot_cache
    plain = answer(model, [1, 2, 3], block_length=4, decoding_method="llada")
    for cache in ("dual", "prefix", "vicinity"):
        chosen = {"block_length": 4, "decoding_method": "llada", "kv_cache": cache, "cache_refresh_interval": 1}
        assert torch.equal(answer(model, [1, 2, 3], **chosen).sequences, plain.sequences)


@pytest.mark.parametrize(
    "key",
    [
        {"attention_window": [4, 4]},
        {"window_size": 4},
        {"local_attention": 4},
        {"attention_chunk_size": 4},
        {"sliding_window_pattern": 2},
        {"global_attn_every_n_layers": 3},
        {"attention_types": [[["global", "local"], 1]]},
        {"attention_type": "block_sparse"},
        {"mamba_d_state": 4},
        {"linear_num_key_heads": 2},
        {"layers_block_type": ["attention", "recurrent"]},
        {"layer_types": ["full_attention", "chunked_attention"]},
    ],
    ids=lambda key: next(iter(key)),
)
def test_every_spelling_of_a_limited_reach_is_read(key):
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    assert limited_reach(model) is None
    for name, value in key.items():
        setattr(model.config, name, value)
    assert next(iter(key)) in limited_reach(model) or "layer_types" in limited_reach(model)
    assert not as_diffusion_lm(model, mask_token_id=MASK).supports_slot_cache


@pytest.mark.parametrize(
    "key",
    [
        {"sliding_window": 4, "use_sliding_window": False},
        {"sliding_window": None, "max_window_layers": 2},
        {"attention_type": "original_full"},
        {"layer_types": ["full_attention", "full_attention"]},
        {"chunk_size_feed_forward": 4},
    ],
    ids=lambda key: ", ".join(key),
)
def test_what_limits_nothing_takes_no_cache_away(key):
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    for name, value in key.items():
        setattr(model.config, name, value)
    assert as_diffusion_lm(model, mask_token_id=MASK).supports_slot_cache


def test_a_window_that_only_a_module_names_is_seen():
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.model.layers[1].self_attn.sliding_window = 4
    assert limited_reach(model) == "sliding_window=4"


def test_a_window_that_came_later_or_under_a_class_that_claims_a_cache_is_refused_by_the_call():
    class MyMistral(D3LLMGenerationMixin, MistralForCausalLM):
        logit_shift = 1
        supports_slot_cache = True

    model = MyMistral(MistralConfig(**SIZES, sliding_window=None, mask_token_id=MASK)).eval()
    assert answer(model, [1, 2], kv_cache="dual").sequences.shape == (1, 18)
    model.config.sliding_window = 4
    with pytest.raises(ValueError, match="sliding_window=4 says that some layer does not attend to all positions"):
        answer(model, [1, 2], kv_cache="dual")


class HiddenWindow(Qwen2ForCausalLM):
    """A window of 4 that neither its config nor a module names, counted from where a cache ends."""

    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, **kwargs):
        width = input_ids.shape[1]
        length = width if past_key_values is None else past_key_values.get_seq_length()
        near = (torch.arange(length - width, length)[:, None] - torch.arange(length)).abs() < 4
        mask = near[None, None].expand(len(input_ids), -1, -1, -1)
        return super().forward(input_ids=input_ids, attention_mask=mask, **{CACHE: past_key_values}, **kwargs)


class CausalBlocks(Qwen2ForCausalLM):
    """Blocks of 8 that see themselves and what precedes them."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        block = torch.arange(input_ids.shape[1]) // 8
        mask = (block[:, None] >= block)[None, None].expand(len(input_ids), -1, -1, -1)
        return super().forward(input_ids=input_ids, attention_mask=mask, **kwargs)


class OfThreeTokens(Qwen2ForCausalLM):
    def forward(self, input_ids=None, **kwargs):
        if input_ids.shape[1] > 6:
            raise IndexError("too long")
        return super().forward(input_ids=input_ids, **kwargs)


def test_a_window_that_nothing_names_is_found_by_forwards():
    assert not as_diffusion_lm(QWEN2.tiny(cls=HiddenWindow), mask_token_id=MASK).supports_slot_cache


def test_blocks_that_are_causal_among_each_other_are_refused():
    with pytest.raises(ValueError, match="nor causal by blocks: in CausalBlocks the beginning of a text of 64 tokens"):
        as_diffusion_lm(QWEN2.tiny(cls=CausalBlocks), mask_token_id=MASK)


def test_a_model_of_short_texts_is_asked_no_long_one():
    assert not as_diffusion_lm(QWEN2.tiny(cls=OfThreeTokens), mask_token_id=MASK).supports_slot_cache


# ---- padding -------------------------------------------------------------------------------------------------------


class NeverReadsIt(Qwen2ForCausalLM):
    """Takes a mask, as one of any keywords."""

    def forward(self, input_ids=None, **kwargs):
        return super().forward(input_ids=input_ids, **(kwargs | {"attention_mask": None}))


class ReadsItAsText(Qwen2ForCausalLM):
    """Reads the mask the wrong way round."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        if attention_mask is not None and not attention_mask.all():
            attention_mask = 1 - attention_mask.long()
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


class NoMask(BertForMaskedLM):
    def forward(self, input_ids=None, position_ids=None):
        return super().forward(input_ids=input_ids, position_ids=position_ids)


class NeedsMore(Qwen2ForCausalLM):
    def forward(self, input_ids=None, language=None, **kwargs):
        if language is None:
            raise ValueError("which language?")
        return super().forward(input_ids=input_ids, **kwargs)


def mixed(cls):
    return type(cls.__name__, (D3LLMGenerationMixin, cls), {"logit_shift": 1})


@pytest.mark.parametrize("how", ["as_diffusion_lm", "mixin"])
@pytest.mark.parametrize("cls", [NeverReadsIt, ReadsItAsText])
def test_padding_that_a_forward_does_not_read_is_refused(cls, how):
    if how == "mixin":
        model = QWEN2.tiny(cls=mixed(cls), mask_token_id=MASK)
    else:
        model = as_diffusion_lm(QWEN2.tiny(cls=cls), mask_token_id=MASK)
        assert model.supports_padding is False
    with pytest.raises(ValueError, match=rf"`attention_mask` must not hide positions from {cls.__name__}"):
        model.generate(**PADDED, max_new_tokens=4)
    assert model.generate(**EVEN, max_new_tokens=4).shape == (2, 6)
    with pytest.raises(ValueError, match=rf"`suffix_length` must not hide positions from {cls.__name__}"):
        model.generate(**EVEN, max_new_tokens=8, block_length=2, suffix_length=2)
    completion = torch.tensor([[False, False, True, True]] * 2)
    for score in (log_likelihood, is_greedy):
        with pytest.raises(ValueError, match=rf"`attention_mask` must not hide positions from {cls.__name__}"):
            score(model, completion_mask=completion, **PADDED)


def test_padding_is_refused_where_the_forward_takes_no_mask_at_all():
    model = BERT.tiny(cls=type("NoMask", (D3LLMGenerationMixin, NoMask), {}), mask_token_id=MASK)
    with pytest.raises(ValueError, match="must not hold zeros for NoMask: its forward takes no `attention_mask`"):
        model.generate(**PADDED, max_new_tokens=4)


def test_a_class_may_say_what_it_does_with_padding_and_is_asked_no_forward():
    cls = type("Sure", (D3LLMGenerationMixin, NeverReadsIt), {"logit_shift": 1, "supports_padding": True})
    model = QWEN2.tiny(cls=cls, mask_token_id=MASK)
    assert model.generate(**PADDED, max_new_tokens=4).shape == (2, 8)


def test_a_probe_for_padding_leaves_the_model_in_its_mode_and_needs_nothing_of_it():
    model = QWEN2.tiny(cls=mixed(Qwen2ForCausalLM), mask_token_id=MASK).train()
    assert model.generate(**PADDED, max_new_tokens=4).shape == (2, 8)
    assert all(module.training for module in model.modules())
    needs = QWEN2.tiny(cls=mixed(NeedsMore), mask_token_id=MASK)
    assert needs.generate(**PADDED, max_new_tokens=4, language="en").shape == (2, 8)


def test_padding_is_granted_where_other_processes_would_wait(monkeypatch):
    model = QWEN2.tiny(cls=mixed(NeverReadsIt), mask_token_id=MASK)
    for name, value in (("is_available", True), ("is_initialized", True), ("get_world_size", 2)):
        monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
    assert model._reads_padding()


def test_likelihoods_of_a_roberta_count_positions_from_behind_its_padding_row():
    model = as_diffusion_lm(ENCODERS[1].tiny(), mask_token_id=MASK)
    ids = torch.tensor([[5, 6, 7, 8]])
    hidden = torch.tensor([[False, False, False, True]])
    with torch.no_grad():
        expected = model(input_ids=ids.masked_fill(hidden, MASK)).logits[0, 3].log_softmax(-1)[8]
    found = log_likelihood(model, ids, hidden, num_samples=1)
    torch.testing.assert_close(found.mean[0].float(), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="`input_ids` must fit into the model's 60 positions"):
        log_likelihood(model, torch.ones(1, 61, dtype=torch.long), torch.ones(1, 61, dtype=torch.bool))


def test_a_causal_model_has_no_likelihood_of_this_kind():
    model = QWEN2.tiny(cls=mixed(Qwen2ForCausalLM), mask_token_id=MASK, is_causal=None)
    with pytest.raises(ValueError, match="Attention must not be causal"):
        log_likelihood(model, torch.tensor([[1, 2]]), torch.tensor([[False, True]]))
