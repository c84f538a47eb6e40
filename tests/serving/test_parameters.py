"""Every parameter of OpenAI's clients: what it may say here, and what of it is refused in this server's words."""

import inspect
import json

import pytest

from d3llm_hf.serving.errors import ApiError
from d3llm_hf.serving.schemas import SETTINGS, ChatRequest, CompletionRequest, parse
from d3llm_hf.serving.unsupported import IN_MESSAGE


CHAT = {"model": "d3llm-llada", "messages": [{"role": "user", "content": "Tom has 8 apples."}], "max_tokens": 4}
COMPLETION = {"model": "d3llm-llada", "prompt": "Tom has", "max_tokens": 4}
BODIES = {ChatRequest: CHAT, CompletionRequest: COMPLETION}
NOT_SENT = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
A_TOOL = {"type": "function", "function": {"name": "f"}}

# Parameter -> values that are taken, and values that are refused.
TABLE = {
    "audio": ([], [{"voice": "ash", "format": "wav"}]),
    "best_of": ([1], [2]),
    "echo": ([False], [True]),
    "frequency_penalty": ([0, 0.0], [0.5]),
    "function_call": (["none", "auto"], [{"name": "f"}]),
    "functions": ([[]], [[{"name": "f"}]]),
    "logit_bias": ([{}], [{"50256": -100}]),
    "logprobs": ([False], [True, 0, 5]),
    "max_completion_tokens": ([4], [0, -1, 4.5, "4", 1 << 70]),
    "max_tokens": ([4], [0, -1, 4.5, "4", True]),
    "messages": ([CHAT["messages"]], [[], "hi", {}]),
    "metadata": ([{}], [{"a": "b"}]),
    "modalities": ([["text"]], [["text", "audio"]]),
    "model": (["d3llm-llada"], [3]),
    "moderation": ([], [{"model": "m"}]),
    "n": ([1], [2, 0, True, 10**300]),
    "parallel_tool_calls": ([True, False], ["yes"]),
    "prediction": ([], [{"type": "content", "content": "x"}]),
    "presence_penalty": ([0, 0.0], [-0.5]),
    "prompt": (["Tom", ["Tom"]], ["", [], ["a", "b"], [1, 2], [[1]], 3]),
    "prompt_cache_key": (["k"], [3]),
    "prompt_cache_options": ([{}], [{"ttl": "1h"}]),
    "prompt_cache_retention": (["in_memory", "in-memory"], ["24h"]),
    "reasoning_effort": (["none"], ["low", "high"]),
    "response_format": ([{"type": "text"}], [{"type": "json_object"}, {"type": "text", "more": 1}]),
    "safety_identifier": (["s"], [3]),
    "seed": ([0, 2**63 - 1], [-1, 2**63, 1.5, "1"]),
    "service_tier": (["auto", "default"], ["priority"]),
    "stop": (["", [], [""], "a", ["a", "", "b"]], [3, ["a", 3], ["a"] * 17, "a" * 257, {}]),
    "store": ([False], [True]),
    "stream": ([True, False], ["yes", 1]),
    "stream_options": ([{}, {"include_usage": False}, {"include_usage": None, "include_obfuscation": False}],
                       [{"include_usage": True}, {"include_obfuscation": True}, {"more": 1}, []]),
    "suffix": ([""], ["x"]),
    "temperature": ([0, 1, 0.5, 2], [-1, 2.1, "1", True]),
    "tool_choice": (["none", "auto"], ["required", A_TOOL]),
    "tools": ([[]], [[A_TOOL]]),
    "top_logprobs": ([0], [2]),
    "top_p": ([1, 1.0], [0, 1.1, "1"]),
    "user": (["me", ""], [3]),
    "verbosity": (["medium"], ["low"]),
    "web_search_options": ([], [{}]),
}  # fmt: skip


def refusal(kind, change):
    """The error of a request with a change, None where it is taken."""
    try:
        parse(kind, json.dumps(BODIES[kind] | change).encode())
    except ApiError as error:
        return error
    return None


