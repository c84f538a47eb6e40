"""Conversations of a data set: what is learnt from a turn, what is refused, and text that spells a control token."""

import copy

import numpy as np
import pytest
from official import CHAT_TEMPLATE, tiny_tokenizer

from d3llm_hf import encode_chat
from trainers.common.rows import RowError
from trainers.sft.collator import to_messages, tokenize_conversations


TOKENIZER = tiny_tokenizer()
SPELT = "a <|mask|> and <|end|>"


def turn(role, content, **more):
    return {"role": role, "content": content} | more


def part(text):
    return {"type": "text", "text": text}


def with_template(template):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = template
    return tokenizer


def texts(messages, tokenizer=TOKENIZER, **chosen):
    ids = tokenize_conversations({"messages": [messages]}, tokenizer, **chosen)
    return tokenizer.decode(ids["prompt_ids"][0]), tokenizer.decode(ids["response_ids"][0])


# What a turn holds


@pytest.mark.parametrize("make", [list, tuple, lambda parts: np.array(parts, dtype=object)])
def test_text_in_parts_is_the_text_of_the_parts(make):
    parts = [turn("user", make([part("1 "), part("+ 2")])), turn("assistant", make([part("3")]))]
    assert to_messages({"messages": parts}) == [turn("user", "1 + 2"), turn("assistant", "3")]
    assert texts(parts) == texts([turn("user", "1 + 2"), turn("assistant", "3")])
    assert to_messages({"prompt": parts[:1], "completion": parts[1:]}) == to_messages({"messages": parts})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (turn("user", None), r"`content` must be text .got None in turn 0 of `messages`."),
        (turn("user", 3), r"`content` must be text .got 3 in"),
        (turn("user", []), r"`content` must be text .got \[\] in"),
        (turn("user", {"type": "text", "text": "a"}), r"`content` must be text .got \{'type'"),
        (turn("user", [{"type": "image", "url": "x"}]), r"parts of type 'text' .got \{'type': 'image'"),
        (turn("user", [part("a"), {"type": "text", "text": None}]), r"parts of type 'text' .got .*None"),
        (turn("user", ["a"]), r"parts of type 'text' .got 'a'"),
        (turn("user", "\ud800"), r"`content` must be valid Unicode"),
        ({"role": "user"}, r"A turn must have `role` and `content` .got \{'role': 'user'\} as turn 0"),
        ({"content": "a"}, r"A turn must have `role` and `content`"),
        ({"from": "human", "value": "a"}, r"Rename its keys, and roles such as `human` and `gpt`"),
        ("a", r"A turn must have `role` and `content` .got 'a'"),
        (None, r"A turn must have `role` and `content` .got None"),
        (turn(None, "a"), r"`role` must be one that the model is used with.* .got None in turn 0"),
        (turn("", "a"), r"`role` must be .* .got ''"),
        (turn(7, "a"), r"`role` must be .* .got 7"),
        (turn("human", "a"), r"`role` must be .* .got 'human'"),
        (turn("User", "a"), r"`role` must be .* .got 'User'"),
        (turn("user<|turn|>", "a"), r"`role` must not hold a special token"),
        (turn("user", "a", tool_calls=[{"name": "f"}]), r"`tool_calls` must be unset .* in turn 0"),
        (turn("user", "a", function_call={"name": "f"}), r"`function_call` must be unset"),
        (turn("user", "a", name="<|turn|>"), r"in the `content` of a turn only .got '<|turn|>' in \['name'\]"),
    ],
)
def test_a_turn_of_something_else_than_text_is_refused_by_row_and_place(wrong, message):
    good = [turn("user", "a"), turn("assistant", "b")]
    with pytest.raises(RowError, match=f"^Row 6: .*{message}"):
        tokenize_conversations({"messages": [good, [wrong, good[1]]]}, TOKENIZER, numbers=[5, 6])


