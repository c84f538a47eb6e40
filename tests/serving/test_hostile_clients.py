"""A client that wants to stop the server for all: `/health` stays quick, and everyone else is answered."""

import contextlib
import gc
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest
from loopback import on_loopback

from d3llm_hf.serving import schemas
from d3llm_hf.serving.admission import Admission
from d3llm_hf.serving.app import create_app
from d3llm_hf.serving.bodies import MAX_VALUES, read_object
from d3llm_hf.serving.connection import bounded_protocol
from d3llm_hf.serving.errors import ApiError
from d3llm_hf.serving.schemas import ChatRequest, CompletionRequest, parse


CHAT = "/v1/chat/completions"
NAME = "d3llm-llada"
QUESTION = "Tom has 8 apples. He buys 7 more. How many apples does Tom have now?"


def post(port, body, path=CHAT, timeout=120):
    """Status and content, or what is told of an error."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}",
        data=body if isinstance(body, bytes) else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            return reply.status, json.loads(reply.read())["choices"][0]["message"]["content"]
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["error"]["message"]


def chat(text=QUESTION, **more):
    return {"model": NAME, "messages": [{"role": "user", "content": text}], "max_tokens": 16} | more


def head(length):
    return f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{length}\r\n\r\n".encode()


class Health:
    """Asks for `/health` again and again, and knows the slowest reply, and how late the machine itself was at most."""

    def __init__(self, port):
        self.port, self.slowest, self.late, self.failures = port, 0.0, 0.0, []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def _ask(self):
        while not self._ended.is_set():
            began = time.monotonic()
            self._ended.wait(0.02)
            self.late = max(self.late, time.monotonic() - began - 0.02)
            began = time.monotonic()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=60).read()
            except OSError as error:
                self.failures.append(error)
            self.slowest = max(self.slowest, time.monotonic() - began)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._ended.set()
        self._thread.join()


def slow_bodies(port, count, seconds):
    """Connections that send a byte now and then, of a head, a body and a chunked one."""
    openings = [b"POST /v1", head("Content-Length: 900000") + b"{", head("Transfer-Encoding: chunked") + b"1\r\n{\r\n"]
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(contextlib.closing(socket.create_connection(("127.0.0.1", port))))
            for _ in range(count)
        ]
        for index, client in enumerate(clients):
            client.sendall(openings[index % 3])
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.2)
            for index, client in enumerate(clients):
                with contextlib.suppress(OSError):
                    client.sendall((b"x", b" ", b"1\r\n \r\n")[index % 3])


def huge_bodies(port, count, size):
    """Prompts of about the largest body, and bodies that are larger still."""
    texts = ["word " * (size // 5), "<|eot_id|>" * (size // 10), "a" * size, " " * size, "\n" * (size // 2)]
    for index in range(count):
        status, _ = post(port, chat(texts[index % len(texts)]))
        assert status in (200, 400, 413, 429)  # of blanks a chat template may leave nothing
    turns = [{"role": "user", "content": "<|eot_id|>"}] * (size // 50)
    assert post(port, chat(messages=turns))[0] in (400, 413, 429)
    deep = b'{"model": ' + b"[" * (size // 2) + b"]" * (size // 2) + b"}"
    assert post(port, deep)[0] in (400, 413, 429)
    many = json.dumps(chat(stop=["a"] * (size // 8), metadata={str(i): i for i in range(size // 30)})).encode()
    assert post(port, many)[0] in (400, 413, 429)
    for length in ("Content-Length: 100000000000", "Transfer-Encoding: chunked"):
        with contextlib.closing(socket.create_connection(("127.0.0.1", port))) as client:
            client.settimeout(60)
            client.sendall(head(length))
            with contextlib.suppress(OSError):  # closed before all is sent
                for _ in range(4 * size // 60_000):
                    client.sendall((b"ea60\r\n" if "chunked" in length else b"") + b" " * 60_000 + b"\r\n")
                assert b" 413 " in client.recv(100)


def many_values(port, count):
    """Bodies of very many values, most of them wrong, and one in very many chunks."""
    turns = [b"1", b"{}", b'{"a":1}', b'{"role":1}', b'{"role":"user","content":""}']
    for turn in turns:
        assert post(port, b'{"model":"d3llm-llada","messages":[' + b",".join([turn] * count) + b"]}")[0] == 400
    assert post(port, chat(stop=[1] * count))[0] == 400
    assert post(port, chat(messages=[{str(name): 1 for name in range(count // 4)}]))[0] == 400
    assert post(port, chat(metadata=[[]] * count))[0] == 400
    body = json.dumps(chat(user="u" * count)).encode()
    with contextlib.closing(socket.create_connection(("127.0.0.1", port))) as client:
        client.settimeout(60)
        client.sendall(head("Transfer-Encoding: chunked") + b"".join(b"1\r\n%c\r\n" % byte for byte in body))
        client.sendall(b"0\r\n\r\n")
        assert b" 200 " in client.recv(100)


def costly_options(port, count):
    options = [
        {"d3llm": {"no_repeat_ngram_size": 5000}},
        {"d3llm": {"no_repeat_ngram_size": 40}},
        {"d3llm": {"decoding_method": "dream", "steps": 2**31 - 1}},
        {"d3llm": {"lossless": True, "draft_length": 10**6}},
        {"d3llm": {"top_k": 10**300}},
        {"stop": ["x" * 256] * 16},
        {"n": 10**6},
        {"max_tokens": 10**9},
        {"logit_bias": {str(token): -100 for token in range(9000)}},
        {"temperature": 1e-40},
        {"seed": 10**200},
    ]
    for index in range(count):
        assert post(port, chat(**options[index % len(options)]))[0] in (200, 400)


def bad_unicode(port, count):
    for index in range(count):
        name, value = [("model", "\ud800"), ("user", "\udfff"), ("\ud800", 1), ("stop", ["\ud800"])][index % 4]
        assert post(port, chat(**{name: value}))[0] == 400


def leavers(port, count):
    """Connections whose clients leave, half of them behind a whole request."""
    body = json.dumps(chat(stream=True)).encode()
    clients = []
    for index in range(count):
        client = socket.create_connection(("127.0.0.1", port))
        client.sendall(head(f"Content-Length: {len(body)}") + (body if index % 2 else body[:20]))
        clients.append(client)
    for client in clients:
        client.close()


def attack(port, size, leaving, seconds):
    """All of it at once; the errors of its parts."""
    errors = []

    def part(do, *arguments):
        def run():
            try:
                do(port, *arguments)
            except BaseException as error:
                errors.append(error)

        return threading.Thread(target=run)

    parts = [
        part(slow_bodies, 30, seconds), part(huge_bodies, 5, size), part(huge_bodies, 5, size),
        part(many_values, size // 40), part(costly_options, 11), part(bad_unicode, 12), part(leavers, leaving),
    ]  # fmt: skip
    return parts, errors


def assert_unharmed(port, **how):
    """Everyone else is answered while a hostile client does what it can."""
    expected = post(port, chat())
    assert expected[0] == 200
    with Health(port) as before:
        time.sleep(0.5)
    parts, errors = attack(port, **how)
    with Health(port) as health:
        for thread in parts:
            thread.start()
        answers = [post(port, chat()) for _ in range(4)]
        for thread in parts:
            thread.join()
        answers.append(post(port, chat()))
    assert errors == []
    assert answers == [expected] * 5
    assert health.failures == []
    # A second, and more on a machine that is busy itself
    assert health.slowest < max(1.0, 20 * before.slowest) + 10 * health.late


@pytest.mark.full
def test_a_hostile_client_harms_nobody_else(loaded):
    app = create_app(*loaded, NAME, max_queue=256, max_body_bytes=200_000)
    with on_loopback(app, http=bounded_protocol(120), ws="none") as port:
        assert_unharmed(port, size=180_000, leaving=60, seconds=1)


@pytest.mark.slow
def test_a_hostile_client_harms_no_server_of_the_command_which_ends_when_it_is_told_to():
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "d3llm_hf", "serve", NAME, "--port", str(port), "--max-queue", "300"]
    server = subprocess.Popen([*command, "--dtype", "float32"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(120):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).read()
                break
            time.sleep(1)
        assert_unharmed(port, size=1_000_000, leaving=200, seconds=8)
        with contextlib.closing(socket.create_connection(("127.0.0.1", port))) as half:
            half.sendall(head("Content-Length: 500"))
            body = json.dumps(chat(d3llm={"no_repeat_ngram_size": 5000}, max_tokens=128, stream=True)).encode()
            with contextlib.closing(socket.create_connection(("127.0.0.1", port))) as client:
                client.sendall(head(f"Content-Length: {len(body)}") + body)
                server.send_signal(signal.SIGTERM)
                server.wait(60)
    finally:
        server.kill()
        server.wait()


# ---- what bounds the reading of a request ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"messages": [1, 2, 3]}, "messages.0"),
        ({"messages": [{}, {}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": 1}, {"role": 2}]}, "messages.1.role"),
        ({"messages": [{"role": "user", "content": "a", "b": 1, "c": 2}]}, "messages.0.b"),
        ({"stream": True, "stream_options": {"b": 1, "c": 2}}, "stream_options.b"),
        ({"stop": [1, 2, 3]}, "stop.0"),
    ],
)
def test_of_very_many_mistakes_the_first_elements_alone_are_looked_at(change, name, monkeypatch):
    found = []

    def in_our_words(error):
        found.append(error.error_count())
        return words(error)

    words = schemas.in_our_words
    monkeypatch.setattr(schemas, "in_our_words", in_our_words)
    with pytest.raises(ApiError) as refused:
        parse(ChatRequest, json.dumps(chat(**change)).encode())
    assert refused.value.param == name
    assert sum(found) <= 2  # of one element


def test_a_body_holds_so_many_values_at_most():
    values = b'{"model": "m", "metadata": [%b]}'
    for inside in (b",".join([b"1"] * (MAX_VALUES + 1)), b",".join([b"[]"] * (MAX_VALUES + 1))):
        with pytest.raises(ApiError, match="must hold at most 100000 values"):
            read_object(values % inside)
    assert len(read_object(values % b",".join([b"1"] * (MAX_VALUES - 2)))["metadata"]) == MAX_VALUES - 2


def test_while_a_server_runs_no_collection_looks_at_what_was_there_before_it(with_client):
    async def use(client):
        return gc.get_freeze_count()

    assert with_client(use) > 10_000
    assert gc.get_freeze_count() < 10_000


# ---- what bounds a prompt ----------------------------------------------------------------------------------------


class Counting:
    """A tokenizer that counts the characters it encodes."""

    def __init__(self, tokenizer):
        self._tokenizer, self.characters = tokenizer, 0

    def __call__(self, text, *args, **kwargs):
        self.characters += len(text)
        return self._tokenizer(text, *args, **kwargs)

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)


def admitted(admission, text, kind=ChatRequest):
    more = {"messages": [{"role": "user", "content": text}]} if kind is ChatRequest else {"prompt": text}
    request = parse(kind, json.dumps({"model": NAME, "max_tokens": 8} | more).encode())
    return admission.job(request, lambda event: None)


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
@pytest.mark.parametrize("text", ["word " * 20_000, "<|eot_id|>" * 10_000, "a" * 100_000, "🙂" * 20_000])
def test_of_a_prompt_that_does_not_fit_only_the_beginning_is_encoded(loaded, kind, text):
    model, tokenizer = loaded
    counting = Counting(tokenizer)
    with pytest.raises(ApiError, match=r"256 positions \(got more than 256 \+ 8\)") as refused:
        admitted(Admission(model, counting, NAME, 64), text, kind)
    assert refused.value.code == "context_length_exceeded"
    assert counting.characters < len(text) / 2


def test_a_prompt_that_fits_is_encoded_as_before_however_long_its_text_is(loaded, monkeypatch):
    model, tokenizer = loaded
    text = "Tom has 8 apples. " * 8
    expected = admitted(Admission(model, tokenizer, NAME, 64), text).prompt
    monkeypatch.setattr("d3llm_hf.serving.admission.CHARACTERS", 0.1)  # so that its beginnings are looked at
    assert admitted(Admission(model, tokenizer, NAME, 64), text).prompt == expected


def test_a_server_may_allow_shorter_prompts_than_its_model(loaded, monkeypatch):
    admission = Admission(*loaded, NAME, 64, max_prompt_tokens=4)
    assert len(admitted(admission, "Tom", CompletionRequest).prompt) <= 4
    with pytest.raises(ApiError, match="`prompt` must have at most 4 tokens on this server") as refused:
        admitted(admission, "Tom has 8 apples and 9 pens.", CompletionRequest)
    assert refused.value.param == "prompt"
    # and a model that names no positions has a limit of its own
    monkeypatch.setattr(Admission, "_positions", lambda self: None)
    with pytest.raises(ApiError, match="at most 8192 tokens"):
        admitted(Admission(*loaded, NAME, 64), "word " * 60_000, CompletionRequest)
