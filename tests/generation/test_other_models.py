"""Models that are not ours: stock classes of transformers decode by the mixin, as the slow oracle does."""

import pytest
import torch
from oracle import decode
from others import DECODERS, ENCODERS, OTHERS, OtherNetwork, cached_network, oracle_rules
from thin import covering
from tiny import MASK, answer, attributes, same_attributes, tiny_prompt
from transformers import BertForMaskedLM, ModernBertForMaskedLM, Qwen2ForCausalLM

from d3llm_hf import D3LLMGenerationConfig, D3LLMGenerationMixin, as_diffusion_lm


class MyDiffusionLM(D3LLMGenerationMixin, ModernBertForMaskedLM):
    pass


class MyQwen(D3LLMGenerationMixin, Qwen2ForCausalLM):
    logit_shift = 1
    supports_slot_cache = True


class MyBert(D3LLMGenerationMixin, BertForMaskedLM):
    pass


METHODS = {
    "d3llm": {"decoding_method": "d3llm", "block_length": 5, "entropy_threshold": 0.9, "early_stop": True},
    "dparallel": {"decoding_method": "dparallel", "block_length": 4, "entropy_threshold": 0.9, "early_stop": True},
    "llada": {"decoding_method": "llada", "block_length": 8, "steps": 9, "early_stop": False},
    "llada, guided": {"decoding_method": "llada", "block_length": 8, "steps": 9, "cfg_scale": 0.7},
    "dream": {"decoding_method": "dream", "steps": 9, "remasking": "entropy", "early_stop": False},
}
CACHES = (
    {"cache_delay": 1, "cache_refresh_interval": 10_000},
    {"cache_delay": 2, "cache_refresh_interval": 3},
    {"cache_delay": 0, "cache_refresh_interval": 4, "block_add_threshold": 0.0, "block_activation_threshold": 0.5},
    {"kv_cache": "prefix"},
    {"kv_cache": "dual"},
    {"kv_cache": "dkv", "cache_delay": 1, "cache_refresh_interval": 8},
)
WITH_CACHE = (*ENCODERS[:2], *DECODERS)


def name_of(value) -> str:
    return getattr(value, "name", value)


def named(others):
    return pytest.mark.parametrize("other", others, ids=name_of)


def diffusion(other, seed=0, **settings):
    return as_diffusion_lm(other.tiny(seed, **settings), mask_token_id=MASK)


def padded(prompts, pad_token_id):
    width = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[pad_token_id] * (width - len(p)) + p for p in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
    }


def compare(model, other, network, prompt, **chosen):
    pad = model.config.pad_token_id
    output = answer(model, prompt, max_new_tokens=12, pad_token_id=pad, **({"early_stop": False} | chosen))
    expected = decode(network, prompt, oracle_rules(other, pad, **chosen))
    assert output.sequences[0].tolist() == expected.sequence
    assert output.step_map[0].tolist() == expected.step_map
    assert int(output.num_forwards) == expected.forwards
    assert int(output.positions_computed) == expected.positions_computed


# ---- equal to the oracle -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other, method", covering(OTHERS, METHODS, strength=1, every=2), ids=name_of)
def test_a_stock_model_decodes_as_the_oracle_does_with_its_own_forward(other, method):
    seed = list(METHODS).index(method)
    model = diffusion(other, seed)
    compare(model, other, OtherNetwork(model, other), tiny_prompt(seed, 2 + 2 * seed), **METHODS[method])


@pytest.mark.every(6)
@pytest.mark.parametrize("settings", CACHES, ids=["delayed", "refreshed", "eager blocks", "prefix", "dual", "dkv"])
@named(WITH_CACHE)
def test_with_a_cache_a_stock_model_decodes_as_the_oracle_does(other, settings):
    settings = {"kv_cache": "delayed", "block_length": 4, "entropy_threshold": 1.2} | settings
    seed = settings.get("cache_delay", 3)
    model = diffusion(other, seed)
    assert model.supports_slot_cache
    network = cached_network(model, other)
    compare(model, other, network, tiny_prompt(seed, 3 + seed), decoding_method="d3llm", **settings)


