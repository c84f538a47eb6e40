"""MMaDA writes text: every recorded run without a defect in it, and no code of an image unless it is asked to."""

import json
from types import SimpleNamespace

import pytest
import torch
from places import GOLDEN
from replayed import LLaDADraws
from transformers import AutoModelForCausalLM

import d3llm_hf
from d3llm_hf.models.methods import methods_of


CASES = {case["id"]: case for case in json.loads((GOLDEN / "mmada" / "cases.json").read_text())["cases"]}
# Runs that a defect of the reference decides, and what is done in its place.
DEFECTS = {
    "a14": "factor_last_rank: the factor's last rank is never counted; here it is, as in LLaDA's runs",
    "a17": "mask_in_prompt: masks of the prompt take part in the quota, and of the answer some stay; here none does",
}
# Errors of the reference for what is well defined here.
ERRORS = {
    "a08": "a mask of the prompt alone; here that is what a mask is",
    "a15": "its model returns no cache; here every cache of LLaDA works",
    "a16": "blocks that the answer does not fill; here the last one is shorter",
}
PAD = 3


@pytest.fixture
def model(request):
    """The recorded checkpoint, whose own generation settings are forgotten."""
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "mmada-tiny-a").eval()
    model.generation_config = type(model.generation_config)()
    return model


def inputs(case):
    ids = torch.tensor(case["prompt"] if isinstance(case["prompt"][0], list) else [case["prompt"]])
    mask = case["args"].get("attention_mask")
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids) if mask is None else torch.tensor(mask)[:, : ids.shape[1]],
    }


def settings(case):
    args = case["args"]
    found = {
        "max_new_tokens": args.get("max_new_tokens", args.get("gen_length")),
        "block_length": args["block_length"],
        "eos_token_id": [args["eot_token"]] if "eot_token" in args else [],
        "early_stop": "eot_token" in args,
        "pad_token_id": PAD,
        "return_dict_in_generate": True,
    }
    if args.get("factor"):
        return found | {"decoding_method": "fast_dllm", "factor": args["factor"]}
    if args.get("threshold"):
        return found | {"decoding_method": "fast_dllm", "confidence_threshold": args["threshold"]}
    found |= {"decoding_method": "llada", "steps": args["steps"], "cfg_scale": args.get("cfg_scale", 0.0)}
    if args.get("temperature"):
        found |= {"do_sample": True, "temperature": args["temperature"]}
    return found | {"remasking": args.get("remasking", "low_confidence")}


def useful(steps):
    """Forwards that decided something, numbered anew: those of an empty quota are not made."""
    made = sorted(set(steps))
    return [made.index(step) + 1 for step in steps]


def replayed(case, monkeypatch, model):
    asked = settings(case)
    row = SimpleNamespace(
        torch_seed=case["args"]["torch_seed"],
        sequence=case["expected"]["sequence"],
        prompt=case["prompt"],
        settings=asked,
    )
    monkeypatch.setattr(type(model), "_sampler", lambda self, config: LLaDADraws(row))


@pytest.mark.every(6)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "expected" in case and name not in DEFECTS])
def test_a_recorded_run_is_reproduced_token_for_token_and_forward_for_forward(name, model, monkeypatch):
    case = CASES[name]
    if case["flags"]["uses_rng"]:
        replayed(case, monkeypatch, model)
    model.config.text_only = "suppress_ids" in case["args"]
    output = model.generate(**inputs(case), **settings(case))
    start = inputs(case)["input_ids"].shape[1]
    expected = torch.tensor(case["expected"]["sequence"]).view(len(output.sequences), -1)[:, start:].tolist()
    steps = torch.tensor(case["expected"]["unmask_step"]).view(len(output.sequences), -1)[:, start:].tolist()
    stop = case["args"].get("eot_token")
    for row, wanted, decided, made in zip(
        output.sequences[:, start:].tolist(), expected, steps, output.step_map.tolist(), strict=True
    ):
        end = wanted.index(stop) + 1 if stop in wanted else len(wanted)
        assert row == wanted[:end] + [PAD] * (len(row) - end)
        assert made == (useful(decided) if name == "a04" else decided)
    if name != "a04":  # half of whose forwards have nothing to decide
        assert output.num_forwards.tolist() == [case["expected"]["n_forwards"]] * len(output.sequences)


