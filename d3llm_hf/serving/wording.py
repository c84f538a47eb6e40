"""What pydantic finds wrong with a request, in this server's words: parameter, rule, value and the way out."""

from typing import Any

from pydantic import ValidationError


KINDS = {
    "string_type": "string", "int_type": "integer", "int_from_float": "integer", "float_type": "number",
    "bool_type": "boolean", "list_type": "list", "dict_type": "object", "model_type": "object",
}  # fmt: skip

# Kind of error -> the rule, with the bounds that pydantic names.
RULES = {
    "missing": "must be given",
    "literal_error": "must be {expected}",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be greater than or equal to {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be less than or equal to {le}",
    "too_short": "must have at least {min_length}",
    "too_long": "must have at most {max_length}",
    "string_too_short": "must have at least {min_length} character",
    "string_too_long": "must have at most {max_length} characters",
}

WAYS_OUT = {
    "messages": 'Send turns as `{"role": "user", "content": "..."}`.',
    "role": "Write what else there is to say, such as a tool's result, into a user's message.",
    "content": 'Send text, or parts of `{"type": "text", "text": "..."}`.',
    "prompt": "Send one text in each request.",
    "model": "`GET /v1/models` names the one that is here.",
    "stop": "Send a string, or a few of them.",
    "d3llm": 'Send settings of decoding by name, such as `{"d3llm": {"block_length": 32}}`.',
}


def in_our_words(error: ValidationError) -> tuple[str, str]:
    """Name of the first parameter at fault, and what the client is told of it."""
    first = error.errors(include_url=False)[0]
    kind, context, place = first["type"], first.get("ctx", {}), first["loc"]
    name = ".".join(map(str, place))[:200]
    field = next((part for part in reversed(place) if isinstance(part, str)), "")
    if kind in KINDS:
        rule = f"must be a valid {KINDS[kind]}"
    elif kind in RULES:
        rule = RULES[kind].format(**context)
    else:  # a rule of ours, in its own words
        rule = first["msg"].removeprefix("Value error, ")
    got = "nothing" if kind == "missing" else shown(first["input"])
    return name, f"`{name}` {rule} (got {got}). {WAYS_OUT.get(field, 'Leave it out for what is usual here.')}"


def shown(value: Any) -> str:
    """A value, as far as it helps."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    shown = {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
    return shown if len(shown) <= 60 else shown[:60] + "..."
