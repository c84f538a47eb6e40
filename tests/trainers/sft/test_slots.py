"""ReFusion's objective: the recorded batches and losses, what is drawn, and a run of the trainer."""

import json
from collections import Counter

import pytest
import torch
from datasets import Dataset
from official import tiny_tokenizer
from peft import PromptTuningConfig
from places import GOLDEN
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from d3llm_hf import ReFusionForCausalLM
from trainers import MaskedDiffusionSFTConfig, MaskedDiffusionSFTTrainer, run_sft
from trainers.sft.masking import generator_for
from trainers.sft.slots import NOTHING, SIZES, SlotDraw, draw_slots, in_slots, slot_losses


CASES = {case["id"]: case for case in json.loads((GOLDEN / "refusion" / "training.json").read_text())["cases"]}
MASK = 511


def load():
    return ReFusionForCausalLM.from_pretrained(GOLDEN / "refusion-tiny-a")


def recorded_draws(case):
    """The recorded draws, a list of each kind for every row: size, ratio and one number a slot, order."""
    draws, rest = [], list(case["draws"])
    for probability in case["p_mask"]:
        size = rest.pop(0)[1]
        while rest[0][0] == "random":
            rest.pop(0)
        draws.append(SlotDraw(size, probability, rest.pop(0)[2]))
    return draws


@pytest.mark.parametrize("name", CASES)
def test_a_recorded_batch_has_its_order_its_loss_and_its_gradients(name):
    case = CASES[name]
    found = load_file(GOLDEN / "refusion" / "training.safetensors")
    tensors = {key.split("/")[1]: value.long() for key, value in found.items() if key.startswith(f"{name}/")}
    rows = in_slots(tensors["input_ids"], case["prompt_lengths"], case["answer_lengths"], recorded_draws(case), MASK)
    seen = tensors["attention_mask"].bool()
    assert torch.equal(rows.input_ids[seen], tensors["out_input_ids"][seen])
    assert torch.equal(rows.order[seen], tensors["out_position_ids"][seen])
    assert torch.equal((rows.own_tokens != NOTHING)[seen], tensors["out_masked"].bool()[seen])
    model = load()
    logits = model(rows.input_ids, attention_mask=tensors["attention_mask"], position_ids=rows.order).logits
    following, own = slot_losses(logits, rows)
    loss = following + own.mean()
    if name == "train2":  # 0 / 0 there: no token predicts a next one
        assert case["loss"] == "nan" and following == 0 and loss.isfinite()
    else:
        assert following.item() == pytest.approx(case["ar_loss"], rel=1e-5)
        assert own.mean().item() == pytest.approx(case["mdm_loss"], rel=1e-5)
    loss.backward()
    largest = max(case["grad_norms"].values())
    for parameter, norm in case["grad_norms"].items():
        found = float(model.get_parameter(parameter).grad.norm())
        assert found == pytest.approx(norm, rel=1e-4, abs=1e-5 * largest)


def test_draws_are_of_every_size_and_of_every_number_of_masked_slots():
    draws = [draw_slots(70, generator_for(1, number), 1e-3) for number in range(400)]
    sizes = Counter(draw.size for draw in draws)
    assert set(sizes) == set(SIZES) and min(sizes.values()) > 60
    assert all(1e-3 <= draw.probability <= 1 for draw in draws)
    assert all(sorted(set(draw.clean)) == sorted(draw.clean) for draw in draws)
    of_four = [draw for draw in draws if draw.size == 4]
    assert any(draw.clean != sorted(draw.clean) for draw in of_four)
    masked = sum(1 - len(draw.clean) / 18 for draw in of_four) / len(of_four)
    assert 0.4 < masked < 0.6  # as the probabilities are on average
    assert draw_slots(70, generator_for(1, 0), 1e-3) == draws[0]


def data():
    return Dataset.from_list(
        [{"prompt_ids": [5, 6, 7 + row % 3], "response_ids": [*range(20 + row, 31 + row), 510]} for row in range(8)]
    )


def trainer(folder, model=None, peft_config=None, **more):
    arguments = {"response_length": 16, "supervise_eos_fill": False, "max_steps": 2, "use_cpu": True}
    arguments |= {"per_device_train_batch_size": 4, "report_to": "none", "logging_steps": 1, "disable_tqdm": True}
    return MaskedDiffusionSFTTrainer(
        model=load() if model is None else model,
        args=MaskedDiffusionSFTConfig(str(folder), **(arguments | more)),
        train_dataset=data(),
        eval_dataset=data(),
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
    )


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_trainer_trains_it_and_a_batch_may_be_padded(tmp_path):
    run = trainer(tmp_path, learning_rate=1e-2, max_steps=6)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before
    batch = run.data_collator([run.train_dataset[0], {"prompt_ids": [5], "response_ids": [9, 510]}])
    with torch.no_grad():
        loss, outputs = run.compute_loss(run.model.eval(), batch, return_outputs=True)
    assert loss.isfinite() and outputs.logits.shape[:2] == (2, 16)


@pytest.mark.parametrize(
    "more, rule",
    [
        (
            {"supervise_eos_fill": True},
            r"`supervise_eos_fill` must be False for a model .*\(got True",
        ),
        ({"suffix_mask_fraction": 0.5}, r"`suffix_mask_fraction` must be 0.0 for a model .*\(got 0.5\)"),
        ({"min_mask_ratio": 0.1}, r"`min_mask_ratio` must be 0.0"),
        ({"stratified_mask_ratio": True}, r"`stratified_mask_ratio` must be False"),
        ({"label_shift": 1}, r"`label_shift` must be None"),
    ],
)
def test_what_its_objective_does_not_have_is_refused(tmp_path, more, rule):
    with pytest.raises(ValueError, match=rule):
        trainer(tmp_path, **more)


def test_a_learnt_prompt_is_refused(tmp_path):
    learnt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="`peft_config` must leave `position_ids` to a model that decides slots"):
        trainer(tmp_path, peft_config=learnt)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_script_trains_a_checkpoint_that_was_saved_here(tmp_path):
    folder, rows = tmp_path / "model", tmp_path / "rows.jsonl"
    load().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    rows.write_text("".join(json.dumps({"prompt": f"{n} + 2?", "completion": str(n + 2)}) + "\n" for n in range(4)))
    run_sft.main(
        [
            "--model_name_or_path", str(folder), "--dataset_name", str(rows), "--output_dir", str(tmp_path / "out"),
            "--supervise_eos_fill", "False", "--response_length", "16", "--max_steps", "1", "--use_cpu",
            "--per_device_train_batch_size", "2", "--report_to", "none",
        ]
    )  # fmt: skip
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(trained) is ReFusionForCausalLM
