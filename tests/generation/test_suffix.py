"""`suffix_length`: a forward sees so many undecided positions behind the last open block, and no others."""

from random import Random

import pytest
import torch
from every_setting import CACHES, METHODS, drawn_cache, drawn_method, go_together
from oracle import Oracle, Rules
from oracle_network import Network, SlotPerPosition
from problems import FAMILIES, assert_equal, in_oracle_terms, model_of
from thin import covering, some_of
from tiny import EOS, MASK, PAD, ScriptedModel, answer, constant_script, left_padded, tiny_prompt

from d3llm_hf import as_diffusion_lm


WHOLE = {"early_stop": False, "seed": 0, "return_dict_in_generate": True, "eos_token_id": EOS, "pad_token_id": PAD}
SOME = ("d3llm", "fast_dllm", "dream, blocks", "llada, random")
PAIRS = [(method, cache) for method in SOME for cache in CACHES if go_together(METHODS[method], cache)]
COUNTS = ("step_map", "num_forwards", "positions_computed", "tokens_per_forward")


# ---- the slow oracle: it cuts its canvas off before every forward ---------------------------------------------------


class GrowingKeys(SlotPerPosition):
    """Keys and values of a canvas that becomes longer; what is new must be computed at once."""

    length = 0

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if layer_idx not in self.stored:
            assert self.slots == list(range(self.length)), "the first forward covers what it sees"
            self.stored[layer_idx] = [key_states.clone(), value_states.clone()]
        stored, missing = self.stored[layer_idx], self.length - self.stored[layer_idx][0].shape[2]
        assert set(range(self.length - missing, self.length)) <= set(self.slots), "what comes into sight is computed"
        stored[:] = [torch.nn.functional.pad(table, (0, 0, 0, missing)) for table in stored]
        return super().update(key_states, value_states, layer_idx)


class CutNetwork(Network):
    def __init__(self, *args):
        super().__init__(*args)
        self.cache = GrowingKeys()

    def __call__(self, canvas, slots, wanted):
        self.cache.length = len(canvas)
        return super().__call__(canvas, slots, wanted)


class CutOracle(Oracle):
    """The oracle on a canvas that ends `suffix_length` positions behind the last open block."""

    suffix_length = 0

    def forward(self, wanted):
        whole, length = self.canvas, self.length
        self.length = min(self.blocks[max(self.activated)][1] + self.suffix_length, length)
        self.canvas = whole[: self.length]
        try:
            return super().forward(wanted)
        finally:
            self.canvas, self.length, self.canvas_before = whole, length, list(whole)


def oracle(model, prompt, suffix_length: int, seed: int = 0, **chosen):
    dream = model.logit_shift == 1
    noise = in_oracle_terms(seed, len(prompt))
    rules = Rules(eos_token_ids=(EOS,), pad_token_id=PAD, mask_token_id=MASK, noise=noise, **chosen)
    rules.strict, rules.always_lowest, rules.serial_stamps = dream, not dream, not dream
    cut = CutOracle(CutNetwork(model, model.logit_shift, MASK), prompt, rules)
    cut.suffix_length = suffix_length
    return cut.run()


def family_of(method: str, cache: str) -> str:
    """Every method and every cache meets both families."""
    return FAMILIES[(SOME.index(method) + list(CACHES).index(cache)) % 2]


@pytest.mark.every(9)
@pytest.mark.parametrize("method, cache", PAIRS)
def test_a_row_decodes_as_on_a_canvas_that_is_cut_off_by_hand(method, cache):
    rng, family = Random(f"{method} {cache} suffix"), family_of(method, cache)
    model, seed = model_of(family, rng.randint(0, 2), 2), rng.randint(0, 2**70)
    prompt, suffix_length = tiny_prompt(rng.randint(0, 999), rng.randint(1, 9)), rng.choice([0, 1, 3, 7])
    chosen = drawn_method(rng, method) | drawn_cache(rng, cache) | {"block_length": rng.randint(1, 6)}
    chosen |= {"max_new_tokens": rng.randint(8, 24), "early_stop": rng.random() < 0.4}
    expected = oracle(model, prompt, suffix_length, seed, **chosen)
    assert_equal(answer(model, prompt, suffix_length=suffix_length, **chosen | {"seed": seed}), expected)


