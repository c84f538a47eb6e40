"""Where an answer ends, and what its forwards are worth."""

import pytest
import torch
from tiny import EOS, MASK, PAD, ScriptedModel, answer, constant_script, tiny_prompt, trained_like


def hesitant_script(wanted: list[int], order: list[int], prompt_length: int):
    """A model that is sure of `wanted[i]` once `order[i]` of the positions that `order` names are decided."""

    def script(ids: torch.Tensor) -> torch.Tensor:
        logits = constant_script(wanted, prompt_length, 3.0)(ids).clone()
        decided = (ids[:, prompt_length : prompt_length + len(order)] != MASK).sum(1)
        for column, needed in enumerate(order):
            logits[decided >= needed, prompt_length + column] *= 10
        return logits

    return script


@pytest.mark.parametrize("decoding_method", ["d3llm", "dparallel"])
def test_a_row_ends_at_the_first_stop_token_only_once_all_before_it_is_decided(decoding_method):
    # Position 3 (EOS) is sure at once, positions 0 to 2 only after it; position 5 holds an EOS as well.
    script = hesitant_script([10, 11, 12, EOS, 13, EOS, 14, 15], [1, 2, 3, 0], 2)
    model = ScriptedModel(script)
    chosen = {"block_length": 8, "entropy_threshold": 0.1, "early_stop": True, "max_new_tokens": 8}
    output = answer(model, [1, 2], decoding_method=decoding_method, **chosen)
    assert output.sequences[0, 2:].tolist() == [10, 11, 12, EOS, PAD, PAD, PAD, PAD]
    assert output.step_map[0].tolist() == [2, 3, 4, 1, -1, -1, -1, -1]
    assert int(output.num_forwards) == model.calls == 4


@pytest.mark.every(6)
@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("decoding_method", ["d3llm", "dparallel", "llada", "dream"])
@pytest.mark.parametrize("family", ["llada", "dream"])
def test_everything_behind_the_first_stop_token_is_pad(family, decoding_method, early_stop):
    prompts = torch.tensor([tiny_prompt(seed, 4) for seed in range(8)])
    model = trained_like(family)
    chosen = {"decoding_method": decoding_method, "max_new_tokens": 14, "early_stop": early_stop, "pad_token_id": PAD}
    # Two rows say a stop token whatever is drawn: what they have at their second place.
    said = model.generate(prompts, eos_token_id=EOS, **chosen)[:2, 4:6].tolist()
    stops = sorted({EOS, *(second for first, second in said if first != EOS)})
    output = model.generate(prompts, eos_token_id=stops, **chosen)
    stopped = 0
    for row in output[:, 4:].tolist():
        first = min((row.index(stop) for stop in stops if stop in row), default=None)
        if first is not None:
            stopped += 1
            assert row[first + 1 :] == [PAD] * (13 - first)
    assert stopped >= 2


@pytest.mark.parametrize("decoding_method", ["d3llm", "dparallel", "llada", "dream"])
def test_a_model_that_always_ends_costs_at_most_a_block_of_forwards(decoding_method):
    model = ScriptedModel(constant_script([EOS] * 256, 2))
    output = answer(model, [1, 2], decoding_method=decoding_method, max_new_tokens=256, early_stop=True)
    assert model.calls <= 32
    assert output.sequences[0, 2:].tolist() == [EOS] + [PAD] * 255
    assert float(output.tokens_per_forward) == 0.0


def test_without_early_stop_the_whole_answer_is_decoded():
    model = ScriptedModel(constant_script([10, EOS, *[11] * 14], 2))
    chosen = {"block_length": 4, "block_add_threshold": 1.0, "entropy_threshold": 0.1}
    stopping = answer(model, [1, 2], early_stop=True, **chosen)
    going_on = answer(model, [1, 2], early_stop=False, **chosen)
    assert int(stopping.num_forwards) == 1 and int(going_on.num_forwards) == 4
    assert torch.equal(stopping.sequences, going_on.sequences)
    assert (going_on.step_map > 0).all() and (stopping.step_map > 0).sum() == 4


# ---- D-11: tokens per forward --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", [PAD, EOS], ids=["pad", "pad is eos"])
def test_tokens_per_forward_counts_answer_tokens_over_the_forwards_of_their_row(pad):
    # The first prompt token names the answer; each forward decides one block of four.
    answers = [[10] * 16, [10] * 6 + [EOS] + [11] * 9, [EOS] + [11] * 15, [10] * 15 + [EOS]]

    def script(ids: torch.Tensor) -> torch.Tensor:
        return torch.cat([constant_script(answers[row], 1)(ids[:1]) for row in ids[:, 0].tolist()])

    output = ScriptedModel(script).generate(
        torch.tensor([[0], [1], [2], [3]]),
        decoding_method="dparallel",
        block_length=4,
        entropy_threshold=0.1,
        max_new_tokens=16,
        eos_token_id=EOS,
        pad_token_id=pad,
        return_dict_in_generate=True,
        early_stop=True,
    )
    assert output.num_forwards.tolist() == [4, 2, 1, 4]
    assert output.tokens_per_forward.tolist() == [16 / 4, 6 / 2, 0.0, 15 / 4]


def test_a_fill_that_ends_a_row_is_no_forward_but_counts_as_one_by_the_reference():
    model = ScriptedModel(constant_script([10, 10, EOS, 11, *[11] * 12], 2))
    chosen = {"block_length": 4, "entropy_threshold": 0.1, "early_stop": True}
    output = answer(model, [1, 2], decoding_method="d3llm", **chosen)
    assert (int(output.num_forwards), int(output.num_forwards_reference)) == (1, 2)
    sequential = answer(model, [1, 2], decoding_method="dparallel", **chosen)
    assert (int(sequential.num_forwards), int(sequential.num_forwards_reference)) == (1, 1)
