"""Drafts that are verified together never change what is decided, only in how many forwards."""

import pytest
import torch
from thin import covering, some_of
from tiny import EOS, MASK, PAD, ScriptedModel, changing_script, left_padded, tables, tiny_model, tiny_prompt
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, StoppingCriteria, StoppingCriteriaList

from d3llm_hf import D3LLMGenerationConfig
from d3llm_hf.evaluation.tasks.word_problems import generate_problems
from d3llm_hf.hub.sources import embedded_checkpoints


FAMILIES = ("llada", "dream")
FOLDER = embedded_checkpoints()["d3llm-llada"]
PROMPTS = [tiny_prompt(seed, length) for seed, length in ((1, 4), (2, 7), (3, 1))]
SAMPLING = {"do_sample": True, "temperature": 0.8}
SETTINGS = {
    "llada": {"decoding_method": "llada"},
    "llada, blocks": {"decoding_method": "llada", "block_length": 5},
    "llada, steps": {"decoding_method": "llada", "block_length": 5, "steps": 7},
    "llada, many steps": {"decoding_method": "llada", "block_length": 5, "steps": 40},
    "llada, entropy": {"decoding_method": "llada", "block_length": 4, "remasking": "entropy"},
    "llada, margin": {"decoding_method": "llada", "block_length": 4, "remasking": "topk_margin", "steps": 9},
    "llada, random": {"decoding_method": "llada", "block_length": 5, "remasking": "random"},
    "llada, sampled": {"decoding_method": "llada", "block_length": 5} | SAMPLING,
    "llada, top k": {"decoding_method": "llada", "block_length": 5, "top_k": 3, "top_p": 0.9} | SAMPLING,
    "llada, guided": {"decoding_method": "llada", "block_length": 5, "cfg_scale": 0.5},
    "dream": {"decoding_method": "dream"},
    "dream, steps": {"decoding_method": "dream", "steps": 6},
    "dream, many steps": {"decoding_method": "dream", "steps": 40},
    "dream, blocks": {"decoding_method": "dream", "steps": 9, "block_length": 5},
    "dream, maskgit": {"decoding_method": "dream", "remasking": "maskgit_plus"},
    "dream, origin": {"decoding_method": "dream", "remasking": "origin", "steps": 9},
    "dream, warm choice": {"decoding_method": "dream", "remasking": "maskgit_plus", "alg_temp": 0.4},
    "dream, threshold": {"decoding_method": "dream", "steps": 12, "confidence_threshold": 0.5},
    "dream, sampled": {"decoding_method": "dream", "steps": 12, "top_p": 0.9} | SAMPLING,
}
NEW = 10


def generate(model, prompts=PROMPTS, **chosen):
    defaults = {"max_new_tokens": NEW, "eos_token_id": [EOS, 4], "pad_token_id": PAD, "early_stop": False, "seed": 3}
    return model.generate(**left_padded(prompts), return_dict_in_generate=True, **(defaults | chosen))


def assert_lossless(without, found) -> None:
    """The tokens of `without`, decided in the same order and in no more forwards."""
    assert found.sequences.tolist() == without.sequences.tolist()
    assert (found.num_forwards <= without.num_forwards).all()
    for before, after in zip(without.step_map.tolist(), found.step_map.tolist(), strict=True):
        order = sorted((step, forward) for step, forward in zip(before, after, strict=True) if step > 0)
        forwards = [forward for _, forward in order]
        assert forwards == sorted(forwards)
        # What one step decides is decided by one forward.
        assert len({step for step, _ in order}) == len(set(order))


# ---- the same tokens in the same order -----------------------------------------------------------------------------


@pytest.mark.every(6)
@pytest.mark.parametrize("name, family", covering(SETTINGS, FAMILIES, strength=1, every=4))
def test_tokens_and_their_order_are_those_of_the_method_without_drafts(name, family):
    model, chosen = tiny_model(family, 1, spread=3.0), SETTINGS[name]
    for early_stop in (False, True):
        without = generate(model, early_stop=early_stop, **chosen)
        for draft_length in (1, 4) if early_stop else (16,):
            found = generate(model, early_stop=early_stop, lossless=True, draft_length=draft_length, **chosen)
            assert_lossless(without, found)
            assert (found.positions_computed >= without.positions_computed).all()


@pytest.mark.every(6)
@pytest.mark.parametrize("name", some_of(SETTINGS, every=6))
def test_a_row_is_the_same_alone_and_in_a_batch(name):
    model, chosen = tiny_model("dream", 2, spread=3.0), SETTINGS[name] | {"lossless": True, "early_stop": True}
    for row in range(3):
        alone = generate(model, [PROMPTS[row]], **chosen)
        beside = [PROMPTS[row], *PROMPTS[:row], *PROMPTS[row + 1 :]]  # random numbers belong to the row's place
        batch = generate(model, beside, **chosen)
        width = alone.sequences.shape[1]
        assert batch.sequences[0, -width:].tolist() == alone.sequences[0].tolist()
        for field in ("step_map", "num_forwards", "num_forwards_reference", "positions_computed"):
            assert batch[field][0].tolist() == alone[field][0].tolist(), field


