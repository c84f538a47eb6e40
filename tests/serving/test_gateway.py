"""What clients of several replicas connect to: a replica that ends costs no answer, and all are counted as one."""

import asyncio
import json

import httpx
import pytest
from fleets import Fleet, Scripted, ended, started

from d3llm_hf.serving.app import create_app
from d3llm_hf.serving.gateway import TRIES, create_gateway
from d3llm_hf.serving.sums import Sums


MODEL = "d3llm-llada"
CHAT = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "Tom has 8 apples. How many apples does Tom have now?"}],
    "max_tokens": 16,
    "d3llm": {"min_new_tokens": 8},
}
START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
TEXT = {"type": "http.response.body", "body": b"data: one\n\n", "more_body": True}


@pytest.fixture
def through(loaded):
    """`through(use, ...)`: what `await use(client)` returns, of a client of two replicas behind a gateway."""

    def run(use, fleet=None, ends=None, replicas=2, **options):
        async def session():
            made = []
            if fleet is None:
                made += [await started(lambda: create_app(*loaded, MODEL)) for _ in range(replicas)]
            behind = Fleet(made, ends) if fleet is None else fleet
            transport = httpx.ASGITransport(app=create_gateway(behind, **options))
            try:
                async with httpx.AsyncClient(transport=transport, base_url="http://server", timeout=60) as client:
                    client.fleet = behind
                    return await use(client)
            finally:
                for replica in made:
                    await ended(replica)

        return asyncio.run(session())

    return run


async def ask(client, path="/v1/chat/completions", **body):
    return await client.post(path, json=CHAT | body)


def said(reply) -> list:
    """What a reply says, without what is new in each."""
    if reply.headers["content-type"].startswith("text/event-stream"):
        events = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: {")]
        return [(event.get("choices"), event.get("usage"), event.get("error")) for event in map(json.loads, events)]
    return [reply.json().get("choices"), reply.json().get("usage"), reply.json().get("error")]


def test_replies_are_those_of_one_server(through, with_client):
    async def all_kinds(client):
        replies = [
            await ask(client),
            await ask(client, stream=True, stream_options={"include_usage": True}),
            await ask(client, temperature=-1),
            await ask(client, path="/v1/nothing"),
        ]
        return [(reply.status_code, said(reply)) for reply in replies]

    found = through(all_kinds)
    assert found == with_client(all_kinds)
    assert [status for status, _ in found] == [200, 200, 400, 404]


def test_a_replica_that_ends_before_its_answer_costs_no_answer(through):
    async def use(client):
        whole = await ask(client)
        found = [await ask(client) for _ in range(2)] + [await ask(client, stream=True)]
        return whole, found, client.fleet.asked, (await client.get("/metrics")).text

    # The second request ends before anything, the next within its reply, the one after before its first text.
    whole, found, asked, metrics = through(use, ends={1: 0, 3: 1, 5: 0})
    assert [reply.status_code for reply in found] == [200] * 3 and asked == 7
    assert said(found[0]) == said(found[1]) == said(whole)
    assert (
        "".join(choices[0]["delta"].get("content", "") for choices, *_ in said(found[2]) if choices)
        == (whole.json()["choices"][0]["message"]["content"])
    )
    assert "d3llm_repeated_requests_total 3" in metrics and "d3llm_lost_requests_total 0" in metrics


def test_a_stream_whose_replica_ends_says_so_in_its_last_event(through):
    async def use(client):
        reply = await ask(client, stream=True)
        return reply, (await client.get("/metrics")).text

    reply, metrics = through(use, ends={0: 2})
    assert reply.status_code == 200 and said(reply)[0][0][0]["delta"] == {"role": "assistant", "content": ""}
    assert said(reply)[-1][2]["code"] == "replica_lost" and "[DONE]" not in reply.text
    assert "d3llm_lost_requests_total 1" in metrics


@pytest.mark.full
def test_where_every_replica_ends_the_client_may_try_again(through):
    async def use(client):
        reply = await ask(client)
        return reply, client.fleet.asked, (await client.get("/metrics")).text

    reply, asked, metrics = through(use, ends=dict.fromkeys(range(TRIES), 0))
    assert (reply.status_code, reply.headers["retry-after"], asked) == (503, "1", TRIES)
    assert reply.json()["error"]["code"] == "replica_lost"
    assert f"d3llm_repeated_requests_total {TRIES}" in metrics and "d3llm_lost_requests_total 1" in metrics


@pytest.mark.full
def test_all_replicas_are_counted_as_one_server(through):
    async def use(client):
        for _ in range(4):
            await ask(client)
        return (await client.get("/metrics")).text, (await client.get("/health")).json()

    metrics, health = through(use)
    assert 'd3llm_requests_total{outcome="ok"} 4\n' in metrics and "d3llm_request_seconds_count 4\n" in metrics
    assert 'd3llm_request_seconds_bucket{le="+Inf"} 4\n' in metrics and "d3llm_replicas 2\n" in metrics
    assert metrics.count("# TYPE d3llm_requests_total counter\n") == 1
    assert health == {"status": "ok", "replicas": 2}


def test_without_a_replica_the_server_is_not_well(through):
    reply = through(lambda client: client.get("/health"), fleet=Fleet([]))
    assert (reply.status_code, reply.json()["replicas"]) == (503, 0)


def test_the_key_is_asked_for_here_and_web_pages_may_be_let_in(through):
    async def use(client):
        locked = [await ask(client), await client.get("/metrics"), await client.get("/health")]
        key = {"Authorization": "Bearer sesame", "Origin": "https://page"}
        return locked, await client.get("/v1/models", headers=key)

    locked, models = through(use, api_key="sesame", allow_origins=["https://page"])
    assert [reply.status_code for reply in locked] == [401, 401, 200]
    assert models.json()["data"][0]["id"] == MODEL
    assert models.headers["access-control-allow-origin"] == "https://page"


def test_a_body_is_read_up_to_its_limit(through):
    async def chunks():
        for _ in range(9):
            yield b" " * 1000

    async def use(client):
        kind = {"Content-Type": "application/json"}
        declared = await client.post("/v1/completions", content=b" " * 5000, headers=kind)
        other = await client.post("/v1/completions", content=b"x", headers={"Content-Type": "text/plain"})
        return declared, await client.post("/v1/completions", content=chunks(), headers=kind), other

    replies = through(use, fleet=Few(), max_body_bytes=4000)
    assert [reply.status_code for reply in replies] == [200] * 3
    # The first is not read at all, and the second no further than a replica needs to refuse it.
    assert [reply.json() for reply in replies] == [0, 5000, 1]


class Few(Fleet):
    """One replica that says how long the body is that it got."""

    def __init__(self):
        super().__init__([self])

    async def reply(self, scope, body):
        yield {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]}
        yield {"type": "http.response.body", "body": str(len(body)).encode()}


