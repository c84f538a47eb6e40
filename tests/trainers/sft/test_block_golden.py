"""Block-causal training against recorded steps of SDAR, Fast-dLLM v2 and LLaDA2: masks, losses and gradients."""

import json

import pytest
import torch
from block_tuning import block_model, block_trainer
from families import equal_up_to_rounding, flat, gradients
from places import GOLDEN
from safetensors.torch import load_file

from d3llm_hf.models.topology import Topology
from trainers.sft.block_masking import block_mask
from trainers.sft.block_views import doubled_mask


def recorded(family):
    """Cases and tensors of a family's training."""
    folder = GOLDEN / family / "training"
    return json.loads((folder / "training.json").read_text())["cases"], load_file(folder / "training.safetensors")


def cases(family):
    return pytest.mark.parametrize("case", recorded(family)[0], ids=lambda case: case["id"])


def documents_of(positions):
    """The document of each slot of a row, as SDAR finds it: a 0 begins one, and zeros at the end are one more."""
    begins = positions.eq(0)
    padding = begins.flip(0).long().cumprod(0).flip(0).bool()
    return torch.where(padding, -1, begins.long().cumsum(0) - 1)


def counted(documents):
    """Positions in each document."""
    return torch.cat([torch.arange(int((documents == each).sum())) for each in documents.unique_consecutive()])


def sdars_order(documents):
    """The slots of a doubled row in SDAR's order: each text noisy and clean, one text behind the other."""
    length = len(documents)
    whole = [(documents == each).nonzero()[:, 0] for each in documents.unique_consecutive()]
    return torch.cat([torch.cat([slots, slots + length]) for slots in whole])


def assert_a_recorded_step(trainer, inputs, mask, monkeypatch, loss, norms, some=None):
    """Loss, norms of gradients and some of these, from the trainer's own step; returns what the model was given."""
    monkeypatch.setattr("trainers.sft.trainer.draw_block_mask", lambda *args, **kwargs: mask)
    seen = []
    trainer.model.train()
    trainer.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    losses = []

    def step():
        losses.append(trainer.compute_loss(trainer.model, inputs))
        return losses[0]

    found = gradients(trainer.model, step)
    assert losses[0].item() == pytest.approx(loss, rel=1e-5)
    wanted = torch.tensor([norms[name] for name in found])
    assert equal_up_to_rounding(torch.stack([gradient.norm() for gradient in found.values()]), wanted)
    for name, gradient in (some or {}).items():
        assert equal_up_to_rounding(found[name], gradient)
    return seen[0]


@cases("sdar")
def test_a_step_of_sdar_is_the_recorded_one(case, tmp_path, monkeypatch):
    tensors = {
        name.removeprefix(f"{case['id']}/"): tensor
        for name, tensor in recorded("sdar")[1].items()
        if name.startswith(f"{case['id']}/")
    }
    documents = torch.stack([documents_of(row) for row in tensors["position_ids"]])
    positions = torch.stack([counted(row) for row in documents])
    labels = tensors["labels"].long()
    inputs = {
        "input_ids": tensors["input_ids"].long(),
        "labels": labels,
        "documents": documents,
        "position_ids": positions,
        "blocks": positions // case["block_size"],
    }
    # A row is drawn anew until something is hidden: the last draws of each are those that hold.
    ratios, uniforms, draw = [], [], 0
    for row in documents:
        hidden = torch.zeros(1, dtype=torch.bool)
        while not hidden.any():
            ratio, uniform = tensors[f"draw{draw}_rand"], tensors[f"draw{draw + 1}_rand_like"][0]
            p = ((1 - 1e-3) * ratio + 1e-3)[row]  # padding, -1, is the last one
            hidden = (uniform < p) & labels[len(ratios)].ne(-100)
            draw += 2
        ratios.append(p)
        uniforms.append(uniform)
    mask = block_mask(labels != -100, torch.stack(ratios), torch.stack(uniforms), complementary=False)
    assert torch.equal(mask.hidden[0], tensors["masked"])

    trainer = block_trainer(tmp_path, block_model("sdar-tiny-a"))
    expected = case["expected"]
    some = {name.removeprefix("grad/"): value for name, value in tensors.items() if name.startswith("grad/")}
    given = assert_a_recorded_step(trainer, inputs, mask, monkeypatch, expected["loss"], expected["grad_norms"], some)
    for row, order in enumerate(map(sdars_order, documents)):
        assert torch.equal(given["input_ids"][row, order], tensors["concat_input_ids"][row].long())
        assert torch.equal(given["position_ids"][row, order], tensors["concat_position_ids"][row].long())
        assert torch.equal(given["attention_mask"][row, 0][order][:, order], tensors["attention_mask"][row])
        assert torch.equal(given["logits_to_keep"][row, order], tensors["logits_to_keep"][row])


