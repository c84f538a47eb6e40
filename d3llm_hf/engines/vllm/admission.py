"""Requests as they arrive at vLLM: checked and completed before its engine sees them, in the process that answers."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from ..requests import Served, decoding_of, draws, generation_config_of, overridden, stops_of


# Architecture -> shift of its logits.
SHIFTS = {"LLaDAModelLM": 0, "DreamModel": 1}
# Entries of `extra_args` that are vLLM's own.
_WIDTH = "diffusion_canvas_length"
_ENGINE = ("kv_transfer_params", "ec_transfer_params")
# Parameters of vLLM that decide how a token is drawn from its distribution, with the value that asks for nothing. Of
# these canvases the best tokens are decided.
DRAWING: dict[str, Any] = {
    "top_p": 1.0, "top_k": 0, "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
    "repetition_penalty": 1.0, "min_tokens": 0, "logit_bias": None, "bad_words": None, "allowed_token_ids": None,
    "logprobs": None, "prompt_logprobs": None, "structured_outputs": None,
}  # fmt: skip
# Of these nothing is left where the best token is taken anyway.
_WITHOUT_EFFECT_IF_GREEDY = ("top_p", "top_k", "min_p")


def is_ours(model_config: Any) -> bool:
    """Whether a model is one of this plugin's."""
    return bool(SHIFTS.keys() & {*(model_config.architectures or ())})


def served_by(vllm_config: Any) -> Served:
    """What requests are checked against.

    Raises:
        ValueError: for a server that was started without what these models need.
    """
    model, scheduler = vllm_config.model_config, vllm_config.scheduler_config
    way_out = "`d3llm serve --engine vllm MODEL` sets what has to be set."
    if not vllm_config.use_v2_model_runner:
        raise ValueError(
            "vLLM's second model runner must be in use (got the first): canvases are decided in it. Unset "
            "VLLM_USE_V2_MODEL_RUNNER, and install the Triton that vLLM asks for; its log says what it misses."
        )
    if vllm_config.diffusion_config is None:
        raise ValueError(
            f"`--diffusion-config` must give the length of a canvas (got none), such as '{{\"canvas_length\": 512}}'. "
            f"{way_out}"
        )
    canvas_length = vllm_config.diffusion_config.canvas_length
    if "CanvasScheduler" not in str(getattr(scheduler.scheduler_cls, "__name__", scheduler.scheduler_cls)):
        raise ValueError(
            "`--scheduler-cls` must be d3llm_hf.engines.vllm.scheduler.CanvasScheduler (got "
            f"{scheduler.scheduler_cls}). {way_out}"
        )
    if vllm_config.cache_config.enable_prefix_caching:
        raise ValueError(
            "`--no-enable-prefix-caching` must be given (got prefix caching): keys of a prompt change with its "
            f"answer. {way_out}"
        )
    if model.max_model_len < 2 * canvas_length:
        raise ValueError(
            f"`--max-model-len` must be at least {2 * canvas_length}, twice the canvas (got {model.max_model_len}): "
            "vLLM counts the positions of a prompt and those of its canvas one behind the other. Where the model has "
            f"fewer, set VLLM_ALLOW_LONG_MAX_MODEL_LEN=1: a canvas begins with position 0. {way_out}"
        )
    shift = next(SHIFTS[name] for name in model.architectures if name in SHIFTS)
    own = generation_config_of(model.model, model.revision, model.hf_config)
    own = overridden(own, model.override_generation_config or {}, shift)
    return Served.of(model.hf_config, own, shift, canvas_length)


def settings_of(params: Any) -> dict[str, Any]:
    """Our settings in the `extra_args` of a request."""
    return {name: value for name, value in (params.extra_args or {}).items() if name not in (_WIDTH, *_ENGINE)}


