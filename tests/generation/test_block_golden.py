"""Every recorded run of block-causal models without a defect in it: tokens, their order, and counts of forwards."""

import json

import pytest
import torch
from places import GOLDEN
from recorded_blocks import (
    LLADA2_DEFECTS,
    Recorded,
    checkpoint,
    of_d2f,
    of_fast_dllm_v2,
    of_llada2,
    of_sdar,
    recorded_cases,
)
from thin import covering


SUITES = {
    "sdar": recorded_cases("sdar", of_sdar),
    "d2f": recorded_cases("d2f", of_d2f),
    "llada2": recorded_cases("llada2", of_llada2),
}
CASES = [case for cases in SUITES.values() for case in cases]
FAST_DLLM_V2 = recorded_cases("fast_dllm_v2", of_fast_dllm_v2)
PAD = 3


def generate(case: Recorded, **more):
    chosen = {"pad_token_id": PAD, "return_dict_in_generate": True} | case.settings | more
    prompt = torch.tensor([case.prompt])  # with a mask: transformers would take the pad token in it for padding
    return checkpoint(case.model).generate(prompt, attention_mask=torch.ones_like(prompt), **chosen)


def caches(case: Recorded) -> list[str]:
    """Those in which a run decides the same: two that hold no approximation, or the one that it was recorded with."""
    return [case.settings["kv_cache"]] if "kv_cache" in case.settings else ["exact", "none"]


@pytest.mark.every(48)
@pytest.mark.parametrize(
    "case, kv_cache",
    [
        *covering(CASES, ["exact", "none"], strength=1),
        *((case, kv_cache) for case in FAST_DLLM_V2 for kv_cache in caches(case)),
    ],
    ids=lambda v: str(getattr(v, "id", v)),
)
def test_a_recorded_run_is_reproduced_token_for_token_and_forward_for_forward(case, kv_cache):
    output = generate(case, kv_cache=kv_cache)
    answer = output.sequences[0, len(case.prompt) :].tolist()
    assert len(answer) == case.settings["max_new_tokens"]
    assert answer == case.answer + [PAD] * (len(answer) - len(case.answer))
    if case.forwards is not None:
        assert int(output.num_forwards_reference) == case.forwards
    if case.unmask_step is not None:
        assert output.step_map[0, : len(case.unmask_step)].tolist() == case.unmask_step


def test_no_recorded_run_is_left_out_by_accident():
    assert {name: len(cases) for name, cases in SUITES.items()} == {"sdar": 53, "d2f": 39, "llada2": 75}
    assert len(FAST_DLLM_V2) == 59


def test_every_defect_of_llada2s_reference_is_one_that_is_listed():
    quirks = json.loads((GOLDEN / "llada2" / "quirks.json").read_text())
    kept = {case.id for case in SUITES["llada2"]}
    followed = {title.split(" ")[0] for title, ids in quirks.items() if kept & set(ids)}
    assert followed == {"edits", "early_return_with_masks"}
    assert {title.split(" ")[0] for title in quirks} - followed == set(LLADA2_DEFECTS)
