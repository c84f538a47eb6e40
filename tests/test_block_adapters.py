"""`as_diffusion_lm(model, block_length=...)`: stock decoders decode by blocks, or are refused with the reason."""

import copy

import pytest
import torch
from others import DECODERS, ENCODERS, QWEN, Other
from tiny import EOS, MASK, PAD, left_padded, tiny_prompt
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

from d3llm_hf import as_diffusion_lm


LLAMA = Other("LlamaForCausalLM", 1, QWEN)
QWEN2, QWEN3 = DECODERS
MODERNBERT = ENCODERS[2]
ALL = pytest.mark.parametrize("other", [QWEN2, QWEN3, LLAMA], ids=lambda other: other.name)
METHODS = {
    "d3llm": {"entropy_threshold": 1.5, "block_add_threshold": 0.5},
    "fast_dllm_v2": {"confidence_threshold": 0.4, "sub_block_length": 2},
    "llada": {},
}
FIELDS = ("step_map", "num_forwards", "num_store_forwards")


def in_blocks(other, block_length=4, attn_implementation="sdpa", **more):
    return as_diffusion_lm(
        other.tiny(is_causal=None, attn_implementation=attn_implementation, **more),
        mask_token_id=MASK,
        block_length=block_length,
    )


def decode(model, inputs, method="d3llm", **chosen):
    settings = METHODS[method] | {"decoding_method": method, "eos_token_id": EOS, "pad_token_id": PAD}
    settings |= {"max_new_tokens": 11, "early_stop": False, "return_dict_in_generate": True} | chosen
    return model.generate(**inputs, **settings)


def prompts():
    return [tiny_prompt(seed, length) for seed, length in enumerate((2, 4, 7, 12))]


def row_of(output, row):
    answer = output.sequences[row, -11:].tolist()
    return [answer, *(getattr(output, name)[row].tolist() for name in FIELDS)]


@pytest.mark.every(30)
@ALL
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("method", METHODS)
def test_the_exact_cache_changes_nothing_and_a_row_is_decided_as_alone(other, method, attn_implementation):
    model, texts = in_blocks(other, attn_implementation=attn_implementation), prompts()
    assert model.supports_slot_cache
    kept = decode(model, left_padded(texts), method)
    computed = decode(model, left_padded(texts), method, kv_cache="none")
    assert (kept.positions_computed < computed.positions_computed).all()
    for row, text in enumerate(texts):
        alone = decode(model, {"input_ids": torch.tensor([text])}, method)
        assert row_of(kept, row) == row_of(computed, row) == row_of(alone, 0)


@pytest.mark.every(3)
@ALL
@pytest.mark.parametrize("method", ["d3llm", "llada"])
def test_one_block_for_everything_is_full_attention(other, method):
    text = {"input_ids": torch.tensor([tiny_prompt(1, 7)])}
    full = as_diffusion_lm(other.tiny(is_causal=None), mask_token_id=MASK, bidirectional=True)
    # A block is decided as a whole, whatever is asked for of it.
    whole = decode(full, text, method, max_new_tokens=17, block_length=17, kv_cache="none")
    block = decode(in_blocks(other, block_length=24), text, method)
    assert torch.equal(block.sequences[0, 7:], whole.sequences[0, 7:18])
    assert torch.equal(block.step_map[0], whole.step_map[0, :11])


@pytest.mark.every(3)
@ALL
def test_blocks_are_found_again_in_a_saved_checkpoint(other, tmp_path):
    model = in_blocks(other)
    model.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(stock) is other.model_class
    again = as_diffusion_lm(stock)
    assert (again.config.block_length, again.block_alignment, again.traits) == (4, "text", model.traits)
    inputs = left_padded(prompts())
    assert torch.equal(decode(again, inputs).sequences, decode(model, inputs).sequences)


def test_blocks_stay_with_copies_and_a_second_call_changes_their_length():
    model = in_blocks(QWEN3)
    assert copy.deepcopy(model).traits == model.traits
    as_diffusion_lm(model)
    assert model.traits.topology.block_length == 4
    as_diffusion_lm(model, block_length=8)
    assert model.traits.topology.block_length == 8
    other = as_diffusion_lm(QWEN3.tiny(), mask_token_id=MASK)
    assert type(other) is type(model) and other.traits.topology is None


class Deaf(Qwen2ForCausalLM):
    """Looks at no mask of single positions."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        if attention_mask is not None and attention_mask.ndim == 4:
            attention_mask = None
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


class Plain(Qwen2ForCausalLM):
    """Takes no mask with four dimensions."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError("two dimensions")
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


WINDOWS = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
REFUSED = {
    "no tokens": (QWEN2.tiny, {"block_length": 0}, r"`block_length` must be a positive integer .got 0"),
    "not a number": (QWEN2.tiny, {"block_length": True}, r"`block_length` must be a positive integer .got True"),
    "windows": (
        lambda: QWEN2.tiny(**WINDOWS),
        {},
        r"reaches all earlier blocks .got Qwen2ForCausalLM, .*sliding.* without windows",
    ),
    "layers with windows": (MODERNBERT.tiny, {}, r"reaches all earlier blocks .got ModernBertForMaskedLM"),
    "flex-attention": (
        lambda: QWEN2.tiny(attn_implementation="flex_attention"),
        {},
        r"needs a mask for each position .got attention implementation 'flex_attention'",
    ),
    "a mask that nothing looks at": (lambda: QWEN2.tiny(cls=Deaf), {}, r"follows a mask of each position .got Deaf"),
    "a mask that is not taken": (lambda: QWEN2.tiny(cls=Plain), {}, r"follows a mask of each position .got Plain"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_with_the_reason_and_stays_as_it_was(case):
    build, arguments, message = REFUSED[case]
    model = build()
    cls, held, config = type(model), dict(vars(model)), copy.deepcopy(model.config.to_dict())
    with pytest.raises(ValueError, match=message):
        as_diffusion_lm(model, **({"mask_token_id": MASK, "block_length": 4} | arguments))
    assert type(model) is cls and vars(model).keys() == held.keys() and model.config.to_dict() == config


def test_flash_attention_is_refused_with_the_reason():
    model = QWEN2.tiny()
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match=r"needs a mask for each position .got attention implementation 'flash"):
        as_diffusion_lm(model, mask_token_id=MASK, block_length=4)
    assert "block_length" not in model.config.to_dict()