@pytest.mark.every(3)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("appended", [0, 5])
def test_holes_are_filled_the_same(appended, family):
    model, inputs = tiny_model(family, 1), left_padded([tiny_prompt(seed, 9) for seed in range(3)])
    holes = torch.rand(3, 9, generator=torch.Generator().manual_seed(0)) < 0.6
    chosen = {"decoding_method": "llada", "block_length": 3, "return_dict_in_generate": True, "infill_mask": holes}
    chosen |= {"max_new_tokens": appended} if appended else {}
    assert_lossless(model.generate(**inputs, **chosen), model.generate(**inputs, lossless=True, **chosen))


@pytest.mark.full
@pytest.mark.parametrize("batch, family", covering([1, 3], FAMILIES, strength=1, every=2))
def test_processors_see_the_text_of_the_draft_that_they_score(batch, family):
    class NoRepetition(LogitsProcessor):  # reads the decided tokens before the position, of every row
        def __call__(self, input_ids, scores):
            known = input_ids.masked_fill(input_ids == MASK, 0)
            return scores.scatter(1, known, scores.gather(1, known) - 3.0)

    model = tiny_model(family, 1)
    for name in ("llada, blocks", "llada, sampled", "dream, steps"):
        chosen = SETTINGS[name] | {"logits_processor": [NoRepetition()]}
        without = generate(model, PROMPTS[:batch], **chosen)
        assert_lossless(without, generate(model, PROMPTS[:batch], lossless=True, **chosen))
        assert without.sequences.tolist() != generate(model, PROMPTS[:batch], **SETTINGS[name]).sequences.tolist()
    for own in ({"repetition_penalty": 1.7}, {"no_repeat_ngram_size": 2}, {"min_new_tokens": 9}):
        chosen = {"decoding_method": "llada", "block_length": 4, "early_stop": True, **own}
        assert_lossless(
            generate(model, PROMPTS[:batch], **chosen), generate(model, PROMPTS[:batch], lossless=True, **chosen)
        )


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_stopping_criteria_end_a_row_at_the_same_token(family):
    class AfterToken(StoppingCriteria):
        def __init__(self, tokens):
            self.tokens = torch.tensor(tokens)

        def __call__(self, input_ids, scores, **kwargs):
            return torch.isin(input_ids[:, -1], self.tokens)

    model = tiny_model(family, 1)
    stopped = 0
    for tokens in ([1, 2, 3, 5], [7, 8, 9], [11, 12, 13, 14, 15]):
        chosen = {"decoding_method": "llada", "block_length": 4, "early_stop": True, "eos_token_id": EOS}
        chosen["stopping_criteria"] = StoppingCriteriaList([AfterToken(tokens)])
        without, found = generate(model, **chosen), generate(model, lossless=True, **chosen)
        assert found.sequences.tolist() == without.sequences.tolist()
        assert (found.num_forwards <= without.num_forwards).all()
        stopped += int((without.sequences[:, -1] == PAD).sum())
    assert stopped >= 3


def test_streams_are_those_of_the_final_answer_and_never_shorter_than_without_drafts():
    class Told:
        supports_batch = True

        def __init__(self):
            self.text = [[] for _ in PROMPTS]

        def put(self, value, row=None):
            if row is not None:
                self.text[row] += value.tolist()

        def end(self):
            pass

    model, streams = tiny_model("llada", 1), [Told(), Told()]
    chosen = {"decoding_method": "llada", "block_length": 4, "early_stop": True}
    without = generate(model, streamer=streams[0], **chosen)
    found = generate(model, streamer=streams[1], lossless=True, **chosen)
    assert_lossless(without, found)
    assert streams[0].text == streams[1].text


def test_several_samples_of_one_prompt_are_those_without_drafts():
    model, chosen = tiny_model("llada", 1), SETTINGS["llada, sampled"] | {"num_return_sequences": 4}
    without = generate(model, PROMPTS[:2], **chosen)
    assert_lossless(without, generate(model, PROMPTS[:2], lossless=True, **chosen))
    assert len({tuple(row) for row in without.sequences.tolist()}) == 8


