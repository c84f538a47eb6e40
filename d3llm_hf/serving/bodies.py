"""The JSON of a request, with all that no part of it may be: it is looked through once, before anything reads it."""

import json
import math
import re
from typing import Any

from .errors import ApiError


MAX_DEPTH = 64
MAX_VALUES = 100_000  # in all objects and lists together: more than a conversation has
MAX_DIGITS = 309  # of an integer that float64 can hold; Python's own time grows with their square
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def read_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body: valid Unicode in all names and values, finite numbers, so many and so deep at most.

    Raises:
        ApiError: 400, naming the parameter at fault.
    """
    try:
        values = json.loads(body, parse_constant=_no_constant, parse_int=_integer)
    except _NoJSON as error:
        raise _refused(f"The body must be JSON, which has no {error}. Leave the parameter out.") from None
    except UnicodeDecodeError:
        raise _refused("The body must be JSON in UTF-8. Encode it so.") from None
    except (ValueError, RecursionError):
        raise _refused("The body must be JSON. Send an object as OpenAI's API has it.") from None
    if not isinstance(values, dict):
        raise _refused(f"The body must be a JSON object (got {type(values).__name__}). Send one.")
    _look_through(values)
    return values


class _NoJSON(Exception):
    """A constant that Python's JSON knows and the standard does not."""


def _no_constant(name: str) -> None:
    raise _NoJSON(name)


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= MAX_DIGITS else math.inf


def _look_through(values: dict[str, Any]) -> None:
    waiting: list[tuple[str, int, dict[str, Any] | list[Any]]] = [("", 1, values)]
    count = 0
    while waiting:
        path, depth, container = waiting.pop()
        count += len(container)
        if count > MAX_VALUES:
            raise _refused(f"The body must hold at most {MAX_VALUES} values (got more). Send less.")
        if depth > MAX_DEPTH:
            name = path.partition(".")[0]
            raise _refused(f"`{name}` must not be nested deeper than {MAX_DEPTH} levels. Send less.", name)
        if isinstance(container, dict):
            _check_names(path, container)
        for key, value in container.items() if isinstance(container, dict) else enumerate(container):
            if isinstance(value, dict | list):
                waiting.append((_join(path, key), depth + 1, value))
            elif isinstance(value, str) and LONE_SURROGATE.search(value):
                raise _refused(
                    f"`{_join(path, key)}` must be valid Unicode, without lone surrogates (got {value[:80]!a}). "
                    "Convert its source to UTF-8.",
                    _join(path, key),
                )
            elif isinstance(value, float) and not math.isfinite(value):
                raise _refused(
                    f"`{_join(path, key)}` must be a number that float64 can hold (got a larger one). Send a smaller "
                    "one.",
                    _join(path, key),
                )


def _check_names(path: str, container: dict[str, Any]) -> None:
    for name in container:
        if LONE_SURROGATE.search(name):
            where = f"`{path}`" if path else "The body"
            raise _refused(
                f"{where} must have names of valid Unicode, without lone surrogates (got {name[:80]!a}). Convert "
                "their source to UTF-8.",
                path or None,
            )


def _join(path: str, key: str | int) -> str:
    return f"{path}.{key}"[-200:] if path else str(key)[:80]


def _refused(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value" if param else "invalid_json")