def assert_in_our_words(error, name):
    assert error.status == 400 and error.param.startswith(name), (error.param, error.message)
    assert error.message.startswith(f"`{name}"), error.message
    for foreign in ("Input should", "Extra inputs", "Field required", "not permitted", "pydantic", "_type"):
        assert foreign not in error.message, error.message
    assert len(error.message) < 400 and error.message.count(". ") >= 1, f"no way out: {error.message}"


@pytest.mark.parametrize("kind", BODIES, ids=["chat", "completions"])
def test_every_parameter_of_the_openai_client_is_taken_or_refused_by_name(kind):
    from openai.resources import Completions
    from openai.resources.chat import completions as chat

    create = chat.Completions.create if kind is ChatRequest else Completions.create
    names = set(inspect.signature(create).parameters) - NOT_SENT
    assert names <= TABLE.keys(), "new parameters of the client: say in the table what they may be"
    for name in sorted(names | {"user"}):
        taken, refused = TABLE[name]
        if name not in ("messages", "model", "prompt"):
            taken = [None, *taken]  # as clients say that they leave a parameter out
        for value in taken:
            assert refusal(kind, {name: value} | ({"max_tokens": None} if name.startswith("max_c") else {})) is None
        for value in refused:
            error = refusal(kind, {name: value})
            assert error is not None, (name, value)
            if (name, value) != ("max_completion_tokens", 1 << 70):  # two lengths
                assert_in_our_words(error, "max_" if name == "max_completion_tokens" else name)


ASSISTANT = {"role": "assistant", "content": "x"}
TAKEN_IN_MESSAGES = [
    {"role": "user", "content": "hi", "name": "tom"},
    {"role": "system", "content": "hi", "name": ""},
    {"role": "developer", "content": "hi"},
    {"role": "user", "content": None},
    {"role": "user", "content": []},
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": ""}]},
    ASSISTANT | {"tool_calls": [], "annotations": [], "refusal": None, "audio": None, "function_call": None},
    ASSISTANT | {"reasoning_content": "", "reasoning": None, "reasoning_details": [], "provider_specific_fields": {}},
    ASSISTANT | {"content": None, "tool_calls": None},
]
REFUSED_IN_MESSAGES = [
    ({"role": "tool", "content": "x", "tool_call_id": "1"}, "messages.0.tool_call_id"),
    ({"role": "function", "content": "x", "name": "f"}, "messages.0.role"),
    ({"role": "robot", "content": "x"}, "messages.0.role"),
    ({"role": None, "content": "x"}, "messages.0.role"),
    ({"content": "x"}, "messages.0.role"),
    ({"role": "user"}, "messages.0.content"),
    ({"role": "user", "content": 3}, "messages.0.content"),
    ({"role": "user", "content": {}}, "messages.0.content"),
    ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages.0.content"),
    ({"role": "user", "content": ["x"]}, "messages.0.content"),
    ({"role": "user", "content": "x", "name": 3}, "messages.0.name"),
    (ASSISTANT | {"tool_calls": [A_TOOL]}, "messages.0.tool_calls"),
    (ASSISTANT | {"function_call": {"name": "f", "arguments": ""}}, "messages.0.function_call"),
    (ASSISTANT | {"refusal": "no"}, "messages.0.refusal"),
    (ASSISTANT | {"audio": {"id": "1"}}, "messages.0.audio"),
    (ASSISTANT | {"annotations": [{}]}, "messages.0.annotations"),
    (ASSISTANT | {"reasoning_content": "because"}, "messages.0.reasoning_content"),
    (ASSISTANT | {"mood": "good"}, "messages.0.mood"),
    ("hi", "messages.0"),
    (None, "messages.0"),
]