@pytest.mark.slow
@pytest.mark.parametrize("remasking", ["low_confidence", "entropy"])
def test_the_embedded_checkpoint_gives_the_same_answers(remasking):
    tokenizer, model = (auto.from_pretrained(FOLDER) for auto in (AutoTokenizer, AutoModelForCausalLM))
    chats = [[{"role": "user", "content": p.question}] for p in generate_problems(8, split="test", seed=77)]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )
    chosen = {"decoding_method": "llada", "block_length": 16, "remasking": remasking, "max_new_tokens": 64}
    chosen |= {"do_sample": False, "return_dict_in_generate": True}
    without, found = model.generate(**inputs, **chosen), model.generate(**inputs, lossless=True, **chosen)
    assert_lossless(without, found)
    assert found.num_forwards.sum() < 0.6 * without.num_forwards.sum()


# ---- what it costs, and what it saves ------------------------------------------------------------------------------


def settled_script(answer: list[int], prompt_length: int):
    """Logits that never change and order the positions from left to right: every draft is true."""

    def script(ids):
        sure = 20.0 - torch.arange(ids.shape[1]).float()[:, None] / 4
        wanted = torch.tensor([0] * prompt_length + answer)
        return (torch.nn.functional.one_hot(wanted, 32) * sure).expand(len(ids), -1, -1)

    return script


