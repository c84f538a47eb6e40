"""Distillation against the published d3LLM training code: recorded views, losses, gradients and curricula."""

import json
import re
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from recorded import GOLDEN, checkpoint
from safetensors.torch import load_file
from transformers import TrainerState

from trainers.distill import batch as distill_batch
from trainers.distill.callbacks import NoiseCurriculumCallback, WindowCurriculumCallback, noise_floor, window_size
from trainers.distill.config import PseudoTrajectoryDistillConfig
from trainers.distill.noisy_views import make_view, state_index, window_count
from trainers.distill.trainer import PseudoTrajectoryDistillTrainer


RECORDED = json.loads((GOLDEN / "training" / "training.json").read_text(encoding="utf-8"))
MASK, EOS, LENGTH = 511, 510, 96


@cache
def tensors():
    return load_file(GOLDEN / "training" / "training.safetensors")


@cache
def samples(kind):
    """The recorded batch as four samples: prompt, answer canvas, length of the answer, and the teacher's step map."""
    found, data = [], tensors()
    rows = zip(
        data[f"batch/{kind}/input_ids"].long(),
        data[f"batch/{kind}/prompt_lengths"].tolist(),
        data[f"batch/{kind}/full_lengths"].tolist(),
        strict=True,
    )
    for index, (ids, prompt_length, full_length) in enumerate(rows):
        states = data[f"batch/{kind}/trajectory{index}"].long()[:, prompt_length:]
        decided = states != MASK
        step_map = torch.where(decided.any(0), decided.int().argmax(0) + 1, -1)
        # The reference fills Dream's trajectories up with end-of-text, which so are known from the start.
        step_map[(states == EOS).all(0)] = 0
        found.append(
            SimpleNamespace(
                prompt=ids[:prompt_length],
                canvas=ids[prompt_length:],
                content_length=full_length - prompt_length,
                step_map=step_map,
            )
        )
    return found


def recorded_view(case, index, step_map, canvas_length, random_mask, uniforms):
    """The view of one sample from the recorded draws; `uniforms` of the window's own length, in call order."""
    options = case.get("args") or case["forward_process_kwargs"]
    sample = samples(case["batch"])[index]
    span = sample.content_length if case["kind"] == "llada" else canvas_length
    blockwise = options.get("use_blockwise", True)
    window, count, window_index = options["block_size"], 1, 0
    if blockwise:
        window_index = [draw["value"] for draw in case["draws"] if draw["fn"] == "randint"][index]
        count = window_count(span, window)
        assert count == span // window + 1  # no recorded answer is a multiple of its window
    spread = torch.ones(len(step_map))
    if random_mask:
        values = next(uniforms)
        spread[window_index * window :][: len(values)] = values
    return make_view(
        step_map,
        objective="random" if random_mask else "trajectory",
        canvas_length=canvas_length,
        window=window,
        window_index=window_index,
        num_windows=count,
        noise_level=options["mask_ratio"],
        uniforms=spread if random_mask else None,
    )


@pytest.mark.parametrize("case", RECORDED["forward_process"], ids=lambda case: case["id"])
def test_the_views_are_those_of_the_reference(case):
    data, uniforms = tensors(), iter([])
    if case["n_torch_rand"]:
        uniforms = (tensors()[f"{case['id']}/rand{k}"] for k in range(case["n_torch_rand"]))
    for index, sample in enumerate(samples(case["batch"])):
        random_mask = case["args"]["use_naive_random_mask"] or index in case["missing_trajectories"]
        length = len(sample.canvas)
        view = recorded_view(case, index, sample.step_map, length, random_mask, uniforms)
        pairs = [("noisy", "masked", view.masked), ("noisy_rev", "masked_rev", view.complement)]
        for noisy, masked, learnt in pairs[: 1 + case["args"]["use_complementary_loss"]]:
            ids = sample.canvas.masked_fill(learnt | view.future, MASK)
            assert torch.equal(torch.cat([sample.prompt, ids]), data[f"{case['id']}/{noisy}"][index].long())
            assert torch.equal(learnt, data[f"{case['id']}/{masked}"][index].bool()[len(sample.prompt) :])


@pytest.mark.parametrize("case", RECORDED["select_index"], ids=str)
def test_the_state_of_a_window_is_the_references(case):
    found = state_index(case["mask_ratio"], case["block_start"], case["block_end"], case["n_states"])
    assert found == case["index"]


def test_the_curricula_are_the_references():
    assert len(RECORDED["curriculum"]) == 216
    for case in RECORDED["curriculum"]:
        if case["what"] == "block_size":
            found = window_size(case["epoch"], case["progressive_block_sizes"])
        else:
            found = noise_floor(case["global_step"], case["max_steps"], case["min"], case["max"])
        assert found == case["value"], case