def test_keys_that_ask_for_nothing_are_taken():
    bare = [turn("user", "a"), turn("assistant", "b")]
    assert texts([turn("user", "a", name=None, tool_calls=None), turn("assistant", "b", tool_calls=[])]) == texts(bare)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": None}, r"`messages` must be a list of turns with `role` and `content` .got None"),
        ({"messages": "hello"}, r"`messages` must be a list of turns .* .got 'hello'"),
        ({"prompt": None, "completion": "b"}, r"`prompt` must be text, or a list of turns .* .got None"),
        ({"prompt": "a", "completion": None}, r"`completion` must be text, or a list of turns .* .got None"),
        ({"prompt": "a", "completion": 2}, r"`completion` must be text.* .got 2"),
        ({"prompt": turn("user", "a"), "completion": "b"}, r"`prompt` must be text.* .got \{'role'"),
        ({"prompt": "a", "completion": "\ud800"}, r"`completion` must be valid Unicode"),
        ({"prompt": "a", "completion": []}, r"end with one of the role `assistant`"),
        ({"prompt": "a" * 2 + "\udfff", "completion": "b"}, r"`prompt` must be valid Unicode"),
    ],
)
def test_a_column_of_something_else_is_refused(row, message):
    with pytest.raises(RowError, match=f"^Row 0: .*{message}"):
        tokenize_conversations({name: [value] for name, value in row.items()}, TOKENIZER)


def test_a_template_that_writes_tool_calls_may_have_them_in_place_of_text():
    calling = with_template(
        CHAT_TEMPLATE.replace("<|turn|>", "{{ message.tool_calls[0].name if message.tool_calls }}<|turn|>")
    )
    messages = [turn("user", SPELT), turn("assistant", None, tool_calls=[{"name": "look"}])]
    prompt, answer = texts(messages, calling)
    assert answer == "look<|turn|>" and SPELT in prompt
    messages[1]["tool_calls"][0]["name"] = "<|mask|>"
    with pytest.raises(RowError, match=r"in the `content` of a turn only .got '<.mask.>' in \['tool_calls'\]"):
        texts(messages, calling)


def test_what_the_template_refuses_is_refused_by_row():
    strict = with_template("{{ raise_exception('no system turn') }}")
    with pytest.raises(RowError, match=r"Row 0: `messages` must be what the chat template takes .*no system turn"):
        texts([turn("user", "a"), turn("assistant", "b")], strict)


# Text that spells a control token


@pytest.mark.parametrize("templated", [True, False])
@pytest.mark.parametrize("conversation", ["pair", "turns", "parts"])
def test_text_that_spells_a_control_token_is_learnt_as_its_characters(templated, conversation):
    tokenizer = TOKENIZER if templated else with_template(None)
    row = {
        "pair": {"prompt": SPELT, "completion": SPELT},
        "turns": {
            "messages": [
                turn("user", "hello"),
                turn("assistant", SPELT),
                turn("user", SPELT),
                turn("assistant", SPELT),
            ]
        },
        "parts": {"messages": [turn("user", [part("a <|ma"), part("sk|>")]), turn("assistant", [part(SPELT)])]},
    }[conversation]
    batch = {name: [value] for name, value in row.items()}
    ids = tokenize_conversations(batch, tokenizer)
    asked = tokenize_conversations(batch, tokenizer, control_tokens_in_text=True)
    for name in ("prompt_ids", "response_ids"):
        (plain,), (control,) = ids[name], asked[name]
        assert tokenizer.mask_token_id not in plain and tokenizer.mask_token_id in control
        assert tokenizer.decode(plain) == tokenizer.decode(control)
    # What is the template's own stays a control token: the end of the turn, or of the text.
    ends = [tokenizer.convert_tokens_to_ids("<|turn|>") if templated else tokenizer.eos_token_id]
    assert ids["response_ids"][0][-1:] == asked["response_ids"][0][-1:] == ends


def test_a_prompt_is_learnt_with_the_ids_that_chat_and_server_give_it():
    history = [turn("system", "be <|mask|>"), turn("user", "hi "), turn("assistant", ""), turn("user", SPELT)]
    ids = tokenize_conversations({"messages": [[*history, turn("assistant", "b")]]}, TOKENIZER)
    assert ids["prompt_ids"][0] == encode_chat(TOKENIZER, history)["input_ids"][0].tolist()


def test_rows_that_spell_something_change_no_other_row():
    pairs = {"prompt": ["1?", SPELT, "3?"], "completion": ["1", "2", "3"]}
    others = {"prompt": ["1?", "3?"], "completion": ["1", "3"]}
    together, alone = tokenize_conversations(pairs, TOKENIZER), tokenize_conversations(others, TOKENIZER)
    for name in ("prompt_ids", "response_ids"):
        assert [together[name][0], together[name][2]] == alone[name]


def test_text_that_cannot_be_told_from_the_templates_is_refused_unless_tokens_are_asked_for():
    shouting = with_template("{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    messages = [turn("user", "hello<|turn|>"), turn("assistant", "b")]
    with pytest.raises(RowError, match="Row 0: `content` must not hold special tokens with this chat template"):
        texts(messages, shouting)
    assert texts(messages, shouting, control_tokens_in_text=True)[1] == "B"
