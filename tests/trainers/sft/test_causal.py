"""The objective of causal models: next tokens of the answers alone, as transformers computes them, and as a run."""

import json
import math
import sys
from types import SimpleNamespace

import joined_runs
import pytest
import torch
from block_tuning import TOKENIZER, block_trainer
from causal import causal_model, plain_greedy
from datasets import Dataset
from distillation import ARGUMENTS, RESPONSE, rows, student
from others import ENCODERS
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from d3llm_hf import encode_chat
from d3llm_hf.autoregressive.generate import generate
from d3llm_hf.hub.loading import load_causal
from trainers import run_sft
from trainers.sft.causal import CausalSFTCollator, kept_columns, next_token_loss


SIZES = {"vocab_size": len(TOKENIZER), "eos_token_id": TOKENIZER.eos_token_id, "max_position_embeddings": 64}
SHAPE = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 160,
}
OBJECTIVE = {"objective": "causal", "supervise_eos_fill": False}


def trainer_of(folder, model=None, **arguments):
    return block_trainer(folder, causal_model(**SIZES) if model is None else model, **(OBJECTIVE | arguments))


def run(folder, **arguments):
    """The script on generated problems."""
    values = {name: value for name, value in ARGUMENTS.items() if name != "window_sizes"} | OBJECTIVE
    values |= {"max_prompt_length": 96, "response_length": 64, "num_problems": 16, "num_eval_problems": 4}
    values |= {"model_config": json.dumps(SHAPE), "tokenizer_name_or_path": "d3llm-llada", "output_dir": folder}
    values |= arguments
    run_sft.main([part for name, value in values.items() if value is not None for part in (f"--{name}", str(value))])


# ---- the loss ------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_one_computed_by_hand():
    """Of four tokens to learn three cost log 4, where nothing is known, and one log 4/3, whose logit is log 9."""
    labels = torch.tensor([[-100, -100, 2, 3], [-100, 1, 3, -100]])
    logits = torch.zeros(2, 4, 4)
    logits[0, 2, 3] = math.log(9)  # 9 against 1, 1, 1: -log 9/12
    logits[1, 2] = torch.tensor([9.0, 9.0, 9.0, -9.0])  # predicts what is not learnt
    logits[0, 0] = torch.tensor([5.0, -5.0, 1.0, 2.0])  # and so does this
    expected = (3 * math.log(4) + math.log(4 / 3)) / 4
    assert next_token_loss(logits, labels).item() == pytest.approx(expected, rel=1e-6)
    assert kept_columns(labels) == 4 and kept_columns(labels[:1]) == 3
    assert next_token_loss(logits[:1, -3:], labels[:1]).item() == pytest.approx(
        (math.log(4) + math.log(4 / 3)) / 2, rel=1e-6
    )
    nothing = torch.tensor([[3, -100]])  # of an answer without a prompt the first token has no row before it
    assert next_token_loss(torch.zeros(1, 2, 4), nothing).item() == 0 and kept_columns(nothing) == 2


@pytest.mark.parametrize("static", [False, True])
def test_a_batch_has_the_loss_of_transformers_and_of_its_rows_alone(static, tmp_path):
    trainer = trainer_of(tmp_path, pad_prompt_to_max=static)
    samples = rows(5)
    batch = trainer.data_collator(samples)
    longest = max(len(sample["prompt_ids"] + sample["response_ids"]) for sample in samples)
    assert batch["input_ids"].shape == (5, 8 + RESPONSE if static else longest)
    model = trainer.model.eval()
    with torch.no_grad():
        found = trainer.compute_loss(model, batch).item()
        assert found == pytest.approx(model(**batch).loss.item(), rel=1e-5)
        summed = count = 0
        for sample in samples:
            ids = torch.tensor([sample["prompt_ids"] + sample["response_ids"]])
            logits = model(ids).logits[0, len(sample["prompt_ids"]) - 1 : -1].log_softmax(-1)
            summed -= logits.gather(1, torch.tensor(sample["response_ids"])[:, None]).sum().item()
            count += len(sample["response_ids"])
    assert found == pytest.approx(summed / count, rel=1e-5)


def test_a_row_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match=r"must fit a row of 2 tokens \(got 3\)"):
        CausalSFTCollator(0, row_length=2)([{"prompt_ids": [5, 6], "response_ids": [7]}])


# ---- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"min_mask_ratio": 0.1},
        {"mask_ratio_eps": 0.1},
        {"stratified_mask_ratio": True},
        {"suffix_mask_fraction": 0.5},
        {"suffix_window": 4},
        {"mask_ratio_per_block": True},
        {"complementary_masks": True},
        {"block_length": 4},
        {"label_shift": 1},
        {"packing": True},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_settings_of_masks_are_refused(tmp_path, arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=rf"`{name}` has no effect with `objective='causal'`"):
        trainer_of(tmp_path, **arguments)


def test_a_fill_a_model_that_sees_everything_and_a_foreign_tokenizer_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`supervise_eos_fill` must be False with `objective='causal'` \(got True\)"):
        trainer_of(tmp_path, supervise_eos_fill=True)
    for model in (student(TOKENIZER), ENCODERS[0].tiny()):
        with pytest.raises(ValueError, match=rf"`objective` must be another one for {type(model).__name__}"):
            trainer_of(tmp_path, model)
    with pytest.raises(ValueError, match=r"`pad_token_id` must lie inside the vocabulary of 32 tokens"):
        trainer_of(tmp_path, causal_model())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bidirectional": True}, "`bidirectional` must be unset with `objective='causal'`"),
        ({"into": "sdar"}, "`into` must be unset with `objective='causal'`"),
    ],
)
def test_other_forms_of_a_checkpoint_are_refused(arguments, message):
    script_args = run_sft.SFTScriptArguments(model_name_or_path="x", **arguments)
    with pytest.raises(ValueError, match=message):
        run_sft.check_conversion(script_args, SimpleNamespace(objective="causal", fsdp=[], deepspeed=None))


