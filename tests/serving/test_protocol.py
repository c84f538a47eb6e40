"""Endpoints, limits and errors of the server, in this process."""

import asyncio
import json
import re

import pytest

from d3llm_hf.serving.app import _EventStream, create_app


MESSAGES = [{"role": "user", "content": "Tom has 8 apples. How many apples does Tom have now?"}]
CHAT = {"model": "d3llm-llada", "messages": MESSAGES, "max_tokens": 8}
COMPLETION = {"model": "d3llm-llada", "prompt": "Tom has", "max_tokens": 8, "d3llm": {"min_new_tokens": 8}}

# Body of a chat beside `CHAT` -> the parameter named and a part of the message.
BAD_CHATS = [
    ({"messages": None}, "messages", "must be given"),
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": "hello"}, "messages", "valid list"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "'user' or 'assistant'"),
    ({"messages": [{"role": "user"}]}, "messages.0.content", "must be given"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content", "valid string"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages.0.content",
        "parts of type 'text'",
    ),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content", "lone surrogates"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "messages.0.tool_calls", "into its content"),
    ({"messages": [{"role": "user", "content": "many words " * 300}]}, "messages", "256 positions"),
    ({"max_tokens": 0}, "max_tokens", "greater than 0"),
    ({"max_tokens": "8"}, "max_tokens", "valid integer"),
    ({"max_tokens": True}, "max_tokens", "valid integer"),
    ({"max_tokens": 2000}, "max_tokens", "at most 1024 on this server"),
    ({"max_completion_tokens": 9}, "max_tokens", "one thing"),
    ({"temperature": -1}, "temperature", "greater than or equal to 0"),
    ({"temperature": float("nan")}, None, "must be JSON"),
    ({"top_p": 0}, "top_p", "greater than 0"),
    ({"top_p": 0.5}, "top_p", "Send `temperature`, too"),
    ({"seed": -1}, "seed", "greater than or equal to 0"),
    ({"stop": 3}, "stop", "valid list"),
    ({"stop": ["a", None]}, "stop.1", "valid string"),
    ({"stop": ["a" * 257]}, "stop.0", "at most 256"),
    ({"stop": ["a"] * 17}, "stop", "at most 16"),
    ({"stream": "yes"}, "stream", "valid boolean"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "needs `stream: true`"),
    ({"stream": True, "stream_options": {"more": 1}}, "stream_options.more", "no field that is known here"),
    ({"n": 2}, "n", "Send one request for each answer"),
    ({"logprobs": True}, "logprobs", "`log_likelihood`"),
    ({"logprobs": 0}, "logprobs", "`log_likelihood`"),
    ({"tools": [{"type": "function"}]}, "tools", "not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format", "check the answer yourself"),
    ({"presence_penalty": 0.5}, "presence_penalty", "repetition_penalty"),
    ({"temprature": 1}, "temprature", "Did you mean `temperature`"),
    ({"entropy_threshold": 0.3}, "entropy_threshold", "go into `d3llm`"),
    ({"qqqqqqqq": 1}, "qqqqqqqq", "Known are"),
    ({"prompt": "x"}, "prompt", "no parameter of this endpoint"),
    ({"d3llm": []}, "d3llm", "valid object"),
    ({"d3llm": {"entropy_treshold": 0.3}}, "entropy_treshold", "Did you mean `entropy_threshold`"),
    ({"d3llm": {"infill": True}}, "infill", "no setting that a request may choose"),
    ({"d3llm": {"decoding_method": "beam"}}, "d3llm", "`decoding_method` must be one of"),
    ({"d3llm": {"confidence_threshold": 0.5}}, "d3llm", "is not used by decoding_method"),
    ({"d3llm": {"entropy_threshold": "bold"}}, "d3llm", "`entropy_threshold` must be"),
    ({"d3llm": {"top_k": 2.5}}, "d3llm.top_k", "a non-negative integer"),
    ({"d3llm": {"repetition_penalty": "x"}}, "d3llm.repetition_penalty", "a number in (0, 10]"),
    ({"d3llm": {"min_new_tokens": True}}, "d3llm.min_new_tokens", "a non-negative integer"),
    ({"d3llm": {"block_length": 10**12}}, "d3llm.block_length", "at most"),
    ({"d3llm": {"draft_length": 17}}, "d3llm.draft_length", "at most 16"),
    ({"d3llm": {"drafts": True}}, "d3llm.drafts", "needs `stream: true`"),
    ({"d3llm": {"drafts": 1}}, "d3llm.drafts", "true or false"),
]
BAD_COMPLETIONS = [
    ({"prompt": ""}, "prompt", "at least 1 character"),
    ({"prompt": ["a", "b"]}, "prompt", "one request for each prompt"),
    ({"prompt": [1, 2]}, "prompt", "in place of token ids"),
    ({"suffix": "x"}, "suffix", "infill_mask"),
    ({"echo": True}, "echo", "not supported"),
    ({"messages": MESSAGES}, "messages", "no parameter of this endpoint"),
]
# Bodies that are no object at all.
NO_OBJECTS = [(b"{", "must be JSON"), (b"[" * 100_000, "must be JSON"), (b"[]", "got list"), (b"\xff", "must be JSON")]


