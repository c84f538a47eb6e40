"""`as_diffusion_lm`: a loaded model gets the decoder, or is refused with the reason and stays as it was."""

import copy
import pickle

import pytest
import torch
from others import DECODERS, ENCODERS, OTHERS
from tiny import MASK, answer, tiny_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertForMaskedLM,
    BertModel,
    GenerationConfig,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from d3llm_hf import D3LLMGenerationConfig, D3LLMGenerationMixin, as_diffusion_lm
from d3llm_hf.models.cache_name import CACHE


BERT, ROBERTA, MODERNBERT = ENCODERS
QWEN2, QWEN3 = DECODERS
ALL = pytest.mark.parametrize("other", OTHERS, ids=lambda other: other.name)


@pytest.mark.every(3)
@ALL
def test_the_same_object_with_the_same_weights_gets_a_generate(other):
    model = other.tiny()
    weights, before = dict(model.named_parameters()), model(torch.tensor([[1, 2]])).logits
    adapted = as_diffusion_lm(model, mask_token_id=MASK)
    assert adapted is model and isinstance(model, D3LLMGenerationMixin) and isinstance(model, other.model_class)
    assert all(weight is weights[name] for name, weight in adapted.named_parameters())
    assert torch.equal(adapted(torch.tensor([[1, 2]])).logits, before)
    assert adapted.logit_shift == other.shift
    assert isinstance(adapted.generation_config, D3LLMGenerationConfig)
    assert answer(adapted, [1, 2, 3], block_length=4).sequences.shape == (1, 19)


@pytest.mark.every(3)
@ALL
def test_it_saves_a_stock_checkpoint_in_which_mask_token_and_shift_are_found_again(other, tmp_path):
    model = as_diffusion_lm(other.tiny(), mask_token_id=MASK, generation_config=D3LLMGenerationConfig(block_length=4))
    model.save_pretrained(tmp_path)
    auto = AutoModelForMaskedLM if other in ENCODERS else AutoModelForCausalLM
    stock = auto.from_pretrained(tmp_path)
    assert type(stock) is other.model_class and stock.config.architectures == [other.name]
    again = as_diffusion_lm(stock)
    assert (again.config.mask_token_id, again.logit_shift) == (MASK, other.shift)
    if other in DECODERS:  # transformers reads the file only for classes that generate
        assert again.generation_config.block_length == 4
    chosen = {"block_length": 4}
    assert torch.equal(answer(again, [1, 2], **chosen).sequences, answer(model, [1, 2], **chosen).sequences)


def test_copies_and_pickles_decode_as_the_model_does():
    model = as_diffusion_lm(QWEN2.tiny(), mask_token_id=MASK)
    expected = answer(model, [1, 2, 3]).sequences
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(same) is type(model) and same.get_input_embeddings() is not model.get_input_embeddings()
        assert torch.equal(answer(same, [1, 2, 3]).sequences, expected)


def test_all_models_of_a_class_share_one_class_and_a_second_call_changes_settings_only():
    first, second = (as_diffusion_lm(BERT.tiny(seed), mask_token_id=MASK) for seed in range(2))
    assert type(first) is type(second)
    cls = type(first)
    as_diffusion_lm(first, mask_token_id=5, logit_shift=1)
    assert type(first) is cls and (first.config.mask_token_id, first.logit_shift) == (5, 1)
    as_diffusion_lm(first)
    assert (first.config.mask_token_id, first.logit_shift, second.logit_shift) == (5, 1, 0)


def test_a_model_of_ours_is_left_what_it_is():
    model = tiny_model("dream")
    cls = type(model)
    assert type(as_diffusion_lm(model)) is cls and model.logit_shift == 1 and model.supports_slot_cache


def test_the_mask_token_may_come_from_the_config_and_the_shift_from_the_caller():
    model = as_diffusion_lm(QWEN2.tiny(mask_token_id=7), logit_shift=0)
    assert model.config.mask_token_id == 7 and model.logit_shift == 0


def test_a_decoder_is_made_bidirectional_on_request():
    model = as_diffusion_lm(QWEN3.tiny(is_causal=None), mask_token_id=MASK, bidirectional=True)
    assert model.config.is_causal is False
    logits = model(torch.tensor([[1, 2, 3], [1, 2, 4]])).logits[:, 0]
    assert not torch.equal(logits[0], logits[1])


def test_the_models_own_generation_settings_stay_and_given_ones_replace_them():
    model = QWEN2.tiny()
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.7, eos_token_id=4)
    as_diffusion_lm(model, mask_token_id=MASK)
    assert (model.generation_config.temperature, model.generation_config.eos_token_id) == (0.7, 4)
    as_diffusion_lm(model, generation_config=GenerationConfig(eos_token_id=5))
    assert (model.generation_config.temperature, model.generation_config.eos_token_id) == (None, 5)


def test_a_cache_is_offered_where_one_works():
    found = [as_diffusion_lm(other.tiny(), mask_token_id=MASK).supports_slot_cache for other in OTHERS]
    assert found == [True, True, False, True, True]
    windows = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    assert not as_diffusion_lm(QWEN2.tiny(**windows), mask_token_id=MASK).supports_slot_cache

    class Moody(Qwen2ForCausalLM):
        def forward(self, input_ids=None, past_key_values=None, **kwargs):
            if past_key_values is not None:
                raise NotImplementedError
            return super().forward(input_ids=input_ids, **kwargs)

    assert not as_diffusion_lm(QWEN2.tiny(cls=Moody), mask_token_id=MASK).supports_slot_cache


