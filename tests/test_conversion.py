"""`block_causal_lm`: causal models as Fast-dLLM v2 or SDAR, with the forward they had, in folders that are known."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from official import tiny_tokenizer
from others import ENCODERS, QWEN, Other
from transformers import AutoModelForCausalLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

from d3llm_hf import Fast_dLLM_QwenForCausalLM, SDARForCausalLM, as_diffusion_lm, block_causal_lm, export_checkpoint
from d3llm_hf.conversion import MASK_TOKEN
from d3llm_hf.evaluation.harness.loading import load_checkpoint
from d3llm_hf.hub.loading import load
from d3llm_hf.hub.push import checked_files


CAUSAL = QWEN | {"is_causal": None}
QWEN2 = Other("Qwen2ForCausalLM", 1, CAUSAL)
QWEN3 = Other("Qwen3ForCausalLM", 1, CAUSAL | {"head_dim": 8})
LLAMA = Other("LlamaForCausalLM", 1, CAUSAL)
CASES = {
    "Qwen2 as SDAR": (QWEN2, "sdar", SDARForCausalLM, {}),
    "Qwen2 as Fast-dLLM v2": (QWEN2, "fast_dllm_v2", Fast_dLLM_QwenForCausalLM, {}),
    "tied Qwen2 as Fast-dLLM v2": (QWEN2, "fast_dllm_v2", Fast_dLLM_QwenForCausalLM, {"tie_word_embeddings": True}),
    "Qwen3 as Fast-dLLM v2": (QWEN3, "fast_dllm_v2", Fast_dLLM_QwenForCausalLM, {"tie_word_embeddings": True}),
    "Qwen3 as SDAR": (QWEN3, "sdar", SDARForCausalLM, {}),
    "Llama as Fast-dLLM v2": (LLAMA, "fast_dllm_v2", Fast_dLLM_QwenForCausalLM, {"head_dim": 8}),
    "Llama with biases as Fast-dLLM v2": (LLAMA, "fast_dllm_v2", None, {"attention_bias": True}),
    "Llama as SDAR": (LLAMA, "sdar", SDARForCausalLM, {}),
    "Llama with biases as SDAR": (LLAMA, "sdar", SDARForCausalLM, {"attention_bias": True}),
    "Qwen3 with biases as SDAR": (QWEN3, "sdar", SDARForCausalLM, {"attention_bias": True}),
    "Qwen3 with biases as Fast-dLLM v2": (QWEN3, "fast_dllm_v2", None, {"attention_bias": True}),
    "Llama with biases in its MLP as SDAR": (LLAMA, "sdar", None, {"mlp_bias": True}),
}
OF_A_FAMILY = [name for name, case in CASES.items() if case[2] is not None]
STOCK = [name for name, case in CASES.items() if case[2] is None]


def tokenizer_without_mask():
    tokenizer = tiny_tokenizer()
    tokenizer.mask_token = None
    return tokenizer


def causal(other, rows=512, **config):
    """A stock model whose table has a row for each token of the tokenizer, and biases and norms that matter."""
    model = other.tiny(**({"vocab_size": rows, "eos_token_id": 510, "pad_token_id": 510} | config))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name)))
                weight.copy_(drawn if name.endswith("bias") else 1 + drawn / 4)
    return model


def converted(case, tokenizer=None, block_length=4):
    other, into, _, config = CASES[case]
    return block_causal_lm(
        causal(other, **config), tokenizer or tokenizer_without_mask(), into, block_length=block_length
    )


def decode(model, **settings):
    prompt = torch.tensor([[65, 66, 67, 68, 69]])
    return model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=7, early_stop=False, **settings
    )


@pytest.mark.every(3)
@pytest.mark.parametrize("case", CASES)
def test_the_forward_over_a_mask_of_blocks_is_the_stock_models(case):
    other, into, family, config = CASES[case]
    stock = causal(other, **config)
    place = torch.arange(10) // 4
    inputs = {
        "input_ids": torch.arange(65, 75)[None],
        "attention_mask": (place[:, None] >= place)[None, None],
        "position_ids": torch.arange(10)[None],
    }
    with torch.no_grad():
        before = stock(**inputs).logits
        model = block_causal_lm(copy.deepcopy(stock), tokenizer_without_mask(), into, block_length=4)
        after = model(**inputs).logits
    assert type(model) is family or (family is None and type(model).__name__ == other.name)
    assert (model.logit_shift, model.config.block_length) == ({"fast_dllm_v2": 1, "sdar": 0}[into], 4)
    assert model.traits.topology.block_length == 4 and not model.training
    assert (after[..., :512] - before).abs().max() <= 1e-5 * before.abs().max()


@pytest.mark.parametrize("case", ["tied Qwen2 as Fast-dLLM v2", "Qwen3 as SDAR", "Llama with biases as Fast-dLLM v2"])
@pytest.mark.parametrize("rows", [512, 520])
def test_a_new_row_is_the_mean_of_those_that_had_a_token(case, rows):
    other, into, _, config = CASES[case]
    stock, tokenizer = causal(other, rows=rows, **config), tokenizer_without_mask()
    tables = [stock.get_input_embeddings().weight, stock.get_output_embeddings().weight]
    means = [table[:512].detach().mean(0) for table in tables]
    model = block_causal_lm(stock, tokenizer, into)
    assert (tokenizer.mask_token, tokenizer.mask_token_id, model.config.mask_token_id) == (MASK_TOKEN, 512, 512)
    new = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    assert (new[0] is new[1]) == bool(config.get("tie_word_embeddings"))
    for table, mean in zip(new, means, strict=True):
        assert len(table) == max(rows, 513)
        torch.testing.assert_close(table[512].detach(), mean)


def test_a_mask_token_that_is_there_keeps_its_row():
    stock, tokenizer = causal(QWEN2), tiny_tokenizer()
    row = stock.get_input_embeddings().weight[511].detach().clone()
    model = block_causal_lm(stock, tokenizer)
    assert (model.config.mask_token_id, len(tokenizer), model.config.vocab_size) == (511, 512, 512)
    assert torch.equal(model.get_input_embeddings().weight[511], row)


def test_tokens_without_a_row_get_one():
    stock, tokenizer = causal(LLAMA, rows=500, eos_token_id=7, pad_token_id=7), tiny_tokenizer()
    mean = stock.get_input_embeddings().weight.detach().mean(0)
    model = block_causal_lm(stock, tokenizer, "sdar")
    assert model.config.vocab_size == 512
    torch.testing.assert_close(model.get_input_embeddings().weight[500:].detach(), mean.expand(12, -1))


def test_blocks_are_those_of_the_family_unless_given_and_sampling_is_not_taken_over():
    stock = causal(QWEN2)
    stock.generation_config.update(do_sample=True, temperature=0.7, eos_token_id=[510, 509])
    model = block_causal_lm(stock, tiny_tokenizer())
    settings = model.generation_config
    assert (model.config.bd_size, settings.sub_block_length, settings.decoding_method) == (32, None, "fast_dllm_v2")
    assert (settings.do_sample, settings.temperature, settings.eos_token_id) == (False, None, [510, 509])
    assert block_causal_lm(causal(QWEN3), tiny_tokenizer(), "sdar").config.block_size == 4


@pytest.mark.every(16)
@pytest.mark.parametrize("case", OF_A_FAMILY)
def test_a_folder_of_a_family_loads_generates_and_is_exported(case, tmp_path):
    tokenizer = tokenizer_without_mask()
    model = converted(case, tokenizer)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    written = decode(model)
    assert (written != tokenizer.mask_token_id).all()
    exported = export_checkpoint(tmp_path / "saved", tmp_path / "exported")
    for folder in (tmp_path / "saved", exported):
        again = AutoModelForCausalLM.from_pretrained(folder)
        assert type(again) is CASES[case][2] and torch.equal(decode(again), written)
        assert AutoTokenizer.from_pretrained(folder).mask_token_id == again.config.mask_token_id == 512
    assert torch.equal(decode(load(str(exported), device="cpu")[0]), written)


@pytest.mark.every(8)
@pytest.mark.parametrize("case", STOCK)
def test_a_folder_of_a_stock_class_is_known_by_its_config(case, tmp_path):
    tokenizer = tokenizer_without_mask()
    model = converted(case, tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    written = decode(model)
    loaded = [load(str(tmp_path), device="cpu")[0], load_checkpoint(str(tmp_path), device="cpu")[0]]
    for again in [*loaded, as_diffusion_lm(AutoModelForCausalLM.from_pretrained(tmp_path))]:
        assert again.traits == model.traits and torch.equal(decode(again), written)
    with pytest.raises(
        ValueError, match=r"a class of transformers that `as_diffusion_lm` saved.* share the folder.*`block_causal_lm`"
    ):
        export_checkpoint(tmp_path, tmp_path / "exported")
    with pytest.raises(ValueError, match=r"needs: code of its own, .*`block_causal_lm` makes .*`model.push_to_hub`"):
        checked_files(tmp_path)


@pytest.mark.full
def test_a_folder_of_a_stock_class_becomes_one_of_a_family(tmp_path):
    """As earlier versions made them of a Qwen3 in the form of Fast-dLLM v2."""
    tokenizer, stock = tiny_tokenizer(), causal(QWEN3)
    model = as_diffusion_lm(stock, mask_token_id=tokenizer.mask_token_id, logit_shift=1, block_length=4)
    written = decode(model, decoding_method="fast_dllm_v2", sub_block_length=4)
    model.save_pretrained(tmp_path)
    again = block_causal_lm(AutoModelForCausalLM.from_pretrained(tmp_path), tokenizer, block_length=4)
    assert type(again) is Fast_dLLM_QwenForCausalLM
    assert torch.equal(decode(again, sub_block_length=4), written)


WITHOUT_THE_PACKAGE = """
import sys
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = torch.tensor([[65, 66, 67, 68, 69]])
written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=7, early_stop=False)
assert "d3llm_hf" not in sys.modules
print(type(model).__module__.split(".")[0], written.tolist())
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", ["Qwen3 as Fast-dLLM v2", "Llama as SDAR"])
def test_an_exported_folder_needs_no_package(case, tmp_path):
    tokenizer = tokenizer_without_mask()
    model = converted(case, tokenizer)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    exported = export_checkpoint(tmp_path / "saved", tmp_path / "exported")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_THE_PACKAGE, str(exported)],
        cwd=tmp_path,
        env=environment | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == f"transformers_modules {decode(model).tolist()}"