def test_no_recorded_run_is_left_out_by_accident():
    assert {name for name, case in CASES.items() if "error" in case} == set(ERRORS)
    assert set(DEFECTS) <= set(CASES) and len(CASES) == 19


@pytest.mark.every(3)
@pytest.mark.parametrize("name", [*DEFECTS, *ERRORS])
def test_what_the_reference_leaves_undecided_or_refuses_is_decided(name, model):
    case = CASES[name]
    chosen = settings(case) | ({"kv_cache": "prefix"} if name == "a15" else {})
    model.config.text_only = False
    output = model.generate(**inputs(case), **chosen)
    answer = output.sequences[:, inputs(case)["input_ids"].shape[1] :]
    assert answer.shape[1] == chosen["max_new_tokens"] and not (answer == case["mask_id"]).any()
    if name == "a17":
        assert output.sequences[0, : len(case["prompt"])].tolist() == case["prompt"]
    if name == "a14":
        assert answer[0].tolist() == case["expected"]["sequence"][len(case["prompt"]) :]


@pytest.mark.full
@pytest.mark.parametrize("case", ["a00", "a02"])
def test_every_method_of_llada_writes_text_alone_where_it_would_have_written_codes(case, model):
    chosen = {"max_new_tokens": 16, "block_length": 8, "eos_token_id": [], "pad_token_id": PAD}
    methods = methods_of(model.traits)
    assert {"d3llm", "dparallel", "fast_dllm", "dinfer", "entropy_bound", "local_leap", "dkv", "llada", "dream"} <= {
        *methods
    }
    for method in methods:
        more = {"decoder": "credit"} if method == "dinfer" else {}
        model.config.text_only = True
        answer = model.generate(**inputs(CASES[case]), decoding_method=method, **chosen, **more)
        assert (answer < 512).all(), method
        model.config.text_only = False
        answer = model.generate(**inputs(CASES[case]), decoding_method=method, **chosen, **more)
        assert (answer >= 512).any(), method


def test_tasks_are_hidden_as_codes_are_and_sampling_draws_none(model):
    first = model.generate(**inputs(CASES["a01"]), **settings(CASES["a01"])).sequences
    model.config.task_token_ids = [4, 1000]
    for more in ({}, {"do_sample": True, "temperature": 3.0, "seed": 1}, {"cfg_scale": 2.0}):
        answer = model.generate(**inputs(CASES["a01"]), **settings(CASES["a01"]) | more).sequences[:, 10:]
        assert (first[:, 10:] == 4).any() and not (answer == 4).any() and (answer < 512).all()


def test_greedy_likelihood_agrees_with_what_is_written(model):
    case = CASES["a01"]
    chosen = settings(case) | {"block_length": 8, "steps": 8, "max_new_tokens": 8}
    text = model.generate(**inputs(case), **chosen).sequences
    completion = torch.zeros_like(text, dtype=torch.bool)
    completion[:, 10:] = True
    assert (text < 512).all()
    assert d3llm_hf.is_greedy(model, text, completion).tolist() == [True]


def test_images_are_refused_by_name(model):
    model.config.drawing_token_ids = [7]
    with pytest.raises(ValueError, match=r"`input_ids` must ask for text \(got the token 7, which asks for an image"):
        model.generate(torch.tensor([[5, 7]]), max_new_tokens=4)
    with pytest.raises(ValueError, match="`t2i_generate` draws images, which is not implemented here"):
        model.t2i_generate(torch.tensor([[5]]))