def test_a_cache_is_offered_by_the_name_that_a_forward_has_for_it():
    class Older(Qwen2ForCausalLM):
        def forward(self, input_ids=None, past_key_values=None, **kwargs):
            return super().forward(input_ids=input_ids, **{CACHE: past_key_values}, **kwargs)

    class Newer(Qwen2ForCausalLM):
        def forward(self, input_ids=None, cache=None, **kwargs):
            return super().forward(input_ids=input_ids, **{CACHE: cache}, **kwargs)

    class Whatever(Qwen2ForCausalLM):
        def forward(self, **kwargs):
            return super().forward(**kwargs)

    for cls, name in ((Older, "past_key_values"), (Newer, "cache"), (Whatever, CACHE)):
        model = as_diffusion_lm(QWEN2.tiny(cls=cls), mask_token_id=MASK)
        assert (model.cache_name, model.supports_slot_cache) == (name, True)


def test_a_model_that_trains_keeps_the_mode_of_every_module():
    model = BERT.tiny().train()
    model.bert.embeddings.eval()
    modes = [module.training for module in model.modules()]
    as_diffusion_lm(model, mask_token_id=MASK)
    assert [module.training for module in model.modules()] == modes


def test_a_model_with_an_adapter_of_peft_generates_through_the_wrapper():
    from peft import LoraConfig, get_peft_model

    wrapper = get_peft_model(QWEN2.tiny(), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    assert as_diffusion_lm(wrapper, mask_token_id=MASK) is wrapper
    assert isinstance(wrapper.get_base_model(), D3LLMGenerationMixin) and wrapper.logit_shift == 1
    assert answer(wrapper.eval(), [1, 2, 3]).sequences.shape == (1, 19)


def test_a_model_whose_weights_are_not_there_yet_is_checked_by_its_config():
    with torch.device("meta"):
        model, causal = (Qwen2ForCausalLM(QWEN2.config(is_causal=value)) for value in (False, None))
    assert isinstance(as_diffusion_lm(model, mask_token_id=MASK), D3LLMGenerationMixin)
    with pytest.raises(ValueError, match="Attention must not be causal"):
        as_diffusion_lm(causal, mask_token_id=MASK)


# ---- refused, and left as it was -----------------------------------------------------------------------------------


class Failing(Qwen2ForCausalLM):
    """As MPT, whose forward reads the mask that only causal attention has."""

    def forward(self, *args, **kwargs):
        return None.to("cpu")


class Stubborn(Qwen2ForCausalLM):
    """Its config says one thing, its attention does another."""

    def forward(self, *args, **kwargs):
        self.config.is_causal = True
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.config.is_causal = False


class OtherPositions(BertForMaskedLM):
    def forward(self, input_ids=None, position_ids=None, **kwargs):
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None] + 7
        return super().forward(input_ids=input_ids, position_ids=position_ids, **kwargs)


def encoder_decoder():
    return T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))


REFUSED = {
    "causal attention": (lambda: QWEN2.tiny(is_causal=None), {}, r"config.is_causal = False"),
    "causal, whatever its config says": (lambda: QWEN2.tiny(cls=Stubborn), {}, r"last token .* must reach the first"),
    "an encoder as a decoder": (lambda: BERT.tiny(is_decoder=True), {}, r"Attention must not be causal"),
    "no mask token": (lambda: BERT.tiny(), {"mask_token_id": None}, r"Pass `mask_token_id=tokenizer"),
    "a mask token too high": (
        lambda: BERT.tiny(),
        {"mask_token_id": 32},
        r"inside the vocabulary of 32 tokens .got 32",
    ),
    "another shift": (lambda: BERT.tiny(), {"logit_shift": 2}, r"`logit_shift` must be 0 or 1 .got 2"),
    "no logits": (
        lambda: BertModel(BERT.config()),
        {},
        r"must return logits .* .got None for 3 tokens from BertModel",
    ),
    "other positions": (lambda: BERT.tiny(cls=OtherPositions), {}, r"must be counted from `position_offset` .got 0"),
    "a forward that fails": (
        lambda: QWEN2.tiny(cls=Failing),
        {},
        r"got AttributeError from Failing: .NoneType. object",
    ),
    "an encoder-decoder": (encoder_decoder, {}, r"one stack over one canvas .got T5ForConditionalGeneration"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_with_the_reason_and_stays_as_it_was(case):
    build, arguments, message = REFUSED[case]
    model = build()
    cls, held, config = type(model), dict(vars(model)), copy.deepcopy(model.config.to_dict())
    with pytest.raises(ValueError, match=message):
        as_diffusion_lm(model, **({"mask_token_id": MASK} | arguments))
    assert type(model) is cls and vars(model).keys() == held.keys() and model.config.to_dict() == config
    assert all(vars(model)[name] is value for name, value in held.items())


def test_what_is_no_model_of_transformers_is_refused():
    with pytest.raises(TypeError, match=r"`model` must be a model of transformers .got Linear"):
        as_diffusion_lm(torch.nn.Linear(2, 2))
