"""D2F's asymmetric distillation against recorded steps, and as a run."""

import json

import pytest
import torch
from block_tuning import TOKENIZER, block_trainer
from distillation import rows, student
from families import equal_up_to_rounding, gradients
from peft import LoraConfig, PeftModel
from places import GOLDEN
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from d3llm_hf import DreamModel, LLaDAModelLM, as_diffusion_lm
from trainers.sft.d2f import BlockNoise, answer_blocks, block_causal_mask, block_noise, draw_block_noise, rising_ratios
from trainers.sft.masking import generator_for


CLASSES = {"llada": LLaDAModelLM, "dream": DreamModel}
ADAPTER = LoraConfig(r=2, target_modules="all-linear")


def recorded(family):
    """Cases and tensors of a family's training."""
    folder = GOLDEN / "d2f" / "training"
    cases = json.loads((folder / f"{family}-tiny-a.json").read_text())["cases"]
    return cases, load_file(folder / f"{family}-tiny-a.safetensors")


def with_adapter(family):
    """Recorded without dropout, and with all weights of the adapter trained."""
    base = CLASSES[family].from_pretrained(GOLDEN / f"{family}-tiny-a", mask_token_id=TOKENIZER.mask_token_id)
    adapter = str(GOLDEN / f"d2f-{family}-tiny-a-lora")
    return PeftModel.from_pretrained(base, adapter, is_trainable=True).eval()


def drawn_tokens(tensors, learnt, blocks):
    """The draws `(B, R)` of all tokens: a tensor for each block, row by row."""
    found, number = torch.ones(learnt.shape), 2
    for row in range(len(learnt)):
        for block in range(int(blocks[row].max()) + 1):
            of = blocks[row] == block
            found[row, of] = tensors[f"rand{number}"][0]
            number += 1
    return found


CASES = [(family, case) for family in CLASSES for case in recorded(family)[0]]


@pytest.mark.every(3)
@pytest.mark.parametrize(("family", "case"), CASES, ids=[f"{family}-{case['id']}" for family, case in CASES])
def test_a_step_of_d2f_is_the_recorded_one(family, case, tmp_path, monkeypatch):
    tensors = {
        name.removeprefix(f"{case['id']}/"): tensor
        for name, tensor in recorded(family)[1].items()
        if name.startswith(f"{case['id']}/")
    }
    # 1. The draws: the answers of a batch need not be equally long, so a canvas holds the ends of some prompts
    ids, prompts = tensors["input_ids"].long(), tensors["question_length"]
    length, shortest = ids.shape[1], int(prompts.min())
    learnt = torch.arange(shortest, length) >= prompts[:, None]
    blocks = answer_blocks(learnt, case["block_size"])
    p = rising_ratios(tensors["rand0"], tensors["rand1"]).gather(1, blocks.clamp_min(0))
    noise = block_noise(learnt, p, drawn_tokens(tensors, learnt, blocks))
    assert torch.equal(noise.hidden, tensors["masked"][:, shortest:].bool())
    assert torch.equal(p[noise.hidden], tensors["p_mask"][:, shortest:][noise.hidden])

    # 2. The step
    objective = "d2f" if case["self_align"] else "d2f_labels"
    trainer = block_trainer(
        tmp_path, with_adapter(family), objective=objective, block_length=case["block_size"], max_prompt_length=20
    )
    monkeypatch.setattr("trainers.sft.trainer.draw_block_noise", lambda *args: noise)
    labels = ids[:, shortest:].masked_fill(~learnt, -100)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    seen, losses = [], []
    base = trainer.model.get_base_model()
    base.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)

    def step():
        losses.append(trainer.compute_loss(trainer.model, batch))
        return losses[0]

    found = gradients(trainer.model, step)
    assert losses[0].item() == pytest.approx(case["loss"], rel=1e-5)
    norms = torch.stack([gradient.norm() for gradient in found.values()]).sort().values
    assert equal_up_to_rounding(norms, torch.tensor(list(case["grad_norms"].values())).sort().values)

    # 3. What was seen: by the teacher everything, by the student its block and what is before
    assert len(seen) == (2 if case["self_align"] else 1)
    for given in seen:
        assert torch.equal(given["input_ids"], tensors["noisy"].long())
    assert torch.equal(seen[-1]["attention_mask"], tensors["student_mask"].bool())
    if case["self_align"]:
        assert seen[0]["attention_mask"].ndim == 2 and tensors["teacher_mask"].all()


def test_ratios_rise_between_their_bounds_and_a_run_draws_them():
    ratios = rising_ratios(torch.tensor([[0.0], [0.5], [1.0]]), torch.ones(3, 3))
    expected = torch.tensor([[0.2, 0.2 + 0.5 / 3, 0.2 + 1 / 3, 0.7], [0.45, 0.45 + 0.25 / 3, 0.45 + 0.5 / 3, 0.7]])
    assert torch.allclose(ratios, torch.cat([expected, torch.full((1, 4), 0.7)]))
    assert torch.allclose(rising_ratios(torch.zeros(1, 1), torch.zeros(1, 0)), torch.tensor([[0.2]]))
    noise = draw_block_noise(torch.ones(64, 4000, dtype=torch.bool), 1000, generator_for(0))
    share = noise.hidden.view(64, 4, 1000).float().mean(2)
    assert share.min() > 0.12 and share.max() < 0.8 and (share.diff(dim=1) > -0.12).all()