@pytest.mark.every(3)
@pytest.mark.parametrize("method, cache", covering(PAIRS, strength=1, every=2))
def test_rows_of_a_batch_decode_as_each_on_its_own_canvas_cut_off_by_hand(method, cache):
    # Rows open their blocks at different forwards, so each sees another length; suffixes take turns.
    number = PAIRS.index((method, cache))
    model, suffix_length = model_of(family_of(method, cache), 1, 2), (0, 2, 5)[number % 3]
    prompts = [tiny_prompt(10 * number + row, 1 + row * 5 % 11) for row in range(4)]
    chosen = METHODS[method] | CACHES[cache] | {"max_new_tokens": 14, "early_stop": True}
    settings = WHOLE | chosen | {"suffix_length": suffix_length, "seed": [7, 8, 9, 10]}
    output, width = model.generate(**left_padded(prompts), **settings), max(map(len, prompts))
    for row, prompt in enumerate(prompts):
        expected = oracle(model, prompt, suffix_length, 7 + row, **chosen)
        assert output.sequences[row, width - len(prompt) :].tolist() == expected.sequence
        assert output.step_map[row].tolist() == expected.step_map
        assert int(output.num_forwards[row]) == expected.forwards
        assert int(output.positions_computed[row]) == expected.positions_computed


# ---- laws -----------------------------------------------------------------------------------------------------------


def batch(family: str, **chosen):
    inputs = left_padded([tiny_prompt(seed, 1 + 2 * seed) for seed in range(3)])
    return model_of(family, 1, 2).generate(**inputs, **WHOLE | {"max_new_tokens": 14} | chosen)


def assert_same(output, expected) -> None:
    assert torch.equal(output.sequences, expected.sequences)
    for name in COUNTS:
        assert torch.equal(output[name], expected[name]), name


@pytest.mark.every(3)
@pytest.mark.parametrize("method, cache", covering(PAIRS, strength=1, every=2))
def test_a_suffix_as_long_as_the_rest_changes_nothing(method, cache):
    chosen, family = METHODS[method] | CACHES[cache], family_of(method, cache)
    suffix_length = 10**30 if cache == "none" else 14 - chosen["block_length"]
    assert_same(batch(family, suffix_length=suffix_length, **chosen), batch(family, **chosen))


@pytest.mark.every(3)
@pytest.mark.parametrize("cache", some_of((cache for cache in CACHES if cache != "dkv_greedy"), every=3))
def test_where_one_block_is_everything_there_is_no_suffix_to_leave_out(cache):
    methods = {"decoding_method": "dparallel", "block_length": 14}, {"decoding_method": "dream", "steps": 9}
    for family, method in zip(FAMILIES, methods, strict=True):
        chosen = method | CACHES[cache]
        assert_same(batch(family, suffix_length=0, **chosen), batch(family, **chosen))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_positions_of_every_forward_are_those_in_sight(family):
    chosen = {"decoding_method": "llada", "block_length": 4, "max_new_tokens": 12, "early_stop": False}
    in_sight = {None: [12] * 12, 0: [4] * 4 + [8] * 4 + [12] * 4, 3: [7] * 4 + [11] * 4 + [12] * 4}
    for suffix_length, ends in in_sight.items():
        output = answer(model_of(family, 1, 2), [1, 2, 3], suffix_length=suffix_length, **chosen)
        assert int(output.positions_computed) == sum(3 + end for end in ends)
    guided = answer(model_of(family, 1, 2), [1, 2, 3], suffix_length=0, cfg_scale=0.7, **chosen)
    assert int(guided.positions_computed) == 2 * (4 * 7 + 4 * 11 + 4 * 15)


@pytest.mark.parametrize("family", FAMILIES)
def test_guidance_sees_the_same_suffix_with_and_without_the_prompt(family):
    model, prompt = model_of(family, 1, 2), tiny_prompt(4, 6)
    chosen = {"decoding_method": "llada", "block_length": 4, "max_new_tokens": 12, "early_stop": False}
    chosen |= {"cfg_scale": 0.7}
    output = answer(model, prompt, suffix_length=2, **chosen)
    assert_equal(output, oracle(model, prompt, 2, **chosen))


