"""D2F on LLaDA and Dream: what holds whatever the settings, and what is refused."""

import pytest
import torch
from peft import PeftModel
from places import GOLDEN
from recorded_blocks import checkpoint
from thin import covering
from tiny import left_padded
from transformers import CompileConfig

from d3llm_hf.models.decoding import Rules, State
from d3llm_hf.models.selection import choose


FAMILIES = ("llada", "dream")
MASK, EOS, PAD = 511, 510, 3
PROMPTS = (
    [1, 236, 237, 210, 210, 207, 227, 221, 223, 236, 8, 51, 51, 40, 55, 51, 56, 66, 53, 2],
    [1, 9, 58, 43, 53, 57, 40, 43, 52, 56, 2],
    [1, 6, 41, 66, 55, 2],
    [1, 219, 201, 231, 206, 208, 215, 232, 231, 13, 59, 64, 56, 63, 60, 47, 55, 51, 2],
)
SETTINGS = {
    "short blocks": {"block_length": 4, "confidence_threshold": 0.5},
    "eager": {"block_length": 8, "block_add_threshold": 0.0, "block_activation_threshold": 0.0},
    "one after the other": {"block_length": 6, "block_add_threshold": 1.0, "block_activation_threshold": 1.0},
    "never pressed": {"block_length": 5, "block_activation_threshold": 2.0, "confidence_threshold": 0.8},
    "by margin": {"block_length": 7, "remasking": "topk_margin", "block_activation_threshold": 0.5},
}
NEW = 24


def model_of(family):
    return checkpoint(f"d2f-{family}-tiny-a-lora")


def generate(model, prompts, **settings):
    defaults = {"decoding_method": "d2f", "max_new_tokens": NEW, "eos_token_id": EOS, "pad_token_id": PAD}
    return model.generate(**left_padded(prompts, PAD), return_dict_in_generate=True, **(defaults | settings))


def same(one, other, *, but=()):
    for name in ("sequences", "step_map", "num_forwards", "num_forwards_reference", "positions_computed"):
        assert name in but or torch.equal(one[name], other[name]), name


