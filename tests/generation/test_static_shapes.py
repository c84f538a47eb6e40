"""Forwards of static shapes (`compile_config`): the same answers, in few compilations."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from every_setting import CACHES, PAIRS
from every_setting import METHODS as SETTINGS
from others import OTHERS
from problems import FAMILIES, model_of
from thin import covering
from tiny import EOS, MASK, PAD, left_padded, tiny_model, tiny_prompt
from torch._dynamo.testing import CompileCounter
from transformers.generation import CompileConfig, MaxTimeCriteria, StoppingCriteria, StoppingCriteriaList

from d3llm_hf import as_diffusion_lm
from d3llm_hf.models.decoding import Rules
from d3llm_hf.models.static_shapes import CompiledForwards, Shapes, bucket


FIELDS = (
    "sequences",
    "step_map",
    "num_forwards",
    "num_forwards_reference",
    "positions_computed",
    "tokens_per_forward",
)
COMMON = {"return_dict_in_generate": True, "eos_token_id": [EOS, 4], "pad_token_id": PAD, "seed": 0}
EAGER = CompileConfig(backend="eager", mode=None)


class Widths:
    """Stands in for `torch.compile`: runs as it is, and notes the shape of every forward."""

    def __init__(self):
        self.seen: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
        self.compiled = 0

    def __call__(self, function, **chosen):
        assert chosen["fullgraph"] is True and chosen["dynamic"] is False
        self.compiled += 1

        def run(model, places, inputs):
            self.seen.append((tuple(inputs["position_ids"].shape), tuple(places.shape)))
            return function(model, places, inputs)

        return run


@pytest.fixture
def widths(monkeypatch) -> Widths:
    """The whole path but the compiler."""
    found = Widths()
    monkeypatch.setattr(torch, "compile", found)
    for family in FAMILIES:
        vars(model_of(family, 1, 2)).pop("_compiled_forwards", None)
    yield found
    for family in FAMILIES:
        vars(model_of(family, 1, 2)).pop("_compiled_forwards", None)


def batch(*lengths: int) -> dict[str, torch.Tensor]:
    return left_padded([tiny_prompt(seed, length) for seed, length in enumerate(lengths)])


def assert_same(found, expected) -> None:
    for name in FIELDS:
        assert torch.equal(found[name], expected[name]), name


def both(model, inputs, **chosen):
    """Decodes with shapes as they come, and with static ones."""
    chosen = COMMON | {"max_new_tokens": 14} | chosen
    return model.generate(**inputs, **chosen), model.generate(**inputs, **chosen, compile_config=EAGER)


# ---- the same answers -----------------------------------------------------------------------------------------------


@pytest.mark.every(3)
@pytest.mark.parametrize("method, cache", covering(PAIRS, strength=1, every=2))
def test_static_shapes_change_no_answer_and_no_count_of_any_method_with_any_cache(method, cache, widths):
    family = FAMILIES[(list(SETTINGS).index(method) + list(CACHES).index(cache)) % 2]
    chosen = SETTINGS[method] | CACHES[cache]
    expected, found = both(model_of(family, 1, 2), batch(1, 9, 4, 6), early_stop=True, **chosen)
    assert_same(found, expected)
    assert len({rows for (rows, _), _ in widths.seen}) == 1  # finished rows ride along
    assert widths.compiled == len(set(widths.seen)) <= (1 if cache == "none" else 4) * 2


@pytest.mark.full
@pytest.mark.every(6)
@pytest.mark.parametrize("family, cache", [("dream", "none"), ("llada", "delayed"), ("dream", "dual")])
def test_sampling_processors_gaps_criteria_and_embeddings_give_the_same_answers(family, cache, widths):
    class Third(StoppingCriteria):
        def __call__(self, ids, scores, **kwargs):
            return torch.tensor([row[-1].item() % 3 == 0 and len(row) > 14 for row in ids])

    model, chosen = model_of(family, 1, 2), SETTINGS["d3llm"] | CACHES[cache]
    for first in range(2):
        expected, found = both(model, batch(1 + 3 * first, 9, 4), do_sample=True, temperature=0.9, **chosen)
        assert_same(found, expected)
    assert_same(*both(model, batch(5), no_repeat_ngram_size=2, repetition_penalty=1.3, **chosen))
    inputs = batch(9, 9)
    marked = torch.arange(9).expand(2, -1) % torch.tensor([[2], [3]]) == 1
    assert_same(*both(model, inputs, infill_mask=marked, **chosen))
    criteria = StoppingCriteriaList([Third(), MaxTimeCriteria(1000.0)])
    assert_same(*both(model, batch(9, 3), stopping_criteria=criteria, **chosen))
    embedded = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]).detach()}
    assert_same(*both(model, embedded | {"attention_mask": inputs["attention_mask"]}, **chosen))


class Told(list):
    """A streamer that keeps what it is given."""

    def put(self, value: torch.Tensor) -> None:
        self.append(value.tolist())

    def end(self) -> None:
        self.append("end")


def test_a_streamer_is_given_the_same_with_static_shapes(widths):
    model, chosen = model_of("llada", 1, 2), COMMON | SETTINGS["d3llm"] | CACHES["delayed"] | {"max_new_tokens": 14}
    told = [Told(), Told()]
    for streamer, more in zip(told, [{}, {"compile_config": EAGER}], strict=True):
        model.generate(**batch(8), streamer=streamer, **chosen, **more)
    assert told[0] == told[1] and len(told[0]) > 2


def test_other_models_decode_with_static_shapes_where_their_forward_compiles(widths):
    other = next(each for each in OTHERS if each.name == "Qwen2ForCausalLM")
    model = as_diffusion_lm(other.tiny(), mask_token_id=MASK)
    assert_same(*both(model, batch(3, 5), **SETTINGS["d3llm"]))
    assert widths.compiled == 1


# ---- few shapes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length, padded", [(1, 64), (64, 64), (65, 128), (500, 512), (1000, 1024), (1025, 1152)])
def test_a_canvas_is_padded_to_a_length_that_others_share(length, padded):
    assert bucket(length) == padded


def test_a_canvas_from_512_slots_on_grows_by_an_eighth_at_most():
    assert all(length <= bucket(length) <= max(length + 63, length * 9 / 8) for length in range(1, 5000))
    assert len({bucket(length) for length in range(2049, 4097)}) == 8


class Sized:
    """The sizes of a canvas."""

    batch = 3

    def __init__(self, length: int, positions: int):
        self.length, self.slots = length, torch.zeros(3, positions)


@pytest.mark.parametrize(
    "rules, expected",
    [
        ({}, Shapes(3, 1024, (1024,), (32,))),
        ({"kv_cache": "dual"}, Shapes(3, 1024, (64, 256, 512, 1024), (32,))),
        ({"kv_cache": "vicinity", "cache_window": 16}, Shapes(3, 1024, (96, 256, 512, 1024), (32,))),
        ({"block_add_threshold": 0.1}, Shapes(3, 1024, (1024,), (128, 256))),
        ({"kv_cache": "dual", "block_length": 256}, Shapes(3, 1024, (256, 512, 1024), (256,))),
    ],
    ids=["no cache", "dual", "vicinity", "several blocks", "one long block"],
)
def test_the_widths_are_at_most_four_and_the_numbers_of_logits_two(rules, expected):
    rules = Rules(**{"block_length": 32, "score": "entropy", "select": "threshold"} | rules)
    assert Shapes.of(Sized(1000, 256), rules) == expected


# ---- the compiler ---------------------------------------------------------------------------------------------------


@pytest.mark.full
@pytest.mark.parametrize(
    "family, cache, most", [pytest.param("llada", "delayed", 8, marks=pytest.mark.full), ("dream", "none", 2)]
)
def test_calls_compile_one_graph_for_each_shape_and_those_of_other_prompt_lengths_no_other(family, cache, most):
    torch.compiler.reset()
    model, counter = tiny_model(family, 1, layers=1), CompileCounter()
    chosen = COMMON | SETTINGS["d3llm"] | CACHES[cache] | {"max_new_tokens": 20}
    compiled = chosen | {"compile_config": CompileConfig(backend=counter, mode=None)}
    for lengths in [(1, 9, 4), (13, 20, 2), (30, 30, 31)]:  # of canvases of 64 slots
        inputs = batch(*lengths)
        # Of one graph each, or `fullgraph` would raise
        assert_same(model.generate(**inputs, **compiled), model.generate(**inputs, **chosen))
        assert counter.frame_count == len(CompiledForwards.of(model).functions) <= most


@pytest.mark.slow  # a C++ compiler's minutes
@pytest.mark.parametrize("family, cache", [("llada", "none"), ("dream", "dual")])
def test_inductor_gives_the_tokens_of_the_uncompiled_run(family, cache):
    torch.compiler.reset()
    model, inputs = tiny_model(family, 1, layers=1), batch(2, 7)
    chosen = COMMON | SETTINGS["llada"] | CACHES[cache] | {"max_new_tokens": 10}
    found = model.generate(**inputs, **chosen, compile_config=CompileConfig())
    assert_same(found, model.generate(**inputs, **chosen))


@pytest.mark.full  # nine compilations
def test_more_signatures_than_torch_compiles_of_one_function_are_no_trouble():
    torch.compiler.reset()
    model, counter = tiny_model("llada", 1, layers=1), CompileCounter()
    config = CompileConfig(backend=counter, mode=None)
    for rows in range(1, 10):
        model.generate(**batch(*[3] * rows), **COMMON, max_new_tokens=1, compile_config=config)
    assert counter.frame_count == 9


# ---- between calls --------------------------------------------------------------------------------------------------


def test_the_next_call_of_the_same_shapes_finds_the_same_buffers_without_what_was_in_them(widths):
    model, chosen = model_of("llada", 1, 2), COMMON | SETTINGS["llada"] | CACHES["dual"] | {"max_new_tokens": 8}
    model.generate(**batch(3, 5), **chosen, compile_config=EAGER)
    ((_, cache),) = CompiledForwards.of(model).spare
    before = [layer.keys.data_ptr() for layer in cache.layers]
    for layer in cache.layers:
        layer.values.fill_(float("nan"))  # as a call leaves them that a broken model has ended
    inputs = batch(7, 2)
    assert_same(model.generate(**inputs, **chosen, compile_config=EAGER), model.generate(**inputs, **chosen))
    ((_, cache),) = CompiledForwards.of(model).spare
    assert [layer.keys.data_ptr() for layer in cache.layers] == before
    model.generate(**batch(3), **chosen, compile_config=EAGER)
    ((_, other),) = CompiledForwards.of(model).spare
    assert other is not cache and len(other.layers[0].keys) == 1


@pytest.mark.full
def test_calls_at_the_same_time_have_buffers_of_their_own(widths):
    model, chosen = model_of("llada", 1, 2), COMMON | SETTINGS["llada"] | CACHES["dkv"] | {"max_new_tokens": 8}
    prompts = [batch(2 + seed) for seed in range(8)]
    alone = [model.generate(**prompt, **chosen) for prompt in prompts]
    found: list = [None] * len(prompts)

    def work(index: int) -> None:
        found[index] = model.generate(**prompts[index], **chosen, compile_config=EAGER)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, expected in enumerate(alone):
        assert_same(found[index], expected)
    assert len(CompiledForwards.of(model).spare) == 1


def test_a_copy_of_a_model_starts_without_compiled_forwards_and_the_model_can_go(widths):
    model = tiny_model("llada", 1, layers=1)
    model.generate(**batch(3), **COMMON, **CACHES["dual"], max_new_tokens=4, compile_config=EAGER)
    held = CompiledForwards.of(model)
    assert held.functions and held.spare
    for twin in (copy.deepcopy(held), pickle.loads(pickle.dumps(held))):
        assert not twin.functions and not twin.spare
    assert not CompiledForwards.of(copy.deepcopy(model)).functions
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_compilation_that_is_disabled_leaves_shapes_as_they_come(widths):
    model = tiny_model("llada", 1, layers=1)
    chosen = COMMON | {"max_new_tokens": 4, "compile_config": EAGER, "disable_compile": True}
    model.generate(**batch(3), **chosen)
    assert "_compiled_forwards" not in vars(model)
    model.generation_config.compile_config = EAGER
    model.generate(**batch(3), **COMMON, max_new_tokens=4)
    assert CompiledForwards.of(model).functions


# ---- what is refused ------------------------------------------------------------------------------------------------


class Uncompilable:
    is_compileable = False


@pytest.mark.parametrize(
    "chosen, attributes, message",
    [
        ({"lossless": True}, {}, r"`lossless`, .* \(unset one of them\)"),
        ({"lookahead": 1}, {}, r"`lookahead`, .* \(unset one of them\)"),
        ({"cfg_scale": 1.0}, {}, r"`cfg_scale`, .* \(unset one of them\)"),
        ({"suffix_length": 2}, {}, r"`suffix_length`, .* \(unset one of them\)"),
        ({"compile_config": CompileConfig(dynamic=True)}, {}, r"`dynamic=True`: .* \(leave `dynamic` unset\)"),
        ({}, {"_can_compile_fullgraph": False}, r"LLaDAModelLM, which is not known to compile in one graph"),
        ({}, {"hf_device_map": {"a": 0, "b": "disk"}}, r"offloaded to \['disk'\] \(load the model onto its devices\)"),
        ({}, {"hf_device_map": {"a": 0, "b": "cpu"}}, r"offloaded to \['cpu'\]"),
        ({}, {"hf_quantizer": Uncompilable()}, r"quantisation of this model, Uncompilable"),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_the_way_out(chosen, attributes, message, widths):
    model = tiny_model("llada", 1, layers=1)
    vars(model).update(attributes)
    with pytest.raises(ValueError, match=f"^`compile_config` does not go together with .*{message}"):
        model.generate(**batch(3), **COMMON | {"max_new_tokens": 4, "compile_config": EAGER} | chosen)
    assert not widths.seen


def test_a_model_with_canvas_logits_of_its_own_is_not_compiled(widths):
    model = tiny_model("llada", 1, layers=1)

    class Own(type(model)):
        def canvas_logits(self, *args, **kwargs):
            return super().canvas_logits(*args, **kwargs)

    model.__class__ = Own
    with pytest.raises(ValueError, match=r"the `canvas_logits` of Own, .* \(leave it to the forward\)"):
        model.generate(**batch(3), **COMMON, max_new_tokens=4, compile_config=EAGER)


def test_a_model_that_counts_positions_by_itself_is_not_padded(widths):
    model = tiny_model("llada", 1, layers=1)

    class Counting(type(model)):
        def forward(self, input_ids=None, attention_mask=None, logits_to_keep=0):
            return super().forward(input_ids, attention_mask=attention_mask, logits_to_keep=logits_to_keep)

    model.__class__ = Counting
    with pytest.raises(ValueError, match=r"Counting, whose forward takes no `position_ids`"):
        model.generate(**batch(3), **COMMON, max_new_tokens=4, compile_config=EAGER)


def test_flash_attention_is_refused_where_it_would_misread_padding(widths):
    model = tiny_model("llada", 1, layers=1)
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match=r"`compile_config` does not go together with flash-attention"):
        model.generate(**batch(3), **COMMON, max_new_tokens=4, compile_config=EAGER)
    with pytest.raises(ValueError, match=r'`kv_cache` must be "none" where flash-attention decodes a padded batch'):
        model.generate(**batch(3, 4), **COMMON, max_new_tokens=4, kv_cache="dual")