def told(reply, status):
    assert reply.status_code == status, reply.text
    return reply.json()["error"]


def test_bad_requests_are_refused_by_the_name_of_what_is_wrong(with_client, gate):
    gate.close()  # nothing of this reaches the model
    wrong = []

    async def use(client):
        for path, whole, cases in (
            ("chat/completions", CHAT, BAD_CHATS),
            ("completions", COMPLETION, BAD_COMPLETIONS),
        ):
            for change, param, message in cases:
                body = json.dumps(whole | change)
                headers = {"Content-Type": "application/json; charset=utf-8"}
                error = told(await client.post(f"/v1/{path}", content=body, headers=headers), 400)
                if (error["type"], error["param"]) != ("invalid_request_error", param) or message not in error[
                    "message"
                ]:
                    wrong.append((change, error))
        for body, message in NO_OBJECTS:
            reply = await client.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
            assert message in told(reply, 400)["message"]
        assert (
            "is not here"
            in told(await client.post("/v1/completions", json=COMPLETION | {"model": "x"}), 404)["message"]
        )
        assert told(await client.post("/v1/completions", content="{}"), 415)["code"] == "invalid_json"
        assert told(await client.get("/v1/models/x"), 404)["param"] == "model"
        assert told(await client.get("/nothing"), 404)["code"] == "no_such_endpoint"
        assert told(await client.get("/v1/completions"), 405)["code"] == "no_such_endpoint"
        refused = len(BAD_CHATS) + len(BAD_COMPLETIONS) + len(NO_OBJECTS) + 2
        assert f'outcome="refused"}} {refused}' in (await client.get("/metrics")).text

    with_client(use)
    assert wrong == []
    assert not gate.reached.is_set()


def test_a_body_may_be_so_large_and_no_larger(with_client):
    async def use(client):
        assert told(await client.post("/v1/completions", json=COMPLETION), 413)["code"] == "too_large"

    with_client(use, max_body_bytes=20)


def test_what_asks_for_nothing_is_taken(with_client):
    neutral = {
        "n": 1, "logprobs": False, "tools": [], "tool_choice": "none", "response_format": {"type": "text"},
        "presence_penalty": 0.0, "frequency_penalty": 0, "logit_bias": {}, "user": "me", "stop": None, "top_p": 1,
        "stream_options": None, "store": False, "service_tier": "auto",
    }  # fmt: skip
    parts = [{"type": "text", "text": "Tom has 8 apples. "}, {"type": "text", "text": MESSAGES[0]["content"][18:]}]
    messages = [{"role": "user", "content": parts, "tool_calls": None}]

    async def use(client):
        plain = await client.post("/v1/chat/completions", json=CHAT)
        more = await client.post("/v1/chat/completions", json=CHAT | neutral | {"messages": messages})
        assert plain.status_code == more.status_code == 200
        assert plain.json()["choices"] == more.json()["choices"]
        for_listed = await client.post("/v1/completions", json=COMPLETION | {"prompt": ["Tom has"]})
        assert (
            for_listed.json()["choices"] == (await client.post("/v1/completions", json=COMPLETION)).json()["choices"]
        )
        unsaid = {name: value for name, value in CHAT.items() if name != "max_tokens"}
        assert (await client.post("/v1/chat/completions", json=unsaid)).json()["usage"]["completion_tokens"] > 8

    with_client(use)


def test_a_conversation_that_the_template_refuses_is_the_clients_mistake(with_client, loaded, monkeypatch):
    monkeypatch.setattr(loaded[1], "chat_template", "{{ raise_exception('turns must alternate') }}")

    async def use(client):
        error = told(await client.post("/v1/chat/completions", json=CHAT), 400)
        assert error["param"] == "messages" and "turns must alternate" in error["message"]

    with_client(use)


