"""`response_format`: a JSON schema that the answer holds by construction, filled in as a form."""

from typing import Any

from ..forms.filling import mask_of, vocabulary_of_model
from ..forms.form import LaidOut, lay_out
from ..forms.schema import form_of_schema
from .errors import ApiError


# Settings that change or end a text that is written freely; a form is filled to its end.
FREE_TEXT = ("drafts", "min_new_tokens", "no_repeat_ngram_size", "suffix_length")


def schema_of(asked: dict[str, Any] | None, stop: list[str], settings: dict[str, Any]) -> dict[str, Any] | None:
    """The schema that a request asks for, if any.

    Args:
        asked, stop, settings: its `response_format`, `stop` and `d3llm`.

    Raises:
        ApiError: 400, for another format, or beside parameters that a form has no use for.
    """
    if asked is None or asked == {"type": "text"}:
        return None
    inner = asked.get("json_schema")
    known = asked.keys() <= {"type", "json_schema"} and asked.get("type") == "json_schema"
    if not known or not isinstance(inner, dict) or not isinstance(inner.get("schema"), dict):
        raise _refused(
            '`response_format` must be `{"type": "text"}` or `{"type": "json_schema", "json_schema": {"name": ..., '
            '"schema": {...}}}`: any JSON whatever has no form. Send a schema, or ask for the format in a message and '
            "check the answer yourself."
        )
    for name in inner:
        if name not in ("name", "schema", "strict", "description"):
            raise _refused(f"`response_format.json_schema.{name[:80]}` is no field that is known here. Leave it out.")
    if stop:
        raise ApiError(
            400, "`stop` has no effect beside `response_format`: a form is filled to its end. Leave it out.",
            param="stop", code="invalid_value",
        )  # fmt: skip
    for name in FREE_TEXT:
        if settings.get(name):
            raise ApiError(
                400, f"`d3llm.{name}` does not go together with `response_format`. Leave one of them out.",
                param=f"d3llm.{name}", code="invalid_value",
            )  # fmt: skip
    return inner["schema"]


def layout_of(schema: dict[str, Any] | None, max_tokens: int | None, model, tokenizer, longest: int) -> LaidOut | None:
    """The form of a request on the positions that it needs, `None` for one that wants text.

    Args:
        schema: see [`schema_of`].
        max_tokens: of the request.
        longest: positions that it may have.

    Raises:
        ApiError: 400, for a schema that no form can hold, or one too long.
    """
    if schema is None:
        return None
    try:
        form, mask = form_of_schema(schema), mask_of(model, None)
        _check_size(sum(hole.width(tokenizer) for hole in form.holes), longest)  # before automata are made for them
        layout = lay_out(form, tokenizer, vocabulary_of_model(model, tokenizer, None, mask), mask)
    except (ValueError, TypeError) as error:
        raise _refused(str(error)) from None
    size = len(layout.ids)
    _check_size(size, longest)
    if max_tokens is not None and max_tokens < size:
        raise ApiError(
            400, f"`max_tokens` must be at least {size}, the tokens of this form (got {max_tokens}). Leave it out.",
            param="max_tokens", code="invalid_value",
        )  # fmt: skip
    return layout


def _check_size(size: int, longest: int) -> None:
    if size > longest:
        raise _refused(
            f"`response_format` must have a form of at most {longest} tokens on this server (got {size}). Lower its "
            "`maxLength` and `maxItems`."
        )


def _refused(message: str) -> ApiError:
    return ApiError(400, message, param="response_format", code="invalid_value")
