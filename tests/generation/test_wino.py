"""WINO: bold commits, and a shadow block that says which of them the model would not make again."""

from random import Random

import pytest
import torch
import wino_oracle
from others import DECODERS, ENCODERS
from problems import model_of
from recorded_blocks import checkpoint
from recorded_training_free import recorded_runs
from tiny import EOS, MASK, PAD, left_padded, tiny_model, tiny_prompt
from transformers import CompileConfig

from d3llm_hf import LLaDAModelLM, as_diffusion_lm
from d3llm_hf.models.decoding import Rules, State
from d3llm_hf.models.selection import choose, take_back
from d3llm_hf.watch.trace import Recording


RUNS = recorded_runs("wino")
WINO = {"decoding_method": "wino", "block_length": 8, "confidence_threshold": 0.2, "threshold_back": 0.6}
NEW = 14


def decode(prompts, family="llada", model=None, **chosen):
    settings = {"max_new_tokens": NEW, "eos_token_id": [EOS], "pad_token_id": PAD, "return_dict_in_generate": True}
    model = model_of(family, 0, 2) if model is None else model
    return model.generate(**left_padded(prompts), **(settings | WINO | chosen))


# ---- Recorded runs, and a slow oracle -------------------------------------------------------------------------------


@pytest.mark.every(8)
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.id)
def test_a_recorded_run_is_reproduced_token_for_token_and_forward_for_forward(run):
    args = run.args
    chosen = {"confidence_threshold": args["threshold"] or 1e-9, "threshold_back": args["threshold_back"]}
    output = run.generate(decoding_method="wino", block_length=args["block_length"], **chosen)
    run.assert_matches(output)
    assert int(output.num_revoked) == run.revoked


def test_no_recorded_run_is_left_out_by_accident():
    assert len(RUNS) == 10 and sum(run.revoked > 0 for run in RUNS) == 9


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(1, 30))])
def test_any_length_and_any_thresholds_are_decoded_as_the_oracle_does(seed):
    rng = Random(seed)
    model, prompt = tiny_model("llada", seed % 3, layers=2, spread=3.0), tiny_prompt(seed, rng.randint(1, 9))
    length, block_length = rng.randint(1, 30), rng.choice([1, 3, 8, 40])
    threshold, back = rng.choice([0.05, 0.2, 0.4, 0.9]), rng.choice([0.0, 0.1, 0.5, 0.9, 1.0])
    stops, early_stop = (EOS, 3, 7, 11), rng.random() < 0.5
    expected = wino_oracle.decode(
        model, prompt, mask=MASK, length=length, block_length=block_length, threshold=threshold, back=back,
        stops=stops, early_stop=early_stop,
    )  # fmt: skip
    chosen = {"max_new_tokens": length, "block_length": block_length, "early_stop": early_stop}
    chosen |= {"confidence_threshold": threshold, "threshold_back": back, "eos_token_id": list(stops)}
    output = decode([prompt], model=model, **chosen)
    new = expected.canvas[len(prompt) :]
    end = next((place + 1 for place, token in enumerate(new) if token in stops), length)
    assert output.sequences[0, len(prompt) :].tolist()[:end] == new[:end]
    assert output.step_map[0].tolist() == expected.step_map
    for name in ("forwards", "revoked", "positions_computed"):
        found = output[name if name == "positions_computed" else f"num_{name}"]
        assert int(found) == getattr(expected, name)
    assert int(output.num_forwards) <= length


# ---- Rows do not meet, and what else goes with it -------------------------------------------------------------------

PROMPTS = [tiny_prompt(seed, 1 + seed * 5 % 9) for seed in range(5)]
COUNTS = ("step_map", "num_forwards", "num_forwards_reference", "positions_computed", "num_revoked")


@pytest.mark.every(20)
@pytest.mark.parametrize(
    "chosen",
    [
        {"early_stop": False},
        {"eos_token_id": [EOS, 4, 9]},
        {"suffix_length": 3, "block_length": 7},
        {"cfg_scale": 0.5},
        {"do_sample": True, "temperature": 1.5},
        {"no_repeat_ngram_size": 2, "bad_words_ids": [[7]]},
    ],
    ids=str,
)
def test_a_row_is_in_a_batch_what_it_is_alone(chosen):
    seeds = {"seed": [3, 4, 5, 6, 7]} if "do_sample" in chosen else {}
    together = decode(PROMPTS, **chosen | seeds)
    assert int(together.num_revoked.max()) > 0
    for row, prompt in enumerate(PROMPTS):
        alone = decode([prompt], **chosen | ({"seed": 3 + row} if seeds else {}))
        assert torch.equal(together.sequences[row, -NEW:], alone.sequences[0, -NEW:])
        for name in COUNTS:
            assert torch.equal(together[name][row], alone[name][0]), name


