"""Positions between given text are decided as those behind it: against a slow oracle, and by what must be the same."""

import pytest
import torch
from drawn import examples
from hypothesis import given
from hypothesis import strategies as st
from infill_oracle import fill
from thin import covering
from tiny import EOS, MASK, PAD, ScriptedModel, constant_script, tiny_model, tiny_prompt, trained_like
from transformers import LogitsProcessor, StoppingCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import MaxTimeCriteria

from d3llm_hf import D3LLMGenerationConfig
from d3llm_hf.models.scoring import Sampler


FAMILIES = ("llada", "dream")
# Every method, and every cache with a method that takes it.
METHODS = {
    "d3llm": {"decoding_method": "d3llm", "entropy_threshold": 1.0, "block_length": 3},
    "dparallel": {"decoding_method": "dparallel", "entropy_threshold": 1.0, "block_length": 3},
    "fast_dllm": {"decoding_method": "fast_dllm", "confidence_threshold": 0.5, "block_length": 3},
    "dinfer": {"decoding_method": "dinfer", "confidence_threshold": 0.5, "block_length": 3},
    "dinfer hierarchy": {"decoding_method": "dinfer", "decoder": "hierarchy", "low_threshold": 0.2, "block_length": 5},
    "dinfer credit": {"decoding_method": "dinfer", "decoder": "credit", "block_length": 4},
    "dkv": {"decoding_method": "dkv", "block_length": 3},
    "entropy_bound": {"decoding_method": "entropy_bound", "entropy_bound": 1.0, "block_length": 4},
    "local_leap": {"decoding_method": "local_leap", "confidence_threshold": 0.5, "relaxed_threshold": 0.2},
    "llada": {"decoding_method": "llada", "block_length": 3},
    "llada random": {"decoding_method": "llada", "block_length": 3, "remasking": "random", "steps": 4},
    "llada lossless": {"decoding_method": "llada", "block_length": 3, "lossless": True},
    "dream": {"decoding_method": "dream", "steps": 5},
    "dream threshold": {"decoding_method": "dream", "steps": 5, "confidence_threshold": 0.4},
}
CACHES = {
    "prefix": {"kv_cache": "prefix"},
    "dual": {"kv_cache": "dual"},
    "delayed": {"kv_cache": "delayed", "cache_delay": 1},
    "dkv": {"kv_cache": "dkv"},
    "dkv_greedy": {"kv_cache": "dkv_greedy", "decoding_method": "llada", "remasking": "random", "block_length": 3},
    "vicinity": {"kv_cache": "vicinity", "cache_window": 2, "cache_warmup": 1},
}


def batch_of(texts: list[list[int]], holes: list[list[int]]) -> dict[str, torch.Tensor]:
    """Left-padded texts with the slots `holes[i]` of text i marked."""
    width = max(map(len, texts))
    inputs = {
        "input_ids": torch.tensor([[PAD] * (width - len(text)) + text for text in texts]),
        "attention_mask": torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts]),
    }
    inputs["infill_mask"] = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    for row, (text, marked) in enumerate(zip(texts, holes, strict=True)):
        for slot in marked:
            inputs["infill_mask"][row, width - len(text) + slot] = True
    return inputs


def infill(model, texts, holes, **chosen):
    defaults = {"eos_token_id": EOS, "pad_token_id": PAD, "early_stop": False, "return_dict_in_generate": True}
    return model.generate(**batch_of(texts, holes), **(defaults | chosen))


def without_stop(model):
    """The model, none of whose tokens ends a row."""
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


# ---- against the oracle --------------------------------------------------------------------------------------------


@st.composite
def problems(draw):
    """A text of which some tokens are special, its holes, and how much is appended."""
    text = tiny_prompt(draw(st.integers(0, 999)), draw(st.integers(2, 14)))
    for position in draw(st.sets(st.integers(0, 13), max_size=3)) & set(range(len(text))):
        text[position] = draw(st.sampled_from([MASK, EOS, PAD]))
    # One token always stays: on a canvas of masks alone all positions are equal, and rounding would decide.
    kept = draw(st.integers(0, len(text) - 1))
    text[kept] = 5
    holes = sorted(draw(st.sets(st.integers(0, len(text) - 1), max_size=9)) - {kept})
    appended = draw(st.sampled_from([0, 0, 1, 4, 9]) if holes else st.integers(1, 9))
    chosen = {"early_stop": draw(st.booleans())} | ({"max_new_tokens": appended} if appended else {})
    return draw(st.sampled_from(FAMILIES)), text, holes, chosen