@pytest.mark.parametrize("kind", ["lama", pytest.param("vit", marks=pytest.mark.full), None])
def test_a_shape_of_no_causal_model_is_refused(kind):
    shape = {"model_type": kind}
    with pytest.raises(ValueError, match="`model_config` must name a model type of which transformers makes a causal"):
        run_sft.load_causal_model(run_sft.SFTScriptArguments(model_config=json.dumps(shape)), TOKENIZER)


def test_a_causal_shape_says_what_it_needs_and_one_source_is_named():
    shape = run_sft.SFTScriptArguments(model_config=json.dumps(SHAPE))
    with pytest.raises(ValueError, match=r"got 'llama'\). Add `model_type`, or set `objective: causal`"):
        run_sft.load_model(shape, TOKENIZER)
    with pytest.raises(ValueError, match="Exactly one of `model_name_or_path` and `model_config`"):
        run_sft.load_causal_model(run_sft.SFTScriptArguments(), TOKENIZER)


# ---- runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.full
def test_a_run_learns_and_a_resumed_one_is_the_unbroken_one(tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 2}
    unbroken = trainer_of(tmp_path / "a", **saved)
    before = {name: weight.clone() for name, weight in unbroken.model.state_dict().items()}
    unbroken.train()
    losses = [entry["loss"] for entry in unbroken.state.log_history if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0]
    resumed = trainer_of(tmp_path / "b", **saved)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for name, weight in unbroken.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]) and not torch.equal(weight, before[name]), name


def test_the_script_makes_a_folder_that_transformers_and_the_sweeps_loader_decode_alike(tmp_path):
    run(tmp_path, max_steps=2, save_dtype="bfloat16")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ends = stock.generation_config.eos_token_id
    assert type(stock).__name__ == "LlamaForCausalLM" and stock.dtype is torch.bfloat16
    assert tokenizer.convert_ids_to_tokens(ends) == ["<|endoftext|>", "<|eot_id|>"]  # an answer's end is a stop
    model, _ = load_causal(str(tmp_path), device="cpu", dtype="float32")
    inputs = encode_chat(tokenizer, [{"role": "user", "content": "Tom has 8 apples."}])
    written = stock.float().generate(**inputs, max_new_tokens=6, do_sample=False)
    assert torch.equal(generate(model, **inputs, max_new_tokens=6).sequences, written)
    prompt = inputs["input_ids"][0].tolist()
    assert written[0].tolist() == prompt + plain_greedy(model, prompt, 6, tuple(ends))


@pytest.mark.full
def test_a_checkpoint_trains_on_with_an_adapter_and_is_evaluated(tmp_path):
    run(tmp_path / "first", max_steps=1)
    more = {"model_config": None, "model_name_or_path": tmp_path / "first", "eval_strategy": "steps", "eval_steps": 1}
    run(tmp_path / "second", max_steps=1, use_peft=True, lora_r=2, **more)
    state = json.loads((tmp_path / "second" / "adapter_config.json").read_text(encoding="utf-8"))
    assert state["r"] == 2
    run(tmp_path / "third", max_steps=1, **more)
    stops = AutoModelForCausalLM.from_pretrained(tmp_path / "third").generation_config.eos_token_id
    assert len(stops) == len(set(stops)) == 2


@pytest.mark.full
def test_an_adapter_learns_and_the_base_stays(tmp_path):
    adapter = {"peft_config": LoraConfig(r=2, target_modules="all-linear")}
    trainer = block_trainer(tmp_path, causal_model(**SIZES), given=adapter, **OBJECTIVE)
    before = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    trainer.train()
    for name, weight in trainer.model.state_dict().items():
        assert torch.equal(weight, before[name]) != ("lora_" in name), name


def test_a_card_calls_it_no_diffusion_model(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.create_model_card(model_name="twin")
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: text-generation" in card and "diffusion" not in card.split("---")[1]


@pytest.mark.full
@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_two_processes_have_the_losses_of_one(tmp_path):
    """Answers of one length: each process takes the mean of its own tokens."""
    texts = torch.randint(5, 20, (16, 12), generator=torch.Generator().manual_seed(0)).tolist()
    samples = [{"prompt_ids": text[:4], "response_ids": text[4:]} for text in texts]
    Dataset.from_list(samples).to_parquet(tmp_path / "rows.parquet")
    causal_model(**SIZES).save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    shared = {name: value for name, value in ARGUMENTS.items() if name != "window_sizes"} | OBJECTIVE
    shared |= {"model_name_or_path": tmp_path / "model", "dataset_name": tmp_path / "rows.parquet"}
    shared |= {"learning_rate": 1e-3}

    def joined(name, processes):
        values = shared | {"per_device_train_batch_size": 4 // processes, "output_dir": tmp_path / name}
        arguments = [part for key, value in values.items() for part in (f"--{key}", str(value))]
        return {
            "script": "sft",
            "processes": processes,
            "arguments": arguments,
            "told": str(tmp_path / f"{name}.json"),
        }

    joined_runs.run_in_process([joined("one", 1), joined("two", 2)])
    told = {name: json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8")) for name in ("one", "two")}
    losses = {name: [entry["loss"] for entry in told[name]["log"] if "loss" in entry] for name in told}
    assert told["two"]["processes"] == 2 and len(losses["one"]) == 4
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-4)
    weights = {name: load_file(tmp_path / name / "model.safetensors") for name in told}
    for name, tensor in weights["one"].items():
        assert (weights["two"][name] - tensor).abs().max() <= 1e-3 * tensor.abs().max(), name
