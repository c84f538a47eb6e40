"""What transformers and its neighbours build around `generate`: adapters, samples, criteria, sharded models."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import EOS, PAD, answer, left_padded, tiny_model, tiny_prompt, trained_like
from transformers import StoppingCriteria, StoppingCriteriaList


FAMILIES = ("llada", "dream")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_with_an_adapter_decodes_with_our_settings_and_counts(family):
    torch.manual_seed(0)
    model = tiny_model(family)
    adapted = get_peft_model(tiny_model(family), LoraConfig(target_modules="all-linear", r=2))
    prompt = tiny_prompt(0, 5)
    output = answer(adapted, prompt, decoding_method="d3llm", entropy_threshold=0.4, block_length=4)
    expected = answer(model, prompt, decoding_method="d3llm", entropy_threshold=0.4, block_length=4)
    # A fresh adapter changes nothing, so the answers agree.
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(output.num_forwards, expected.num_forwards)


def test_several_samples_of_a_prompt_come_in_one_batch():
    model, ids = trained_like("llada"), torch.tensor([tiny_prompt(0, 4), tiny_prompt(1, 4)])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        num_return_sequences=3,
        seed=1,
        max_new_tokens=8,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    assert output.shape == (6, 12)
    assert torch.equal(output[:, :4], ids.repeat_interleave(3, 0))
    assert len({tuple(row.tolist()) for row in output[:3]}) > 1


class RememberingCriterion(StoppingCriteria):
    """Keeps a state for each row of the batch that it was made for, and answers once for all."""

    def __init__(self, rows: int, token: int, prompt_length: int):
        self.done = [False] * rows
        self.token, self.prompt_length = token, prompt_length

    def __call__(self, input_ids, scores, **kwargs) -> bool:
        assert len(input_ids) == len(self.done)
        for row, ids in enumerate(input_ids[:, self.prompt_length :].tolist()):
            self.done[row] = self.done[row] or self.token in ids
        return all(self.done)


def test_a_criterion_that_remembers_each_row_sees_the_whole_batch_until_the_end():
    prompts = [tiny_prompt(seed, 3 + seed) for seed in range(3)]
    model, inputs = trained_like("llada"), left_padded(prompts)
    chosen = {"max_new_tokens": 16, "block_length": 4, "eos_token_id": EOS, "pad_token_id": PAD}
    plain = model.generate(**inputs, **chosen)
    width = inputs["input_ids"].shape[1]
    unseen = RememberingCriterion(3, token=-7, prompt_length=width)
    output = model.generate(**inputs, stopping_criteria=StoppingCriteriaList([unseen]), **chosen)
    assert torch.equal(output, plain)

    token = int(plain[0, width])
    everywhere = RememberingCriterion(3, token=token, prompt_length=width)
    everywhere.done[1:] = [True, True]
    output = model.generate(**inputs, stopping_criteria=StoppingCriteriaList([everywhere]), **chosen)
    assert output[0, width:].tolist() == [token] + [PAD] * 15


def test_a_process_that_is_finished_keeps_forwarding_until_its_peers_are(monkeypatch):
    model = trained_like("llada")
    prompt, forwards, idle = tiny_prompt(0, 4), [], 3
    expected = answer(model, prompt)

    def unfinished(this_peer_finished, synced_gpus, device):
        nonlocal idle
        if not this_peer_finished:
            return True
        idle -= 1
        return idle >= 0

    monkeypatch.setattr(model, "_has_unfinished_sequences", unfinished, raising=False)
    hook = model.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    output = answer(model, prompt, synced_gpus=True)
    hook.remove()
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(output.num_forwards, expected.num_forwards)  # idle forwards decide nothing and are not counted
    assert len(forwards) == int(expected.num_forwards) + 3
