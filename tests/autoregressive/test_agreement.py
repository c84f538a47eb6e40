"""Answers of speculative decoding against plain ones: equal, parted by rounding, or wrong."""

import pytest
import torch
from causal import chain_model

from d3llm_hf.autoregressive.agreement import agrees
from d3llm_hf.autoregressive.stock import next_scores


def test_answers_agree_or_part_where_two_tokens_are_equally_likely():
    model = chain_model([1, 2, 3, 0])
    assert agrees(model, [0], [1, 2, 3], [1, 2, 3], "ar_mtp")
    with torch.no_grad():
        model.lm_head.weight[0, 2] = 4 * (1 + 1e-6)  # after a 2, tokens 3 and 0 are a tie but for rounding
    assert not agrees(model, [0], [1, 2, 3], [1, 2, 0], "ar_mtp")


@pytest.mark.parametrize("ours", [[1, 2, 0], [1, 2], [1, 2, 3, 0]])
def test_other_tokens_fewer_and_more_are_an_error(ours):
    with pytest.raises(ArithmeticError, match=r"ar_mtp must give the tokens of plain greedy decoding \(got \[1, 2"):
        agrees(chain_model([1, 2, 3, 0]), [0], ours, [1, 2, 3], "ar_mtp")


def test_the_scores_are_those_that_decoding_chooses_by():
    model = chain_model([1, 2, 3, 0])
    assert next_scores(model, torch.tensor([[0, 1]])).argmax() == 2
    model.generation_config.suppress_tokens = [2]
    assert next_scores(model, torch.tensor([[0, 1]]))[2] == -torch.inf
