"""What PEFT and others do to a model from outside of its modules: decoded through, or refused by name."""

import functools

import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from others import ENCODERS
from packaging.version import Version
from thin import covering
from tiny import MASK, answer, left_padded, tiny_model, tiny_prompt
from transformers import CompileConfig

from d3llm_hf import as_diffusion_lm, is_greedy, log_likelihood


FAMILIES = ("llada", "dream")
PROMPTS = {
    "PromptTuningConfig": {"num_virtual_tokens": 4},
    "PromptEncoderConfig": {"num_virtual_tokens": 4},
    "PrefixTuningConfig": {"num_virtual_tokens": 4},
    "MultitaskPromptTuningConfig": {"num_virtual_tokens": 4, "num_tasks": 3},
    "CPTConfig": {"cpt_token_ids": [1, 2, 3], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 3]},
}
LEFT_TO_RIGHT = {"decoding_method": "llada", "block_length": 1, "eos_token_id": [], "max_new_tokens": 6}
QUERIES = {"target_modules": ["q_proj", "v_proj"]}


def wrapped(family: str, kind: str, task_type: str = "CAUSAL_LM", **settings):
    """A tiny model behind a learnt prompt that matters; its sizes are read off the model's config."""
    torch.manual_seed(0)
    config = getattr(peft, kind)(task_type=task_type, **(PROMPTS.get(kind, {}) | settings))
    model = peft.get_peft_model(tiny_model(family), config).eval()
    for name, weight in model.named_parameters():
        if weight.requires_grad or "prompt_encoder" in name:
            weight.data.normal_(0, 2)
    return model


def decoded_by_forwards(model, prompt: list[int], length: int = 6, **inputs) -> list[int]:
    """Greedy decoding from left to right by the wrapper's own forward."""
    base = model.get_base_model()
    ids = torch.tensor([prompt + [MASK] * length])
    for place in range(len(prompt), ids.shape[1]):
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits[:, -ids.shape[1] :]
        logits[..., MASK] = -torch.inf
        ids[0, place] = logits[0, place - base.logit_shift].argmax()
    return ids[0].tolist()


def task(kind: str, rows: int = 1) -> dict:
    return {"task_ids": torch.ones(rows, dtype=torch.long)} if kind.startswith("Multitask") else {}


@pytest.mark.every(6)
@pytest.mark.parametrize("kind, family", covering(PROMPTS, FAMILIES, strength=1, every=2))
def test_a_learnt_prompt_is_decoded_as_the_wrapper_forwards(family, kind):
    model, prompts = wrapped(family, kind), [tiny_prompt(seed, 5) for seed in range(6)]
    outputs = [answer(model, prompt, **LEFT_TO_RIGHT, **task(kind)).sequences[0].tolist() for prompt in prompts]
    assert outputs == [decoded_by_forwards(model, prompt, **task(kind)) for prompt in prompts]
    bare = [answer(model.get_base_model(), prompt, **LEFT_TO_RIGHT).sequences[0].tolist() for prompt in prompts]
    assert outputs != bare  # some of the prompts may happen to have the same answer
    with model.disable_adapter():
        assert answer(model, prompts[0], **LEFT_TO_RIGHT).sequences[0].tolist() == bare[0]
    assert answer(model.get_base_model(), prompts[0], **LEFT_TO_RIGHT).sequences[0].tolist() == bare[0]


@pytest.mark.every(3)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", PROMPTS)
def test_behind_a_learnt_prompt_padding_moves_no_text(family, kind):
    model, prompts = wrapped(family, kind), [tiny_prompt(0, 5), tiny_prompt(1, 3)]
    chosen = {"max_new_tokens": 8, "block_length": 4, "eos_token_id": []}
    together = model.generate(**left_padded(prompts), **chosen, **task(kind, 2))
    alone = [answer(model, prompt, **chosen, **task(kind)).sequences[0, -8:] for prompt in prompts]
    assert torch.equal(together[:, -8:], torch.stack(alone))


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_guidance_drafts_and_a_short_suffix_see_a_learnt_prompt(kind):
    model, prompt = wrapped("llada", kind), tiny_prompt(0, 5)
    one_a_forward = {"decoding_method": "llada", "block_length": 4}
    plain = answer(model, prompt, **one_a_forward)
    drafted = answer(model, prompt, lossless=True, **one_a_forward)
    assert torch.equal(plain.sequences, drafted.sequences)
    for setting in ({"cfg_scale": 1.0}, {"suffix_length": 4}):
        assert answer(model, prompt, **setting).sequences.shape == (1, 21)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_likelihoods_see_a_learnt_prompt(kind):
    model = wrapped("dream", kind)
    ids = torch.tensor([tiny_prompt(0, 5), tiny_prompt(1, 5)])
    last = torch.zeros_like(ids, dtype=torch.bool).index_fill(1, torch.tensor([4]), True)
    found = log_likelihood(model, ids, last, num_samples=2).mean
    logits = model(input_ids=ids.masked_fill(last, MASK), attention_mask=torch.ones_like(ids)).logits[:, -2]
    expected = logits.log_softmax(-1).gather(1, ids[:, -1:])[:, 0].double()
    assert torch.allclose(found, expected, rtol=1e-4)
    assert not torch.allclose(found, log_likelihood(model.get_base_model(), ids, last, num_samples=2).mean, rtol=1e-2)
    logits[:, MASK] = -torch.inf
    assert torch.equal(is_greedy(model, ids, last), logits.argmax(-1) == ids[:, -1])


