"""What a request may say: the part of OpenAI's API that a diffusion model can keep, checked by name and value."""

import difflib
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError

from ..models.generation_config_d3llm import FIELDS
from .bodies import read_object
from .errors import ApiError
from .formats import schema_of
from .unsupported import IN_MESSAGE, IN_STREAM_OPTIONS, PARAMETERS, Table, without_unsupported
from .wording import in_our_words, shown


# Options of transformers that a request may set under `d3llm`: type, the rule in words, and its test.
OPTIONS: dict[str, tuple[tuple[type, ...], str, Callable[[Any], bool]]] = {
    "top_k": ((int,), "a non-negative integer", lambda v: v >= 0),
    "min_p": ((int, float), "a probability in [0, 1]", lambda v: 0 <= v <= 1),
    "repetition_penalty": ((int, float), "a number in (0, 10]", lambda v: 0 < v <= 10),
    "no_repeat_ngram_size": ((int,), "a non-negative integer", lambda v: v >= 0),
    "min_new_tokens": ((int,), "a non-negative integer", lambda v: v >= 0),
}
SETTINGS = (frozenset(FIELDS) - {"seed", "infill", "mask_token_id"}) | OPTIONS.keys()
"""Arguments of `generate` that a request may set under `d3llm`."""

LARGEST = {"draft_length": 16, "lookahead": 16}
"""Bounds of settings that multiply the memory of a request."""


def _stops(value: Any) -> Any:
    """One stop string is a list of one; an empty one ends nothing."""
    listed = [value] if isinstance(value, str) else value
    return [stop for stop in listed if stop != ""] if isinstance(listed, list) else listed


def _one_text(value: Any) -> Any:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        return value[0]
    if isinstance(value, list):
        raise ValueError("must be one text: send one request for each prompt, and text in place of token ids")
    return value


def _joined(value: Any) -> Any:
    """The text of a message that comes in parts."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError("must be text, or parts of type 'text': this model reads nothing else")
        texts.append(part["text"])
    return "".join(texts)


Given = TypeVar("Given", bound="GenerationRequest")


class _Strict(BaseModel):
    """Lists of it end at their first error: pydantic makes an object of each, and lets nobody else work meanwhile."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Strict):
    """`include_usage`: send a last chunk with the counts."""

    include_usage: bool = False