def test_holes_are_filled_with_the_blocks_shadow_between_given_text():
    text = torch.tensor([tiny_prompt(5, 20)])
    holes = torch.zeros_like(text, dtype=torch.bool)
    holes[0, [3, 4, 5, 9, 10, 11, 12, 17]] = True
    chosen = WINO | {"return_dict_in_generate": True, "pad_token_id": PAD, "confidence_threshold": 0.05}
    output = model_of("llada", 0, 2).generate(text, infill_mask=holes, **chosen)
    assert torch.equal(output.sequences[~holes], text[~holes]) and not (output.sequences == MASK).any()
    assert (output.step_map[holes] > 0).all() and int(output.positions_computed) == int(output.num_forwards) * 28


@pytest.mark.full
def test_a_prompt_may_come_as_embeddings():
    model, prompt = model_of("llada", 0, 2), torch.tensor([PROMPTS[1]])
    embeds = model.get_input_embeddings()(prompt).detach()
    chosen = WINO | {"max_new_tokens": NEW, "pad_token_id": PAD, "eos_token_id": EOS}
    found = model.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(prompt), **chosen)
    assert torch.equal(found[0, -NEW:], decode([PROMPTS[1]]).sequences[0, -NEW:])


@pytest.mark.parametrize("attn_implementation", ["eager", pytest.param("sdpa", marks=pytest.mark.full)])
def test_no_slot_of_the_canvas_sees_a_shadow(attn_implementation):
    """With nothing to take back the tokens are those of the same rule without a shadow block."""
    model = tiny_model("llada", 2, layers=2, spread=5.0)
    model.set_attn_implementation(attn_implementation)
    chosen = {"confidence_threshold": 0.4, "block_length": 5, "early_stop": False}
    shadowed = decode(PROMPTS, model=model, threshold_back=0.0, **chosen)
    plain = decode(PROMPTS, model=model, decoding_method="fast_dllm", threshold_back=None, **chosen)
    assert torch.equal(shadowed.sequences, plain.sequences) and torch.equal(shadowed.step_map, plain.step_map)
    assert not shadowed.num_revoked.any()
    extra = shadowed.positions_computed - plain.positions_computed
    last = shadowed.num_forwards - shadowed.step_map[:, :10].amax(1)  # forwards of the last block, which has four
    assert torch.equal(extra, 5 * (shadowed.num_forwards - last) + 4 * last)