@pytest.mark.every(3)
@pytest.mark.parametrize("draft_length", [1, 2, 3, 4, 7, 11, 12, 16])
@pytest.mark.parametrize("block_length", [12, 4, 5, 1])
def test_drafts_that_are_always_right_cost_a_forward_for_each_chain(block_length, draft_length):
    count, prompt = 12, [1, 2, 3]
    model = ScriptedModel(settled_script([7] * count, len(prompt)))
    chosen = {"decoding_method": "llada", "block_length": block_length, "max_new_tokens": count}
    output = generate(model, [prompt], lossless=True, draft_length=draft_length, **chosen)
    # The first forward has no drafts and decides one position. Each later one has d drafts and takes d + 1 steps, if
    # the logits before it reach so far: they are looked at to the end of the block behind the one being decided.
    expected = [1]
    while len(expected) < count:
        decided = len(expected)
        seen = ((decided - 1) // block_length + 2) * block_length
        drafts = min(draft_length, seen - decided, count - 1 - decided)
        expected += [expected[-1] + 1] * (drafts + 1)
    if block_length == count:
        assert expected[-1] == 1 + -(-(count - 1) // (draft_length + 1))
    assert output.step_map[0].tolist() == expected
    assert int(output.num_forwards) == model.calls == expected[-1]
    # A canvas for each of the n decisions, each with all positions, and none for the finished one.
    assert int(output.positions_computed) == count * (len(prompt) + count)


@pytest.mark.every(12)
@pytest.mark.parametrize("draft_length", [1, 4, 16])
@pytest.mark.parametrize("chosen", [{"steps": 30}, {"steps": 5}, {"steps": 30, "remasking": "origin"}], ids=str)
def test_steps_of_a_schedule_that_decide_nothing_are_drafted_as_well(chosen, draft_length):
    model = ScriptedModel(settled_script([7] * 12, 1))
    chosen = chosen | {"decoding_method": "dream", "max_new_tokens": 12}
    steps = int(generate(model, [[1]], **chosen).num_forwards)
    output = generate(model, [[1]], lossless=True, draft_length=draft_length, **chosen)
    assert int(output.num_forwards) == 1 + -(-(steps - 1) // (draft_length + 1))
    assert int(output.positions_computed) == steps * 13


@pytest.mark.parametrize("draft_length", [1, 3])
def test_drafts_that_are_always_wrong_cost_their_canvases_and_save_nothing(draft_length):
    # The surest position of a canvas with u undecided ones is another one in the next: drafts take the wrong token.
    def script(ids):
        left = (ids == MASK).sum(1)  # (B,)
        sure = 20.0 - torch.arange(ids.shape[1]).float()[None, :, None] / 4
        return torch.nn.functional.one_hot(left, 32)[:, None] * sure

    model, count = ScriptedModel(script), 6
    chosen = {"decoding_method": "llada", "max_new_tokens": count, "eos_token_id": EOS}
    without = generate(model, [[25, 26]], **chosen)
    output = generate(model, [[25, 26]], lossless=True, draft_length=draft_length, **chosen)
    assert output.sequences.tolist() == without.sequences.tolist() == [[25, 26, 6, 5, 4, 3, 2, 1]]
    assert output.step_map.tolist() == without.step_map.tolist()
    assert int(output.num_forwards) == int(without.num_forwards) == count
    # Forward 1 has one canvas; the one before which u positions are undecided has min(d, u - 1) drafts besides.
    canvases = 1 + sum(1 + min(draft_length, left - 1) for left in range(1, count))
    assert int(output.positions_computed) == canvases * (2 + count)


def test_drafts_end_where_a_stop_token_ends_the_row():
    model = ScriptedModel(settled_script([7, 8, EOS, 9, 9, 9, 9, 9], 1))
    chosen = {"decoding_method": "llada", "max_new_tokens": 8, "early_stop": True, "eos_token_id": EOS}
    output = generate(model, [[1]], lossless=True, draft_length=8, **chosen)
    assert output.sequences[0].tolist() == [1, 7, 8, EOS, PAD, PAD, PAD, PAD, PAD]
    assert int(output.num_forwards) == 2
    assert int(output.positions_computed) == (1 + 2) * 9  # the row would be finished by the third draft


def test_steps_are_decided_by_the_forward_that_verified_them():
    model = ScriptedModel(changing_script(tables(7, 20), MASK))
    chosen = {"decoding_method": "llada", "block_length": 4, "max_new_tokens": 12, "eos_token_id": EOS}
    without = generate(model, [[1, 2]], **chosen)
    found = generate(model, [[1, 2]], lossless=True, **chosen)
    assert_lossless(without, found)
    assert int(found.step_map.max()) == int(found.num_forwards)


def test_random_remasking_knows_its_order_so_that_settled_tokens_are_drafted():
    model = ScriptedModel(settled_script([7] * 12, 1))
    for settings in (
        {"decoding_method": "llada", "remasking": "random"},
        {"decoding_method": "dream", "remasking": "random"},
    ):
        output = generate(model, [[1]], lossless=True, draft_length=3, max_new_tokens=12, **settings)
        assert int(output.num_forwards) == 1 + 3


# ---- logits that are not finite ------------------------------------------------------------------------------------


def broken_script(script, when):
    """NaN in the canvases `(B, L)` for which `when(ids)` `(B,)` says so."""

    def broken(ids):
        return script(ids).masked_fill(when(ids)[:, None, None], float("nan"))

    return broken


def test_nan_in_a_draft_that_nothing_rests_on_does_no_harm():
    seen = []

    def script(ids):
        left = (ids == MASK).sum(1)
        sure = 20.0 - torch.arange(ids.shape[1]).float()[None, :, None] / 4
        return torch.nn.functional.one_hot(left, 32)[:, None] * sure

    def is_draft(ids):  # of six new tokens the one at place i is 6 - i, unless the draft was wrong
        wanted = torch.tensor([25, 26, 6, 5, 4, 3, 2, 1])
        wrong = ((ids != MASK) & (ids != wanted)).any(1)
        seen.append(int(wrong.sum()))
        return wrong

    model = ScriptedModel(broken_script(script, is_draft))
    output = generate(model, [[25, 26]], lossless=True, decoding_method="llada", max_new_tokens=6, eos_token_id=EOS)
    assert output.sequences[0].tolist() == [25, 26, 6, 5, 4, 3, 2, 1]
    assert sum(seen) > 0


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_nan_in_a_draft_that_came_true_is_reported_as_it_would_be_without(count):
    script = settled_script([7] * 6, 1)
    model = ScriptedModel(broken_script(script, lambda ids: (ids == MASK).sum(1) == count))
    for lossless in (False, True):
        with pytest.raises(ValueError, match=r"must be finite .got NaN or inf for row 0 of the batch in forward"):
            generate(model, [[1]], lossless=lossless, decoding_method="llada", max_new_tokens=6)


def test_nan_where_only_drafts_look_does_no_harm():
    # The second block is looked at for drafts while the first one is decided.
    def script(ids):
        logits = settled_script([7] * 6, 1)(ids).clone()
        logits[(ids[:, 1:4] == MASK).any(1), 4:] = float("nan")
        return logits

    model = ScriptedModel(script)
    chosen = {"decoding_method": "llada", "block_length": 3, "max_new_tokens": 6}
    for lossless in (False, True):
        assert generate(model, [[1]], lossless=lossless, **chosen).sequences[0].tolist() == [1] + [7] * 6


# ---- settings ------------------------------------------------------------------------------------------------------


def test_lossless_alone_stands_for_the_llada_method(tmp_path):
    model = tiny_model("llada", 1)
    expected = generate(model, decoding_method="llada")
    assert_lossless(expected, generate(model, lossless=True))
    config = D3LLMGenerationConfig(lossless=True)
    assert_lossless(expected, generate(model, generation_config=config))
    D3LLMGenerationConfig(lossless=True, draft_length=2).save_pretrained(tmp_path)
    model.generation_config = D3LLMGenerationConfig.from_pretrained(tmp_path)
    assert model.generation_config.draft_length == 2
    assert_lossless(expected, generate(model))
    assert generate(model, lossless=False).sequences.tolist() == expected.sequences.tolist()
    other = generate(model, decoding_method="d3llm", entropy_threshold=9.0)  # does not take them over
    assert int(other.num_forwards.max()) == 1


def test_lossless_keeps_the_method_of_a_checkpoint_that_can_do_it():
    model = tiny_model("dream", 1)
    model.generation_config = D3LLMGenerationConfig(decoding_method="dream", steps=9)
    assert_lossless(generate(model), generate(model, lossless=True))