def compare(problem, seed=None, noise=None, **rules):
    family, text, holes, chosen = problem
    model, eos = trained_like(family), [EOS, 3, 7]
    output = infill(model, [text], [holes], eos_token_id=eos, seed=seed, **chosen, **rules)
    common = {"mask_token_id": MASK, "pad_token_id": PAD, "eos_token_ids": tuple(eos), "noise": noise}
    expected = fill(model, text, holes, **(common | {"max_new_tokens": 0} | chosen | rules))
    assert output.sequences[0].tolist() == expected.sequence
    assert output.step_map[0].tolist() == expected.step_map
    assert int(output.num_forwards) == expected.forwards
    assert int(output.positions_computed) == expected.positions_computed


@examples(30)
@given(problems(), st.integers(1, 6), st.sampled_from([0.0, 0.7]))
def test_one_token_a_forward_fills_as_the_oracle(problem, block_length, cfg_scale):
    steps = len(problem[2]) + problem[3].get("max_new_tokens", 0)
    # Each block gets a step for each of its positions.
    blocks = -(-steps // block_length)
    steps = blocks * min(block_length, steps)
    compare(problem, decoding_method="llada", block_length=block_length, steps=steps, cfg_scale=cfg_scale)


@examples(25)
@given(problems(), st.integers(1, 6), st.integers(1, 20))
def test_a_quota_fills_as_the_oracle(problem, block_length, steps):
    compare(problem, decoding_method="llada", block_length=block_length, steps=steps)


@pytest.mark.full
@examples(20)
@given(problems(), st.integers(1, 6), st.integers(1, 20), st.integers(0, 2**40))
def test_random_remasking_fills_as_the_oracle_given_the_same_noise(problem, block_length, steps, seed):
    def noise(forward: int, position: int) -> float:
        row, column = torch.zeros(1, dtype=torch.long), torch.tensor([position])
        return float(Sampler(seed).uniform(row, forward - 1, column, Sampler.POSITION).float())

    chosen = {"decoding_method": "llada", "block_length": block_length, "steps": steps, "remasking": "random"}
    compare(problem, seed=seed, noise=noise, **chosen)


@examples(30)
@given(problems(), st.integers(1, 6), st.sampled_from([0.0, 0.3, 0.9, 1.8]))
def test_an_entropy_threshold_fills_as_the_oracle(problem, block_length, threshold):
    compare(problem, decoding_method="dparallel", block_length=block_length, entropy_threshold=threshold)


@examples(40)
@given(
    problem=problems(),
    block_length=st.integers(1, 6),
    entropy_threshold=st.sampled_from([0.0, 0.3, 0.9, 1.8]),
    block_add_threshold=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    block_activation_threshold=st.sampled_from([0.0, 0.5, 0.95]),
)
def test_several_blocks_at_once_fill_as_the_oracle(problem, **chosen):
    compare(problem, decoding_method="d3llm", **chosen)


@pytest.mark.every(2)
@examples(20)
@given(problems(), st.integers(1, 20), st.sampled_from(["entropy", "maskgit_plus", "topk_margin"]))
def test_a_schedule_fills_as_the_oracle(problem, steps, remasking):
    compare(problem, decoding_method="dream", steps=steps, remasking=remasking)


# ---- what must be the same -----------------------------------------------------------------------------------------


@pytest.mark.every(3)
@pytest.mark.parametrize("method, family", covering(METHODS, FAMILIES, strength=1, every=2))
def test_holes_at_the_end_or_none_are_what_plain_generation_decides(method, family):
    model, chosen = without_stop(tiny_model(family, 1, spread=4.0)), METHODS[method]
    common = {"seed": 4, "return_dict_in_generate": True}
    texts = [tiny_prompt(1, 6), tiny_prompt(2, 3), tiny_prompt(3, 5)]
    text = batch_of(texts, [[]] * 3)
    plain = {name: text[name] for name in ("input_ids", "attention_mask")}
    expected = model.generate(**plain, max_new_tokens=7, **common, **chosen)
    nothing_marked = model.generate(**text, max_new_tokens=7, **common, **chosen)
    at_the_end = batch_of([text + [9] * 7 for text in texts], [range(len(text), len(text) + 7) for text in texts])
    marked = model.generate(**at_the_end, **common, **chosen)
    both = batch_of([text + [MASK] * 3 for text in texts], [range(len(text), len(text) + 3) for text in texts])
    both = model.generate(**both, max_new_tokens=4, **common, **chosen)
    for found in (nothing_marked, marked, both):
        assert found.sequences.tolist() == expected.sequences.tolist()
        assert found.step_map[:, 6:].tolist() == expected.step_map.tolist()
        assert (found.step_map[:, :6] == -1).all()
        for name in ("num_forwards", "num_forwards_reference", "positions_computed", "tokens_per_forward"):
            assert found[name].tolist() == expected[name].tolist(), name


@pytest.mark.every(3)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cache", CACHES)
def test_holes_at_the_end_are_what_plain_generation_decides_with_every_cache(cache, family):
    model, text = without_stop(tiny_model(family, 2, spread=4.0)), tiny_prompt(1, 6)
    chosen = METHODS["d3llm"] | CACHES[cache]
    if cache == "dkv_greedy":
        chosen = CACHES[cache]
    common = {"seed": 4, "return_dict_in_generate": True}
    expected = model.generate(torch.tensor([text]), max_new_tokens=9, **common, **chosen)
    found = model.generate(**batch_of([text + [9] * 9], [range(6, 15)]), **common, **chosen)
    assert found.sequences.tolist() == expected.sequences.tolist()
    assert found.step_map[:, 6:].tolist() == expected.step_map.tolist()
    assert found.positions_computed.tolist() == expected.positions_computed.tolist()


TEXTS = [tiny_prompt(11, 13), tiny_prompt(12, 9), tiny_prompt(13, 12), tiny_prompt(14, 4)]
HOLES = [[0, 1, 4, 5, 6, 9, 12], [8], [2, 3, 7, 8, 10], [0, 2]]


@pytest.mark.every(9)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cache", CACHES)
def test_a_model_of_one_layer_fills_the_same_with_every_cache(cache, family):
    model = trained_like(family)
    chosen = {"block_length": 3, "decoding_method": "d3llm", "entropy_threshold": 0.9} | CACHES[cache]
    if cache == "dkv_greedy":
        del chosen["entropy_threshold"]
    for extra in ({}, {"max_new_tokens": 5}):
        cached = infill(model, TEXTS, HOLES, seed=3, **extra, **chosen)
        plain = infill(
            model,
            TEXTS,
            HOLES,
            seed=3,
            **extra,
            **{name: value for name, value in chosen.items() if "cache" not in name},
        )
        assert cached.sequences.tolist() == plain.sequences.tolist()
        assert cached.step_map.tolist() == plain.step_map.tolist()
        assert (cached.positions_computed <= plain.positions_computed).all()


ALL = [*METHODS, *(f"cache {name}" for name in CACHES), "sampling", "guided"]


@pytest.mark.every(9)
@pytest.mark.parametrize("method, family", covering(ALL, FAMILIES, strength=1, every=4))
def test_a_row_is_filled_the_same_alone_and_in_a_batch(method, family):
    model = tiny_model(family, 3, spread=4.0)
    chosen = METHODS.get(method) or CACHES.get(method.removeprefix("cache "), {})
    if method.startswith("cache") and method != "cache dkv_greedy":
        chosen = METHODS["d3llm"] | {"block_add_threshold": 0.0} | chosen
    if method == "sampling":
        chosen = METHODS["d3llm"] | {"do_sample": True, "temperature": 0.8, "top_p": 0.9}
    if method == "guided":
        chosen = METHODS["dparallel"] | {"cfg_scale": 0.5}
    appended = {"max_new_tokens": 4, "early_stop": True}
    for first, extra in ((0, appended), (1, {}), (2, {}), (3, appended)):
        # Random numbers belong to the row's place in the batch: the row to compare comes first.
        order = [first, *(row for row in range(4) if row != first)]
        alone = infill(model, [TEXTS[first]], [HOLES[first]], seed=5, **extra, **chosen)
        batch = infill(model, [TEXTS[i] for i in order], [HOLES[i] for i in order], seed=5, **extra, **chosen)
        width = alone.sequences.shape[1]
        assert batch.sequences[0, -width:].tolist() == alone.sequences[0].tolist()
        assert batch.step_map[0, -width:].tolist() == alone.step_map[0].tolist()
        for name in ("num_forwards", "num_forwards_reference", "positions_computed", "tokens_per_forward"):
            assert batch[name][0] == alone[name][0], name


@pytest.mark.parametrize("family", FAMILIES)
def test_given_text_stays_and_every_hole_is_decided_whatever_stood_there(family):
    model = trained_like(family)
    output = infill(model, TEXTS, HOLES)
    assert output.sequences.shape == output.step_map.shape == (4, 13)
    marked = batch_of(TEXTS, HOLES)
    holes = marked["infill_mask"]
    assert torch.equal(output.sequences[~holes], marked["input_ids"][~holes])
    assert ((output.step_map > 0) == holes).all()
    assert not (output.sequences[holes] == MASK).any()
    other = [
        [1 if i in holes else token for i, token in enumerate(text)] for text, holes in zip(TEXTS, HOLES, strict=True)
    ]
    assert infill(model, other, HOLES).sequences.tolist() == output.sequences.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_infill_marks_the_mask_tokens_of_the_text_but_not_its_padding(family):
    model = trained_like(family)
    texts = [
        [MASK if i in holes else token for i, token in enumerate(text)]
        for text, holes in zip(TEXTS, HOLES, strict=True)
    ]
    marked = batch_of(texts, HOLES)
    expected = infill(model, texts, HOLES)
    padded = marked["input_ids"].masked_fill(marked["attention_mask"] == 0, MASK)
    config = D3LLMGenerationConfig(infill=True, early_stop=False, eos_token_id=EOS, pad_token_id=PAD)
    for extra in ({"infill": True, "eos_token_id": EOS, "pad_token_id": PAD}, {"generation_config": config}):
        output = model.generate(padded, attention_mask=marked["attention_mask"], **extra)
        assert output.masked_fill(marked["attention_mask"] == 0, PAD).tolist() == expected.sequences.tolist()


def test_mask_tokens_that_are_not_marked_stay():
    text = [1, MASK, 2, MASK, 3]
    output = infill(trained_like("llada"), [text], [[3]], max_new_tokens=2)
    assert output.sequences[0, [0, 1, 2, 4]].tolist() == [1, MASK, 2, 3]
    assert (output.step_map[0] > 0).tolist() == [False, False, False, True, False, True, True]


def test_a_stop_token_ends_a_row_only_among_what_is_appended():
    wanted = [EOS, 8, EOS, 9, EOS, 10, EOS, 11]
    model, chosen = ScriptedModel(constant_script(wanted, 0)), {"decoding_method": "llada", "early_stop": True}
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = EOS, PAD
    output = infill(model, [[EOS, 5, 5, 5, 5]], [[1, 2, 3]], block_length=1, max_new_tokens=3, **chosen)
    assert output.sequences[0].tolist() == [EOS, 8, EOS, 9, 5, 10, EOS, PAD]
    assert float(output.tokens_per_forward * output.num_forwards) == pytest.approx(4)
    output = infill(model, [[EOS, 5, 5, 5, 5]], [[1, 2, 3, 4]], block_length=1, **chosen)
    assert output.sequences[0].tolist() == [EOS, 8, EOS, 9, EOS]
    assert int(output.num_forwards) == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_of_one_text_differ_and_a_seed_repeats_them(family):
    model, chosen = tiny_model(family), {"do_sample": True, "num_return_sequences": 6, "seed": 2}
    output = infill(model, TEXTS[:1], HOLES[:1], **chosen)
    assert output.sequences.shape == (6, 13)
    assert len({tuple(row) for row in output.sequences.tolist()}) == 6
    kept = ~batch_of(TEXTS[:1], HOLES[:1])["infill_mask"][0]
    assert (output.sequences[:, kept] == torch.tensor(TEXTS[0])[kept]).all()
    assert infill(model, TEXTS[:1], HOLES[:1], **chosen).sequences.tolist() == output.sequences.tolist()


@pytest.mark.parametrize("radius", [0, 1, 2, 20])
def test_neighbours_are_neighbours_in_the_text_not_among_the_holes(radius):
    # Slot 2 is sure, the other holes are so only near to it: slots 3, 5 and 1.
    text = [1, 0, 0, 0, 1, 0, 1]

    def script(ids):
        sure = torch.full((7,), 4.0)
        sure[2] = 20.0
        return torch.nn.functional.one_hot(torch.full((7,), 9), 32).float().expand(len(ids), -1, -1) * sure[:, None]

    chosen = {"decoding_method": "local_leap", "confidence_threshold": 0.99, "relaxed_threshold": 0.3}
    output = infill(ScriptedModel(script), [text], [[1, 2, 3, 5]], leap_radius=radius, **chosen)
    first = {0: [2], 1: [1, 2, 3], 2: [1, 2, 3]}.get(radius, [1, 2, 3, 5])
    assert (output.step_map[0] == 1).nonzero()[:, 0].tolist() == first


def test_the_hierarchy_takes_one_position_of_every_gap():
    text = [1, 0, 0, 1, 0, 0, 1]

    def script(ids):
        sure = torch.tensor([0.0, 4.0, 4.1, 0.0, 4.2, 4.0, 0.0])
        return torch.nn.functional.one_hot(torch.full((7,), 9), 32).float().expand(len(ids), -1, -1) * sure[:, None]

    chosen = {"decoding_method": "dinfer", "decoder": "hierarchy", "low_threshold": 0.3, "kv_cache": "none"}
    output = infill(ScriptedModel(script), [text], [[1, 2, 4, 5]], **chosen)
    assert output.step_map[0].tolist() == [-1, 2, 1, -1, 1, 2, -1]


# ---- services of generate ------------------------------------------------------------------------------------------


class Recorder:
    """Keeps what a streamer is told."""

    def __init__(self, supports_batch: bool = False):
        self.supports_batch, self.put_calls, self.drafts, self.ended = supports_batch, [], [], []

    def put(self, value, row=0):
        self.put_calls.append((row, value.tolist()))

    def put_draft(self, value, row=0):
        self.drafts.append((row, value.tolist()))

    def end_row(self, row):
        self.ended.append(row)

    def end(self):
        pass


@pytest.mark.parametrize("family", FAMILIES)
def test_streamers_are_told_the_tokens_of_the_holes_in_order(family):
    model, marked = trained_like(family), batch_of(TEXTS, HOLES)
    streamer = Recorder(supports_batch=True)
    output = infill(model, TEXTS, HOLES, streamer=streamer, decoding_method="llada", block_length=3)
    assert streamer.put_calls[0][1] == marked["input_ids"].tolist()
    for row in range(4):
        told = [token for told, tokens in streamer.put_calls[1:] if told == row for token in tokens]
        assert told == output.sequences[row][marked["infill_mask"][row]].tolist()
        # A draft is as long as what is left of the row's own holes.
        assert all(len(draft) <= len(HOLES[row]) for told, draft in streamer.drafts if told == row)
        assert [told for told, _ in streamer.drafts].count(row) == int(output.num_forwards[row]) - 1
    assert sorted(streamer.ended) == [0, 1, 2, 3]
    alone = Recorder()
    infill(model, TEXTS[:1], HOLES[:1], streamer=alone, decoding_method="llada", block_length=3)
    told = [token for _, tokens in alone.put_calls[1:] for token in tokens]
    assert told == output.sequences[0][marked["infill_mask"][0]].tolist()


def test_a_time_limit_leaves_what_is_decided_and_mask_tokens():
    class TwoForwards(MaxTimeCriteria):
        asked = 0

        def __call__(self, input_ids, scores, **kwargs):
            self.asked += 1
            return torch.full((len(input_ids),), self.asked >= 2)

    def script(ids):  # sure from the right to the left
        sure = torch.arange(ids.shape[1]).float()[:, None] + 3
        return torch.nn.functional.one_hot(torch.full_like(ids[0], 9), 32).float().expand(len(ids), -1, -1) * sure

    chosen = {"decoding_method": "llada", "stopping_criteria": StoppingCriteriaList([TwoForwards(100.0)])}
    output = infill(ScriptedModel(script), [[1, 0, 0, 0, 2]], [[1, 2, 3]], **chosen)
    assert output.sequences[0].tolist() == [1, MASK, 9, 9, 2]
    assert output.step_map[0].tolist() == [-1, -1, 2, 1, -1]
    chosen["stopping_criteria"] = StoppingCriteriaList([TwoForwards(100.0)])
    output = infill(ScriptedModel(script), [[1, 0, 0, 0, 2]], [[3]], max_new_tokens=2, block_length=1, **chosen)
    assert output.sequences[0].tolist() == [1, 0, 0, 9, 2, 9, PAD]
    assert infill(trained_like("llada"), TEXTS, HOLES, max_time=1e6).sequences.shape == (4, 13)


def test_criteria_that_read_the_text_are_refused():
    class Any(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.zeros(len(input_ids), dtype=torch.bool)

    with pytest.raises(ValueError, match=r"from left to right, which infilling does not write \(got \['Any'\]\)"):
        infill(trained_like("llada"), TEXTS, HOLES, stopping_criteria=StoppingCriteriaList([Any()]))


def test_row_wise_processors_and_bans_apply_to_holes():
    model = trained_like("llada")
    banned = sorted(set(infill(model, TEXTS, HOLES).sequences.flatten().tolist()) - {PAD})[:8]
    output = infill(model, TEXTS, HOLES, suppress_tokens=banned)
    holes = batch_of(TEXTS, HOLES)["infill_mask"]
    assert not set(output.sequences[holes].tolist()) & set(banned)


def test_processors_of_the_caller_are_asked_for_the_holes():
    class Prefer(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, 17] = 100.0
            return scores

    output = infill(trained_like("llada"), TEXTS, HOLES, logits_processor=[Prefer()])
    holes = batch_of(TEXTS, HOLES)["infill_mask"]
    assert set(output.sequences[holes].tolist()) == {17}


# ---- settings ------------------------------------------------------------------------------------------------------


def test_infill_is_saved_with_the_config_and_appends_only_what_a_call_asks_for(tmp_path):
    D3LLMGenerationConfig(infill=True, max_new_tokens=9, eos_token_id=EOS, pad_token_id=PAD).save_pretrained(tmp_path)
    config = D3LLMGenerationConfig.from_pretrained(tmp_path)
    assert config.infill is True
    model, ids = tiny_model("llada"), torch.tensor([[1, MASK, 2]])
    model.generation_config = config
    before = config.to_dict()
    assert model.generate(ids).shape == (1, 3)
    assert model.generate(ids, max_new_tokens=2).shape == (1, 5)
    assert model.generate(ids, max_length=7).shape == (1, 7)
    assert model.generate(ids, infill=False).shape == (1, 12)
    assert config.to_dict() == before
    model.generation_config = D3LLMGenerationConfig(eos_token_id=EOS, pad_token_id=PAD, max_new_tokens=4)
    assert model.generate(ids, generation_config=D3LLMGenerationConfig(infill=True, max_new_tokens=2)).shape == (1, 5)
    assert model.generate(ids, infill_mask=ids == MASK).shape == (1, 3)


IDS = torch.tensor([[1, 2, 3, 4], [PAD, 5, 6, 7]])
SEEN = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])