@torch.no_grad()
def slow(model, prompt, new, block_length, confidence_threshold, add, activate, stop):
    """The published loop over whole canvases: tokens, the forward that decided each, and forwards."""
    shift, start, total = model.logit_shift, len(prompt), -(-new // block_length)
    canvas, when, pressed, stopped, forwards = list(prompt), {}, set(), False, 0
    blocks = []  # places of the open ones

    def decided(index):
        return 1.0 if index < 0 else sum(place in when for place in blocks[index]) / block_length

    while True:
        if len(blocks) < total and not stopped and decided(len(blocks) - 1) >= add:
            blocks.append(range(len(canvas), len(canvas) + block_length))
            canvas += [MASK] * block_length
        pressed |= {index for index in range(len(blocks)) if decided(index - 1) >= activate}
        if all(place in when for block in blocks for place in block):
            return canvas[start : start + new], [when[place] for place in range(start, len(canvas))][:new], forwards
        number = torch.tensor([0] * start + [1 + index for index, block in enumerate(blocks) for _ in block])
        logits = model(torch.tensor([canvas]), attention_mask=(number[:, None] >= number)[None, None]).logits[0]
        logits[:, MASK] = -torch.inf
        surest = logits.softmax(-1).max(-1)
        forwards += 1
        for index, block in enumerate(blocks):
            left = {place: surest.values[place - shift] for place in block if place not in when}
            chosen = [place for place, sure in left.items() if sure > confidence_threshold]
            if not chosen and left and index in pressed:
                chosen = [max(left, key=left.get)]
            for place in chosen:
                canvas[place], when[place] = int(surest.indices[place - shift]), forwards
                stopped |= canvas[place] == stop


@pytest.mark.full
@pytest.mark.every(5)
@pytest.mark.parametrize(
    "family, block_length, confidence, add, activate",
    covering(
        FAMILIES,
        [(4, 0.7, 0.25, 0.5), (8, 0.95, 0.0, 0.95), (5, 0.3, 0.4, 0.8), (6, 0.9, 1.0, 0.0), (32, 0.9, 0.1, 0.95)],
        strength=1,
    ),
)
def test_it_is_the_published_loop_over_whole_canvases(family, block_length, confidence, add, activate):
    for prompt in PROMPTS[:3]:
        stop = int(generate(model_of(family), [prompt], eos_token_id=None).sequences[0, len(prompt) + 9])
        wanted = slow(model_of(family), prompt, NEW, block_length, confidence, add, activate, stop)
        settings = {"block_length": block_length, "confidence_threshold": confidence, "block_add_threshold": add}
        settings |= {"block_activation_threshold": activate, "early_stop": False, "eos_token_id": stop}
        output = generate(model_of(family), [prompt], **settings)
        tokens, steps, forwards = wanted
        end = tokens.index(stop) + 1 if stop in tokens else len(tokens)
        assert output.sequences[0, len(prompt) :].tolist() == tokens[:end] + [PAD] * (NEW - end)
        assert output.step_map[0, : len(steps)].tolist() == steps
        assert int(output.num_forwards) == int(output.num_forwards_reference) == forwards


@pytest.mark.full
@pytest.mark.every(8)
@pytest.mark.parametrize("family, name", covering(FAMILIES, SETTINGS, strength=1))
def test_kept_blocks_change_nothing_and_save_positions(family, name):
    kept, whole = (generate(model_of(family), PROMPTS, kv_cache=c, **SETTINGS[name]) for c in ("exact", "none"))
    same(kept, whole, but=("positions_computed",))
    assert (kept.positions_computed <= whole.positions_computed).all()
    same(kept, generate(model_of(family), PROMPTS, **SETTINGS[name]))  # which is the default


@pytest.mark.full
@pytest.mark.every(8)
@pytest.mark.parametrize("family, name", covering(FAMILIES, SETTINGS, strength=1))
def test_a_row_of_a_batch_is_decoded_as_alone(family, name):
    batch = generate(model_of(family), PROMPTS, **SETTINGS[name])
    for row, prompt in enumerate(PROMPTS):
        alone = generate(model_of(family), [prompt], **SETTINGS[name])
        assert batch.sequences[row].tolist() == [PAD] * (20 - len(prompt)) + alone.sequences[0].tolist()
        for field in ("step_map", "num_forwards", "positions_computed"):
            assert torch.equal(batch[field][row], alone[field][0]), field


@pytest.mark.full
@pytest.mark.every(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_of_any_length_is_the_beginning_of_one_of_whole_blocks(family):
    for new in (1, 7, 8, 9, 13):
        short = generate(model_of(family), PROMPTS, max_new_tokens=new, block_length=8, eos_token_id=None)
        whole = generate(model_of(family), PROMPTS, max_new_tokens=-(-new // 8) * 8, block_length=8, eos_token_id=None)
        assert torch.equal(short.sequences, whole.sequences[:, : 20 + new])
        assert torch.equal(short.step_map, whole.step_map[:, :new])
        assert torch.equal(short.num_forwards, whole.num_forwards)


@pytest.mark.full
@pytest.mark.every(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_longer_than_the_answer_is_decoded_as_one(family):
    answers = [
        generate(model_of(family), PROMPTS, max_new_tokens=new, block_length=32, eos_token_id=None)
        for new in (5, 31, 32)
    ]
    for answer in answers:
        assert torch.equal(answer.sequences, answers[-1].sequences[:, : answer.sequences.shape[1]])
        same(answer, answers[-1], but=("sequences", "step_map"))


@pytest.mark.full
@pytest.mark.every(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_early_stop_gives_the_same_answer_in_fewer_forwards(family):
    settings = {"block_length": 8, "max_new_tokens": 64, "block_add_threshold": 0.1, "confidence_threshold": 0.6}
    usual = generate(model_of(family), PROMPTS, eos_token_id=None, **settings).sequences[:, 20:]
    settings["eos_token_id"] = stops = usual[:, 14].tolist()
    early, published = (generate(model_of(family), PROMPTS, early_stop=stop, **settings) for stop in (True, False))
    assert torch.equal(early.sequences, published.sequences)
    assert torch.isin(early.sequences[:, 20:], torch.tensor(stops)).any(1).all()
    assert (early.num_forwards <= published.num_forwards).all()
    assert (early.num_forwards < published.num_forwards).any()


@pytest.mark.full
def test_no_block_opens_behind_a_stop_token():
    model, prompt = model_of("llada"), PROMPTS[1]
    settings = {"block_length": 4, "max_new_tokens": 64, "block_add_threshold": 1.0, "early_stop": False}
    usual = generate(model, [prompt], eos_token_id=None, **settings)
    stop = int(usual.sequences[0, len(prompt) + 5])
    first = usual.sequences[0, len(prompt) :].tolist().index(stop)
    output = generate(model, [prompt], eos_token_id=stop, **settings)
    end = (first // 4 + 1) * 4
    assert (output.step_map[0, :end] > 0).all()  # to the end of the block, behind the stop token too
    assert (output.step_map[0, end:] == -1).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_advances_where_no_block_is_pressed_and_nothing_is_sure(family):
    output = generate(
        model_of(family),
        PROMPTS[:1],
        block_length=4,
        block_activation_threshold=2.0,
        confidence_threshold=1.0,
        eos_token_id=None,
    )
    assert sorted(output.step_map[0].tolist()) == list(range(1, NEW + 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_prompt_has_an_answer(family):  # by which the published loop divides
    settings = {"attention_mask": torch.ones(1, 0), "max_new_tokens": 16, "block_length": 8, "decoding_method": "d2f"}
    outputs = [
        model_of(family).generate(
            torch.ones(1, 0, dtype=torch.long), kv_cache=cache, eos_token_id=None, pad_token_id=PAD, **settings
        )
        for cache in ("exact", "none")
    ]
    assert outputs[0].shape == (1, 16)
    assert torch.equal(*outputs)
    assert not (outputs[0] == MASK).any()


def test_confidence_is_that_of_the_distribution_that_tokens_are_drawn_from():
    output = generate(model_of("llada"), PROMPTS[:1], block_length=8, do_sample=True, top_k=1, eos_token_id=None)
    assert output.step_map[0].tolist() == [1] * 8 + [2] * 8 + [3] * 8


def test_a_probability_of_the_threshold_does_not_exceed_it():
    settings = {"block_length": 8, "do_sample": True, "top_k": 1, "eos_token_id": None}  # every probability is 1
    output = generate(model_of("llada"), PROMPTS[:1], confidence_threshold=1.0, block_add_threshold=1.0, **settings)
    assert sorted(output.step_map[0].tolist()) == list(range(1, NEW + 1))


@pytest.mark.full
def test_sampling_is_repeatable_and_the_same_from_kept_blocks():
    settings = {"do_sample": True, "temperature": 0.9, "seed": 5, "block_length": 6}
    kept, whole = (generate(model_of("dream"), PROMPTS, kv_cache=c, **settings) for c in ("exact", "none"))
    same(kept, whole, but=("positions_computed",))


@pytest.mark.full
@pytest.mark.every(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_of_peft_and_the_merged_one_decode_the_same(family):
    base = type(model_of(family)).from_pretrained(GOLDEN / f"{family}-tiny-a").eval()
    base.generation_config = type(base.generation_config)()
    wanted = generate(model_of(family), PROMPTS, block_length=8)
    wrapped = PeftModel.from_pretrained(base, str(GOLDEN / f"d2f-{family}-tiny-a-lora")).eval()
    same(generate(wrapped, PROMPTS, block_length=8), wanted)
    same(generate(wrapped.merge_and_unload(), PROMPTS, block_length=8), wanted)


def test_every_pressed_block_that_would_stand_still_is_helped_by_its_own_best():
    undecided = torch.ones(1, 8, dtype=torch.bool)
    rules = Rules(2, "confidence", "threshold", threshold=1.0, inclusive=False, force_each=True)
    state = State.start(torch.full((1, 8), MASK), undecided, rules)
    state.active = torch.tensor([[True, True, False, True]])
    cost = torch.tensor([[0.5, 2.0, 3.0, 3.0, 1.5, 1.2, 4.0, 1.0]])  # of equals the leftmost; 1 is not under 1
    commits, forced = choose(cost, cost, undecided, state, rules)
    assert commits[0].nonzero()[:, 0].tolist() == [0, 2, 7]
    assert forced[0].nonzero()[:, 0].tolist() == [2, 7]


REFUSED = {
    "another cache": ({"kv_cache": "delayed"}, r"`kv_cache` must be one of \['none', 'exact'\]"),
    "suffix": ({"suffix_length": 8}, "`suffix_length` does not apply to block-causal attention"),
    "drafts": ({"lossless": True}, "`lossless` is not used by decoding_method"),
    "guidance": ({"cfg_scale": 1.0, "kv_cache": "exact"}, '`cfg_scale` needs kv_cache="none"'),
    "chance": ({"remasking": "random"}, "`remasking` must be one of"),
    "holes": ({"infill": True}, "and a method without blocks of its own"),
    "graphs": ({"compile_config": CompileConfig()}, "block-causal attention, whose canvas grows"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused(name):
    settings, message = REFUSED[name]
    prompt = [*PROMPTS[2][:4], MASK, *PROMPTS[2][4:]] if name == "holes" else PROMPTS[2]
    with pytest.raises(ValueError, match=message):
        generate(model_of("llada"), [prompt], **settings)


def test_a_model_whose_blocks_begin_elsewhere_is_refused():
    with pytest.raises(ValueError, match='`decoding_method` must not be "d2f" for a model whose blocks begin with'):
        generate(checkpoint("sdar-tiny-a"), [PROMPTS[2]])


def test_blocks_belong_to_the_call_not_to_the_model():
    model = model_of("llada")
    assert model.traits.topology is None
    config = model.check_settings(max_new_tokens=8, decoding_method="d2f")
    assert config.topology(model.traits).alignment == "prompt"
    assert model.check_settings(max_new_tokens=8).topology(model.traits) is None