def test_a_key_opens_everything_but_health(with_client):
    async def use(client):
        for path in ("/v1/models", "/metrics"):
            assert told(await client.get(path), 401)["code"] == "invalid_api_key"
            for wrong in ("Bearer wrong", "Basic sécret", "sécret"):
                reply = await client.get(path, headers={"Authorization": wrong.encode()})
                assert reply.status_code == 401 and reply.headers["www-authenticate"] == "Bearer"
            assert (await client.get(path, headers={"Authorization": "bearer sécret".encode()})).status_code == 200
        assert told(await client.post("/v1/completions", json=COMPLETION), 401)
        assert (await client.get("/health")).json() == {"status": "ok"}

    with_client(use, api_key="sécret")


def test_pages_of_other_origins_are_let_in_only_when_they_are_named(with_client):
    asking = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}

    async def use(client):
        reply = await client.options("/v1/completions", headers=asking)
        return reply.headers.get("access-control-allow-origin")

    assert with_client(use) is None
    assert with_client(use, allow_origins=["https://page.example"]) == "https://page.example"
    assert with_client(use, allow_origins=["https://other.example"]) is None


def test_a_full_queue_refuses_and_says_when_to_come_back(with_client, gate):
    gate.close()

    async def use(client):
        first = asyncio.ensure_future(client.post("/v1/completions", json=COMPLETION))
        assert await asyncio.to_thread(gate.reached.wait, 30)
        waiting = [asyncio.ensure_future(client.post("/v1/completions", json=COMPLETION)) for _ in range(2)]
        while client.app.state.worker.waiting < 2:
            await asyncio.sleep(0.01)
        reply = await client.post("/v1/completions", json=COMPLETION | {"stream": True})
        assert told(reply, 429)["code"] == "queue_full"
        assert int(reply.headers["retry-after"]) >= 1
        text = (await client.get("/metrics")).text
        assert "d3llm_queue_length 2\n" in text and "d3llm_running_rows 1\n" in text
        waiting[0].cancel()  # whoever leaves makes room
        while client.app.state.worker.waiting > 1:
            await asyncio.sleep(0.01)
        waiting.append(asyncio.ensure_future(client.post("/v1/completions", json=COMPLETION)))
        await asyncio.sleep(0.05)
        gate.open.set()
        replies = await asyncio.gather(first, *waiting, return_exceptions=True)
        assert [getattr(reply, "status_code", None) for reply in replies] == [200, None, 200, 200]
        text = (await client.get("/metrics")).text
        assert 'outcome="ok"} 3\n' in text and 'outcome="queue_full"} 1\n' in text
        assert re.search(r'd3llm_request_seconds_bucket\{le="\+Inf"\} 4\n', text)
        assert "d3llm_completion_tokens_total 24\n" in text and "d3llm_batches_total 2\n" in text

    with_client(use, max_queue=2)


def test_an_answer_that_takes_too_long_is_given_up(with_client, gate):
    async def use(client):
        gate.close()
        assert told(await client.post("/v1/completions", json=COMPLETION), 504)["code"] == "timeout"
        assert told(await client.post("/v1/completions", json=COMPLETION | {"stream": True}), 504)
        gate.open.set()
        assert 'outcome="timeout"} 2\n' in (await client.get("/metrics")).text

    with_client(use, timeout=0.2)


@pytest.mark.full
def test_a_stream_that_has_begun_tells_of_its_end_in_an_event(with_client, gate):
    slow = COMPLETION | {"stream": True, "d3llm": {"decoding_method": "llada", "block_length": 1, "min_new_tokens": 8}}

    def late(ids):
        if len(gate.rows) == 4:
            gate.close()

    async def use(client):
        gate.fault = late
        reply = await client.post("/v1/completions", json=slow)
        gate.open.set()
        events = [line.removeprefix("data: ") for line in reply.text.splitlines() if line]
        assert reply.status_code == 200 and reply.headers["content-type"].startswith("text/event-stream")
        assert json.loads(events[0])["choices"][0]["text"]
        assert json.loads(events[-1])["error"]["code"] == "timeout"

    with_client(use, timeout=3)