def admit(served: Served, params: Any, prompt_length: int, longest: int) -> Any:
    """A request's parameters as the engine can take them; those of the caller stay as they are.

    1. What draws from a distribution is refused, or left out where it would change nothing.
    2. The length: where vLLM filled in all it has for none, the checkpoint's, or what the canvas has left.
    3. Settings of decoding, checked as `generate` checks them; a seed where one is needed.
    4. The checkpoint's stop tokens end the request in vLLM as well; the canvas is as wide as it has to be.

    Args:
        served: the model.
        params: vLLM's `SamplingParams`.
        prompt_length: tokens of the prompt.
        longest: the server's `max_model_len`.

    Raises:
        ValueError, TypeError: for what cannot be carried out.
    """
    params = params.clone()
    # 1. Drawing
    if params.temperature not in (0.0, 1.0):
        raise ValueError(
            "`temperature` must be 0, or left out (got "
            f"{params.temperature}): the best tokens are decided. `d3llm serve` without `--engine` samples."
        )
    greedy, params.temperature = params.temperature == 0, 1.0  # vLLM refuses any other of a diffusion model
    for name, neutral in DRAWING.items():
        value = getattr(params, name)
        if not value and not neutral:
            continue
        if value == neutral or (name in ("top_k",) and value == -1):
            continue
        if greedy and name in _WITHOUT_EFFECT_IF_GREEDY:
            setattr(params, name, neutral)
            continue
        raise ValueError(
            f"`{name}` cannot be carried out by this engine, which decides the best tokens of whole canvases (got "
            f"{value!r}). Leave it out; where the checkpoint's generation_config.json asks for it, start the server "
            "with `--generation-config vllm`."
        )
    extra = {name: value for name, value in (params.extra_args or {}).items() if name != _WIDTH}
    if params.seed is not None:
        extra.setdefault("seed", params.seed)
        params.seed = None

    # 2. Length
    left = served.canvas_length - prompt_length
    if params.max_tokens is None or params.max_tokens == longest - prompt_length:
        params.max_tokens = min(left, served.own.max_new_tokens or left)
    if left < 1 or params.max_tokens > left:
        raise ValueError(
            f"The prompt and its answer must fit the canvas of {served.canvas_length} positions (got {prompt_length} "
            f"+ {params.max_tokens}). Shorten the prompt, lower `max_tokens`, or start the server with a longer "
            "`--canvas-length`."
        )

    # 3. Settings
    params.extra_args = extra
    decoding = decoding_of(
        served, settings_of(params), params.max_tokens,
        stop_ids=tuple(params.stop_token_ids or ()), ignore_eos=params.ignore_eos,
    )  # fmt: skip
    if draws(decoding.rules) and extra.get("seed") is None:
        extra["seed"] = int(torch.randint(2**62, ()))

    # 4. What vLLM has to know
    if not params.ignore_eos:
        params.stop_token_ids = [*dict.fromkeys([*(params.stop_token_ids or ()), *stops_of(served)])]
    extra[_WIDTH] = prompt_length + params.max_tokens
    return params


def admitting(process_inputs: Callable[..., Any], kind: type, refusal: type[Exception]) -> Callable[..., Any]:
    """`InputProcessor.process_inputs`, to which [`admit`] has seen every request; of other models it is what it was.

    Args:
        process_inputs: vLLM's.
        kind: its class of parameters of a generation; others pass.
        refusal: its error, which a server answers as the fault of a request.
    """

    @functools.wraps(process_inputs)
    def admitted(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        if is_ours(self.model_config) and isinstance(params, kind):
            served = vars(self).get("canvases_served") or served_by(self.vllm_config)
            self.canvases_served = served
            tokens = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
            if tokens is None:
                raise refusal("`prompt` must be text or token ids (got neither). Pass `prompt_token_ids`.")
            try:
                params = admit(served, params, len(tokens), self.model_config.max_model_len)
            except (TypeError, ValueError) as error:
                raise refusal(str(error)) from error
        return process_inputs(self, request_id, prompt, params, *args, **kwargs)

    return admitted


def install() -> None:
    """Puts [`admitting`] around vLLM's method, once."""
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.input_processor import InputProcessor

    if not hasattr(InputProcessor.process_inputs, "__wrapped__"):
        InputProcessor.process_inputs = admitting(InputProcessor.process_inputs, SamplingParams, VLLMValidationError)


__all__ = ["DRAWING", "SHIFTS", "admit", "admitting", "install", "is_ours", "served_by", "settings_of"]