def quantised():
    model = causal(QWEN2)
    model.config.quantization_config = {"quant_method": "fp8"}
    return model


def naming(**tokens):
    """A model whose config names tokens."""
    model = causal(QWEN2)
    for name, value in tokens.items():
        setattr(model.config, name, value)
    return model


def ended_by_its_mask():
    model = causal(QWEN2)
    model.generation_config.eos_token_id = [510, 511]
    return model


def padded_by_its_mask():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.mask_token
    return tokenizer


def t5():
    return T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))


WINDOWS = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
REFUSED = {
    "another form": (lambda: causal(QWEN2), tiny_tokenizer, {"into": "bd3lm"}, "`into` must be one of .*got 'bd3lm'"),
    "no tokens": (lambda: causal(QWEN2), tiny_tokenizer, {"block_length": 0}, "`block_length` must be .*got 0"),
    "not a number": (lambda: causal(QWEN2), tiny_tokenizer, {"block_length": True}, "`block_length` must .*got True"),
    "an encoder": (lambda: ENCODERS[0].tiny(), tiny_tokenizer, {}, "must be a causal model, .*got BertForMaskedLM"),
    "an encoder-decoder": (t5, tiny_tokenizer, {}, "must be a causal model, .*got T5ForConditionalGeneration"),
    "windows": (
        lambda: causal(QWEN2, **WINDOWS),
        tiny_tokenizer,
        {},
        "all earlier tokens .got Qwen2.*without windows",
    ),
    "quantised weights": (quantised, tiny_tokenizer, {}, "must not be quantised .got Qwen2ForCausalLM"),
    "a diffusion LM": (lambda: converted("Qwen3 as SDAR"), tiny_tokenizer, {}, "decodes by diffusion already"),
    "another mask in the config": (
        lambda: naming(mask_token_id=3),
        tiny_tokenizer,
        {},
        r"mask token that the model's config names .got 511, and 3 in config.json",
    ),
    "a mask in the config alone": (lambda: naming(mask_token_id=3), tokenizer_without_mask, {}, "got None, and 3 in"),
    "a mask that pads": (
        lambda: causal(QWEN2),
        padded_by_its_mask,
        {},
        "mask token of its own .got '<.mask.>', which is `pad_token_id`",
    ),
    "a mask that ends": (ended_by_its_mask, tiny_tokenizer, {}, "mask token of its own .*which is `eos_token_id`"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_before_anything_changes(case):
    build, tokenizer, arguments, message = REFUSED[case]
    model, tokenizer = build(), tokenizer()
    config, known = copy.deepcopy(model.config.to_dict()), len(tokenizer)
    with pytest.raises(ValueError, match=message):
        block_causal_lm(model, tokenizer, **arguments)
    assert model.config.to_dict() == config and len(tokenizer) == known


def test_anything_but_a_model_of_transformers_is_refused():
    with pytest.raises(TypeError, match=r"must be a causal model of transformers .got Linear.*merge_and_unload"):
        block_causal_lm(torch.nn.Linear(2, 2), tiny_tokenizer())
