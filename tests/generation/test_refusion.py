"""ReFusion's decoding in slots: every recorded run, in batches too, and what it refuses."""

import json

import pytest
import torch
from places import GOLDEN
from thin import some_of
from tiny import left_padded, tiny_model
from transformers import CompileConfig, LogitsProcessor, LogitsProcessorList

import d3llm_hf
from d3llm_hf import ReFusionForCausalLM
from d3llm_hf.models.decoding import Rules
from d3llm_hf.models.scoring import Sampler
from d3llm_hf.models.slots import RowInSlots


ALL = {case["id"]: case for case in json.loads((GOLDEN / "refusion" / "cases.json").read_text())["cases"]}
# What the official code does otherwise than it says, and what is done here. Runs that depend on it are compared as far
# as they do not.
DEFECTS = {
    "disc_eos_row_index": "slots before a stop token are lost, by the number of a row taken for that of a slot; here "
    "they are decided in later rounds",
    "tail_not_generated": "what fills no block is not decided; here later blocks have a slot more",
    "error": "blocks that are not whole slots end in an error; here they are whole slots",
}
CORRECTED = {name for name, case in ALL.items() if set(case.get("tags", ())) & set(DEFECTS)}
CASES = {name: case for name, case in ALL.items() if name not in CORRECTED}
GREEDY = {name: case for name, case in CASES.items() if case["robust"]}
PAD = 3


@pytest.fixture(scope="module")
def model():
    model = ReFusionForCausalLM.from_pretrained(GOLDEN / "refusion-tiny-a").eval()
    model.generation_config = type(model.generation_config)()
    return model


def settings(case):
    args = case["args"]
    return {
        "max_new_tokens": args["gen_length"],
        "slot_size": args["slot_size"],
        "serial_num_blocks": args["serial_num_blocks"],
        "slot_threshold": max(args["slot_threshold"], 0.0),  # of -1, which every probability exceeds
        "token_threshold": max(args["token_threshold"], 0.0),
        "eos_token_id": case["eos_token_id"],
        "pad_token_id": PAD,
        "return_dict_in_generate": True,
    }


def decode(model, prompts, chosen):
    return model.generate(**left_padded(prompts, PAD), **chosen)


def up_to_stop(tokens, stop):
    return tokens[: tokens.index(stop) + 1] if stop in tokens else tokens


def answers(output, stop):
    new = output.step_map.shape[1]
    return [up_to_stop(row, stop) for row in output.sequences[:, -new:].tolist()]


def expected(case):
    """Up to the first stop token; behind it the official code may keep tokens that were decided earlier."""
    start, asked = len(case["prompt"]), case["args"]["gen_length"]
    return up_to_stop(case["expected"]["sequence"][start : start + asked], case["eos_token_id"])


