"""Forms that are filled hold what their types allow, whatever the model, the method, the cache and the batch."""

import importlib
import importlib.util
import json

import forms
import pytest
import torch
from drawn import examples
from hypothesis import given
from hypothesis import strategies as st

from d3llm_hf.forms import holes
from d3llm_hf.forms.filling import fill, fill_batch
from d3llm_hf.forms.form import Form
from d3llm_hf.forms.schema import form_of_schema


METHODS = {
    "d3llm": {"decoding_method": "d3llm", "entropy_threshold": 2.0, "block_length": 5},
    "fast_dllm": {"decoding_method": "fast_dllm", "confidence_threshold": 0.3, "kv_cache": "dual", "block_length": 8},
    "dinfer": {"decoding_method": "dinfer", "decoder": "hierarchy", "low_threshold": 0.2, "block_length": 8},
    "entropy_bound": {"decoding_method": "entropy_bound", "entropy_bound": 3.0, "kv_cache": "delayed"},
    "local_leap": {"decoding_method": "local_leap", "kv_cache": "prefix", "block_length": 8},
    "dkv": {"decoding_method": "dkv", "block_length": 8},
    "llada": {"decoding_method": "llada", "steps": 4, "block_length": 64},
    "llada random": {"decoding_method": "llada", "remasking": "random", "steps": 5, "kv_cache": "dkv_greedy"},
    "llada lossless": {"decoding_method": "llada", "lossless": True, "block_length": 8},
    "vicinity": {"decoding_method": "dparallel", "entropy_threshold": 3.0, "kv_cache": "vicinity"},
    "dream": {"decoding_method": "dream", "steps": 4},
    "sampled": {"decoding_method": "d3llm", "do_sample": True, "temperature": 1.5, "entropy_threshold": 5.0},
}
FEW = {"decoding_method": "llada", "steps": 2, "block_length": 256}  # as many at once as can be


def filled(form, *, family="llada", seed=0, **settings):
    return fill(forms.model(family, seed), forms.tokenizer(), form, prompt="Q: ", **settings)


def has_holes(schema) -> bool:
    try:
        form_of_schema(schema)
    except ValueError as error:
        assert "at least one hole" in str(error)
        return False
    return True


def check_schema(schema, **settings):
    form = form_of_schema(schema, string_slots=6)
    found = json.loads(filled(form, **settings).text)
    assert forms.valid(schema, found)
    if importlib.util.find_spec("jsonschema"):  # an opinion that is not ours
        importlib.import_module("jsonschema").Draft202012Validator(schema).validate(found)


@examples(80)
@given(forms.schemas().filter(has_holes), st.sampled_from(sorted(METHODS)), st.integers(0, 9))
def test_fillings_of_schemas_parse_and_are_valid(schema, method, seed):
    check_schema(schema, seed=seed, **METHODS[method])


@pytest.mark.slow
@pytest.mark.full
@examples(2000)
@given(forms.schemas().filter(has_holes), st.sampled_from(["llada", "dream"]), st.integers(0, 99))
def test_many_schemas_are_filled_validly_with_many_positions_at_once(schema, family, seed):
    check_schema(schema, family=family, seed=seed, **FEW)


@examples(80)
@given(forms.forms(), st.sampled_from(sorted(METHODS)), st.integers(0, 9))
def test_typed_holes_hold_their_types_between_the_text_as_it_was_given(parts, method, seed):
    form = [forms.TYPED[part][0]() if part in forms.TYPED else part for part in parts]
    found = filled(form, seed=seed, **METHODS[method])
    texts = iter(found.holes)
    written = [next(texts) if part in forms.TYPED else part for part in parts]
    assert found.text == "".join(written)
    assert all(forms.TYPED[part][1](text) for part, text in zip(parts, written, strict=True) if part in forms.TYPED)
    assert found.form_tokens <= found.positions_computed


SCHEMA = {
    "type": "object",
    "properties": {
        "steps": {"type": "array", "items": {"type": "string", "maxLength": 6}, "maxItems": 2},
        "answer": {"type": "integer", "minimum": -5, "maximum": 120},
        "sure": {"type": "boolean"},
    },
}


@pytest.mark.every(64)
@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("method", METHODS)
def test_a_row_is_filled_in_a_batch_as_alone(method, family):
    model, tokenizer = forms.model(family), forms.tokenizer()
    other, form = ["Is it ", holes.one_of(["so", "not"]), "? ", holes.text(5)], form_of_schema(SCHEMA, string_slots=4)
    rows = [(form, "A question: "), (other, None), (form, "x"), (other, [{"role": "user", "content": "hm"}])]
    seeds = [3, 4, 5, 6]
    together = fill_batch(
        model, tokenizer, [f for f, _ in rows], prompts=[p for _, p in rows], seed=seeds, **METHODS[method]
    )
    for (form, prompt), seed, found in zip(rows, seeds, together, strict=True):
        assert fill(model, tokenizer, form, prompt=prompt, seed=[seed], **METHODS[method]) == found