@pytest.mark.full
def test_a_row_that_fails_leaves_the_others_and_the_worker_unharmed(with_client, gate, loaded, caplog):
    bad = loaded[1]("zebra")["input_ids"][-1]
    slow = {"decoding_method": "llada", "block_length": 1, "min_new_tokens": 8}

    def fault(ids):
        if (ids == bad).any() and (ids == loaded[0].config.mask_token_id).sum() < 7 * len(ids):
            raise RuntimeError("out of memory")

    async def use(client):
        bodies = [COMPLETION | {"prompt": p, "stream": True, "d3llm": slow} for p in ("Tom has", "Anna has", "zebra")]
        expected = [(await client.post("/v1/completions", json=body)).text for body in bodies[:2]]
        gate.fault, gate.rows = fault, []
        replies = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
        assert 3 in gate.rows and 1 in gate.rows
        for reply, text in zip(replies, expected, strict=False):
            assert said(reply.text) == said(text)
        assert json.loads(replies[2].text.splitlines()[-2].removeprefix("data: "))["error"]["type"] == "server_error"
        assert (await client.post("/v1/completions", json=COMPLETION)).status_code == 200

    with_client(use, max_wait_ms=300)
    assert "out of memory" in caplog.text and "zebra" not in caplog.text


def said(stream):
    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    return "".join(event["choices"][0]["text"] for event in events if event["choices"])


def test_a_failure_outside_of_the_model_is_told_without_its_message(with_client, monkeypatch):
    async def use(client):
        monkeypatch.setattr("d3llm_hf.serving.app.parse", lambda kind, body: {}["secret"])
        assert "secret" not in (await client.post("/v1/completions", json=COMPLETION)).text
        assert 'outcome="failed"} 1\n' in (await client.get("/metrics")).text

    with_client(use)


def test_a_server_that_stops_answers_nobody_and_says_so(with_client, gate):
    gate.close()

    async def use(client):
        running = asyncio.ensure_future(client.post("/v1/completions", json=COMPLETION))
        assert await asyncio.to_thread(gate.reached.wait, 30)
        other = COMPLETION | {"max_tokens": 9}
        waiting = asyncio.ensure_future(client.post("/v1/completions", json=other))
        worker = client.app.state.worker
        while not worker.waiting:
            await asyncio.sleep(0.01)
        closing = asyncio.ensure_future(asyncio.to_thread(worker.close))
        while worker.alive:
            await asyncio.sleep(0.01)
        gate.open.set()
        await closing
        for reply in (await running, await waiting, await client.post("/v1/completions", json=COMPLETION)):
            assert told(reply, 503)["code"] == "server_stopping"
        assert (await client.get("/health")).status_code == 503

    with_client(use)


def test_a_stream_is_finished_even_where_its_first_byte_cannot_be_sent():
    finished = []

    async def source():
        yield "data: 1\n\n"

    async def finish():
        finished.append(True)

    async def send(message):
        raise OSError("gone")

    asyncio.run(_EventStream(source(), finish)({"type": "http"}, None, send))
    assert finished == [True]


def test_a_client_that_leaves_before_its_request_is_complete_is_forgotten(loaded):
    app = create_app(*loaded, "m")

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        statuses.append(message.get("status"))

    statuses = []
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b""}
    asyncio.run(app(scope, receive, send))
    assert statuses[0] == 499


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_batch_size": 0}, "`max_batch_size` must be positive"),
        ({"timeout": float("nan")}, "`timeout` must be positive"),
        ({"max_wait_ms": -1}, "`max_wait_ms` must not be negative"),
        ({"max_prompt_tokens": 0}, "`max_prompt_tokens` must be positive"),
        ({"api_key": ""}, "`api_key` must not be empty"),
        ({"name": ""}, "`name` must not be empty"),
    ],
)
def test_limits_that_are_none_are_refused(loaded, limits, message):
    with pytest.raises(ValueError, match=message):
        create_app(*loaded, **({"name": "m"} | limits))


def test_nothing_of_a_request_is_logged(with_client, caplog):
    caplog.set_level("DEBUG", logger="d3llm_hf")

    async def use(client):
        await client.post("/v1/chat/completions", json=CHAT | {"messages": [{"role": "user", "content": "my zebra"}]})
        await client.post("/v1/chat/completions", json=CHAT | {"zebra": 1})

    with_client(use)
    assert "zebra" not in caplog.text


def test_a_client_without_a_loop_left_is_not_told(with_client, gate):
    """The event loop may end before the worker's last word, as when a program is interrupted."""
    gate.close()

    async def use(client):
        asyncio.ensure_future(client.post("/v1/completions", json=COMPLETION)).add_done_callback(lambda done: None)
        assert await asyncio.to_thread(gate.reached.wait, 30)
        gate.open.set()
        return client.app.state.worker

    assert not with_client(use).alive