def test_the_prompt_is_a_block_and_padding_is_seen_by_nothing():
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    learnt = torch.tensor([[True] * 4, [False, True, True, False]])
    blocks = answer_blocks(learnt, 2)
    assert blocks.tolist() == [[0, 0, 1, 1], [-1, 0, 0, 1]]
    sees = block_causal_mask(mask, blocks)[:, 0]
    assert (
        sees[0, 1:].int().tolist()
        == [[0, 1, 0, 0, 0, 0], [0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 0, 0]] + [[0, 1, 1, 1, 1, 1]] * 2
    )
    assert sees[1, :5].int().tolist() == [[1, 1, 1, 0, 0, 0]] * 3 + [[1, 1, 1, 1, 1, 0]] * 2
    assert sees.any(-1).all()


@pytest.mark.full
@pytest.mark.every(6)
@pytest.mark.parametrize(("family", "position_mask"), [("llada", True), ("dream", True), ("dream", False)])
def test_an_adapter_learns_and_the_base_stays_and_a_resumed_run_is_the_unbroken_one(family, position_mask, tmp_path):
    def trainer(folder):
        model = student(TOKENIZER, family)
        model.supports_position_mask = position_mask
        torch.manual_seed(1)
        saved = {"save_strategy": "steps", "save_steps": 2}
        return block_trainer(folder, model, objective="d2f", block_length=4, given={"peft_config": ADAPTER}, **saved)

    unbroken = trainer(tmp_path / "a")
    before = {name: weight.clone() for name, weight in unbroken.model.state_dict().items()}
    unbroken.train()
    logs = [entry for entry in unbroken.state.log_history if "loss" in entry]
    assert all(0 < entry["masked_fraction"] < 1 and entry["loss"] > 0 for entry in logs)
    resumed = trainer(tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for name, weight in unbroken.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
        assert torch.equal(weight, before[name]) != ("lora_" in name), name
    ids = torch.tensor([[5, 6, 7]])
    answer = unbroken.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), decoding_method="d2f", block_length=4, max_new_tokens=8
    )
    assert answer.shape == (1, 11)


def test_an_adapter_that_changes_nothing_and_sees_everything_is_taught_what_it_knows(tmp_path, monkeypatch):
    """In one block behind no prompt teacher and student see the same, and the loss is the entropy of what they say."""
    model = student(TOKENIZER)
    trainer = block_trainer(tmp_path, model, objective="d2f", block_length=12, given={"peft_config": ADAPTER})
    batch = trainer.data_collator([{"prompt_ids": [], "response_ids": row["response_ids"]} for row in rows(2)])
    hidden = torch.ones(2, 12, dtype=torch.bool)
    monkeypatch.setattr(
        "trainers.sft.trainer.draw_block_noise", lambda *args: BlockNoise(hidden, hidden / hidden.sum())
    )
    logits = model(torch.full((2, 12), TOKENIZER.mask_token_id)).logits
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(entropy.item(), rel=1e-5)


@pytest.mark.full
def test_without_an_adapter_only_labels_are_learnt_and_another_model_learns_no_blocks(tmp_path):
    with pytest.raises(ValueError, match=r'`model` must have an adapter with `objective="d2f"` \(got LLaDAModelLM\)'):
        block_trainer(tmp_path, student(TOKENIZER), objective="d2f")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    stock = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(TOKENIZER), **sizes, **heads))
    other = as_diffusion_lm(stock, mask_token_id=TOKENIZER.mask_token_id, bidirectional=True)
    with pytest.raises(ValueError, match=r"`objective` must be masked_diffusion for Qwen3ForCausalLM \(got 'd2f'\)"):
        block_trainer(tmp_path, other, objective="d2f")
    trainer = block_trainer(tmp_path, student(TOKENIZER), objective="d2f_labels", max_steps=1)
    assert trainer.topology.block_length == 16 and trainer.train().training_loss > 0


@pytest.mark.parametrize(
    "arguments",
    [
        {"suffix_mask_fraction": 0.5},
        {"suffix_window": 4},
        {"min_mask_ratio": 0.1},
        {"mask_ratio_eps": 0.1},
        {"stratified_mask_ratio": True},
        {"mask_ratio_per_block": True},
        {"complementary_masks": True},
        {"packing": True},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_settings_of_other_objectives_are_refused(tmp_path, arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=rf"`{name}` has no effect on LLaDAModelLM with d2f"):
        block_trainer(tmp_path, student(TOKENIZER), objective="d2f_labels", **arguments)
