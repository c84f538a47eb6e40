"""Every recorded run of block-causal models without a defect in it: tokens, their order, and counts of forwards."""

import pytest
import torch
from recorded_blocks import Recorded, checkpoint, of_fast_dllm_v2, of_sdar, recorded_cases
from thin import covering


CASES = recorded_cases("sdar", of_sdar)
FAST_DLLM_V2 = recorded_cases("fast_dllm_v2", of_fast_dllm_v2)
PAD = 3


def generate(case: Recorded, **more):
    chosen = {"pad_token_id": PAD, "return_dict_in_generate": True} | case.settings | more
    return checkpoint(case.model).generate(torch.tensor([case.prompt]), **chosen)


def caches(case: Recorded) -> list[str]:
    """Those in which a run decides the same: two that hold no approximation, or the one that it was recorded with."""
    return [case.settings["kv_cache"]] if "kv_cache" in case.settings else ["exact", "none"]


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
        assert output.step_map[0, : len(case.answer)].tolist() == case.unmask_step


def test_no_recorded_run_is_left_out_by_accident():
    assert (len(CASES), len(FAST_DLLM_V2)) == (53, 59)