REFUSED = {
    "a cache": ({"kv_cache": "dual"}, r'`kv_cache` must be "none" with a PROMPT_TUNING adapter .got "dual"'),
    "compiled forwards": ({"compile_config": CompileConfig()}, r"`compile_config` does not go together with a PROMPT"),
    "a shadow block": (
        {"decoding_method": "wino"},
        r"A shadow block does not go together with a PROMPT_TUNING adapter",
    ),
    "a text too long": ({"max_new_tokens": 2042}, r"2048 positions behind the 4 virtual tokens .* .got 2047"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_learnt_prompt_cannot_go_with_is_refused(case):
    settings, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        answer(wrapped("llada", "PromptTuningConfig"), tiny_prompt(0, 5), **settings)


def test_rows_of_several_tasks_are_refused_where_rows_leave_the_batch():
    model, ids = wrapped("llada", "MultitaskPromptTuningConfig"), torch.tensor([[1, 2], [3, 4]])
    with pytest.raises(ValueError, match=r"`task_ids` must be the same for all rows of a batch.*got \[0, 2\]"):
        model.generate(ids, max_new_tokens=4, task_ids=torch.tensor([0, 2]))


@pytest.mark.parametrize("task_type", ["FEATURE_EXTRACTION", "TOKEN_CLS", "QUESTION_ANS", "SEQ_CLS"])
def test_a_task_whose_generate_leaves_the_learnt_prompt_out_is_refused(task_type):
    model = wrapped("llada", "PromptTuningConfig", task_type)
    with pytest.raises(ValueError, match=rf'`task_type` of the PROMPT_TUNING adapter .*"CAUSAL_LM".*got {task_type}'):
        model.generate(torch.tensor([[1, 2]]), max_new_tokens=4)


def test_a_task_that_puts_the_learnt_prompt_elsewhere_is_refused():
    model = wrapped("llada", "PrefixTuningConfig", "SEQ_2_SEQ_LM", num_transformer_submodules=1)
    with pytest.raises(ValueError, match=r"`task_type` of the PREFIX_TUNING adapter .*got SEQ_2_SEQ_LM"):
        model.generate(input_ids=torch.tensor([[1, 2]]), max_new_tokens=4)


def test_a_stock_model_behind_a_learnt_prompt_takes_no_padding():
    bert = as_diffusion_lm(ENCODERS[0].tiny(), mask_token_id=MASK)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(bert, config).eval()
    assert answer(model, [1, 2, 3], max_new_tokens=4).sequences.shape == (1, 7)
    padded = left_padded([[1, 2, 3], [1]])
    with pytest.raises(ValueError, match="`attention_mask` must not hold zeros with a PROMPT_TUNING adapter"):
        model.generate(**padded, max_new_tokens=4)
    with pytest.raises(ValueError, match="`attention_mask` must not hold zeros with a PEFT adapter that drops"):
        log_likelihood(model, padded["input_ids"], padded["input_ids"] == 3, attention_mask=padded["attention_mask"])


# ---- adapters inside of the modules --------------------------------------------------------------------------------

INSIDE = {
    "LoraConfig": {},
    "VeraConfig": {},
    "LoHaConfig": {},
    "LoKrConfig": {},
    "IA3Config": {"feedforward_modules": []},
    "OFTConfig": {"oft_block_size": 4},
    "LNTuningConfig": {"target_modules": ["norm"]},
}


@pytest.mark.every(3)
@pytest.mark.parametrize("kind", INSIDE)
def test_an_adapter_of_the_modules_is_decoded_as_the_wrapper_forwards(kind):
    model, prompt = wrapped("llada", kind, **(QUERIES | INSIDE[kind])), tiny_prompt(0, 5)
    output = answer(model, prompt, **LEFT_TO_RIGHT).sequences[0].tolist()
    assert output == decoded_by_forwards(model, prompt)


@pytest.fixture
def two_adapters(tmp_path):
    """Folders of two LoRA adapters of the tiny LLaDA."""
    folders = []
    for index in range(2):
        model = wrapped("llada", "LoraConfig", **QUERIES, init_lora_weights=False)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data.normal_(0, 0.5, generator=torch.Generator().manual_seed(index))
        model.save_pretrained(tmp_path / str(index))
        folders.append(str(tmp_path / str(index)))
    return folders


@pytest.mark.skipif(Version(peft.__version__) < Version("0.20"), reason="its X-LoRA finds no adapter's tensors")
def test_the_weights_that_x_lora_gives_its_adapters_are_those_of_the_wrappers_forward(two_adapters):
    base, prompt = tiny_model("llada"), tiny_prompt(0, 5)
    base.config.use_cache = False
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=16, xlora_depth=1, adapters=dict(zip("01", two_adapters, strict=True))
    )
    model = peft.get_peft_model(base, config).eval()
    ids = torch.tensor([prompt])
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **LEFT_TO_RIGHT)
    assert output[0].tolist() == decoded_by_forwards(model, prompt)


