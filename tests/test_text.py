"""User text never becomes a control token, and ordinary text is encoded as the tokenizer would."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from official import CHAT_TEMPLATE, SPECIAL_TOKENS, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from d3llm_hf import encode_chat, encode_infill, encode_text


TOKENIZER = tiny_tokenizer()
CONTROL = set(TOKENIZER.convert_tokens_to_ids(list(SPECIAL_TOKENS)))
HEADER, HEADER_END, TURN = TOKENIZER.convert_tokens_to_ids(["<|header|>", "<|/header|>", "<|turn|>"])
MESSY = st.lists(
    st.sampled_from([*SPECIAL_TOKENS, "<|", "a", " ", "\n", "é", "十", "assistant", "\ue0000\ue001"])
).map("".join)


def with_template(template: str):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@given(MESSY.filter(bool))
@settings(max_examples=60, deadline=None)
def test_plain_text_keeps_every_character_and_gains_no_control_token(text):
    ids = encode_text(TOKENIZER, text)["input_ids"][0].tolist()
    assert not CONTROL.intersection(ids)
    assert TOKENIZER.decode(ids, clean_up_tokenization_spaces=False) == text


@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), MESSY), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_a_conversation_has_exactly_the_control_tokens_of_its_template(turns):
    messages = [{"role": role, "content": content} for role, content in turns]
    ids = encode_chat(TOKENIZER, messages)["input_ids"][0].tolist()
    expected = [HEADER, HEADER_END, TURN] * len(turns) + [HEADER, HEADER_END]
    assert [token for token in ids if token in CONTROL] == expected
    rendered = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert TOKENIZER.decode(ids, clean_up_tokenization_spaces=False) == rendered


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_an_ordinary_conversation_is_encoded_as_the_tokenizer_does(add_generation_prompt):
    messages = [{"role": "user", "content": " What is 3 + 4?\n"}, {"role": "assistant", "content": "7"}]
    encoding = encode_chat(TOKENIZER, messages, add_generation_prompt=add_generation_prompt)
    expected = TOKENIZER.apply_chat_template(
        messages, add_generation_prompt=add_generation_prompt, return_tensors="pt", return_dict=True
    )
    assert encoding["input_ids"].tolist() == expected["input_ids"].tolist()
    assert encoding["attention_mask"].tolist() == expected["attention_mask"].tolist()


def test_a_template_that_rewrites_messages_refuses_only_control_tokens():
    shouting = with_template(CHAT_TEMPLATE.replace("| trim", "| upper"))
    assert encode_chat(shouting, [{"role": "user", "content": "hello"}])["input_ids"].shape[0] == 1
    with pytest.raises(ValueError, match="`content` must not hold special tokens with this chat template"):
        encode_chat(shouting, [{"role": "user", "content": "hello<|turn|>"}])
    nosy = with_template(CHAT_TEMPLATE + "{% if '<|turn|>' in messages[0]['content'] %}!{% endif %}")
    with pytest.raises(ValueError, match="`content` must not hold special tokens with this chat template"):
        encode_chat(nosy, [{"role": "user", "content": "hello<|turn|>"}])


def test_what_cannot_be_encoded_is_refused():
    with pytest.raises(ValueError, match="`messages` must hold at least one turn"):
        encode_chat(TOKENIZER, [])
    turn = {"role": "user", "content": "x"}
    for wrong, hint in (
        ("hi", "got str.*`encode_text`"),
        (turn, "sequence of turns .got dict"),
        (None, "sequence of turns .got NoneType"),
        (3, "sequence of turns .got int"),
        (["hi"], "hold turns .got str"),
        ([[turn]], "one conversation .got a batch of 1"),
        ([[turn], [turn]], "a batch of 2.*one by one"),
    ):
        with pytest.raises(TypeError, match=f"`messages` must .*{hint}"):
            encode_chat(TOKENIZER, wrong)
    with pytest.raises(ValueError, match="`tokenizer` must have a chat template"):
        encode_chat(with_template(None), [{"role": "user", "content": "x"}])
    with pytest.raises(TypeError, match=r"`content` must be a string .got list"):
        encode_chat(TOKENIZER, [{"role": "user", "content": [{"type": "image"}]}])
    with pytest.raises(ValueError, match="`role` must not hold a special token"):
        encode_chat(TOKENIZER, [{"role": "user<|/header|>", "content": "x"}])
    with pytest.raises(TypeError, match=r"`text` must be a string .got NoneType"):
        encode_text(TOKENIZER, None)
    with pytest.raises(ValueError, match="`text` must not be empty"):
        encode_text(TOKENIZER, "")


def test_a_tokenizer_that_cannot_split_special_tokens_refuses_them():
    class Unsplitting:
        def __getattr__(self, name):
            return getattr(TOKENIZER, name)

        def __call__(self, text, split_special_tokens=False, **kwargs):
            return TOKENIZER(text, **kwargs)

    assert encode_text(Unsplitting(), "fine")["input_ids"].shape == (1, 4)
    with pytest.raises(ValueError, match="cannot split them"):
        encode_text(Unsplitting(), "a<|mask|>b")


def test_a_text_with_gaps_has_mask_tokens_in_them_and_plain_text_between():
    encoding = encode_infill(TOKENIZER, ["ab", 2, "<|mask|>c", 1, ""])
    ids, holes = encoding["input_ids"], encoding["infill_mask"]
    assert encoding["attention_mask"].tolist() == [[1] * ids.shape[1]]
    assert holes.dtype == torch.bool
    assert (ids == TOKENIZER.mask_token_id).tolist() == holes.tolist()
    assert holes.sum() == 3
    assert holes[0].nonzero()[:, 0].tolist() == [2, 3, ids.shape[1] - 1]
    assert TOKENIZER.decode(ids[~holes], clean_up_tokenization_spaces=False) == "ab<|mask|>c"
    assert not CONTROL.intersection(ids[~holes].tolist())
    other = encode_infill(TOKENIZER, (1, "x"), mask_token_id=7)
    assert other["input_ids"][0, 0] == 7
    assert other["infill_mask"].tolist() == [[True, False]]


def test_what_a_tokenizer_puts_around_a_text_goes_around_the_whole():
    tokenizer = tiny_tokenizer()
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A <|end|>", special_tokens=[("<|start|>", start), ("<|end|>", end)]
    )
    encoding = encode_infill(tokenizer, [1, "ab", 2])
    mask = tokenizer.mask_token_id
    letters = tokenizer("ab", add_special_tokens=False)["input_ids"]
    assert encoding["input_ids"].tolist() == [[start, mask, *letters, mask, mask, end]]
    assert encoding["infill_mask"].tolist() == [[False, True, False, False, True, True, False]]
    rest = encode_infill(tokenizer, [1, "ab", 2], add_special_tokens=False)
    assert rest["input_ids"].tolist() == [[mask, *letters, mask, mask]]


def test_texts_that_cannot_have_gaps_are_refused():
    with pytest.raises(TypeError, match=r"`parts` must be a sequence of strings and integers .got str"):
        encode_infill(TOKENIZER, "Paris is")
    for wrong in (2.0, True, None):
        with pytest.raises(TypeError, match=f"strings and integers only .got {type(wrong).__name__}"):
            encode_infill(TOKENIZER, ["a", wrong])
    with pytest.raises(ValueError, match=r"gaps of at least one position .got 0"):
        encode_infill(TOKENIZER, ["a", 0])
    with pytest.raises(ValueError, match="`parts` must hold at least one gap"):
        encode_infill(TOKENIZER, ["a", "b"])
    tokenizer = tiny_tokenizer()
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match="`mask_token_id` must be given"):
        encode_infill(tokenizer, ["a", 1])
