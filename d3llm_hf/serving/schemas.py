"""What a request may say: the part of OpenAI's API that a diffusion model can keep, checked by name and value."""

import difflib
import json
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from ..models.generation_config_d3llm import FIELDS
from .errors import ApiError


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

LARGEST = {"draft_length": 16}
"""Bounds of settings that multiply the memory of a request."""

# Parameter of OpenAI's API -> values that ask for nothing, and the way out for the others.
UNSUPPORTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "n": ((1,), "Send one request for each answer, they are decoded together."),
    "best_of": ((1,), "Send one request for each answer, they are decoded together."),
    "echo": ((False,), "Put the prompt before the answer yourself."),
    "suffix": (("",), "Fill gaps with the library's `generate(infill_mask=...)`."),
    "logprobs": ((False,), "Positions are decided at different forwards; see `log_likelihood` of the library."),
    "top_logprobs": ((0,), "Positions are decided at different forwards; see `log_likelihood` of the library."),
    "logit_bias": (({},), "Leave it out."),
    "presence_penalty": ((0,), 'Use `{"d3llm": {"repetition_penalty": 1.1}}`.'),
    "frequency_penalty": ((0,), 'Use `{"d3llm": {"repetition_penalty": 1.1}}`.'),
    "tools": (([],), "Describe the tools in a message and read the answer yourself."),
    "tool_choice": (("none", "auto"), "Leave it out."),
    "parallel_tool_calls": ((True, False), "Leave it out."),
    "functions": (([],), "Describe the functions in a message and read the answer yourself."),
    "function_call": (("none", "auto"), "Leave it out."),
    "response_format": (({"type": "text"},), "Ask for the format in a message and check the answer yourself."),
    "modalities": ((["text"],), "Answers are text."),
    "audio": ((), "Answers are text."),
    "prediction": ((), "Leave it out."),
    "reasoning_effort": ((), "Leave it out."),
    "verbosity": ((), "Leave it out."),
    "web_search_options": ((), "Leave it out."),
    "service_tier": (("auto", "default"), "Leave it out."),
    "store": ((False,), "Nothing is stored here."),
    "metadata": (({},), "Nothing is stored here."),
}


def _unicode(text: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("must be valid Unicode, without lone surrogates")
    return text


def _without_nulls(value: Any) -> Any:
    """`null` is how clients say that they leave a parameter out."""
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


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


Text = Annotated[str, AfterValidator(_unicode)]
Given = TypeVar("Given", bound="GenerationRequest")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Strict):
    """`include_usage`: send a last chunk with the counts."""

    include_usage: bool = False


class Message(_Strict):
    """One turn. `developer` is OpenAI's newer name of the system's turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Text, BeforeValidator(_joined)]


class GenerationRequest(_Strict):
    """What both endpoints take; what is left out keeps the server's settings.

    Attributes:
        max_tokens, max_completion_tokens: length of the canvas, two names of one thing.
        temperature: 0 does not sample.
        seed: a request with a seed gets the same answer again.
        stop: strings that end the answer and are not part of it.
        user: taken and forgotten.
        d3llm: settings of `generate` (see `SETTINGS`), and `drafts: true` for draft events in a stream.
    """

    model: str
    max_tokens: int | None = Field(None, gt=0)
    max_completion_tokens: int | None = Field(None, gt=0)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_unicode)]],
        BeforeValidator(_listed),
        Field(max_length=16),
    ] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    d3llm: dict[str, Any] = {}


class ChatRequest(GenerationRequest):
    """`POST /v1/chat/completions`."""

    messages: list[Annotated[Message, BeforeValidator(_without_nulls)]] = Field(min_length=1)


class CompletionRequest(GenerationRequest):
    """`POST /v1/completions`."""

    prompt: Annotated[str, Field(min_length=1), AfterValidator(_unicode), BeforeValidator(_one_text)]


def parse(kind: type[Given], body: bytes) -> Given:
    """Reads the body of a request.

    Raises:
        ApiError: 400, naming the first parameter that is unknown, unsupported or wrong.
    """
    try:
        values = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise ApiError(
            400, "The body must be JSON. Send an object as OpenAI's API has it.", code="invalid_json"
        ) from None
    if not isinstance(values, dict):
        raise ApiError(400, f"The body must be a JSON object (got {type(values).__name__}).", code="invalid_json")
    values = _without_nulls(values)
    for name in list(values):
        if name in UNSUPPORTED and name not in kind.model_fields:
            neutral, way_out = UNSUPPORTED[name]
            if not _asks_nothing(values.pop(name), neutral):
                raise ApiError(
                    400,
                    f"`{name}` is not supported by this server. {way_out}",
                    param=name,
                    code="unsupported_parameter",
                )
        elif name not in kind.model_fields:
            raise _unknown(name, [*kind.model_fields], "is no parameter of this endpoint")
    try:
        request = kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        name = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise ApiError(400, f"`{name}`: {message}.", param=name, code="invalid_value") from None
    _check_together(request)
    return request


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _asks_nothing(value: Any, neutral: tuple[Any, ...]) -> bool:
    """Whether a value is one of the neutral ones; 0 is not False."""
    return any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in neutral)


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
    if request.stream_options is not None and not request.stream:
        raise ApiError(
            400, "`stream_options` needs `stream: true`. Leave it out.", param="stream_options", code="invalid_value"
        )
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
                raise ApiError(400, f"`{param}` must be {rule}.", param=param, code="invalid_value")
        largest = LARGEST.get(name, 2**31)
        if isinstance(value, int) and abs(value) > largest:
            raise ApiError(400, f"`{param}` must be at most {largest}.", param=param, code="invalid_value")


def _unknown(name: str, known: list[str], what: str) -> ApiError:
    near = difflib.get_close_matches(name, known, n=1)
    if name in SETTINGS and name not in known:
        hint = f'Settings of decoding go into `d3llm`: {{"d3llm": {{"{name}": ...}}}}.'
    else:
        hint = f"Did you mean `{near[0]}`?" if near else f"Known are {sorted(known)}."
    return ApiError(400, f"`{name[:80]}` {what}. {hint}", param=name[:80], code="unknown_parameter")