@pytest.mark.parametrize(
    ("replica", "status", "code"),
    [(Scripted(None), 504, "timeout"), (Scripted(ValueError("a fault")), 500, None)],
    ids=["silent", "faulty"],
)
def test_a_replica_that_does_not_answer_is_not_waited_for(replica, status, code, through, monkeypatch):
    monkeypatch.setattr("d3llm_hf.serving.gateway.LAST_WORD_SECONDS", 0.0)
    fleet = Fleet([replica])
    reply = through(ask, fleet=fleet, timeout=0.2)
    assert (reply.status_code, reply.json()["error"]["code"], fleet.closed) == (status, code, 1)


def test_a_stream_that_does_not_end_is_ended(through, monkeypatch):
    monkeypatch.setattr("d3llm_hf.serving.gateway.LAST_WORD_SECONDS", 0.0)
    reply = through(ask, fleet=Fleet([Scripted(START, TEXT, None)]), timeout=0.2)
    assert reply.text.startswith("data: one\n\n") and said(reply)[-1][2]["code"] == "timeout"


def messages(*told):
    """`receive` of a client that says this and then nothing more, and what it was sent."""
    waiting, sent = list(told), []

    async def receive():
        return waiting.pop(0) if waiting else await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    return receive, send, sent


SCOPE = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [(b"content-length", b"2")]}
LEFT = {"type": "http.disconnect"}


@pytest.mark.parametrize("told", [[LEFT], [{"type": "http.request", "body": b"{}"}, LEFT]], ids=["body", "answer"])
def test_a_client_that_leaves_is_waited_for_no_longer(told):
    fleet = Fleet([Scripted(None)])
    receive, send, sent = messages(*told)
    asyncio.run(create_gateway(fleet)(SCOPE, receive, send))
    assert sent == [] and fleet.closed == fleet.asked == len(told) - 1


def test_a_body_that_does_not_arrive_gets_408():
    receive, send, sent = messages({"type": "http.request", "body": b"{", "more_body": True})
    asyncio.run(create_gateway(Fleet([]), timeout=0.05)(SCOPE, receive, send))
    assert sent[0]["status"] == 408 and b"within 0.05 s" in sent[1]["body"]


def test_what_is_no_request_of_http_is_left_to_the_server():
    with pytest.raises(NotImplementedError, match="websocket"):
        asyncio.run(create_gateway(Fleet([]))({"type": "websocket"}, None, None))


# Counts


def test_counters_of_a_replica_that_is_gone_stay_and_its_gauges_go():
    sums, text = Sums(), "# TYPE a_total counter\na_total {}\n# TYPE g gauge\ng {}\n# TYPE s_sum counter\ns_sum {}\n"
    first = sums.render({"one": text.format(1, 5, "0.500000"), "two": text.format(2, 7, "0.250000")}, {})
    assert first.splitlines()[1::2] == ["a_total 3", "g 12", "s_sum 0.750000"]
    later = sums.render({"two": text.format(4, 1, "1.000000")}, {"n": ("gauge", 1)})
    assert later.splitlines()[1::2] == ["a_total 5", "g 1", "s_sum 1.500000", "n 1"]


# A replica


def test_a_replica_keeps_why_its_recipe_fails():
    async def use():
        def make():
            raise ValueError("`name` must not be empty (got '').")

        replica = await started(make)
        await replica.check_health()  # Ray shall not try again
        return await replica.refusal()

    assert asyncio.run(use()).startswith("`name` must not be empty")


def test_a_replica_whose_thread_has_ended_is_not_well_and_a_client_that_leaves_is_told(loaded, gate):
    async def use():
        replica = await started(lambda: create_app(*loaded, MODEL))
        await replica.check_health()
        gate.close()
        scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b""}
        scope["headers"] = [(b"content-type", b"application/json")]
        reply = replica.reply(scope, json.dumps(CHAT).encode())
        waits = asyncio.ensure_future(anext(reply))
        await asyncio.to_thread(gate.reached.wait, 30)
        waits.cancel()
        await asyncio.wait({waits})
        gate.open.set()
        _, metrics = await replica.told()
        await ended(replica)
        with pytest.raises(RuntimeError, match="the worker has ended"):
            await replica.check_health()
        return metrics

    assert 'd3llm_requests_total{outcome="left"} 1' in asyncio.run(use())