def test_a_text_ends_where_the_model_goes_on_with_what_stands_behind_it():
    """A model that is sure of `ab` and then of the given line feed ends the text there, with the rest closed up."""
    from tiny import ScriptedModel, constant_script

    tokenizer = forms.tokenizer()
    answer = tokenizer("ab\nzzzz")["input_ids"]
    model = ScriptedModel(constant_script(answer, 1, vocab_size=512), 512, mask_token_id=tokenizer.mask_token_id)
    found = fill(model, tokenizer, ["{", holes.text(6), "\n"], decoding_method="llada")
    assert (found.text, found.holes) == ("{ab\n", ("ab",))


def test_a_text_of_several_lines_ends_where_the_model_goes_on_with_what_stands_behind_it():
    from tiny import ScriptedModel, constant_script

    tokenizer = forms.tokenizer()
    answer = tokenizer("ab\nc\n=7zzz")["input_ids"]
    model = ScriptedModel(constant_script(answer, 1, vocab_size=512), 512, mask_token_id=tokenizer.mask_token_id)
    wide, one, in_order = holes.text(8, lines=True), holes.text(8), {"decoding_method": "llada", "block_length": 1}
    assert fill(model, tokenizer, ["{", wide, "="], **in_order).text == "{ab\nc\n="
    assert "\n" not in fill(model, tokenizer, ["{", one, "="], **in_order).text
    with pytest.raises(ValueError, match="must not go on with a line feed behind a text of several lines"):
        Form([wide, "\n#### "])
    assert Form([one, "\n#### "]).holes == [one]
    with pytest.raises(TypeError, match="`lines` must be True or False"):
        holes.text(8, lines=1)


def test_token_ids_are_a_prompt_and_texts_may_be_empty():
    ids = forms.tokenizer()("Q: ")["input_ids"]
    form = ["", holes.text(3), ""]
    assert fill(forms.model(), forms.tokenizer(), form, prompt=ids) == filled(form)
    assert fill(forms.model(), forms.tokenizer(), form, prompt="").prompt_tokens == 0


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Form("a"), "`form` must be a sequence of texts and holes (got str)"),
        (lambda: Form(["a", 3]), "`form` must hold texts and holes only (got int)"),
        (lambda: Form(["a"]), "`form` must have at least one hole (got 1 texts)"),
        (lambda: Form(["\ud800", holes.text()]), "`form` must be valid Unicode"),
        (lambda: filled([holes.text(2, least=900)]), "`form` must have holes with room for one of their texts (got 2"),
        (lambda: holes.text(0), "`slots` must be at least 1 (got 0)"),
        (lambda: holes.text(2.5), "`slots` must be an integer (got 2.5)"),
        (lambda: holes.string(3, least=4, most=2), "`most` must be at least `least` (got 2 and 4)"),
        (lambda: holes.text(3, most=9999), "`least` and `most` must be at most 1000 characters (got 0 and 9999)"),
        (lambda: holes.integer(0.5), "`least` must be an integer (got 0.5)"),
        (lambda: holes.number("1"), "`least` must be a number (got '1')"),
        (lambda: holes.number(0, float("inf")), "`most` must lie between -9999999999999 and 9999999999999 (got inf)"),
        (lambda: holes.number(0.11, 0.19, decimals=1), "must have a number of 1 decimals between them (got 0.11"),
        (lambda: holes.number(decimals=7), "`decimals` must be at most 6 (got 7)"),
        (lambda: holes.one_of("yes"), "`options` must be a list of texts (got str)"),
        (lambda: holes.one_of(["a", 1]), "`options` must hold strings (got int)"),
        (lambda: holes.one_of(["a", "a"]), "`options` must be different texts, none of them empty (got ['a', 'a'])"),
        (lambda: filled([holes.text(2)], max_new_tokens=3), "`max_new_tokens` is no argument of `fill`"),
        (lambda: filled([holes.text(2)], infill=True), "`infill` is no argument of `fill`"),
        (lambda: filled([holes.text(2)], generation_config=1), "`generation_config` is no argument of `fill`"),
        (
            lambda: fill_batch(forms.model(), forms.tokenizer(), [[holes.text(2)]], prompts=[]),
            "`prompts` must be one for each form, of which there is at least one (got 0 for 1)",
        ),
    ],
)
def test_what_is_no_form_is_refused(make, message):
    with pytest.raises((TypeError, ValueError)) as error:
        make()
    assert message in str(error.value)


def test_a_model_without_a_mask_token_is_refused():
    from types import SimpleNamespace

    from transformers import PretrainedConfig

    bare = SimpleNamespace(generation_config=SimpleNamespace(), config=PretrainedConfig())
    with pytest.raises(ValueError, match="`mask_token_id` must name the token of an undecided position"):
        fill(bare, forms.tokenizer(), [holes.text(2)])


def test_numbers_of_numpy_and_torch_are_taken():
    import numpy as np

    assert holes.integer(np.int64(3), torch.tensor(9)) == holes.integer(3, 9)
    assert holes.text(np.int64(3)) == holes.text(3)
