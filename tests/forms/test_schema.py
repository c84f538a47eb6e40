"""JSON schemas as forms: what is read, and every refusal with its place and a way out."""

import json

import forms
import pytest

from d3llm_hf.forms.filling import fill
from d3llm_hf.forms.holes import Hole
from d3llm_hf.forms.schema import form_of_schema


def given(schema, **more) -> list[str]:
    """The parts of a form, holes as `?`."""
    return ["?" if isinstance(part, Hole) else part for part in form_of_schema(schema, **more).parts]


def test_what_a_schema_fixes_is_given_text():
    schema = {
        "title": "Answer",
        "type": "object",
        "properties": {
            "steps": {"type": "array", "items": {"type": "string", "maxLength": 5}, "minItems": 2, "maxItems": 2},
            "né": {"$ref": "#/$defs/kind"},
            "none": {"type": "null"},
            "k": {"const": {"a": [1]}},
            "more": {"type": "array", "items": {"type": "integer"}, "maxItems": 2},
            "empty": {"type": "array", "maxItems": 0},
            "nothing": {"type": "object"},
        },
        "required": ["steps"],
        "additionalProperties": False,
        "$defs": {"kind": {"enum": ["a", 1, None]}},
    }
    assert given(schema) == [
        '{"steps": ["', "?", '", "', "?", '"], "né": ', "?", ', "none": null, "k": {"a": [1]}, "more": [', "?",
        '], "empty": [], "nothing": {}}',
    ]  # fmt: skip


@pytest.mark.parametrize(
    "schema, message",
    [
        (True, "`schema` must be a mapping (got bool)"),
        ({}, "`schema.type` must be one of"),
        ({"type": "text"}, "`schema.type` must be one of"),
        ({"type": "string", "pattern": "a*"}, "`schema.pattern` must not be in a form's schema (got 'a*')"),
        ({"type": "string", "format": "date"}, "`schema.format` must not be in a form's schema"),
        ({"type": "string", "minimum": 3}, "`schema.minimum` must not be in a form's schema"),
        ({"oneOf": []}, "`schema.oneOf` must not be in a form's schema (got [])"),
        ({"type": "integer", "multipleOf": 2}, "`schema.multipleOf` must not be in a form's schema"),
        ({"anyOf": []}, "`schema.anyOf` must be a list of schemas (got [])"),
        ({"anyOf": [{"type": "string"}, 3]}, "`schema.anyOf.1` must be an object with a `type` (got 3)"),
        ({"enum": []}, "`schema.enum` must be a list of values (got [])"),
        ({"enum": ["a"], "maxLength": 3}, "`schema.maxLength` must not be in a form's schema (got 3)"),
        ({"enum": [1], "type": "string"}, "`schema.enum` must be of the type that stands beside it, 'string' (got 1)"),
        ({"const": float("nan")}, "`schema.const` must be a value that JSON can hold (got nan)"),
        ({"const": "\ud800"}, "`schema.const` must be a value that JSON can hold"),
        ({"type": "object", "properties": []}, "`schema.properties` must be an object (got [])"),
        ({"type": "object", "required": ["a"]}, "`schema.required` must be names of `properties` (got 'a')"),
        ({"type": "object", "properties": {"a": {"type": "x"}}}, "`schema.properties.a.type` must be one of"),
        ({"type": "array", "items": {"type": "null"}}, "must be from `minItems`, 0, to 200 (got None)"),
        ({"type": "array", "maxItems": 1, "minItems": 2}, "must be from `minItems`, 2, to 200 (got 1)"),
        ({"type": "array", "maxItems": 1}, "`schema.items` must be a schema (got None)"),
        ({"type": "array", "maxItems": 1.5}, "`schema.maxItems` must be an integer of at least 0 (got 1.5)"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "must have a `minLength` and `maxLength` that fit"),
        ({"type": "string", "maxLength": 5000}, "at most 1000 characters"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "`schema` must have bounds that a number lies between"),
        ({"type": "integer", "minimum": True}, "`schema.minimum` must be a number of at most 10^15 (got True)"),
        ({"type": "integer", "minimum": 1e300}, "`schema.minimum` must be a number of at most 10^15 (got 1e+300)"),
        ({"$ref": "#"}, "`schema.$ref` must not lead back to itself (got '#')"),
        ({"$ref": "other.json"}, "`schema.$ref` must be a place of this schema such as"),
        ({"$ref": "#/$defs/x"}, "`schema.$ref` must be a place of this schema"),
        ({"type": "null"}, "`form` must have at least one hole (got 1 texts)"),
    ],
)  # fmt: skip
def test_what_a_form_cannot_hold_is_refused_by_name(schema, message):
    with pytest.raises((ValueError, TypeError)) as error:
        form_of_schema(schema)
    assert message in str(error.value)


def test_a_schema_that_grows_beyond_measure_is_refused():
    schema = {"type": "null"}
    for _ in range(4):
        schema = {"type": "array", "items": schema, "minItems": 100, "maxItems": 100}
    with pytest.raises(ValueError, match=r"`schema.items.items` must not need more than 2000 texts and holes"):
        form_of_schema(schema)
    names = {f"p{n}": {"type": "array", "items": {"type": "null"}, "maxItems": 200} for n in range(12)}
    with pytest.raises(ValueError, match="`schema` must not need more than 2000 texts and holes"):
        form_of_schema({"type": "object", "properties": names})


@pytest.mark.parametrize("schema", [{"type": "integer", "exclusiveMinimum": 3, "minimum": 4.5, "exclusiveMaximum": 6}])
def test_bounds_of_all_kinds_hold_together(schema):
    assert json.loads(fill(forms.model(), forms.tokenizer(), form_of_schema(schema)).text) == 5