@pytest.mark.every(3)
@pytest.mark.parametrize(
    "other, attn_implementation", covering(OTHERS, ["sdpa", "eager"], strength=1, every=2), ids=name_of
)
def test_rows_alone_and_in_left_padded_batches_get_the_same_answer(other, attn_implementation):
    model = diffusion(other, 1, attn_implementation=attn_implementation)
    pad = model.config.pad_token_id
    prompts = [tiny_prompt(seed, length) for seed, length in enumerate((3, 9, 1))]
    methods = [METHODS["d3llm"], METHODS["llada, guided"] | {"steps": 4}]
    if model.supports_slot_cache:
        methods.append({"block_length": 4, "entropy_threshold": 1.2, "kv_cache": "delayed", "cache_delay": 1})
    for method in methods:
        settings = {"max_new_tokens": 8, "pad_token_id": pad, "return_dict_in_generate": True} | method
        together = model.generate(**padded(prompts, pad), **settings)
        for row, prompt in enumerate(prompts):
            alone = model.generate(**padded([prompt], pad), **settings)
            assert together.sequences[row, 9:].tolist() == alone.sequences[0, len(prompt) :].tolist()
            assert together.positions_computed[row] == alone.positions_computed[0]


@pytest.mark.every(3)
@named(OTHERS)
def test_both_attention_backends_give_the_same_answer(other):
    sdpa, eager = (diffusion(other, 2, attn_implementation=name) for name in ("sdpa", "eager"))
    a, b = (answer(model, tiny_prompt(5, 6), **METHODS["dream"]).sequences for model in (sdpa, eager))
    assert torch.equal(a, b)


@named(DECODERS)
def test_is_causal_false_lets_the_last_token_move_the_first_position(other):
    texts = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 2, 4]])  # apart: rows of one batch may round differently
    for is_causal, moved in ((False, True), (True, False)):
        model = other.tiny(is_causal=is_causal)
        first = [model(ids).logits[:, 0] for ids in texts]
        assert torch.equal(*first) is not moved


# ---- what a model is asked, and what it is not ---------------------------------------------------------------------


def test_a_class_in_one_line_loads_generates_saves_and_loads_again(tmp_path):
    other = ENCODERS[2]
    other.tiny(mask_token_id=MASK).save_pretrained(tmp_path / "stock")
    model = MyDiffusionLM.from_pretrained(tmp_path / "stock")
    assert isinstance(model.generation_config, D3LLMGenerationConfig)
    model.generation_config.decoding_method = "dparallel"
    expected = answer(model, [1, 2, 3], block_length=4).sequences
    model.save_pretrained(tmp_path / "mine")
    again = MyDiffusionLM.from_pretrained(tmp_path / "mine")
    assert again.config.architectures == ["MyDiffusionLM"]
    assert again.generation_config.decoding_method == "dparallel"
    assert torch.equal(answer(again, [1, 2, 3], block_length=4).sequences, expected)
    stock = ModernBertForMaskedLM.from_pretrained(tmp_path / "mine")
    assert torch.equal(stock(torch.tensor([[1, 2]])).logits, model(torch.tensor([[1, 2]])).logits)


def test_a_class_over_a_decoder_says_its_shift_and_its_cache(tmp_path):
    model = DECODERS[0].tiny(cls=MyQwen, mask_token_id=MASK)
    adapted = as_diffusion_lm(DECODERS[0].tiny(), mask_token_id=MASK)
    settings = {"kv_cache": "delayed", "block_length": 4, "cache_delay": 1}
    assert torch.equal(answer(model, [1, 2], **settings).sequences, answer(adapted, [1, 2], **settings).sequences)
    model.save_pretrained(tmp_path)
    again = MyQwen.from_pretrained(tmp_path)
    assert torch.equal(answer(again, [1, 2], **settings).sequences, answer(model, [1, 2], **settings).sequences)


def test_positions_of_a_roberta_begin_behind_its_padding_row_and_end_with_its_table():
    model = diffusion(ENCODERS[1])
    assert model.position_offset == 4
    assert answer(model, [1, 2], max_new_tokens=58).sequences.shape == (1, 60)
    with pytest.raises(ValueError, match=r"must fit into the model's 60 positions .got 2 \+ 59 = 61"):
        answer(model, [1, 2], max_new_tokens=59)


