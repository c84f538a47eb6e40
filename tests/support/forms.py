"""Forms and schemas that hypothesis draws, and a random model that speaks bytes to fill them."""

import math
from functools import cache
from typing import Any

from hypothesis import strategies as st
from official import VOCABULARY, tiny_tokenizer
from tiny import tiny_model

from d3llm_hf.forms import holes


@cache
def tokenizer():
    """A byte-level tokenizer, shared by the tests: its vocabulary is read once."""
    return tiny_tokenizer()


@cache
def model(family: str = "llada", seed: int = 0):
    """A random model of the tokenizer's vocabulary."""
    made = tiny_model(family, seed, vocab_size=VOCABULARY, layers=1, spread=4.0)
    made.generation_config.eos_token_id = made.generation_config.pad_token_id = tokenizer().eos_token_id
    return made


NAMES = st.text('abcé "\\{}', min_size=1, max_size=5)
VALUES = st.one_of(st.none(), st.booleans(), st.integers(-99, 99), st.text('ab"\\\né', max_size=4))


@st.composite
def _strings(draw) -> dict[str, Any]:
    least = draw(st.integers(0, 3))
    schema: dict[str, Any] = {"type": "string"} | ({"minLength": least} if least else {})
    return schema | ({"maxLength": least + draw(st.integers(0, 5))} if draw(st.booleans()) else {})


@st.composite
def _numbers(draw) -> dict[str, Any]:
    kind = draw(st.sampled_from(["integer", "number"]))
    least = draw(st.integers(-300, 300)) / draw(st.sampled_from([1, 4]))
    schema: dict[str, Any] = {"type": kind}
    if draw(st.booleans()):
        schema[draw(st.sampled_from(["minimum", "exclusiveMinimum"]))] = least
    if draw(st.booleans()):
        most = math.ceil(least) + draw(st.integers(3, 200))
        schema[draw(st.sampled_from(["maximum", "exclusiveMaximum"]))] = most
    return schema


LEAVES = st.one_of(
    _strings(),
    _numbers(),
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.just({"type": ["string", "null"], "maxLength": 3}),
    st.lists(VALUES, min_size=1, max_size=4).map(lambda values: {"enum": values}),
    VALUES.map(lambda value: {"const": value}),
)


def _nested(inner):
    objects = st.dictionaries(NAMES, inner, max_size=3).map(
        lambda found: {"type": "object", "properties": found, "required": list(found), "additionalProperties": False}
    )
    bounds = st.tuples(st.integers(0, 2), st.integers(0, 2))
    arrays = st.builds(
        lambda item, bound: {"type": "array", "items": item, "minItems": bound[0], "maxItems": sum(bound)},
        inner,
        bounds,
    )
    return st.one_of(objects, arrays, st.lists(inner, min_size=1, max_size=2).map(lambda all_: {"anyOf": all_}))


def schemas() -> st.SearchStrategy:
    """JSON schemas of what a form can hold; at times one that leaves nothing open."""
    return st.recursive(LEAVES, _nested, max_leaves=4)


TYPED = {
    "text": (lambda: holes.text(4, most=5), lambda found: len(found) <= 5 and min(found, default=" ") >= " "),
    "string": (
        lambda: holes.string(5, least=1),
        lambda found: len(found) >= 1 and '"' not in found.replace('\\"', ""),
    ),
    "integer": (lambda: holes.integer(-12, 340), lambda found: str(int(found)) == found and -12 <= int(found) <= 340),
    "number": (lambda: holes.number(-0.5, 3.25), lambda found: -0.5 <= float(found) <= 3.25),
    "one_of": (lambda: holes.one_of(["yes", "no", "né"]), lambda found: found in ("yes", "no", "né")),
}
"""Name -> a hole of that type, and whether a text may stand in it."""


def forms() -> st.SearchStrategy:
    """Lists of given texts and names of `TYPED`, of which there is at least one."""
    return st.lists(st.one_of(NAMES, st.sampled_from(sorted(TYPED))), min_size=1, max_size=4).filter(
        lambda parts: any(part in TYPED for part in parts)
    )


def valid(schema: dict[str, Any], value: Any) -> bool:
    """Whether a value is what a drawn schema asks for, by the definition of each keyword (JSON Schema 2020-12)."""
    if "anyOf" in schema:
        return any(valid(each, value) for each in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return any(type(value) is type(each) and value == each for each in schema.get("enum", [schema.get("const")]))
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    return any(_is_valid(kind, schema, value) for kind in kinds)


def _is_valid(kind: str, schema: dict[str, Any], value: Any) -> bool:
    if kind == "null":
        return value is None
    if kind == "boolean":
        return isinstance(value, bool)
    if kind == "string":
        return isinstance(value, str) and schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", math.inf)
    if kind in ("integer", "number"):
        if type(value) not in ((int,) if kind == "integer" else (int, float)):
            return False
        inside = schema.get("minimum", -math.inf) <= value <= schema.get("maximum", math.inf)
        inside &= schema.get("exclusiveMinimum", -math.inf) < value < schema.get("exclusiveMaximum", math.inf)
        return inside
    if kind == "array":
        long = isinstance(value, list) and schema["minItems"] <= len(value) <= schema["maxItems"]
        return long and all(valid(schema["items"], each) for each in value)
    names = schema["properties"]
    return isinstance(value, dict) and list(value) == list(names) and all(valid(names[n], value[n]) for n in names)