class Draws(Sampler):
    """The official draws: Gumbel noise for all masks of a draft."""

    def __init__(self, seed):
        super().__init__(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def tokens(self, logits, rows, step, columns):
        uniform = torch.rand(logits.shape, generator=self.generator, dtype=torch.float64)
        return (logits.double() - torch.log(-torch.log(uniform))).argmax(-1)


@pytest.mark.every(16)
@pytest.mark.parametrize("name", CASES)
def test_a_recorded_run_is_reproduced_token_for_token_and_in_its_order(name, model, monkeypatch):
    case, chosen = CASES[name], settings(CASES[name])
    if case["flags"]["uses_rng"]:
        monkeypatch.setattr(type(model), "_sampler", lambda self, config: Draws(case["args"]["torch_seed"]))
        chosen |= {"do_sample": True, "temperature": case["args"]["temperature"]}
    output = decode(model, [case["prompt"]], chosen)
    assert answers(output, case["eos_token_id"]) == [expected(case)]
    assert output.num_forwards.tolist() == [case["expected"]["n_forwards"]]
    assert output.tokens_per_forward_reference.tolist() == pytest.approx([case["expected"]["tpf_upstream"]])
    asked, start = case["args"]["gen_length"], len(case["prompt"])
    made = output.step_map[0].tolist()
    order = [place + start for place in sorted(range(asked), key=lambda place: made[place]) if made[place] > 0]
    assert order == [place for place in case["expected"]["gen_order_pos"] if place < start + asked]
    computed = sum(rows * width for _, rows, width, *_ in case["expected"]["forwards"])
    assert output.positions_computed.tolist() == [computed]


def test_no_recorded_run_is_left_out_by_accident():
    assert len(ALL) == 31 and {"a00", "a02", "a31", "a32", "a34", "a35"} == CORRECTED
    assert sum("disc_visibility" in case["tags"] for case in GREEDY.values()) == 3


@pytest.mark.every(3)
@pytest.mark.parametrize("name", sorted(name for name in CORRECTED if "disc_eos_row_index" in ALL[name]["tags"]))
def test_no_slot_before_a_stop_token_is_lost(name, model):
    case = ALL[name]
    output = decode(model, [case["prompt"]], settings(case))
    made, start = output.step_map[0], len(case["prompt"])
    answer = answers(output, case["eos_token_id"])[0]
    assert case["eos_token_id"] in answer and (made[: len(answer)] > 0).all()  # no hole, where theirs has one
    first = case["expected"]["n_forwards"]  # what their only round decides is decided here too
    assert case["expected"]["n_rounds"] == 1 and output.num_forwards[0] > first
    placed = dict(zip(case["expected"]["gen_order_pos"], case["expected"]["gen_order_ids"], strict=True))
    given = output.sequences[0, start:].tolist()
    for place, token in placed.items():
        if place - start < len(answer):
            assert (given[place - start], int(made[place - start])) == (token, first)


@pytest.mark.parametrize("name", ["a00", "a02"])
def test_an_answer_of_uneven_blocks_is_decided_to_its_end(name, model):
    case = ALL[name]
    output = decode(model, [case["prompt"]], settings(case))
    made = output.step_map[0].tolist()
    assert min(made) > 0 and len(made) == case["args"]["gen_length"]
    if name == "a00":  # the first five of its six blocks have one slot there too
        assert output.sequences[0, len(case["prompt"]) :].tolist()[:20] == expected(case)[:20]


@pytest.mark.every(2)
@pytest.mark.parametrize("names", some_of([list(GREEDY)[start::4] for start in range(4)], every=2))
def test_rows_of_a_batch_are_decoded_as_each_alone(names, model):
    """Prompts of unequal lengths, whose rows are at different stages of their rounds."""
    chosen = settings(GREEDY[names[0]]) | {"max_new_tokens": 20, "slot_size": 4, "eos_token_id": [6, 11, 510]}
    chosen |= {"slot_threshold": 0.4, "token_threshold": 0.5}
    prompts = [GREEDY[name]["prompt"] for name in names]
    together = decode(model, prompts, chosen)
    for row, prompt in enumerate(prompts):
        alone = decode(model, [prompt], chosen)
        assert together.sequences[row, -20:].tolist() == alone.sequences[0, -20:].tolist()
        assert together.step_map[row].tolist() == alone.step_map[0].tolist()
        for name in ("num_forwards", "positions_computed", "tokens_per_forward", "tokens_per_forward_reference"):
            assert float(getattr(together, name)[row]) == pytest.approx(float(getattr(alone, name)[0]))


@pytest.mark.full
def test_drawn_rows_of_a_batch_are_what_each_draws_alone(model):
    chosen = settings(GREEDY["a23"]) | {"max_new_tokens": 12, "do_sample": True, "temperature": 1.2, "top_p": 0.95}
    prompts = [GREEDY[name]["prompt"] for name in ("a23", "a12", "a27")]
    together = decode(model, prompts, chosen | {"seed": [3, 4, 5]})
    for row, prompt in enumerate(prompts):
        alone = decode(model, [prompt], chosen | {"seed": [3 + row]})
        assert together.sequences[row, -12:].tolist() == alone.sequences[0, -12:].tolist()
    greedy = decode(model, prompts, settings(GREEDY["a23"]) | {"max_new_tokens": 12})
    assert together.sequences.tolist() != greedy.sequences.tolist()


def test_a_length_that_is_no_multiple_of_a_slot_is_that_length(model):
    chosen = settings(GREEDY["a10"]) | {"max_new_tokens": 10, "eos_token_id": []}
    output = decode(model, [GREEDY["a10"]["prompt"]], chosen)
    longer = decode(model, [GREEDY["a10"]["prompt"]], chosen | {"max_new_tokens": 16})
    assert output.sequences.tolist() == longer.sequences[:, :-6].tolist() and output.step_map.shape == (1, 10)


def test_without_early_stop_the_whole_answer_is_decided(model):
    case = GREEDY["a19"]
    output = decode(model, [case["prompt"]], settings(case) | {"early_stop": False})
    assert (output.step_map > 0).all()
    assert output.num_forwards > case["expected"]["n_forwards"]


def test_a_streamer_sees_the_decided_prefix(model):
    case, shown = GREEDY["a13"], []

    class Streamer:
        def put(self, value):
            shown.append(value.flatten().tolist())

        def end(self):
            shown.append("end")

    output = decode(model, [case["prompt"]], settings(case) | {"streamer": Streamer()})
    decided = output.sequences[0, len(case["prompt"]) :].tolist()
    assert [token for put in shown[1:-1] for token in put] == decided and shown[-1] == "end"


def test_banned_tokens_are_neither_drafted_nor_filled_in(model):
    case = GREEDY["a23"]
    usual = set(expected(case))
    banned = sorted(usual)[0]
    output = decode(model, [case["prompt"]], settings(case) | {"suppress_tokens": [banned]})
    assert banned in usual and banned not in answers(output, case["eos_token_id"])[0]


def test_a_slot_is_chosen_filled_and_verified_as_the_rules_say():
    """By hand: two slots of two; the first tokens are sure, the second of the first slot does not hold."""
    rules = Rules(
        block_length=4, score="confidence", select="slots", slot_size=2, slot_threshold=0.5, token_threshold=0.5
    )
    row = RowInSlots(rules, 2, frozenset({9}), 31)
    assert (row.ask.columns, row.ask.tokens, row.ask.draws) == ([0, 1, 2, 3], [31] * 4, True)
    row.answer([(5, 0.9), (6, 0.9), (7, 0.8), (8, 0.1)])
    assert (row.ask.tokens, row.ask.wanted, row.ask.targets) == ([5, 6, 7, 8], [0, 2], [6, 8])
    row.answer([(6, 0.2), (8, 0.9)])
    assert row.committed == [] and row.ask.apart
    assert (row.ask.columns, row.ask.tokens, row.ask.wanted) == ([0, 1, 2, 3], [5, 31, 7, 8], [1])
    row.answer([(4, 0.9)])
    assert (row.ask.tokens, row.ask.wanted) == ([5, 4, 7, 8], [])
    row.answer([])
    assert row.committed == [(0, 5), (1, 4), (2, 7), (3, 8)] and row.ask is None and row.rates == [1.0]


class Reading(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


@pytest.mark.parametrize(
    "more, rule",
    [
        (
            {"decoding_method": "llada"},
            r"`decoding_method` must be one of \['refusion'\] for this model \(got 'llada'",
        ),
        (
            {"kv_cache": "none"},
            r"`kv_cache` must be one of \['exact'\] with decoding_method=\"refusion\" \(got 'none'",
        ),
        ({"use_cache": False}, r"`kv_cache` must be one of \['exact'\]"),
        ({"cfg_scale": 1.0}, r'`cfg_scale` is not used by decoding_method="refusion"'),
        ({"suffix_length": 4}, r'`suffix_length` is not used by decoding_method="refusion"'),
        ({"block_length": 4}, r'`block_length` is not used by decoding_method="refusion"'),
        ({"slot_size": 0}, r"`slot_size` must be a positive integer \(positions\) \(got 0\)"),
        ({"serial_num_blocks": 0}, r"`serial_num_blocks` must be a positive integer \(got 0\)"),
        ({"slot_threshold": 1.5}, r"`slot_threshold` must be a probability in \[0, 1\] \(got 1.5\)"),
        ({"token_threshold": -1.0}, r"`token_threshold` must be a probability in \[0, 1\] \(got -1.0\)"),
        ({"no_repeat_ngram_size": 2}, r"takes what looks at one row of logits alone \(got NoRepeatNGram"),
        ({"logits_processor": LogitsProcessorList([Reading()])}, r"one row of logits alone \(got Reading\)"),
        ({"compile_config": CompileConfig(backend="eager")}, "`compile_config` does not go together with decoding_m"),
        ({"infill": True}, "`infill_mask` and `infill` need a model that sees the text behind a hole"),
        ({"max_new_tokens": 510}, "Prompt and `max_new_tokens` must fit into the model's 512 positions"),
    ],
)
def test_what_has_no_meaning_for_slots_is_refused(more, rule, model):
    with pytest.raises(ValueError, match=rule):
        decode(model, [[5, 511, 6]], {"max_new_tokens": 8} | more)


def test_embeddings_are_refused(model):
    with pytest.raises(ValueError, match='`inputs_embeds` has no meaning with decoding_method="refusion"'):
        model.generate(inputs_embeds=torch.zeros(1, 3, 64), max_new_tokens=8)


def test_models_without_slots_refuse_the_method():
    with pytest.raises(ValueError, match=r"`decoding_method` must be one of \['d3llm'.*\(got 'refusion'\)"):
        tiny_model("llada").generate(torch.tensor([[5, 6]]), decoding_method="refusion", max_new_tokens=8)


@pytest.mark.parametrize("spoiled, rule", [(float("nan"), "must be finite"), (float("-inf"), "must be finite")])
def test_logits_that_are_no_numbers_are_refused(spoiled, rule, model, monkeypatch):
    monkeypatch.setattr(type(model), "text_logits", lambda self, logits: torch.full_like(logits, spoiled))
    with pytest.raises(ValueError, match=rule):
        decode(model, [[5, 6]], {"max_new_tokens": 8})


def test_constraints_that_leave_nothing_are_refused(model):
    with pytest.raises(ValueError, match="The constraints must leave a token for every position"):
        decode(model, [[5, 6]], {"max_new_tokens": 8, "suppress_tokens": list(range(512))})


def test_likelihood_is_refused_by_name(model):
    text = torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match=r"`model` must see the whole text \(got ReFusionForCausalLM"):
        d3llm_hf.log_likelihood(model, text, torch.tensor([[False, True, True]]))