@pytest.mark.parametrize(("name", "lengths"), [("n10_b4", [10]), ("n12_b4", [12]), ("packed_7_5_b4", [7, 5])])
def test_masks_of_sdar_are_the_recorded_ones(name, lengths):
    wanted = load_file(GOLDEN / "sdar" / "training" / "masks.safetensors")[f"sdar_train_mask/{name}"]
    documents = torch.cat([torch.full((length,), number) for number, length in enumerate(lengths)])
    order = sdars_order(documents)
    found = doubled_mask(documents[None], counted(documents)[None] // 4)[0, 0]
    assert torch.equal(found[order][:, order], wanted)


@pytest.mark.parametrize(("prompt", "answer"), [(5, 10), (6, 8)])
def test_blocks_from_the_answer_on_are_seen_as_trados_are(prompt, answer):
    """TraDo's training has the prompt once, counts its blocks backwards, and has the noisy answer at the end."""
    wanted = load_file(GOLDEN / "sdar" / "training" / "masks.safetensors")[
        f"trado_train_mask/L0_{prompt}_L1_{answer}_b4"
    ]
    positions, length = torch.arange(prompt + answer), prompt + answer
    blocks = Topology(4, "prompt").blocks(positions[None], torch.tensor([prompt]))
    found = doubled_mask(torch.zeros(1, length, dtype=torch.long), blocks)[0, 0]
    order = torch.cat([positions[prompt:] + length, positions[prompt:]])  # clean, then noisy
    clean_prompt = positions[:prompt] + length
    assert torch.equal(found[order][:, order], wanted[prompt:, prompt:])
    assert torch.equal(found[order][:, clean_prompt], wanted[prompt:, :prompt])


@cases("fast_dllm_v2")
def test_a_step_of_fast_dllm_v2_is_the_recorded_one(case, tmp_path, monkeypatch):
    tensors = {
        name.removeprefix(f"{case['id']}/"): tensor
        for name, tensor in recorded("fast_dllm_v2")[1].items()
        if name.startswith(f"{case['id']}/")
    }
    ids, labels = tensors["input_ids"].long(), tensors["labels"].long()
    positions = torch.arange(case["L"]).repeat(case["B"], 1)
    inputs = {
        "input_ids": ids,
        "labels": labels,
        "documents": torch.zeros_like(ids),
        "position_ids": positions,
        "blocks": positions // case["bd_size"],
    }
    p = ((1 - 1e-3) * tensors["rand_t"] + 1e-3).repeat_interleave(case["bd_size"]).view_as(ids)
    mask = block_mask(labels != -100, p, tensors["rand_mask"].view_as(ids), complementary=True)
    assert torch.equal(mask.hidden.flatten(0, 1), tensors["model_labels"] != -100)

    trainer = block_trainer(tmp_path, block_model("fdv2-tiny-a"))
    assert trainer.block_objective.complementary and trainer.block_objective.per_block
    given = assert_a_recorded_step(trainer, inputs, mask, monkeypatch, case["loss"], case["grad_norms"])
    assert torch.equal(given["input_ids"], tensors["model_input_ids"].long())
    assert torch.equal(given["attention_mask"], tensors["mask"].bool().expand(2 * case["B"], 1, -1, -1))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_loss_of_llada2_over_given_labels_is_the_recorded_one(implementation):
    (case,), tensors = recorded("llada2")
    ids, labels = (tensors[f"labels_loss/{name}"].long() for name in ("input_ids", "labels"))
    block = torch.arange(ids.shape[1]) // case["block"]
    model = block_model("llada2-tiny-a", attn_implementation=implementation).train()
    losses = []

    def step():
        losses.append(model(ids, attention_mask=(block[:, None] >= block)[None, None], labels=labels).loss)
        return losses[0]

    found = gradients(model, step)
    assert losses[0].item() == pytest.approx(case["expected"]["loss"], rel=1e-5)
    norms = case["expected"]["grad_norms"]
    whole = torch.tensor(list(norms.values())).norm()  # the files split and join what modules hold
    assert flat(found).norm().item() == pytest.approx(whole.item(), rel=1e-5)
