"""Every recorded run of block-causal models without a defect in it: tokens, their order, and counts of forwards."""

from collections import Counter

import pytest
import torch
from recorded_blocks import Recorded, checkpoint, of_d2f, of_sdar, recorded_cases
from thin import covering


CASES = recorded_cases("sdar", of_sdar) + recorded_cases("d2f", of_d2f)
PAD = 3


def generate(case: Recorded, **more):
    chosen = {"pad_token_id": PAD, "return_dict_in_generate": True} | case.settings | more
    return checkpoint(case.model).generate(torch.tensor([case.prompt]), **chosen)


@pytest.mark.parametrize(
    "case, kv_cache", covering(CASES, ["exact", "none"], strength=1), ids=lambda v: str(getattr(v, "id", v))
)
def test_a_recorded_run_is_reproduced_token_for_token_and_forward_for_forward(case, kv_cache):
    output = generate(case, kv_cache=kv_cache)
    answer = output.sequences[0, len(case.prompt) :].tolist()
    assert len(answer) == case.settings["max_new_tokens"]
    assert answer == case.answer + [PAD] * (len(answer) - len(case.answer))
    assert int(output.num_forwards_reference) == case.forwards
    if case.unmask_step is not None:
        assert output.step_map[0, : len(case.unmask_step)].tolist() == case.unmask_step


def test_no_recorded_run_is_left_out_by_accident():
    assert Counter(case.settings.get("decoding_method", "sdar") for case in CASES) == {"sdar": 53, "d2f": 39}
