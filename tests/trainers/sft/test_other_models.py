"""The training script on architectures that are not ours: it trains them, and what it saves is theirs and decodes."""

import json
import shutil

import pytest
import torch
from official import tiny_tokenizer
from others import DECODERS, ENCODERS
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from d3llm_hf import as_diffusion_lm, encode_text
from trainers import run_sft
from trainers.sft.config import MaskedDiffusionSFTConfig
from trainers.sft.trainer import MaskedDiffusionSFTTrainer


BERT, ROBERTA, MODERNBERT = ENCODERS
QWEN2, QWEN3 = DECODERS
ARGUMENTS = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "max_prompt_length": 48,
    "response_length": 8,
    "learning_rate": 1e-2,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
}


def write_checkpoint(other, folder, tokenizer, **config):
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(1)  # a low one: RoBERTa's positions begin behind it
    tokens = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 1}
    other.tiny(max_position_embeddings=64, **(tokens | config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [{"prompt": "ab" * (1 + index), "completion": "xyz"} for index in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def train(folder, output, *extra):
    named = {"model_name_or_path": folder, "dataset_name": folder / "rows.jsonl", "output_dir": output} | ARGUMENTS
    run_sft.main([*(part for name, value in named.items() for part in (f"--{name}", str(value))), *extra])


@pytest.mark.every(8)
@pytest.mark.parametrize(
    ("other", "auto", "config", "extra"),
    [
        (MODERNBERT, AutoModelForMaskedLM, {}, []),
        (ROBERTA, AutoModelForMaskedLM, {}, []),
        (QWEN2, AutoModelForCausalLM, {}, []),
        (QWEN3, AutoModelForCausalLM, {"is_causal": None}, ["--bidirectional"]),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_stock_checkpoint_trains_saves_as_it_was_and_decodes(other, auto, config, extra, tmp_path):
    write_checkpoint(other, tmp_path / "in", tiny_tokenizer(), **config)
    train(tmp_path / "in", tmp_path / "out", *extra)
    tokenizer, stock = AutoTokenizer.from_pretrained(tmp_path / "out"), auto.from_pretrained(tmp_path / "out")
    assert type(stock) is other.model_class and stock.config.architectures == [other.name]
    before = auto.from_pretrained(tmp_path / "in").get_output_embeddings().weight
    assert not torch.equal(stock.get_output_embeddings().weight, before)
    model = as_diffusion_lm(stock)
    assert (model.config.mask_token_id, model.logit_shift) == (tokenizer.mask_token_id, other.shift)
    prompt = encode_text(tokenizer, "abab")
    output = model.generate(**prompt, max_new_tokens=8, early_stop=False)
    assert output.shape == (1, prompt["input_ids"].shape[1] + 8) and (output != tokenizer.mask_token_id).all()


@pytest.mark.full
def test_a_resumed_run_of_a_stock_model_is_equal_to_an_unbroken_one(tmp_path):
    write_checkpoint(QWEN2, tmp_path / "in", tiny_tokenizer())
    train(tmp_path / "in", tmp_path / "whole", "--save_steps", "2")
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    train(tmp_path / "in", tmp_path / "resumed", "--resume_from_checkpoint", "last")
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_a_separator_ends_an_answer_where_a_tokenizer_has_no_end_of_text(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token, tokenizer.sep_token = None, "<|turn|>"
    tokenizer.save_pretrained(tmp_path)
    loaded = run_sft.load_tokenizer(run_sft.SFTScriptArguments(tokenizer_name_or_path=str(tmp_path)))
    assert loaded.eos_token == "<|turn|>"


@pytest.mark.parametrize(
    ("other", "config", "mask_token", "message"),
    [
        (QWEN2, {"is_causal": None}, "<|mask|>", "Attention must not be causal"),
        (QWEN2, {}, None, "`mask_token_id` must name the token of an undecided position"),
    ],
    ids=["causal attention", "no mask token"],
)
def test_a_checkpoint_that_cannot_be_decoded_is_refused_before_training(other, config, mask_token, message, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.mask_token = mask_token
    write_checkpoint(other, tmp_path, tokenizer, **config)
    with pytest.raises(ValueError, match=message):
        train(tmp_path, tmp_path / "out")


@pytest.mark.every(3)
@pytest.mark.parametrize("other", [BERT, ROBERTA, MODERNBERT, QWEN2, QWEN3], ids=lambda other: other.name)
def test_a_padded_row_is_trained_as_the_row_alone(other, tmp_path):
    tokenizer = tiny_tokenizer()
    model = other.tiny(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    model = as_diffusion_lm(model, mask_token_id=tokenizer.mask_token_id)
    arguments = MaskedDiffusionSFTConfig(str(tmp_path), use_cpu=True, report_to="none")
    trainer = MaskedDiffusionSFTTrainer(model, arguments, processing_class=tokenizer)
    answer = torch.tensor([[23, 24, 25, 26]])
    ids = torch.cat([torch.tensor([[21, 22]]), answer], dim=1)
    losses = []
    for padding in (0, 5):
        row = {
            "input_ids": torch.nn.functional.pad(ids, (padding, 0)),
            "attention_mask": torch.nn.functional.pad(torch.ones_like(ids), (padding, 0)),
            "labels": answer,
            "content_lengths": torch.tensor([4]),
        }
        trainer._draw_key = None  # the same masks again
        losses.append(trainer.compute_loss(model, row).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0] > 0


def test_padding_that_a_forward_does_not_read_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    model = BERT.tiny(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    model = as_diffusion_lm(model, mask_token_id=tokenizer.mask_token_id)
    model.supports_padding = False
    arguments = MaskedDiffusionSFTConfig(str(tmp_path), use_cpu=True, report_to="none")
    trainer = MaskedDiffusionSFTTrainer(model, arguments, processing_class=tokenizer)
    ids, seen = torch.tensor([[0, 21, 22, 23]]), torch.tensor([[0, 1, 1, 1]])
    with pytest.raises(ValueError, match="`model` must leave out what `attention_mask` names"):
        trainer._model_inputs(ids, seen, 0)
    assert "input_ids" in trainer._model_inputs(ids, torch.ones_like(ids), 0)
