"""A request becomes a job, or is refused before it waits: what it costs is known from here on."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..models.generation_config_d3llm import FIELDS, D3LLMGenerationConfig
from ..text import encode_chat, encode_text
from .errors import ApiError
from .formats import layout_of, schema_of
from .jobs import Event, Job
from .schemas import OPTIONS, ChatRequest, CompletionRequest


DEFAULT_NEW_TOKENS = 128
DEFAULT_PROMPT_TOKENS = 8192
"""Longest prompt for a model that names no number of positions."""
CHARACTERS = 8
"""Of a text that are encoded at first for each position; most tokens hold fewer."""
KINDS = {name: kinds for name, (kinds, *_) in (FIELDS | OPTIONS).items()}


@dataclass
class Admission:
    """What is known of the model when a request comes in. For one thread: tokenizers change while they encode.

    Args:
        model: with this library's `generate`; only its configs are read.
        tokenizer: encodes the prompts.
        name (`str`): of the model, which requests give.
        max_tokens (`int`): longest canvas that a request may ask for.
        max_prompt_tokens (`int`, *optional*): longest prompt; what the model has positions for when unset.
    """

    model: Any
    tokenizer: Any
    name: str
    max_tokens: int
    max_prompt_tokens: int | None = None

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
        asked = request.max_completion_tokens or request.max_tokens
        schema = schema_of(request.response_format, request.stop, request.d3llm)
        layout = layout_of(schema, asked, self.model, self.tokenizer, self.max_tokens)
        length = asked or self._default_length()
        length = length if layout is None else len(layout.ids)
        if length > self.max_tokens:
            raise ApiError(
                400, f"`max_tokens` must be at most {self.max_tokens} on this server (got {length}).",
                param="max_tokens", code="invalid_value",
            )  # fmt: skip
        settings = self._settings(request)
        if isinstance(settings.get("steps"), int) and settings["steps"] > self.max_tokens:
            raise ApiError(
                400,
                f"`d3llm.steps` must be at most {self.max_tokens} on this server: each is a forward (got "
                f"{settings['steps']}). Leave it out for one a token.",
                param="d3llm.steps", code="invalid_value",
            )  # fmt: skip
        self._check_settings(settings, length, fills=layout is not None)
        prompt = self._encode(request, length)
        return Job(
            prompt=prompt,
            max_new_tokens=length,
            settings=settings,
            stops=tuple(request.stop),
            seed=secrets.randbits(62) if request.seed is None else request.seed,
            tell=tell,
            streamed=request.stream,
            drafts=request.d3llm.get("drafts", False),
            layout=layout,
        )

    def _default_length(self) -> int:
        return min(self.model.generation_config.max_new_tokens or DEFAULT_NEW_TOKENS, self.max_tokens)

    def _positions(self) -> int | None:
        return self.model.max_positions

    def _settings(self, request: ChatRequest | CompletionRequest) -> dict[str, Any]:
        """Arguments of `generate`; what is not said stays the server's."""
        settings = {name: value for name, value in request.d3llm.items() if name != "drafts"}
        for name, value in settings.items():
            if type(value) is int and float in KINDS[name]:  # transformers takes some numbers as floats only
                settings[name] = float(value)
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

    def _check_settings(self, settings: dict[str, Any], length: int, fills: bool) -> None:
        """Asks the configuration, as `generate` will."""
        try:
            config = self.model.check_settings(**settings, max_new_tokens=length)
        except (ValueError, TypeError) as error:
            named = [name for name in ("temperature", "top_p") if str(error).startswith(f"`{name}`")]
            raise ApiError(400, str(error), param=(named or ["d3llm"])[0], code="invalid_value") from None
        rules = config.rules(length, self.model.traits)
        in_parts = config.topology(self.model.traits) is not None or rules.slot_size or rules.suffix_length is not None
        if fills and in_parts:
            raise ApiError(
                400,
                "`response_format` needs decoding that sees the whole text, which this model, method or "
                "`suffix_length` does not. Ask for the format in a message and check the answer yourself.",
                param="response_format", code="invalid_value",
            )  # fmt: skip

    def _encode(self, request: ChatRequest | CompletionRequest, length: int) -> list[int]:
        """Token ids that leave room for the answer; what a user writes never becomes a control token."""
        param = "messages" if isinstance(request, ChatRequest) else "prompt"
        try:
            if isinstance(request, ChatRequest):
                roles = {"developer": "system"}
                turns = [{"role": roles.get(m.role, m.role), "content": m.content} for m in request.messages]
                if len(request.messages) + sum(len(turn["content"]) for turn in turns) > self.longest:
                    self._check_beginning(self.tokenizer.apply_chat_template(turns, tokenize=False), param, length)
                encoded = encode_chat(self.tokenizer, turns)
            else:
                self._check_beginning(request.prompt, param, length)
                encoded = encode_text(self.tokenizer, request.prompt)
        except ApiError:
            raise
        except Exception as error:  # templates raise what they like, for example for roles in a wrong order
            raise ApiError(400, f"`{param}` cannot be encoded: {error}", param=param, code="invalid_value") from None
        prompt = encoded["input_ids"][0].tolist()
        limit = self._positions()
        if len(prompt) > self.longest or (limit is not None and len(prompt) + length > limit):
            raise self._too_long(param, str(len(prompt)), length)
        return prompt

    @property
    def longest(self) -> int:
        """Tokens that a prompt may have."""
        limits = [limit for limit in (self.max_prompt_tokens, self._positions()) if limit is not None]
        return min(limits, default=DEFAULT_PROMPT_TOKENS)

    def _check_beginning(self, text: str, param: str, length: int) -> None:
        """Refuses a text of which a beginning alone is too long twice over, without encoding the rest of it."""
        longest = self.longest
        size = CHARACTERS * longest
        while size < len(text):
            count = len(self.tokenizer(text[:size], add_special_tokens=False, verbose=False)["input_ids"])
            if count > 2 * longest:
                raise self._too_long(param, f"more than {longest}", length)
            size *= 2

    def _too_long(self, param: str, count: str, length: int) -> ApiError:
        limit, code = self._positions(), "context_length_exceeded"
        if limit is None or self.longest < limit:
            return ApiError(
                400,
                f"`{param}` must have at most {self.longest} tokens on this server (got {count}). Shorten it.",
                param=param, code=code,
            )  # fmt: skip
        return ApiError(
            400,
            f"The prompt and its answer must fit into the model's {limit} positions (got {count} + {length}). Shorten "
            "the prompt, or lower `max_tokens`.",
            param=param, code=code,
        )  # fmt: skip


def with_settings(model, settings: dict[str, Any]) -> D3LLMGenerationConfig:
    """A model's generation config in which `settings` take the place of its own, as in a call of `generate`.

    Raises:
        ValueError, TypeError: what `generate` would say of them.
    """
    own, config = model.generation_config, D3LLMGenerationConfig()
    if not isinstance(own, D3LLMGenerationConfig):
        own = D3LLMGenerationConfig.coerce(own)
    config.inherit(own, dict(settings), model.traits)
    config.validate()
    config.rules(config.max_new_tokens or DEFAULT_NEW_TOKENS, model.traits)
    return config