def test_token_types_of_the_prompt_continue_in_the_answer_and_follow_their_rows():
    model = diffusion(ENCODERS[0], 1)
    seen = []
    model.register_forward_pre_hook(lambda _, args, inputs: seen.append(inputs["token_type_ids"]), with_kwargs=True)
    prompts, types = [tiny_prompt(seed, 3) for seed in range(3)], torch.tensor([[0, 0, 1], [0, 0, 0], [1, 1, 1]])
    batch = padded(prompts, 0)
    settings = {"max_new_tokens": 12, "block_length": 4, "entropy_threshold": 1.5, "kv_cache": "delayed"}
    together = model.generate(**batch, token_type_ids=types, **settings)
    assert seen[0].tolist() == [[0, 0] + [1] * 13, [0] * 15, [1] * 15]
    for row, prompt in enumerate(prompts):
        alone = model.generate(**padded([prompt], 0), token_type_ids=types[row : row + 1], **settings)
        assert torch.equal(alone[0], together[row])
    guided = {"decoding_method": "llada", "steps": 4, "cfg_scale": 0.5, "max_new_tokens": 4}
    model.generate(**batch, token_type_ids=types, **guided)
    assert seen[-1].shape == (6, 7)
    nothing = torch.zeros(1, 0, dtype=torch.long)
    model.generate(nothing, attention_mask=nothing, token_type_ids=nothing, max_new_tokens=4)
    assert seen[-1].tolist() == [[0] * 4]


def test_prompts_may_come_as_embeddings():
    for other in OTHERS:
        model, ids = diffusion(other), torch.tensor([[5, 6, 7]])
        embeds = model.get_input_embeddings()(ids).detach()
        plain = {"max_new_tokens": 8, "block_length": 4, "pad_token_id": model.config.pad_token_id}
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **plain)[:, 3:]
        assert torch.equal(model.generate(inputs_embeds=embeds, **plain), expected), other.name


def test_an_answer_streams():
    class Collector:
        def __init__(self):
            self.tokens, self.ended = [], 0

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended += 1

    streamer = Collector()
    output = answer(diffusion(ENCODERS[2]), [1, 2, 3], streamer=streamer, block_length=4, early_stop=False)
    assert streamer.tokens == output.sequences[0].tolist() and streamer.ended == 1


def test_decoding_stores_nothing_on_the_model():
    for other in OTHERS:
        model = diffusion(other)
        before = attributes(model)
        answer(model, [1, 2, 3], block_length=4)
        assert same_attributes(before, attributes(model))


def test_a_forward_may_lack_positions_and_a_cache_where_nothing_is_padded():
    class NoPositions(MyBert):
        def forward(self, input_ids, attention_mask=None):
            return super().forward(input_ids=input_ids, attention_mask=attention_mask)

    model, full = (ENCODERS[0].tiny(cls=cls, mask_token_id=MASK) for cls in (NoPositions, MyBert))
    chosen = {"block_length": 4, "early_stop": False}
    assert torch.equal(answer(model, [1, 2, 3], **chosen).sequences, answer(full, [1, 2, 3], **chosen).sequences)
    with pytest.raises(ValueError, match=r"must not hold zeros for NoPositions: its forward takes no `position_ids`"):
        model.generate(**padded([[1, 2, 3], [1]], 0), max_new_tokens=4)


# ---- what cannot work ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "other", "config"),
    [(MyQwen, DECODERS[0], {"is_causal": None}), (MyBert, ENCODERS[0], {"is_decoder": True})],
    ids=["decoder", "encoder as a decoder"],
)
def test_causal_attention_is_refused_by_generate_with_the_way_out(cls, other, config):
    model = other.tiny(cls=cls, mask_token_id=MASK, **config)
    with pytest.raises(ValueError, match=rf"must not be causal.* .got {cls.__name__}.*config.is_causal = False"):
        answer(model, [1, 2, 3])
    model.config.is_causal = False
    assert answer(model, [1, 2, 3]).sequences.shape == (1, 19)


def test_a_cache_is_refused_where_the_forward_cannot_use_one():
    model = diffusion(ENCODERS[2])
    assert not model.supports_slot_cache
    with pytest.raises(ValueError, match='`kv_cache` must be "none" for ModernBertForMaskedLM'):
        answer(model, [1, 2, 3], kv_cache="delayed")
    answer(model, [1, 2, 3], kv_cache="delayed", use_cache=False)


def test_a_model_without_a_mask_token_is_refused():
    model = ENCODERS[2].tiny(cls=MyDiffusionLM)
    with pytest.raises(ValueError, match="`mask_token_id` must name the token of an undecided position"):
        answer(model, [1, 2, 3])
    assert answer(model, [1, 2, 3], mask_token_id=MASK).sequences.shape == (1, 19)