class Message(_Strict):
    """One turn. `developer` is OpenAI's newer name of the system's turn; `name` is taken and forgotten."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_joined)]
    name: str = ""


class GenerationRequest(_Strict):
    """What both endpoints take; what is left out keeps the server's settings.

    Attributes:
        max_tokens, max_completion_tokens: length of the canvas, two names of one thing.
        temperature: 0 does not sample.
        seed: a request with a seed gets the same answer again.
        stop: strings that end the answer and are not part of it.
        response_format: a JSON schema that the answer holds; see `formats.py`.
        user, safety_identifier, prompt_cache_key: taken and forgotten.
        d3llm: settings of `generate` (see `SETTINGS`), and `drafts: true` for draft events in a stream.
    """

    model: str
    max_tokens: int | None = Field(None, gt=0)
    max_completion_tokens: int | None = Field(None, gt=0)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: Annotated[
        list[Annotated[str, Field(max_length=256)]],
        FailFast(),
        BeforeValidator(_stops),
        Field(max_length=16),
    ] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    d3llm: dict[str, Any] = {}


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], FailFast()] = Field(min_length=1)


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    prompt: Annotated[str, Field(min_length=1), BeforeValidator(_one_text)]


def parse(kind: type[Given], body: bytes) -> Given:
    """Reads the body of a request.

    Raises:
        ApiError: 400, naming the first parameter that is unknown, unsupported or wrong.
    """
    values = without_unsupported(read_object(body), PARAMETERS, kind.model_fields)
    for name in values:
        if name not in kind.model_fields:
            raise _unknown(name, [*kind.model_fields], "is no parameter of this endpoint")
    _read_messages(values)
    if isinstance(values.get("d3llm"), dict):  # `null` is how clients say that they leave a parameter out
        values["d3llm"] = {name: value for name, value in values["d3llm"].items() if value is not None}
    options = values.get("stream_options")
    if isinstance(options, dict):
        values["stream_options"] = _fields(options, IN_STREAM_OPTIONS, StreamOptions, "stream_options.")
    try:
        request = kind.model_validate(values)
    except ValidationError as error:
        name, message = in_our_words(error)
        raise ApiError(400, message, param=name, code="invalid_value") from None
    _check_together(request)
    return request


def _read_messages(values: dict[str, Any]) -> None:
    """Takes what asks for nothing out of the messages; content that is `null` is empty."""
    messages = values.get("messages")
    if not isinstance(messages, list):
        return
    values["messages"] = [
        ({"content": ""} if "content" in message else {}) | _fields(message, IN_MESSAGE, Message, f"messages.{index}.")
        if isinstance(message, dict)
        else message
        for index, message in enumerate(messages)
    ]


def _fields(values: dict[str, Any], table: Table, kind: type[_Strict], path: str) -> dict[str, Any]:
    """The fields of `kind` that an object within a request sets.

    Raises:
        ApiError: 400, for the first that is unsupported or unknown.
    """
    fields = without_unsupported(values, table, kind.model_fields, path)
    for name in fields:
        if name not in kind.model_fields:
            param = f"{path}{name[:80]}"
            raise ApiError(
                400, f"`{param}` is no field that is known here. Leave it out.", param=param, code="invalid_value"
            )
    return fields


def _check_together(request: GenerationRequest) -> None:
    """Names and sizes of the settings, and parameters that exclude each other."""
    lengths = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(lengths) > 1:
        raise ApiError(
            400,
            f"`max_tokens` and `max_completion_tokens` are one thing (got {request.max_tokens} and "
            f"{request.max_completion_tokens}). Send one of them.",
            param="max_tokens",
            code="invalid_value",
        )
    if request.stream_options is not None and request.stream_options.include_usage and not request.stream:
        raise ApiError(
            400, "`stream_options` needs `stream: true`. Leave it out.", param="stream_options", code="invalid_value"
        )
    schema_of(request.response_format, request.stop, request.d3llm)
    for name, value in request.d3llm.items():
        param = f"d3llm.{name}"
        if name == "drafts":
            if not isinstance(value, bool) or (value and not request.stream):
                raise ApiError(
                    400, "`d3llm.drafts` must be true or false, and true needs `stream: true`.", param=param,
                    code="invalid_value",
                )  # fmt: skip
        elif name not in SETTINGS:
            raise _unknown(name, [*SETTINGS, "drafts"], "in `d3llm` is no setting that a request may choose")
        if name in OPTIONS:
            types, rule, holds = OPTIONS[name]
            if not isinstance(value, types) or isinstance(value, bool) or not holds(value):
                raise ApiError(
                    400, f"`{param}` must be {rule} (got {shown(value)}).", param=param, code="invalid_value"
                )
        largest = LARGEST.get(name, 2**31 - 1)
        if isinstance(value, int) and abs(value) > largest:
            raise ApiError(
                400, f"`{param}` must be at most {largest} (got {shown(value)}).", param=param, code="invalid_value"
            )


def _unknown(name: str, known: list[str], what: str) -> ApiError:
    name = name[:80]
    near = difflib.get_close_matches(name, known, n=1)
    if name in SETTINGS and name not in known:
        hint = f'Settings of decoding go into `d3llm`: {{"d3llm": {{"{name}": ...}}}}.'
    else:
        hint = f"Did you mean `{near[0]}`?" if near else f"Known are {', '.join(sorted(known))}."
    return ApiError(400, f"`{name}` {what}. {hint}", param=name, code="unknown_parameter")
