"""Languages over bytes hold exactly what they say, and the automaton over tokens the same texts in all their cuts."""

import json
from decimal import Decimal
from itertools import product

import forms
import pytest
import torch
from drawn import examples
from hypothesis import given
from hypothesis import strategies as st

from d3llm_hf.forms.automata import byte_automaton, token_automaton
from d3llm_hf.forms.languages import (
    JSON_CHARACTER,
    Either,
    OneOf,
    Repeated,
    Sequence,
    characters,
    literal,
    optional,
    sequence,
)
from d3llm_hf.forms.numbers import numbers
from d3llm_hf.forms.vocabulary import Vocabulary, vocabulary_of_tokenizer


def holds(automaton, text: bytes) -> bool:
    following, accepting, class_of_byte = automaton
    state = 0
    for byte in text:
        state = following[state, class_of_byte[byte]]
    return bool(accepting[state])


@pytest.mark.parametrize("least, most", [(-25, 130), (0, 9), (7, 7), (-120, -99), (-1, 0), (95, 1003), (3, 2)])
def test_a_range_of_integers_holds_them_and_no_other_spelling(least, most):
    automaton = byte_automaton(numbers(Decimal(least), Decimal(most)))
    assert all(holds(automaton, str(n).encode()) == (least <= n <= most) for n in range(-1300, 1300))
    assert not any(holds(automaton, text) for text in (b"", b"-", b"-0", b"007", b"+7", b"7.0", b" 7"))


def test_a_range_of_decimals_holds_them_with_as_many_digits_as_are_allowed():
    least, most = Decimal("-1.25"), Decimal("10.5")
    automaton = byte_automaton(numbers(least, most, 2))
    for digits, n in product(range(4), range(-1300, 1300)):
        value = Decimal(n).scaleb(-digits)
        text = f"{value:.{digits}f}"
        wanted = digits <= 2 and least <= value <= most and (n != 0 or text[0] != "-")
        assert holds(automaton, text.encode()) == wanted, text


SIGNS = 'a"é€\U0001f642\ud800\x1f\x7f'


@examples(100)
@given(
    st.one_of(
        st.binary(max_size=4),
        st.text(SIGNS, max_size=3).map(lambda text: text.encode("utf-8", "surrogatepass")),
    )
)
def test_characters_are_those_of_utf_8(text):
    try:
        wanted = all(ord(sign) >= 0x20 and sign not in '\x7f"' for sign in text.decode())
    except UnicodeDecodeError:
        wanted = False
    assert holds(byte_automaton(Repeated(characters(without='"'))), text) == wanted


@examples(100)
@given(st.text('ab"\\né\n/', max_size=4))
def test_json_strings_are_what_json_reads_but_for_numbered_characters(text):
    automaton = byte_automaton(Repeated(JSON_CHARACTER, 1, 3))
    try:
        read = json.loads(f'"{text}"')
    except ValueError:
        read = ""
    assert holds(automaton, text.encode()) == (1 <= len(read) <= 3)


@st.composite
def languages(draw, depth: int = 3):
    if not depth:
        return draw(st.sampled_from([OneOf(frozenset(b"a")), OneOf(frozenset(b"ab")), literal("ba"), literal("")]))
    inner = languages(depth - 1)
    kind = draw(st.integers(0, 3))
    if kind == 0:
        least = draw(st.integers(0, 2))
        return Repeated(draw(inner), least, draw(st.sampled_from([None, least, least + 2])))
    parts = tuple(draw(st.lists(inner, max_size=3)))
    return Sequence(parts) if kind == 1 else Either(parts) if kind == 2 else optional(draw(inner))


def texts_of(language, longest: int) -> set[bytes]:
    """All texts of a language up to a length, by the definition of its parts."""
    if isinstance(language, OneOf):
        return {bytes([byte]) for byte in language.bytes}
    if isinstance(language, Either):
        return set().union(*(texts_of(part, longest) for part in language.parts))
    if isinstance(language, Sequence):
        found = {b""}
        for part in language.parts:
            found = {a + b for a in found for b in texts_of(part, longest) if len(a + b) <= longest}
        return found
    part = texts_of(language.part, longest)
    rounds = [{b""}]
    for _ in range(longest + 3 if language.most is None else language.most):
        rounds.append({a + b for a in rounds[-1] for b in part if len(a + b) <= longest})
    return set().union(*rounds[language.least :])


LETTERS = Vocabulary(((0, b"a"), (1, b"b"), (2, b"ab"), (3, b"ba"), (5, b"abc")), 7, 6)  # 4 is a control token


@examples(80)
@given(languages())
def test_an_automaton_over_tokens_holds_every_cut_of_every_text_with_end_tokens_behind_it(language):
    automaton, texts = token_automaton(language, LETTERS), texts_of(language, 6)
    words = dict(LETTERS.texts)
    rows = list(product(range(7), repeat=3))
    table = torch.tensor(rows)
    found = automaton.can_end(table, torch.ones_like(table).bool()).tolist()
    for tokens, holds_it in zip(rows, found, strict=True):
        content = tokens[: tokens.index(6)] if 6 in tokens else tokens
        known = all(token in words for token in content) and set(tokens[len(content) :]) <= {6}
        wanted = known and b"".join(words[token] for token in content) in texts
        assert holds_it == wanted, (tokens, language)


@pytest.mark.full
def test_a_language_of_too_many_states_is_refused_before_it_takes_long():
    with pytest.raises(ValueError, match=r"at most 10000 states \(got one with more\). Lower the maximum"):
        byte_automaton(Repeated(Repeated(JSON_CHARACTER, 0, 1000), 0, 100))
    with pytest.raises(ValueError, match="at most 10000 states"):
        byte_automaton(
            sequence(Repeated(OneOf(frozenset(b"ab"))), literal("a"), Repeated(OneOf(frozenset(b"ab")), 14, 14))
        )


def test_the_vocabulary_has_the_bytes_of_every_token_that_texts_are_made_of():
    tokenizer = forms.tokenizer()
    mask = tokenizer.mask_token_id
    vocabulary = vocabulary_of_tokenizer(tokenizer, mask_token_id=mask)
    text = 'né "x"\t\n🙂'
    ids = tokenizer(text)["input_ids"]
    assert b"".join(dict(vocabulary.texts)[token] for token in ids).decode() == text
    assert {b for _, b in vocabulary.texts if len(b) == 1} == {bytes([byte]) for byte in range(256)}
    assert not {token for token, _ in vocabulary.texts} & set(tokenizer.added_tokens_decoder)
    assert vocabulary_of_tokenizer(tokenizer, mask_token_id=mask) is vocabulary
    less = vocabulary_of_tokenizer(tokenizer, mask_token_id=5, end_token_id=507, vocab_size=509)
    assert {token for token, _ in less.texts} == set(range(506)) - {5} and less.end_token_id == 507


def test_other_tokenizers_and_end_tokens_are_refused():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = forms.tokenizer()
    with pytest.raises(TypeError, match=r"`tokenizer` must be a fast tokenizer \(got str\)"):
        vocabulary_of_tokenizer("gpt2", mask_token_id=1)
    for end in (5, tokenizer.mask_token_id):
        with pytest.raises(
            ValueError, match=rf"`end_token_id` must be a special token of the model, not the mask .* \(got {end}\)"
        ):
            vocabulary_of_tokenizer(tokenizer, mask_token_id=tokenizer.mask_token_id, end_token_id=end)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")), eos_token="<e>")
    with pytest.raises(TypeError, match=r"must be a byte-level BPE \(got a model of type 'WordLevel'\)"):
        vocabulary_of_tokenizer(words, mask_token_id=0)