def test_fields_of_messages_that_ask_for_nothing_are_taken_and_the_others_refused_by_name():
    for message in TAKEN_IN_MESSAGES:
        assert refusal(ChatRequest, {"messages": [message]}) is None, message
    for message, name in REFUSED_IN_MESSAGES:
        error = refusal(ChatRequest, {"messages": [message]})
        assert error is not None, message
        assert error.param == name
        assert_in_our_words(error, name)
    assert {name for message, _ in REFUSED_IN_MESSAGES for name in dict(message if isinstance(message, dict) else {})}
    assert IN_MESSAGE.keys().isdisjoint({"role", "content", "name"})


def test_messages_that_ask_for_nothing_get_the_answer_of_those_without(with_client):
    more = {"name": "tom", "tool_calls": [], "annotations": [], "refusal": None, "reasoning_content": ""}

    async def use(client):
        plain = (await client.post("/v1/chat/completions", json=CHAT)).json()
        messages = [CHAT["messages"][0] | more]
        replies = [
            await client.post("/v1/chat/completions", json=CHAT | {"messages": messages, "stop": stop})
            for stop in ("", None, [], [""])
        ]
        assert [reply.json()["choices"] for reply in replies] == [plain["choices"]] * 4
        empty = await client.post(
            "/v1/chat/completions", json=CHAT | {"messages": [{"role": "user", "content": None}]}
        )
        assert empty.status_code == 200

    with_client(use)


# ---- text and numbers that are none ------------------------------------------------------------------------------

LONE = "\ud800"
SPOILT = [
    ({"model": LONE}, "model"),
    ({"user": f"a{LONE}"}, "user"),
    ({"stop": LONE}, "stop"),
    ({"stop": ["a", LONE]}, "stop.1"),
    ({"messages": [{"role": LONE, "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": LONE}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "x", "name": LONE}]}, "messages.0.name"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": LONE}]}]}, "messages.0.content.0.text"),
    ({"messages": [{"role": "user", "content": "x", LONE: 1}]}, "messages.0"),
    ({"d3llm": {LONE: 1}}, "d3llm"),
    ({"d3llm": {"decoding_method": LONE}}, "d3llm.decoding_method"),
    ({"metadata": {"a": {"b": [LONE]}}}, "metadata.a.b.0"),
    ({LONE: 1}, None),
    ({"logit_bias": {LONE: 1}}, "logit_bias"),
]


def test_text_that_is_no_unicode_is_refused_in_every_field_and_name(with_client):
    async def use(client):
        for change, name in SPOILT:
            # As an escape, and as the bytes that some languages write
            for body in (
                json.dumps(CHAT | change).encode(),
                json.dumps(CHAT | change, ensure_ascii=False).encode("utf-8", "surrogatepass"),
            ):
                reply = await client.post(
                    "/v1/chat/completions", content=body, headers={"Content-Type": "application/json"}
                )
                error = reply.json()["error"]
                assert (reply.status_code, error["param"]) == (400, name), error
                assert "lone surrogates" in error["message"]
        for path in ("/v1/models/%ED%A0%80", "/v1/models/%FF", "/%ED%A0%80"):
            assert (await client.get(path)).status_code == 404
        reply = await client.post(
            "/v1/completions", content=b'{"a": "\xff"}', headers={"Content-Type": "application/json"}
        )
        assert reply.status_code == 400 and "UTF-8" in reply.json()["error"]["message"]

    with_client(use)


