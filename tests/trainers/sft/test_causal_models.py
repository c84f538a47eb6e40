"""The training script on causal checkpoints, `--into` a block-causal model: folders that load, decode and export."""

import json
from types import SimpleNamespace

import pytest
import torch
from distillation import student
from official import tiny_tokenizer
from others import ENCODERS, QWEN, Other
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from d3llm_hf import D3LLMGenerationMixin, Fast_dLLM_QwenForCausalLM, SDARForCausalLM, encode_text, export_checkpoint
from d3llm_hf.hub.loading import load
from d3llm_hf.models.topology import Topology
from trainers import run_sft
from trainers.sft.config import MaskedDiffusionSFTConfig


CAUSAL = QWEN | {"is_causal": None}
QWEN2 = Other("Qwen2ForCausalLM", 1, CAUSAL)
QWEN3 = Other("Qwen3ForCausalLM", 1, CAUSAL | {"head_dim": 8})
LLAMA = Other("LlamaForCausalLM", 1, CAUSAL)
ARGUMENTS = {
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "max_prompt_length": 24,
    "response_length": 8,
    "learning_rate": 1e-2,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
}


def write_causal(other, folder, **config):
    """A causal checkpoint without a mask token, and rows to learn."""
    tokenizer = tiny_tokenizer()
    tokenizer.mask_token = None
    tokens = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 510}
    other.tiny(**(tokens | config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [{"prompt": "ab" * (1 + index), "completion": "xyz"} for index in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def train(folder, output, *extra):
    named = {"model_name_or_path": folder, "dataset_name": folder / "rows.jsonl", "output_dir": output} | ARGUMENTS
    run_sft.main([*(part for name, value in named.items() for part in (f"--{name}", str(value))), *extra])


@pytest.mark.every(16)
@pytest.mark.parametrize(
    ("other", "into", "family", "extra"),
    [
        (QWEN2, "fast_dllm_v2", Fast_dLLM_QwenForCausalLM, ["--packing"]),
        (QWEN3, "sdar", SDARForCausalLM, []),
        (LLAMA, "fast_dllm_v2", Fast_dLLM_QwenForCausalLM, ["--use_peft", "--lora_r", "2"]),
        (QWEN3, "fast_dllm_v2", Fast_dLLM_QwenForCausalLM, []),
        (LLAMA, "sdar", SDARForCausalLM, []),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_causal_checkpoint_becomes_a_folder_that_decodes(other, into, family, extra, tmp_path):
    write_causal(other, tmp_path / "in")
    train(tmp_path / "in", tmp_path / "out", "--into", into, "--block_length", "4", *extra)
    model, tokenizer = load(str(tmp_path / "out"), device="cpu")
    assert isinstance(model, D3LLMGenerationMixin) and (family is None or type(model) is family)
    mask = tokenizer.mask_token_id  # the last one: a tokenizer class may add others of its own before it
    assert model.config.mask_token_id == mask == len(tokenizer) - 1
    assert model.traits.topology.block_length == 4 and model.generation_config.decoding_method == into
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "in").model.layers[0].mlp.up_proj.weight
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before)
    prompt = encode_text(tokenizer, "abab")
    written = model.generate(**prompt, max_new_tokens=8, early_stop=False)
    assert (written != mask).all()
    if family is not None:
        exported = export_checkpoint(tmp_path / "out", tmp_path / "exported")
        again = AutoModelForCausalLM.from_pretrained(exported)
        assert torch.equal(again.generate(**prompt, max_new_tokens=8, early_stop=False), written)
        assert AutoTokenizer.from_pretrained(exported).mask_token_id == mask


@pytest.mark.full
def test_a_converted_checkpoint_trains_on_as_it_is(tmp_path):
    write_causal(LLAMA, tmp_path / "in")
    train(tmp_path / "in", tmp_path / "first", "--into", "sdar")
    (tmp_path / "first" / "rows.jsonl").write_bytes((tmp_path / "in" / "rows.jsonl").read_bytes())
    train(tmp_path / "first", tmp_path / "second", "--packing")
    assert load(str(tmp_path / "second"), device="cpu")[0].traits.topology.block_length == 4


@pytest.mark.parametrize("into", ["fast_dllm_v2", "sdar", None])
def test_unset_views_and_ratios_are_those_of_the_form(into, tmp_path):
    args = MaskedDiffusionSFTConfig(str(tmp_path), use_cpu=True, report_to="none")
    run_sft.train_as_its_family(args, into)
    wanted = True if into == "fast_dllm_v2" else None
    assert (args.complementary_masks, args.mask_ratio_per_block) == (wanted, wanted)
    args.complementary_masks = args.mask_ratio_per_block = False
    run_sft.train_as_its_family(args, into)
    assert not args.complementary_masks and not args.mask_ratio_per_block


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"into": "sdar"}, "`into` must be unset without `model_name_or_path`"),
        ({"gguf_file": "a.gguf"}, "`gguf_file` must be unset without `model_name_or_path`"),
        ({"block_alignment": "text"}, "`block_alignment` must be unset without `model_name_or_path`"),
        (
            {"model_name_or_path": "x", "block_alignment": "text"},
            "`block_length` must be set beside `block_alignment`",
        ),
        (
            {"model_name_or_path": "x", "into": "sdar", "block_alignment": "text"},
            "`block_alignment` must be unset beside `into`",
        ),
        ({"model_name_or_path": "x", "into": "sdar", "bidirectional": True}, "`bidirectional` must be unset beside"),
        ({"model_name_or_path": "x", "into": "sdar", "use_peft": True}, "`use_peft` must be unset beside `into`"),
    ],
)
def test_arguments_without_effect_are_refused(arguments, message):
    script_args = run_sft.SFTScriptArguments(**arguments)
    with pytest.raises(ValueError, match=message):
        run_sft.check_conversion(
            script_args,
            SimpleNamespace(objective="masked_diffusion", fsdp=["full_shard"], deepspeed=None, block_length=None),
        )