@pytest.mark.parametrize(
    ("chosen", "kind", "message"),
    [
        ({"infill_mask": [[True]]}, TypeError, r"`infill_mask` must be a bool tensor \(got list\)"),
        ({"infill_mask": torch.ones(2, 4)}, TypeError, r"must be a bool tensor \(got dtype torch.float32\)"),
        (
            {"infill_mask": torch.ones(2, 3, dtype=torch.bool)},
            ValueError,
            r"shape of `input_ids`, \(2, 4\) \(got \(2, 3",
        ),
        ({"infill_mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, "`infill_mask` must not mark padding"),
        ({"infill": True}, ValueError, "something to decide .got row 0 without a hole.*Put the mask token .31. where"),
        ({"infill_mask": IDS == 2}, ValueError, "something to decide .got row 1 without a hole.*Mark the tokens"),
    ],
)
def test_what_cannot_be_filled_is_refused(chosen, kind, message):
    with pytest.raises(kind, match=message):
        trained_like("llada").generate(IDS, attention_mask=SEEN, **chosen)


@pytest.mark.parametrize("chosen", [{"infill": True}, {"infill_mask": torch.ones(1, 3, dtype=torch.bool)}])
def test_holes_in_embeddings_are_refused(chosen):
    model = trained_like("llada")
    embeds = model.get_input_embeddings()(torch.tensor([[1, 2, 3]]))
    with pytest.raises(ValueError, match=r"need `input_ids` .got `inputs_embeds`"):
        model.generate(inputs_embeds=embeds, **chosen)