@pytest.mark.full
def test_a_trace_shows_what_stayed():
    class Plain:
        all_special_ids, clean_up_tokenization_spaces = (), False

        def decode(self, ids, **kwargs):
            return "".join(f"<{token}>" for token in ids)

    ids = torch.tensor([PROMPTS[1]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    chosen = WINO | {"max_new_tokens": NEW, "eos_token_id": [], "pad_token_id": PAD, "early_stop": False}
    with Recording(model_of("llada", 0, 2), Plain(), "", inputs, **chosen) as recording:
        forwards = list(recording)
        trace = recording.trace()
    final = decode([PROMPTS[1]], **chosen)
    assert int(final.num_revoked) > 0 and len(forwards) == int(final.num_forwards)
    assert (trace.tokens, trace.step_map) == (final.sequences[0, -NEW:].tolist(), final.step_map[0].tolist())


# ---- The rules, by hand ---------------------------------------------------------------------------------------------


def start(length=40, **chosen):
    rules = Rules(block_length=length, score="confidence", select="wide_in", revoke="narrow_out", **chosen)
    return rules, State.start(torch.full((1, length), MASK), torch.ones(1, length, dtype=torch.bool), rules)


@pytest.mark.parametrize("undecided, most", [(40, 20), (20, 14), (19, 13), (10, 7), (7, 5), (3, 3), (1, 1)])
def test_wide_in_takes_seven_of_ten_but_five_to_twenty(undecided, most):
    rules, state = start(threshold=1.0)
    among = state.undecided & (torch.arange(40) >= 40 - undecided)
    cost = torch.linspace(0.9, 0.1, 40)[None]
    commits, _ = choose(cost, cost, among, state, rules)
    assert commits[0].nonzero()[:, 0].tolist() == list(range(40 - most, 40))
    commits, _ = choose(cost + 1.0, cost, among, state, rules)
    assert commits[0].nonzero()[:, 0].tolist() == [39]  # none is sure: the surest


@pytest.mark.parametrize(
    "gained, committed, expected",
    [
        (5, 2, [0, 1, 3]),  # all of what is doubtful
        (3, 2, [0, 3]),  # those of least probability, one fewer than the last forward committed
        (1, 2, []),
        (5, 1, []),  # a forward that commits one alone takes nothing back
    ],
)
def test_narrow_out_takes_back_less_than_the_forward_before_gave(gained, committed, expected):
    rules, state = start(16, revoke_threshold=0.5)
    state.undecided[0, :8], state.unsettled[0, :8], state.forward[:] = False, True, 3
    state.step_map[0, :8] = torch.tensor([3] * gained + [2] * (8 - gained))
    doubt = torch.full((1, 16), 0.1)
    doubt[0, [0, 1, 3, 12]] = torch.tensor([2.0, 0.6, 3.0, 9.0])  # the last one is not decided
    commits = (torch.arange(16) >= 16 - committed)[None]
    assert take_back(doubt, commits, state, rules)[0].nonzero()[:, 0].tolist() == expected


def test_rules_that_take_nothing_back_say_so():
    rules, state = start(4)
    rules = Rules(**vars(rules) | {"revoke": None})
    assert take_back(torch.zeros(1, 4), state.undecided, state, rules) is None


# ---- What it does not go with ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chosen, rule",
    [
        ({"kv_cache": "dual"}, r'`kv_cache` must be "none" with decoding_method="wino" \(got "dual"\)'),
        ({"threshold_back": 1.5}, r"`threshold_back` must be a probability in \[0, 1\] \(got 1.5\)"),
        ({"family": "dream"}, r'`decoding_method` must not be "wino" for a model with shifted logits'),
        ({"compile_config": CompileConfig()}, r'`compile_config` does not go together with decoding_method="wino"'),
        ({"lossless": True}, r'`lossless` is not used by decoding_method="wino"'),
    ],
    ids=str,
)
def test_what_has_no_meaning_with_a_shadow_block_is_refused(chosen, rule):
    with pytest.raises(ValueError, match=rule):
        decode([[5, 6, 7]], **chosen)


def test_a_model_with_block_causal_attention_is_refused():
    chosen = {"max_new_tokens": 4, "pad_token_id": 3, "eos_token_id": [510]}
    with pytest.raises(
        ValueError, match=r'`decoding_method` must not be "wino" for a model with block-causal attention'
    ):
        checkpoint("sdar-tiny-a").generate(torch.tensor([[5, 6]]), decoding_method="wino", **chosen)


def test_models_of_others_have_shadow_blocks_where_they_can():
    bert = as_diffusion_lm(ENCODERS[0].tiny(), mask_token_id=MASK)
    chosen = {"confidence_threshold": 0.4, "block_length": 5, "early_stop": False}
    shadowed = decode(PROMPTS, model=bert, threshold_back=0.0, **chosen)
    plain = decode(PROMPTS, model=bert, decoding_method="fast_dllm", threshold_back=None, **chosen)
    assert torch.equal(shadowed.sequences, plain.sequences) and torch.equal(shadowed.step_map, plain.step_map)
    with pytest.raises(
        ValueError, match=r"A shadow block needs layers that attend to all positions \(got .*ModernBert"
    ):
        decode(PROMPTS, model=as_diffusion_lm(ENCODERS[2].tiny(), mask_token_id=MASK))
    with pytest.raises(ValueError, match=r'`decoding_method` must not be "wino" for a model with shifted logits'):
        decode(PROMPTS, model=as_diffusion_lm(DECODERS[0].tiny(), mask_token_id=MASK))


def test_a_forward_that_cannot_be_told_where_a_shadow_stands_is_refused():
    class Deaf(LLaDAModelLM):
        def forward(self, input_ids=None, attention_mask=None, logits_to_keep=0):
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=logits_to_keep)

    deaf = Deaf(tiny_model("llada").config)
    with pytest.raises(
        ValueError, match=r"A shadow block needs `position_ids`.*\(got Deaf, .*takes no `position_ids`"
    ):
        decode([PROMPTS[1]], model=deaf)
    flex = tiny_model("llada")
    flex.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match=r"A shadow block needs a mask for each position \(got .*'flex_attention'"):
        decode([PROMPTS[1]], model=flex)
