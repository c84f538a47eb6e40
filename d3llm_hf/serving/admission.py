"""A request becomes a job, or is refused before it waits."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..models.generation_config_d3llm import D3LLMGenerationConfig
from ..text import encode_chat, encode_text
from .errors import ApiError
from .jobs import Event, Job
from .schemas import ChatRequest, CompletionRequest


DEFAULT_NEW_TOKENS = 128


@dataclass
class Admission:
    """What is known of the model when a request comes in. For one thread: tokenizers change while they encode.

    Args:
        model: with this library's `generate`; only its configs are read.
        tokenizer: encodes the prompts.
        name (`str`): of the model, which requests give.
        max_tokens (`int`): longest canvas that a request may ask for.
    """

    model: Any
    tokenizer: Any
    name: str
    max_tokens: int

    def check_model(self, name: str) -> None:
        """Refuses requests to another model.

        Raises:
            ApiError: 404.
        """
        if name != self.name:
            raise ApiError(
                404, f"The model `{name[:80]}` is not here. This server has `{self.name}`.", param="model",
                code="model_not_found",
            )  # fmt: skip

    def job(self, request: ChatRequest | CompletionRequest, tell: Callable[[Event], None]) -> Job:
        """Encodes and checks a request.

        Raises:
            ApiError: 400 or 404, naming the parameter at fault.
        """
        self.check_model(request.model)
        length = request.max_completion_tokens or request.max_tokens or self._default_length()
        if length > self.max_tokens:
            raise ApiError(
                400, f"`max_tokens` must be at most {self.max_tokens} on this server (got {length}).",
                param="max_tokens", code="invalid_value",
            )  # fmt: skip
        settings = self._settings(request)
        self._check_settings(settings, length)
        prompt = self._encode(request)
        limit = self._positions()
        if limit is not None and len(prompt) + length > limit:
            raise ApiError(
                400,
                f"The prompt and its answer must fit into the model's {limit} positions (got {len(prompt)} + "
                f"{length}). Shorten the prompt, or lower `max_tokens`.",
                param="messages" if isinstance(request, ChatRequest) else "prompt",
                code="context_length_exceeded",
            )
        return Job(
            prompt=prompt,
            max_new_tokens=length,
            settings=settings,
            stops=tuple(request.stop),
            seed=secrets.randbits(62) if request.seed is None else request.seed,
            tell=tell,
            streamed=request.stream,
            drafts=request.d3llm.get("drafts", False),
        )

    def _default_length(self) -> int:
        return min(self.model.generation_config.max_new_tokens or DEFAULT_NEW_TOKENS, self.max_tokens)

    def _positions(self) -> int | None:
        return self.model.max_positions

    def _settings(self, request: ChatRequest | CompletionRequest) -> dict[str, Any]:
        """Arguments of `generate`; what is not said stays the server's."""
        settings = {name: value for name, value in request.d3llm.items() if name != "drafts"}
        samples = bool(self.model.generation_config.do_sample)
        if request.temperature is not None:
            samples = request.temperature > 0
            settings["do_sample"] = samples
            if samples:
                settings["temperature"] = request.temperature
        if request.top_p is not None and samples:
            settings["top_p"] = request.top_p
        elif request.top_p not in (None, 1) and request.temperature is None:
            raise ApiError(
                400, "`top_p` needs sampling, which this server does not do unless told. Send `temperature`, too.",
                param="top_p", code="invalid_value",
            )  # fmt: skip
        return settings

    def _check_settings(self, settings: dict[str, Any], length: int) -> None:
        """Asks the configuration, as `generate` will."""
        try:
            self.model.check_settings(**settings, max_new_tokens=length)
        except (ValueError, TypeError) as error:
            raise ApiError(400, str(error), param="d3llm", code="invalid_value") from None

    def _encode(self, request: ChatRequest | CompletionRequest) -> list[int]:
        """Token ids; what a user writes never becomes a control token."""
        try:
            if isinstance(request, CompletionRequest):
                param, encoded = "prompt", encode_text(self.tokenizer, request.prompt)
            else:
                param = "messages"
                roles = {"developer": "system"}
                turns = [{"role": roles.get(m.role, m.role), "content": m.content} for m in request.messages]
                encoded = encode_chat(self.tokenizer, turns)
        except Exception as error:  # templates raise what they like, for example for roles in a wrong order
            raise ApiError(400, f"`{param}` cannot be encoded: {error}", param=param, code="invalid_value") from None
        return encoded["input_ids"][0].tolist()


def with_settings(model, settings: dict[str, Any]) -> D3LLMGenerationConfig:
    """A model's generation config in which `settings` take the place of its own, as in a call of `generate`.

    Raises:
        ValueError, TypeError: what `generate` would say of them.
    """
    own, config = model.generation_config, D3LLMGenerationConfig()
    if not isinstance(own, D3LLMGenerationConfig):
        own = D3LLMGenerationConfig.coerce(own)
    config.inherit(own, dict(settings))
    config.validate()
    config.rules(config.max_new_tokens or DEFAULT_NEW_TOKENS, model.logit_shift)
    return config