def recorded_batch(kind):
    """The recorded batch as the collator gives it, but with canvases of unequal length (the reference's are)."""
    rows = samples(kind)
    prompt_length, length = (max(len(getattr(row, name)) for row in rows) for name in ("prompt", "canvas"))
    batch = {name: [] for name in ("input_ids", "attention_mask", "labels", "step_map")}
    for row in rows:
        padding = prompt_length - len(row.prompt), length - len(row.canvas)
        ids = torch.cat([row.prompt, row.canvas])
        batch["input_ids"].append(torch.nn.functional.pad(ids, padding, value=EOS))
        batch["attention_mask"].append(torch.nn.functional.pad(torch.ones_like(ids), padding))
        batch["labels"].append(torch.nn.functional.pad(row.canvas, (0, padding[1]), value=-100))
        batch["step_map"].append(torch.nn.functional.pad(row.step_map, (0, padding[1]), value=-1))
    batch = {name: torch.stack(values) for name, values in batch.items()}
    batch["content_lengths"] = torch.tensor([row.content_length for row in rows])
    batch["sample_ids"] = torch.arange(len(rows))
    return batch


def official_name(name):
    """Name of a LLaDA tensor in its published code."""
    for ours, theirs in [
        (r"\blayers\.", "transformer.blocks."),
        (r"self_attn\.o_proj", "attn_out"),
        (r"self_attn\.", ""),
        (r"mlp\.gate_proj", "ff_proj"),
        (r"mlp\.up_proj", "up_proj"),
        (r"mlp\.down_proj", "ff_out"),
        (r"input_layernorm", "attn_norm"),
        (r"post_attention_layernorm", "ff_norm"),
        (r"model\.embed_tokens", "model.transformer.wte"),
        (r"model\.norm", "model.transformer.ln_f"),
        (r"lm_head", "model.transformer.ff_out"),
    ]:
        name = re.sub(ours, theirs, name)
    return name


@pytest.mark.every(3)
@pytest.mark.parametrize("case", RECORDED["compute_loss"], ids=lambda case: case["id"])
def test_loss_and_gradients_are_those_of_the_reference(case, tmp_path, monkeypatch):
    model = checkpoint(case["model"])
    model.zero_grad()
    recorded, state = case["trainer"], case["state"]
    args = PseudoTrajectoryDistillConfig(
        str(tmp_path),
        use_cpu=True,
        report_to="none",
        objective="random" if recorded["use_naive_random_mask"] else "trajectory",
        complementary=recorded["use_complementary_loss"],
        blockwise=recorded.get("use_blockwise_loss", True),
        windows_over_fill=case["kind"] == "dream",
        noise_start=recorded["min_mask_ratio"],
        noise_end=recorded["max_mask_ratio"],
        window_sizes=recorded["progressive_block_sizes"],
        num_train_epochs=case["num_train_epochs"],
        entropy_weight=recorded["entropy_weight"],
        entropy_temperature=recorded["temperature"],
        loss_chunk_size=50,
    )
    tokenizer = SimpleNamespace(mask_token_id=MASK, eos_token_id=EOS, pad_token_id=EOS)
    trainer = PseudoTrajectoryDistillTrainer(model, args, processing_class=tokenizer)
    trainer.state = TrainerState(**state)
    for callback in (NoiseCurriculumCallback(trainer), WindowCurriculumCallback(trainer)):
        callback.on_step_begin(args, trainer.state, trainer.control)
    assert (trainer.window, trainer.noise_floor) == (case["current_block_size"], case["current_mask_ratio"])

    uniforms = (tensors()[f"{case['id']}/rand{k}"] for k in range(4))
    order = iter(range(4))

    def with_recorded_draws(step_map, generator, *, objective, canvas_length, window, noise_range, **options):
        assert window == case["current_block_size"] and noise_range == (case["draws"][0]["a"], case["draws"][0]["b"])
        return recorded_view(case, next(order), step_map, canvas_length, objective == "random", uniforms)

    monkeypatch.setattr(distill_batch, "draw_view", with_recorded_draws)
    model.train()
    loss = trainer.compute_loss(model, recorded_batch(case["batch"]))
    loss.backward()
    model.eval()

    expected = case["expected"]
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5)
    sums = {name: value.item() for name, value in trainer._metric_sums[0].items()}
    terms = [sums["cross_entropy"] / sums["masked"]]
    if recorded["use_complementary_loss"]:
        terms.append(sums["complementary_cross_entropy"] / sums["complement"])
    assert terms == pytest.approx(expected["cross_entropy_terms_in_call_order"], rel=1e-5)
    rename = official_name if case["kind"] == "llada" else str
    norms = {rename(name): weight.grad.norm().item() for name, weight in model.named_parameters()}
    assert norms == pytest.approx(expected["grad_norms"], rel=1e-4)
    for name, weight in model.named_parameters():
        gradient = tensors().get(f"{case['id']}/grad/{rename(name)}")
        if gradient is not None:
            torch.testing.assert_close(weight.grad, gradient, rtol=1e-3, atol=1e-6)
    model.zero_grad()
