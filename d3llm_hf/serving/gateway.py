"""What clients of several replicas connect to: each request is passed to one of them, and its reply passed on.

The replicas are the FastAPI app of [`create_app`] each; what they are run by is not known here.
"""

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any, Protocol

from starlette.middleware.cors import CORSMiddleware

from .app import LAST_WORD_SECONDS, TIMEOUT
from .errors import ApiError
from .keys import check_key
from .replies import failure
from .sums import Sums


logger = logging.getLogger(__name__)

TRIES = 3
"""Replicas that are asked in turn, where each ends before its answer begins."""
PASSED = (
    "type",
    "asgi",
    "http_version",
    "method",
    "scheme",
    "path",
    "raw_path",
    "query_string",
    "root_path",
    "headers",
)
"""What of a request's scope a replica gets."""

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Lost(Exception):
    """A replica that ended before its reply did."""


class Fleet(Protocol):
    """Replicas of one app."""

    def ask(self, scope: Scope, body: bytes) -> AsyncGenerator[Message, None]:
        """The ASGI messages with which one of them replies.

        Raises:
            Lost: when it ends before it has replied.
        """

    async def told(self) -> Mapping[str, str]:
        """Replica -> what its metrics say, of those that answer now."""

    async def running(self) -> int:
        """How many there are now."""


class _Left(Exception):
    """The client has left."""


def create_gateway(
    fleet: Fleet,
    *,
    timeout: float = TIMEOUT,
    max_body_bytes: int = 1 << 20,
    api_key: str | None = None,
    allow_origins: Sequence[str] = (),
) -> App:
    """An ASGI app before replicas, with the endpoints of [`create_app`].

    1. A request's key and body are read here, `/health` and `/metrics` are answered for all replicas together.
    2. All else goes to a replica. A reply that is no stream is passed on when it is whole, a stream when its first
       text is there; a replica that ends before that costs time, for another one is asked.
    3. A stream whose replica ends later ends with an event of the error, as it does where decoding fails.

    Args:
        fleet: the replicas.
        timeout (`float`): seconds from a request's headers to the end of its reply.
        max_body_bytes (`int`): of a request, of which the replicas read no more either.
        api_key (`str`, *optional*): what clients must send, everywhere but to `/health`. Replicas need none.
        allow_origins: web pages of these origins may use the server.
    """
    app: App = _Gateway(fleet, timeout, max_body_bytes, api_key)
    if not allow_origins:
        return app
    return CORSMiddleware(  # type: ignore[return-value]
        app,  # type: ignore[arg-type]
        allow_origins=list(allow_origins),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
    )


