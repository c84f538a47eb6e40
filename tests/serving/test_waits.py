"""Every wait for a client, and for a thread, has an end."""

import asyncio
import contextlib
import itertools
import json
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from loopback import on_loopback

from d3llm_hf import cli
from d3llm_hf.serving.app import _EventStream, create_app
from d3llm_hf.serving.connection import TURN_SECONDS, _Turns, bounded_protocol
from d3llm_hf.serving.desk import Desk
from d3llm_hf.serving.errors import ApiError
from d3llm_hf.serving.jobs import Job
from d3llm_hf.serving.worker import Worker


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n"

# What a client sends at once, what it goes on sending bit by bit, and the status of the last reply (None: no reply).
UNFINISHED = {
    "nothing": (b"", b"", None),
    "half a request line": (b"POST /v1/comp", b"", 408),
    "half of the headers": (HEAD, b"", 408),
    "headers without end": (HEAD, b"a: b\r\n", 408),
    "half a body": (HEAD + b"Content-Length: 500\r\n\r\n{", b"", 408),
    "a body bit by bit": (HEAD + b"Content-Length: 500\r\n\r\n{", b" ", 408),
    "a body in chunks without end": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n", b"1\r\n \r\n", 408),
    "a body that waits to be asked for": (HEAD + b"Content-Length: 500\r\nExpect: 100-continue\r\n\r\n", b"", 408),
    "a declared length of 100 GB": (HEAD + b"Content-Length: 100000000000\r\n\r\n{", b" ", 413),
    "a declared length alone": (
        HEAD + b"Connection: close\r\nContent-Length: 9999\r\n\r\n{",
        b" ",
        413,
    ),
    "a length of many digits": (HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n{", b" ", 400),
    "a body for what takes none": (HEALTH + b"Content-Length: 100000000000\r\n\r\n{", b" ", 200),
    "a second request that ends in its head": (HEALTH + b"\r\nPOST /v1", b"", 408),
    "another type": (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n", b"", 415),
}


def talk(port, data, more):
    """Everything that a server sends until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.sendall(data)
        client.settimeout(0.1)
        received, deadline = b"", time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                if more:
                    client.sendall(more)
                piece = client.recv(4096)
            except TimeoutError:
                continue
            except ConnectionError:
                return received
            if not piece:
                return received
            received += piece
        raise AssertionError(f"still open: {received}")


@pytest.mark.full
def test_a_connection_that_is_never_finished_is_closed(loaded):
    app = create_app(*loaded, "m", timeout=1, max_body_bytes=1000)
    with on_loopback(app, http=bounded_protocol(1), ws="none") as port, ThreadPoolExecutor(len(UNFINISHED)) as pool:
        replies = pool.map(lambda case: talk(port, *case[:2]), UNFINISHED.values())
        for (name, (_, _, status)), reply in zip(UNFINISHED.items(), replies, strict=True):
            found = [int(part[:3]) for part in reply.split(b"HTTP/1.1 ")[1:]]
            assert (found[-1] if found else None) == status, (name, reply)
            if status == 408:
                assert json.loads(reply[reply.index(b'{"err') :])["error"]["code"] == "timeout"


def test_a_declared_length_is_refused_before_a_byte_of_it_is_there(with_client):
    async def use(client):
        async def never():
            yield b"{"
            await asyncio.sleep(3600)

        for length in ("1001", "1" + "0" * 11, "1" * 30):
            headers = {"Content-Type": "application/json", "Content-Length": length}
            scope_reply = await client.post("/v1/completions", content=never(), headers=headers)
            assert scope_reply.status_code == 413

    with_client(use, max_body_bytes=1000)


def test_a_client_that_sends_too_much_in_one_go_sees_why_it_is_refused(loaded):
    app = create_app(*loaded, "m", max_body_bytes=1000)
    with on_loopback(app, http=bounded_protocol(60), ws="none") as port:
        for end in (b"", b"Connection: close\r\n"):
            with socket.create_connection(("127.0.0.1", port)) as client:
                client.settimeout(60)
                client.sendall(HEAD + end + b"Content-Length: 20000000\r\n\r\n" + b"x" * 20_000_000)
                assert client.recv(100).startswith(b"HTTP/1.1 413")


@pytest.mark.full
def test_many_small_chunks_are_parsed_in_turns_and_whole(loaded):
    """A body that comes in the smallest chunks there are is read as any other."""
    body = json.dumps({"model": "m", "prompt": "Tom has", "max_tokens": 2, "user": "u" * 30_000}).encode()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"
    app = create_app(*loaded, "m")
    with on_loopback(app, http=bounded_protocol(60), ws="none") as port:
        reply = talk(port, HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks, b"")
    assert reply.startswith(b"HTTP/1.1 200"), reply[:300]


def test_connections_with_much_to_parse_take_turns_and_a_round_of_the_loop_is_short_however_many_they_are(monkeypatch):
    now = 0.0
    monkeypatch.setattr("d3llm_hf.serving.connection.time.monotonic", lambda: now)

    class Connection:
        def __init__(self, name):
            self.name, self.left, self.loop = name, 3, self

        def call_soon(self, callback, *arguments):
            rounds.append(lambda: callback(*arguments))

        def parse(self):
            nonlocal now
            now += TURN_SECONDS / 4
            parsed.append(self.name)
            self.left -= 1
            if self.name == "b" and self.left == 1:
                raise ZeroDivisionError
            return self.left > 0

    turns, rounds, parsed, sizes = _Turns(), [], [], []
    for name in "abc":
        turns.wait(Connection(name))
    while rounds:
        assert len(rounds) == 1
        with contextlib.suppress(ZeroDivisionError):
            rounds.pop()()
        sizes.append(len(parsed))
    assert "".join(parsed) == "abcabcac"
    assert max(b - a for a, b in itertools.pairwise([0, *sizes])) <= 4


def test_a_reply_that_is_not_read_is_left():
    ended = threading.Event()

    async def app(scope, receive, send):
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(1000):
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        ended.set()

    with on_loopback(app, http=bounded_protocol(0.5), ws="none") as port:
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(HEALTH + b"\r\n")
            assert ended.wait(60)
        with socket.create_connection(("127.0.0.1", port)) as client:  # and one that is read is whole
            client.sendall(HEALTH + b"Connection: close\r\n\r\n")
            size = 0
            while piece := client.recv(1 << 20):
                size += len(piece)
            assert size > 1000 * 65536


def test_a_stream_whose_client_does_not_read_is_given_up():
    finished = []

    async def source():
        yield "data: 1\n\n"

    async def finish():
        finished.append(True)

    async def send(message):
        await asyncio.sleep(3600)

    asyncio.run(_EventStream(source(), finish, 0.05)({"type": "http"}, None, send))
    assert finished == [True]


# ---- threads -----------------------------------------------------------------------------------------------------


def test_a_forward_that_does_not_end_holds_up_no_stop(loaded, gate):
    worker = Worker(*loaded, max_batch_size=1, max_wait=0.0, max_queue=1)
    worker.start()
    gate.close()
    told = []
    worker.submit(Job(prompt=[5], max_new_tokens=2, settings={}, stops=(), seed=0, tell=told.append))
    assert gate.reached.wait(30)
    assert worker.close(0.05) is False
    assert worker.is_stuck and not worker.alive
    gate.open.set()
    assert worker.close() is True
    assert not worker.is_stuck


@pytest.mark.parametrize("is_stuck", [True, False])
def test_the_command_ends_without_a_forward_that_does_not(monkeypatch, is_stuck):
    import uvicorn

    left = []
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: None)
    monkeypatch.setattr(Worker, "is_stuck", is_stuck)
    monkeypatch.setattr("logging.basicConfig", lambda **options: None)
    monkeypatch.setattr("logging.shutdown", lambda: None)
    monkeypatch.setattr("d3llm_hf.commands.serve.check_address", lambda *address: None)
    monkeypatch.setattr(os, "_exit", left.append)
    assert cli.main(["serve", "d3llm-llada"]) == 0
    assert left == [0] * is_stuck


def at_desk(use, limit=8):
    """`await use(desk)` with a desk that has started, whose first task goes on until `desk.begin` is set."""

    async def session():
        desk = Desk(limit)
        desk.begin = threading.Event()
        desk.start()
        started = threading.Event()
        held = asyncio.ensure_future(desk.run(0, lambda: (started.set(), desk.begin.wait(30))))
        await asyncio.sleep(0)
        assert await asyncio.to_thread(started.wait, 30)
        try:
            await use(desk)
        finally:
            desk.begin.set()
            await held
            desk.close()

    asyncio.run(session())


def test_short_requests_are_read_before_long_ones_and_those_that_left_not_at_all():
    order = []

    async def use(desk):
        tasks = {
            size: asyncio.ensure_future(desk.run(size, lambda size=size: order.append(size)))
            for size in (30, 10, 40, 20)
        }
        await asyncio.sleep(0)
        tasks[20].cancel()
        await asyncio.sleep(0)
        desk.begin.set()
        await asyncio.gather(tasks[10], tasks[30], tasks[40])

    at_desk(use)
    assert order == [10, 30, 40]


def test_of_too_many_requests_the_longest_is_refused():
    async def use(desk):
        tasks = {size: asyncio.ensure_future(desk.run(size, lambda: "read")) for size in (30, 90, 10)}
        with pytest.raises(ApiError, match="2 shorter requests wait") as refused:
            await tasks[90]
        assert (refused.value.status, refused.value.retry_after) == (429, 1)
        desk.begin.set()
        assert await asyncio.gather(tasks[30], tasks[10]) == ["read", "read"]

    at_desk(use, limit=2)


def test_what_goes_wrong_at_the_desk_is_told_and_the_next_one_read():
    async def use(desk):
        desk.begin.set()
        with pytest.raises(ZeroDivisionError):
            await desk.run(1, lambda: 1 / 0)
        assert await desk.run(1, lambda: 2) == 2

    at_desk(use)


def test_a_desk_that_closes_refuses_whoever_waits():
    async def use(desk):
        waiting = asyncio.ensure_future(desk.run(1, lambda: 1))
        await asyncio.sleep(0)
        desk.close()
        for task in (waiting, desk.run(1, lambda: 1)):
            with pytest.raises(ApiError, match="is stopping"):
                await task

    at_desk(use)