def test_adapters_of_single_rows_need_one_row_and_leave_nothing_behind(two_adapters):
    model = peft.PeftModel.from_pretrained(tiny_model("llada"), two_adapters[0], adapter_name="a")
    model.load_adapter(two_adapters[1], "b")
    ids, chosen = torch.tensor([tiny_prompt(0, 5), tiny_prompt(1, 5)]), {"max_new_tokens": 6}
    with pytest.raises(ValueError, match=r"`adapter_names` belongs to the rows .*got 2 rows.*`set_adapter`"):
        model.generate(input_ids=ids, adapter_names=["a", "b"], **chosen)
    named = model.generate(input_ids=ids[:1], adapter_names=["b"], **chosen)
    model.set_adapter("b")
    assert torch.equal(named, model.generate(input_ids=ids, **chosen)[:1])
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_tasks_of_poly_need_one_row():
    model, ids = wrapped("llada", "PolyConfig", **QUERIES, n_tasks=2, n_skills=2), torch.tensor([[1, 2], [3, 4]])
    assert model.generate(ids[:1], task_ids=torch.tensor([1]), max_new_tokens=4).shape == (1, 6)
    with pytest.raises(ValueError, match=r"`task_ids` belongs to the rows of a batch"):
        model.generate(ids, task_ids=torch.tensor([1, 0]), max_new_tokens=4)


def test_an_activated_lora_is_refused():
    model = wrapped("llada", "LoraConfig", **QUERIES, alora_invocation_tokens=[3])
    with pytest.raises(ValueError, match="`alora_invocation_tokens` has no meaning in `generate`"):
        model.generate(torch.tensor([[1, 3, 2]]), max_new_tokens=4)


# ---- a model that someone else has changed -------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_that_was_replaced_on_the_instance_is_the_one_that_decodes(family):
    model, prompt = tiny_model(family), tiny_prompt(0, 5)
    expected, own, calls = answer(model, prompt), model.forward, []

    def forward(input_ids, attention_mask=None):
        calls.append(input_ids)
        return own(input_ids=input_ids, attention_mask=attention_mask)

    model.forward = forward
    assert torch.equal(answer(model, prompt).sequences, expected.sequences)
    assert len(calls) == int(expected.num_forwards)
    with pytest.raises(ValueError, match=r'`kv_cache` must be "none"'):
        answer(model, prompt, kv_cache="dual")
    with pytest.raises(ValueError, match="its forward takes no `position_ids`"):
        model.generate(**left_padded([[1, 2], [3]]), max_new_tokens=4)

    @functools.wraps(own)
    def doubled(*args, **kwargs):
        output = own(*args, **kwargs)
        output.logits = -output.logits
        return output

    model.forward = doubled
    assert not torch.equal(answer(model, prompt, kv_cache="dual").sequences, expected.sequences)


def test_hooks_of_accelerate_run_in_every_forward():
    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    model, prompt, hook = tiny_model("llada"), tiny_prompt(0, 5), Counting()
    expected = answer(model, prompt, kv_cache="dual")
    add_hook_to_module(model, hook)
    assert torch.equal(answer(model, prompt, kv_cache="dual").sequences, expected.sequences)
    assert hook.calls == int(expected.num_forwards)


def test_inputs_that_someone_else_prepares_are_refused():
    model = tiny_model("llada")
    model.prepare_inputs_for_generation = lambda *args, **kwargs: {}
    with pytest.raises(ValueError, match=r"`prepare_inputs_for_generation` must be left as it is.*<lambda>"):
        model.generate(torch.tensor([[1, 2]]), max_new_tokens=4)