@pytest.mark.every(2)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("suffix_length", [0, 2])
def test_what_is_out_of_sight_changes_no_token_in_sight(family, suffix_length):
    chosen = {"decoding_method": "fast_dllm", "block_length": 4, "confidence_threshold": 0.5, "early_stop": False}
    chosen |= {"suffix_length": suffix_length}
    short, long = (answer(model_of(family, 1, 2), [1, 2, 3], max_new_tokens=n, **chosen) for n in (12, 40))
    # The last blocks of the shorter answer have less behind them.
    assert short.sequences[0, :11].tolist() == long.sequences[0, :11].tolist()
    whole = {**chosen, "suffix_length": None}
    seen = answer(model_of(family, 1, 2), [1, 2, 3], max_new_tokens=40, **whole)
    assert not torch.equal(long.sequences, seen.sequences)


@pytest.mark.every(3)
@pytest.mark.parametrize("method", ["llada, one token a forward", "llada, random", "dream, blocks"])
@pytest.mark.parametrize("suffix_length", [0, 2, 7])
def test_lossless_decoding_gives_the_tokens_of_the_method_with_the_same_suffix(method, suffix_length):
    family = FAMILIES[method.startswith("dream")]
    chosen = METHODS[method] | {"suffix_length": suffix_length}
    without, output = batch(family, **chosen), batch(family, lossless=True, draft_length=3, **chosen)
    assert torch.equal(output.sequences, without.sequences)
    assert (output.num_forwards <= without.num_forwards).all()
    assert (output.num_forwards < without.num_forwards).any()


def test_embeddings_as_a_prompt_give_the_tokens_of_their_ids():
    model, ids = model_of("llada", 1, 2), torch.tensor([tiny_prompt(3, 5)])
    chosen = WHOLE | {"decoding_method": "llada", "block_length": 4, "max_new_tokens": 12, "suffix_length": 1}
    mask = torch.ones_like(ids)
    expected = model.generate(ids, attention_mask=mask, **chosen)
    embeds = model.get_input_embeddings()(ids)
    output = model.generate(inputs_embeds=embeds, attention_mask=mask, **chosen)
    assert torch.equal(output.sequences, expected.sequences[:, 5:])


def test_a_model_of_transformers_gives_the_rows_of_a_batch_what_it_gives_them_alone():
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    model = as_diffusion_lm(
        BertForMaskedLM(BertConfig(vocab_size=32, initializer_range=1.0, **sizes)).eval(), mask_token_id=MASK
    )
    chosen = WHOLE | {"decoding_method": "fast_dllm", "block_length": 4, "confidence_threshold": 0.5}
    chosen |= {"max_new_tokens": 12, "suffix_length": 1}
    prompts = [tiny_prompt(row, 2 + row) for row in range(3)]
    output = model.generate(**left_padded(prompts), **chosen)
    for row, prompt in enumerate(prompts):
        alone = model.generate(**left_padded([prompt]), **chosen)
        assert output.sequences[row, 2 - row :].tolist() == alone.sequences[0].tolist()
        assert int(output.positions_computed[row]) == int(alone.positions_computed)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [{"infill": True}, {"infill_mask": torch.tensor([[False, True, False]])}])
def test_infilling_is_refused_by_name(asked):
    model = ScriptedModel(constant_script([1] * 16, 2))
    with pytest.raises(ValueError, match="`suffix_length` cannot be combined with infilling"):
        answer(model, [1, MASK, 3], suffix_length=4, **asked)
    assert model.calls == 0


class WithoutMask(ScriptedModel):
    def forward(self, input_ids=None, logits_to_keep=0):
        return super().forward(input_ids, logits_to_keep)


def test_a_batch_of_a_model_that_takes_no_mask_is_refused_and_a_single_row_is_not():
    model, chosen = WithoutMask(constant_script([1] * 16, 2)), {"block_length": 4, "suffix_length": 2}
    assert answer(model, [1, 2], **chosen).sequences.tolist() == [[1, 2] + [1] * 16]
    model.calls = 0
    with pytest.raises(ValueError, match="`suffix_length` needs an `attention_mask`"):
        model.generate(torch.tensor([[1, 2], [3, 4]]), **WHOLE | {"max_new_tokens": 16} | chosen)
    with pytest.raises(ValueError, match="`suffix_length` needs an `attention_mask`"):
        answer(model, [1, 2], lossless=True, **chosen)  # drafts are rows of their own
    assert model.calls == 0


def test_a_batch_with_a_cache_and_flash_attention_is_refused(monkeypatch):
    model = model_of("llada", 1, 2)
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(ValueError, match="`suffix_length` of a batch with a cache"):
        batch("llada", suffix_length=2, kv_cache="dual")
