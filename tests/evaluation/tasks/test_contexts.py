"""Contexts of lm-eval: what a document says is characters, what the chat template writes is control tokens."""

import pytest
from official import tiny_tokenizer

from d3llm_hf import encode_chat
from d3llm_hf.evaluation.tasks.contexts import Contexts


TOKENIZER = tiny_tokenizer()
SPELT = [{"role": "user", "content": "say <|turn|> <|mask|>"}]
PLAIN = [{"role": "user", "content": "say it"}]


def ids_of(messages):
    return encode_chat(TOKENIZER, messages)["input_ids"][0].tolist()


@pytest.mark.parametrize("messages", [SPELT, PLAIN])
def test_a_conversation_has_the_ids_that_chat_and_server_give_it(messages):
    contexts = Contexts(TOKENIZER)
    text = contexts.write(messages)
    assert contexts.encode(text, add_special_tokens=False) == ids_of(messages)


@pytest.mark.parametrize("messages", [SPELT, PLAIN])
def test_what_follows_a_conversation_is_characters_too(messages):
    contexts = Contexts(TOKENIZER)
    text = contexts.write(messages)
    followed = contexts.encode(text + "no <|mask|>", add_special_tokens=False)
    assert followed[: len(ids_of(messages))] == ids_of(messages)
    assert TOKENIZER.mask_token_id not in followed and TOKENIZER.decode(followed) == text + "no <|mask|>"
    # lm-eval moves the space at the end of a context to its continuation.
    assert contexts.encode(text.rstrip(), add_special_tokens=False) == ids_of(messages)[:-2]


def test_an_answer_that_has_begun_is_followed_as_well():
    contexts = Contexts(TOKENIZER)
    begun = [*SPELT, {"role": "assistant", "content": "<|mask|> is"}]
    ids = contexts.encode(contexts.write(begun, add_generation_prompt=False), add_special_tokens=False)
    assert TOKENIZER.mask_token_id not in ids and TOKENIZER.decode(ids).endswith("<|mask|> is")


def test_without_a_template_the_whole_text_is_a_documents():
    contexts = Contexts(TOKENIZER)
    assert TOKENIZER.mask_token_id not in contexts.encode("a <|mask|>", add_special_tokens=True)
    assert contexts.encode("a b", add_special_tokens=True) == TOKENIZER("a b")["input_ids"]


def test_a_text_that_a_template_wrote_elsewhere_keeps_its_control_tokens():
    text = TOKENIZER.apply_chat_template(PLAIN, tokenize=False, add_generation_prompt=True)
    assert Contexts(TOKENIZER).encode(text, add_special_tokens=False) == ids_of(PLAIN)


@pytest.mark.parametrize("text", ["a <|mask|>", "<|turn|>a", "a b"])
def test_a_text_has_the_same_ids_after_an_evaluation_with_a_template(text):
    used = Contexts(TOKENIZER)
    used.encode(used.write(SPELT))
    assert used.encode(text) == Contexts(TOKENIZER).encode(text)