def test_a_gguf_is_named_beside_its_folder(tmp_path):
    write_causal(LLAMA, tmp_path / "in")
    (tmp_path / "in" / "model.gguf").write_bytes(b"GGUF")
    file = tmp_path / "in" / "model.gguf"
    with pytest.raises(ValueError, match=r"must be a folder .*--gguf_file model.gguf"):
        run_sft.main(["--model_name_or_path", str(file), "--output_dir", str(tmp_path / "out"), "--use_cpu"])
    with pytest.raises(FileNotFoundError, match=r"`gguf_file` must be a file of the checkpoint's folder"):
        train(tmp_path / "in", tmp_path / "out", "--gguf_file", "other.gguf")


def test_weights_of_a_gguf_are_unpacked(tmp_path, monkeypatch):
    """Of what transformers is asked for; reading such a file takes the package `gguf`."""
    write_causal(LLAMA, tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    asked = []

    def of_the_folder(load):
        def from_pretrained(name, gguf_file=None, quantization_config=None, **kwargs):
            if gguf_file is not None:  # they ask one another, too
                asked.append((gguf_file, getattr(quantization_config, "dequantize", None)))
            return load(name, **kwargs)

        return from_pretrained

    for auto in (AutoConfig, AutoModelForCausalLM, AutoTokenizer):
        monkeypatch.setattr(auto, "from_pretrained", of_the_folder(auto.from_pretrained))
    script_args = run_sft.SFTScriptArguments(
        model_name_or_path=str(tmp_path), gguf_file="model.gguf", into="fast_dllm_v2"
    )
    model = run_sft.load_model(script_args, run_sft.load_tokenizer(script_args), 8)
    assert type(model) is Fast_dLLM_QwenForCausalLM and model.config.block_length == 8
    assert asked == [("model.gguf", None), ("model.gguf", None), ("model.gguf", True)]
    monkeypatch.setattr("transformers.GgufConfig", None, raising=False)  # of an older one, which always unpacks
    run_sft.load_model(script_args, run_sft.load_tokenizer(script_args), 8)
    assert asked[3:] == [("model.gguf", None)] * 3


@pytest.mark.full
@pytest.mark.parametrize("alignment", ["prompt", "text"])
def test_a_bidirectional_llada_becomes_block_causal(alignment, tmp_path):
    write_causal(QWEN2, tmp_path / "qwen2")
    folder, tokenizer = tmp_path / "llada", tiny_tokenizer()
    student(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "rows.jsonl").write_bytes((tmp_path / "qwen2" / "rows.jsonl").read_bytes())
    blocks = ["--block_length", "4", "--block_alignment", alignment]
    train(folder, tmp_path / "out", *blocks, "--mask_ratio_per_block", "true")
    model = load(str(tmp_path / "out"), device="cpu")[0]
    assert model.traits.topology == Topology(4, alignment)
    written = model.generate(**encode_text(tokenizer, "abab"), max_new_tokens=8, early_stop=False)
    assert (written != tokenizer.mask_token_id).all()
    with pytest.raises(ValueError, match=r"`block_alignment` must be unset for qwen2 \(got"):
        train(tmp_path / "qwen2", tmp_path / "out", *blocks)


def test_an_encoder_or_an_unknown_form_is_refused_before_training(tmp_path):
    write_causal(ENCODERS[0], tmp_path / "bert", is_causal=None)
    with pytest.raises(ValueError, match=r"must be a causal model, a decoder .*got BertForMaskedLM"):
        train(tmp_path / "bert", tmp_path / "out", "--into", "sdar")
    write_causal(QWEN2, tmp_path / "qwen2")
    with pytest.raises(ValueError, match="`into` must be one of"):
        train(tmp_path / "qwen2", tmp_path / "out", "--into", "bd3lm")