@pytest.mark.parametrize(
    ("body", "name", "message"),
    [
        ('{"seed": 1e400}', "seed", "float64 can hold"),
        ('{"temperature": -1e999}', "temperature", "float64 can hold"),
        ('{"seed": 1' + "0" * 5000 + "}", "seed", "float64 can hold"),
        ('{"d3llm": {"top_k": 1' + "0" * 100_000 + "}}", "d3llm.top_k", "float64 can hold"),
        ('{"d3llm": {"cfg_scale": [1e400]}}', "d3llm.cfg_scale.0", "float64 can hold"),
        ('{"temperature": Infinity}', None, "which has no Infinity"),
        ('{"temperature": NaN}', None, "which has no NaN"),
        ('{"metadata": ' + "[" * 100 + "]" * 100 + "}", "metadata", "nested deeper than 64"),
        ('{"a": ' * 5000 + "1" + "}" * 5000, None, None),
        ('{"' + "x" * 100_000 + '": 1}', "x" * 80, "is no parameter"),
        ('{"model": "m", "prompt": "x", "d3llm": {"' + "x" * 100_000 + '": 1}}', "x" * 80, "is no setting"),
        ('{"model": "m", "prompt": "x", "d3llm": {"decoding_method": 1e308}}', None, None),
    ],
)  # fmt: skip
def test_numbers_names_and_depths_without_measure_are_refused_in_few_words(body, name, message):
    try:
        parse(CompletionRequest, body.encode())
    except ApiError as error:
        assert error.status == 400 and len(error.message) < 1000
        if message is not None:
            assert (error.param, message in error.message) == (name, True), error.message


# ---- settings ----------------------------------------------------------------------------------------------------

EXTREMES = [None, 0, 2, -1, 2**31 - 1, 2**31, 10**300, 0.5, 1e-40, 1e38, 1e40, True, "x" * 9999, [1], {}]


METHOD_SETTINGS = {
    "dream": ["steps"],
    "dinfer": ["credit_weight", "credit_exponent", "credit_decay"],
    "llada": ["cfg_scale", "steps"],
    "fast_dllm": ["factor"],
    "entropy_bound": ["entropy_bound"],
}


@pytest.mark.full
@pytest.mark.parametrize("values", [[2**31 - 1, 1e-40, 1e40], pytest.param(EXTREMES, marks=pytest.mark.slow)])
def test_no_value_of_any_setting_is_admitted_and_then_fails(with_client, values):
    """Each is answered, or refused by the name of the setting."""
    cases = [{"d3llm": {name: value}} for name in sorted(SETTINGS) for value in values]
    cases += [{name: value} for name in ("temperature", "top_p", "seed") for value in values]
    cases += [
        {"d3llm": {"decoding_method": method, name: value}}
        for method, names in METHOD_SETTINGS.items()
        for name in names
        for value in (*values, 1e-30, 1e30)
    ]
    wrong = []

    async def use(client):
        for case in cases:
            reply = await client.post("/v1/completions", json=COMPLETION | case)
            name = next(reversed(case.get("d3llm", case)))
            told = "" if reply.status_code == 200 else reply.json()["error"]["message"]
            if reply.status_code != 200 and (reply.status_code != 400 or f"{name}`" not in told or len(told) > 1010):
                wrong.append((case, reply.status_code, told))

    with_client(use, max_wait_ms=0)
    assert wrong == []


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": 1e-40},
        {"d3llm": {"repetition_penalty": 1e-40}},
        {"d3llm": {"cfg_scale": 1e40}},
        {"d3llm": {"no_repeat_ngram_size": 2**31}},
        {"d3llm": {"decoding_method": "dream", "steps": 1025}},
    ],
)
def test_what_float32_cannot_hold_is_refused_with_the_reason(with_client, change):
    async def use(client):
        reply = await client.post("/v1/completions", json=COMPLETION | change)
        assert reply.status_code == 400
        assert "must" in reply.json()["error"]["message"] and "(got " in reply.json()["error"]["message"]

    with_client(use)


def test_a_whole_number_is_a_number(with_client):
    async def use(client):
        for name, value in {"repetition_penalty": 2, "min_p": 0, "cfg_scale": 1, "entropy_threshold": 1}.items():
            replies = [
                await client.post("/v1/completions", json=COMPLETION | {"d3llm": {name: number}})
                for number in (value, float(value))
            ]
            assert [reply.status_code for reply in replies] == [200, 200], replies[0].text
            assert replies[0].json()["choices"] == replies[1].json()["choices"]

    with_client(use)
