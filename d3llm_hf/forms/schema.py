"""A JSON schema as a form: what the schema fixes is given text, what it leaves open is a hole.

Of JSON Schema (draft 2020-12) this is the part that a form can hold by construction: objects with the properties that
they name, arrays, strings, integers, numbers, booleans, null, `enum`, `const`, `anyOf`, and references without a loop.
All other keywords that demand something are refused by name. The text is spaced as Python's `json.dumps` spaces it.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Any

from ..models.plain_values import plain
from .form import Form
from .holes import SLOTS, Hole, count, json_one_of, language_of, number, string, weight_of
from .languages import Either, Repeated, optional, sequence


MOST_ITEMS = 200
MOST_PIECES = 2000
"""Of a form, those within holes included."""

# Keywords that demand nothing.
ANNOTATIONS = {
    "title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$schema", "$id", "$comment",
    "$defs", "definitions",
}  # fmt: skip
# Type -> keywords that are kept. An object is written with all of its properties and no others.
KEPT = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "minItems", "maxItems"},
    "string": {"minLength", "maxLength"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "boolean": set(),
    "null": set(),
}
WAYS_OUT = {
    "pattern": "Use `enum`, or `maxLength` and check the text yourself.",
    "format": "Leave it out and check the text yourself.",
    "multipleOf": 'Use "integer", or `enum`.',
    "oneOf": "Use `anyOf`.",
    "allOf": "Write its parts as one schema.",
    "uniqueItems": "Use an object with a property for each item.",
    "prefixItems": "Use an object with a property for each item.",
}

Parts = list[str | Hole]


def form_of_schema(schema: Mapping[str, Any], *, string_slots: int = SLOTS, decimals: int = 2) -> Form:
    """The form of a JSON schema.

    Args:
        schema: a mapping, as `json.loads` reads it.
        string_slots (`int`): positions of each string; fewer where its `maxLength` is less.
        decimals (`int`): digits behind the point of a "number", at most.

    Returns:
        [`Form`], whose fillings parse and are valid.

    Raises:
        TypeError: when `schema` is no mapping.
        ValueError: for what is no schema, for a keyword that no form can hold, named with its place and a way out, and
            for a schema that leaves nothing open.
    """
    if not isinstance(schema, Mapping):
        raise TypeError(f"`schema` must be a mapping (got {type(schema).__name__}). Read it with `json.loads`.")
    reader = _Reader(plain(dict(schema)), count("string_slots", string_slots, 1), decimals)
    return Form(_joined(reader.parts(reader.whole, "schema", ())))


def _check_size(pieces: int, path: str) -> None:
    if pieces > MOST_PIECES:
        raise ValueError(
            f"`{path}` must not need more than {MOST_PIECES} texts and holes (got {pieces}). Lower `maxItems`, or ask "
            "for less."
        )


def _joined(parts: Parts) -> Parts:
    """Neighbouring texts as one, which is tokenized as a whole."""
    joined: Parts = []
    for part in parts:
        if joined and isinstance(part, str) and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined


@dataclass(frozen=True)
class _Reader:
    whole: dict[str, Any]
    string_slots: int
    decimals: int

    def parts(self, schema: Any, path: str, within: tuple[str, ...]) -> Parts:
        """The parts of a schema at a place of the whole, within references that lead there."""
        if not isinstance(schema, dict):
            raise _refused(path, schema, "an object with a `type`", "Say what may stand there.")
        if "$ref" in schema:
            return self._referred(schema, path, within)
        for name, way_out in WAYS_OUT.items():
            if name in schema:
                raise _not_held(f"{path}.{name}", schema[name], way_out)
        for name, read in (("const", _const), ("enum", _enum)):
            if name in schema:
                _check_keywords(schema, {name, "type"}, path)
                return read(schema, path)
        if "anyOf" in schema:
            _check_keywords(schema, {"anyOf"}, path)
            options = schema["anyOf"]
            if not isinstance(options, list) or not options:
                raise _refused(f"{path}.anyOf", options, "a list of schemas", "Write at least one.")
            found = [self.parts(each, f"{path}.anyOf.{n}", within) for n, each in enumerate(options)]
            _check_size(sum(map(weight_of, found)), path)
            return _one_of(found)
        kinds = schema.get("type")
        listed: list[Any] = kinds if isinstance(kinds, list) and kinds else [kinds]
        for kind in listed:
            if not isinstance(kind, str) or kind not in KEPT:
                raise _refused(f"{path}.type", kind, f"one of {sorted(KEPT)}", "Say which values may stand there.")
        _check_keywords(schema, {"type"}.union(*(KEPT[kind] for kind in listed)), path)
        return _one_of([self._of_type(kind, schema, path, within) for kind in listed])

    def _referred(self, schema: dict[str, Any], path: str, within: tuple[str, ...]) -> Parts:
        _check_keywords(schema, {"$ref"}, path)
        name = schema["$ref"]
        if name in within:
            raise ValueError(
                f"`{path}.$ref` must not lead back to itself (got {name!r}): a form has an end. Write the levels that "
                "you need one within the other."
            )
        found: Any = self.whole
        steps = name.split("/") if isinstance(name, str) else []
        for step in steps[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            found = found.get(step) if isinstance(found, dict) else None
        if steps[:1] != ["#"] or not isinstance(found, dict):
            raise _refused(f"{path}.$ref", name, "a place of this schema such as '#/$defs/name'", "Write it out.")
        return self.parts(found, path, (*within, name))

    def _of_type(self, kind: str, schema: dict[str, Any], path: str, within: tuple[str, ...]) -> Parts:
        if kind == "object":
            return self._object(schema, path, within)
        if kind == "array":
            return self._array(schema, path, within)
        readers: dict[str, Callable[[dict[str, Any], str], Hole]] = {
            "string": self._string,
            "integer": lambda schema, path: _number(schema, path, 0),
            "number": lambda schema, path: _number(schema, path, self.decimals),
            "boolean": lambda schema, path: json_one_of([True, False]),
        }
        if kind == "null":
            return ["null"]
        hole = readers[kind](schema, path)
        return ['"', hole, '"'] if kind == "string" else [hole]

    def _object(self, schema: dict[str, Any], path: str, within: tuple[str, ...]) -> Parts:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, dict):
            raise _refused(f"{path}.properties", properties, "an object", "Name each property with its schema.")
        missing = [name for name in required if name not in properties] if isinstance(required, list) else [required]
        if missing:
            raise _refused(f"{path}.required", missing[0], "names of `properties`", "Say what that property holds.")
        parts: Parts = ["{"]
        for number_, (name, each) in enumerate(properties.items()):
            parts.append(f"{', ' if number_ else ''}{json.dumps(name, ensure_ascii=False)}: ")
            parts += self.parts(each, f"{path}.properties.{name}", within)
            _check_size(weight_of(parts), path)
        return [*parts, "}"]

    def _array(self, schema: dict[str, Any], path: str, within: tuple[str, ...]) -> Parts:
        least = _count(schema, "minItems", path, 0)
        most = _count(schema, "maxItems", path, None)
        if most is None or most > MOST_ITEMS or most < least:
            raise _refused(
                f"{path}.maxItems",
                most,
                f"from `minItems`, {least}, to {MOST_ITEMS}",
                "Say how long the array may be.",
            )
        if "items" not in schema and most:
            raise _refused(f"{path}.items", None, "a schema", "Say what the array holds.")
        item = self.parts(schema["items"], f"{path}.items", within) if most else []
        _check_size(most * (1 + weight_of(item)), path)
        if least == most:
            return ["[", *[part for n in range(most) for part in ([", "] if n else []) + item], "]"]
        one = language_of(item)
        several = sequence(one, Repeated(language_of([", ", *item]), max(least - 1, 0), most - 1))
        whole = tuple(part for n in range(most) for part in ([", "] if n else []) + item)
        return ["[", Hole(several if least else optional(several), (whole,)), "]"]

    def _string(self, schema: dict[str, Any], path: str) -> Hole:
        least, most = _count(schema, "minLength", path, 0), _count(schema, "maxLength", path, None)
        slots = self.string_slots if most is None else max(1, min(self.string_slots, most))
        try:
            return string(slots, least=least, most=most)
        except ValueError as error:
            raise ValueError(f"`{path}` must have a `minLength` and `maxLength` that fit: {error}") from None


def _one_of(variants: list[Parts]) -> Parts:
    """One of several lists of parts, as a single hole where there are several."""
    if len(variants) == 1:
        return variants[0]
    return [Hole(Either(tuple(map(language_of, variants))), tuple(map(tuple, variants)))]


def _number(schema: dict[str, Any], path: str, decimals: int) -> Hole:
    bounds: dict[str, Decimal] = {}
    for name in KEPT["number"] & schema.keys():
        value = schema[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e15:  # NaN, too
            raise _refused(f"{path}.{name}", value, "a number of at most 10^15", "Leave it out.")
        bounds[name] = Decimal(repr(value))
    unit = Decimal(1).scaleb(-decimals)
    low, high = [bounds.get("minimum")], [bounds.get("maximum")]
    if "exclusiveMinimum" in bounds:
        low.append(((bounds["exclusiveMinimum"] / unit).to_integral_value(ROUND_FLOOR) + 1) * unit)
    if "exclusiveMaximum" in bounds:
        high.append(((bounds["exclusiveMaximum"] / unit).to_integral_value(ROUND_CEILING) - 1) * unit)
    least = max((bound for bound in low if bound is not None), default=None)
    most = min((bound for bound in high if bound is not None), default=None)
    try:
        return number(least, most, decimals=decimals)  # type: ignore[arg-type]  # decimals are exact
    except ValueError as error:
        raise ValueError(f"`{path}` must have bounds that a number lies between: {error}") from None


def _const(schema: dict[str, Any], path: str) -> Parts:
    return [_written(schema["const"], schema, f"{path}.const")]


def _enum(schema: dict[str, Any], path: str) -> Parts:
    values = schema["enum"]
    if not isinstance(values, list) or not values:
        raise _refused(f"{path}.enum", values, "a list of values", "Write at least one.")
    texts = list(dict.fromkeys(_written(value, schema, f"{path}.enum") for value in values))
    return _one_of([[text] for text in texts])


def _written(value: Any, schema: dict[str, Any], path: str) -> str:
    """A value of `enum` or `const` as JSON, which has to be of the type that stands beside it."""
    kinds = schema.get("type", [])
    listed = kinds if isinstance(kinds, list) else [kinds]
    if listed and not any(kind in KEPT and _is(value, kind) for kind in listed):
        raise _refused(path, value, f"of the type that stands beside it, {kinds!r}", "Leave that value out.")
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except ValueError:
        raise _refused(path, value, "a value that JSON can hold", "Leave that value out.") from None
    return text


def _is(value: Any, kind: str) -> bool:
    types: dict[str, Any] = {
        "object": dict, "array": list, "string": str, "integer": int, "number": int | float, "boolean": bool,
        "null": type(None),
    }  # fmt: skip
    return isinstance(value, types[kind]) and (kind == "boolean" or not isinstance(value, bool))


def _count(schema: dict[str, Any], name: str, path: str, otherwise: Any) -> Any:
    value = schema.get(name, otherwise)
    if name in schema and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise _refused(f"{path}.{name}", value, "an integer of at least 0", "Leave it out.")
    return value


def _check_keywords(schema: dict[str, Any], known: set[str], path: str) -> None:
    """Refuses keywords that demand something which would not be kept."""
    for name in schema:
        if name not in known | ANNOTATIONS:
            raise _not_held(f"{path}.{name}", schema[name], "Leave it out.")


def _not_held(path: str, value: Any, way_out: str) -> ValueError:
    return ValueError(
        f"`{path}` must not be in a form's schema (got {value!r:.60}): here no form can promise it. {way_out}"
    )


def _refused(path: str, value: Any, rule: str, way_out: str) -> ValueError:
    return ValueError(f"`{path}` must be {rule} (got {value!r:.60}). {way_out}")