class _Gateway:
    def __init__(self, fleet: Fleet, timeout: float, max_body_bytes: int, api_key: str | None):
        self.fleet, self.timeout, self.max_body_bytes, self._key = fleet, timeout, max_body_bytes, api_key
        self._sums = Sums()
        self._repeated = self._lost = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # the lifespan, which nothing here has
            raise NotImplementedError(scope["type"])
        try:
            await self._reply(scope, receive, send)
        except ApiError as error:
            await _send_error(send, error)
        except _Left:
            logger.debug("a client has left")
        except Exception:
            logger.exception("a request failed")
            await _send_error(send, ApiError(500, "The request failed, see the server's log."))

    async def _reply(self, scope: Scope, receive: Receive, send: Send) -> None:
        deadline = time.monotonic() + self.timeout
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if scope["path"] == "/health":
            await self._send_health(send)
            return
        check_key(self._key, headers.get("authorization", ""))
        if scope["path"] == "/metrics":
            await self._send_metrics(send)
            return
        body = await self._body(headers, receive, deadline)
        left = asyncio.ensure_future(_departure(receive))
        try:
            # A replica counts the time as well, and says it better.
            await self._pass_on(scope, body, send, left, deadline + LAST_WORD_SECONDS)
        finally:
            left.cancel()

    async def _send_health(self, send: Send) -> None:
        running = await self.fleet.running()
        content = {"status": "ok" if running else "no replica is running", "replicas": running}
        await _send_whole(send, 200 if running else 503, "application/json", json.dumps(content))

    async def _send_metrics(self, send: Send) -> None:
        told, running = await asyncio.gather(self.fleet.told(), self.fleet.running())
        own = {
            "d3llm_replicas": ("gauge", running),
            "d3llm_repeated_requests_total": ("counter", self._repeated),
            "d3llm_lost_requests_total": ("counter", self._lost),
        }
        await _send_whole(send, 200, "text/plain; version=0.0.4; charset=utf-8", self._sums.render(told, own))

    async def _body(self, headers: Mapping[str, str], receive: Receive, deadline: float) -> bytes:
        """A request's body; as much of it as replicas need to refuse it where it is too long.

        Raises:
            ApiError: 408.
        """
        declared = headers.get("content-length", "0")
        if len(declared) > 20 or not declared.isdecimal() or int(declared) > self.max_body_bytes:
            return b""  # it will be refused for what it says of itself
        body = bytearray()

        async def read() -> None:
            while len(body) <= self.max_body_bytes:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise _Left
                body.extend(message.get("body", b""))
                if not message.get("more_body", False):
                    return

        try:
            await asyncio.wait_for(read(), max(0.0, deadline - time.monotonic()))
        except asyncio.TimeoutError:
            raise ApiError(
                408, f"The body was not complete within {self.timeout} s. Send it at once.", code="timeout"
            ) from None
        return bytes(body)

    async def _pass_on(
        self, scope: Scope, body: bytes, send: Send, left: "asyncio.Future[None]", deadline: float
    ) -> None:
        """Asks replicas until one has replied.

        Raises:
            ApiError: 503 where none has, 504 at the deadline; before anything was sent.
            _Left: when the client leaves.
        """
        asked = {name: scope[name] for name in PASSED if name in scope}
        for _ in range(TRIES):
            messages, begun = self.fleet.ask(asked, body), _Begun(send)
            try:
                while (message := await _within(anext(messages, None), left, deadline)) is not None:
                    await begun.take(message)
                return
            except Lost:
                if begun.is_sent:
                    self._lost += 1
                    await begun.end(_lost())
                    return
                self._repeated += 1
            except ApiError as error:
                if not begun.is_sent:
                    raise
                await begun.end(error)
                return
            finally:
                with contextlib.suppress(Lost):
                    await messages.aclose()
        self._lost += 1
        raise _lost()


class _Begun:
    """A reply on its way: held until it is whole, or a stream that has something to say."""

    def __init__(self, send: Send):
        self._send = send
        self._held: list[Message] = []
        self._is_stream = False
        self.is_sent = False

    async def take(self, message: Message) -> None:
        """Takes the next message of a replica."""
        if message["type"] == "http.response.start":
            kind = next((value for name, value in message["headers"] if name.lower() == b"content-type"), b"")
            self._is_stream = kind.startswith(b"text/event-stream")
        self._held.append(message)
        is_body = message["type"] == "http.response.body"
        if is_body and (self._is_stream or not message.get("more_body", False)):
            for each in self._held:
                self.is_sent = True
                await self._send(each)
            self._held = []

    async def end(self, error: ApiError) -> None:
        """Ends a stream that was begun."""
        await self._send({"type": "http.response.body", "body": failure(error).encode(), "more_body": False})


async def _within(work: Awaitable[Any], left: "asyncio.Future[None]", deadline: float) -> Any:
    """What `work` gives, unless the client leaves before, or the deadline passes.

    Raises:
        ApiError: 504.
        _Left: when the client leaves.
    """
    task: asyncio.Future[Any] = asyncio.ensure_future(work)
    try:
        seconds = max(0.0, deadline - time.monotonic())
        await asyncio.wait({task, left}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if left.done():
            raise _Left
        raise ApiError(504, "No replica has answered in time. Try again later, or lower `max_tokens`.", code="timeout")
    finally:
        if not task.done():
            task.cancel()
            await asyncio.wait({task})  # a generator that still runs cannot be closed


async def _departure(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _lost() -> ApiError:
    return ApiError(503, "The replica that answered has ended. Try again.", code="replica_lost", retry_after=1)


async def _send_error(send: Send, error: ApiError) -> None:
    await _send_whole(send, error.status, "application/json", json.dumps(error.body), error.headers)


async def _send_whole(send: Send, status: int, kind: str, text: str, headers: Mapping[str, str] | None = None) -> None:
    content = text.encode()
    named = {"content-type": kind, "content-length": str(len(content))} | dict(headers or {})
    pairs = [(name.lower().encode(), value.encode()) for name, value in named.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": content})
