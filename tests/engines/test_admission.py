"""Requests on their way into vLLM, with stand-ins for its objects: what is filled in, left out and refused."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
from tiny import EOS, PAD

from d3llm_hf import D3LLMGenerationConfig, LLaDAConfig
from d3llm_hf.engines.requests import Served
from d3llm_hf.engines.vllm.admission import admit, admitting, served_by
from d3llm_hf.models.topology import Traits


SERVED = Served(D3LLMGenerationConfig(eos_token_id=EOS, pad_token_id=PAD), Traits(0), 31, 32, 64)
LONGEST = 128


class Params(SimpleNamespace):
    """The fields of vLLM's `SamplingParams` that are looked at, with its defaults."""

    def __init__(self, **given):
        plain = {
            "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "presence_penalty": 0.0, "min_tokens": 0,
            "frequency_penalty": 0.0, "repetition_penalty": 1.0, "logit_bias": None, "bad_words": [], "seed": None,
            "allowed_token_ids": None, "logprobs": None, "prompt_logprobs": None, "structured_outputs": None,
            "max_tokens": 16, "extra_args": None, "stop_token_ids": [], "ignore_eos": False,
        }  # fmt: skip
        super().__init__(**plain | given)

    def clone(self):
        return copy.deepcopy(self)


def admitted(prompt_length: int = 10, **given) -> Params:
    return admit(SERVED, Params(**given), prompt_length, LONGEST)


def test_a_plain_request_gets_a_canvas_and_stop_tokens():
    given = Params()
    found = admit(SERVED, given, 10, LONGEST)
    assert found.extra_args == {"diffusion_canvas_length": 26} and found.stop_token_ids == [EOS]
    assert given.extra_args is None and given.stop_token_ids == []  # the caller's own


def test_what_common_clients_send_is_no_error():
    found = admitted(temperature=0.0, top_p=0.9, top_k=40, seed=7)
    assert (found.temperature, found.top_p, found.top_k, found.seed) == (1.0, 1.0, 0, None)
    assert found.extra_args["seed"] == 7
    assert admitted(top_k=-1, temperature=0).top_k == -1


def test_a_length_that_vllm_filled_in_is_what_the_canvas_has_left():
    assert admitted(max_tokens=LONGEST - 10).max_tokens == 54 == admitted(max_tokens=None).max_tokens
    own = replace(SERVED, own=D3LLMGenerationConfig(max_new_tokens=20))
    assert admit(own, Params(max_tokens=None), 10, LONGEST).max_tokens == 20
    assert admit(own, Params(max_tokens=None), 50, LONGEST).max_tokens == 14
    assert admitted(max_tokens=54).extra_args["diffusion_canvas_length"] == 64


def test_stop_tokens_of_the_checkpoint_stay_out_where_they_are_ignored():
    assert admitted(ignore_eos=True, stop_token_ids=[3]).stop_token_ids == [3]
    assert admitted(stop_token_ids=[3]).stop_token_ids == [3, EOS]


def test_random_positions_get_a_seed():
    extra = {"decoding_method": "llada", "remasking": "random"}
    assert admitted(extra_args=extra).extra_args["seed"] >= 0
    assert admitted(extra_args=extra | {"seed": 3}).extra_args["seed"] == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": 0.7}, r"`temperature` must be 0, or left out \(got 0.7\)"),
        ({"top_p": 0.9}, r"`top_p` cannot be carried out by this engine.*\(got 0.9\)"),
        ({"logprobs": 2, "temperature": 0.0}, "`logprobs` cannot be"),
        ({"repetition_penalty": 1.1}, "`repetition_penalty` cannot be"),
        ({"min_tokens": 3}, "`min_tokens` cannot be"),
        ({"max_tokens": 55}, r"must fit the canvas of 64 positions \(got 10 \+ 55\)"),
        ({"extra_args": {"blocklength": 3}}, "`blocklength` is not a generation setting"),
        ({"extra_args": {"kv_cache": "dual"}}, "`kv_cache` cannot be carried out"),
    ],
)
def test_what_cannot_be_carried_out_is_refused(given, message):
    with pytest.raises((TypeError, ValueError), match=message):
        admitted(**given)


def test_a_prompt_without_room_for_an_answer_is_refused():
    with pytest.raises(ValueError, match=r"\(got 64 \+ 16\)"):
        admitted(prompt_length=64)


@pytest.fixture
def config(tmp_path):
    """What vLLM knows of a server that was started as it should be."""
    D3LLMGenerationConfig(eos_token_id=EOS).save_pretrained(tmp_path)
    model = LLaDAConfig(mask_token_id=31, vocab_size=32)
    return SimpleNamespace(
        use_v2_model_runner=True,
        diffusion_config=SimpleNamespace(canvas_length=64),
        scheduler_config=SimpleNamespace(scheduler_cls="d3llm_hf.engines.vllm.scheduler.CanvasScheduler"),
        cache_config=SimpleNamespace(enable_prefix_caching=False),
        model_config=SimpleNamespace(
            architectures=["LLaDAModelLM"], model=str(tmp_path), revision=None, hf_config=model,
            max_model_len=LONGEST, override_generation_config={"block_length": 8, "max_new_tokens": 16},
        ),
    )  # fmt: skip


def test_a_server_has_the_checkpoints_settings_and_those_of_its_command_line(config):
    found = served_by(config)
    assert (found.canvas_length, found.own.block_length, found.own.eos_token_id) == (64, 8, EOS)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("use_v2_model_runner", False, "second model runner must be in use"),
        ("diffusion_config", None, "`--diffusion-config` must give the length of a canvas"),
        ("scheduler_config.scheduler_cls", None, "`--scheduler-cls` must be"),
        ("cache_config.enable_prefix_caching", True, "`--no-enable-prefix-caching` must be given"),
        ("model_config.max_model_len", 127, r"`--max-model-len` must be at least 128, twice the canvas \(got 127\)"),
    ],
)
def test_a_server_that_lacks_a_flag_is_refused(config, path, value, message):
    *parts, name = path.split(".")
    target = config
    for part in parts:
        target = getattr(target, part)
    setattr(target, name, value)
    with pytest.raises(ValueError, match=message):
        served_by(config)


class Refusal(Exception):
    pass


def test_requests_of_our_models_are_admitted_and_others_pass(config):
    seen = []

    def process_inputs(self, request_id, prompt, params, *args, **kwargs):
        seen.append(params)

    method = admitting(process_inputs, Params, Refusal)
    processor = SimpleNamespace(model_config=config.model_config, vllm_config=config)
    method(processor, "1", {"prompt_token_ids": [1, 2]}, Params(max_tokens=4))
    method(processor, "2", {"prompt_token_ids": [1, 2]}, "pooling")
    assert seen[0].extra_args == {"diffusion_canvas_length": 6} and seen[1] == "pooling"
    with pytest.raises(Refusal, match="`temperature` must be 0"):
        method(processor, "3", {"prompt_token_ids": [1]}, Params(temperature=0.5))
    for prompt in ({"prompt_embeds": 1}, "text"):
        with pytest.raises(Refusal, match="`prompt` must be text or token ids"):
            method(processor, "4", prompt, Params())
    other = SimpleNamespace(model_config=SimpleNamespace(architectures=["LlamaForCausalLM"]))
    method(other, "5", "text", Params(temperature=0.5))
    assert seen[-1].temperature == 0.5
