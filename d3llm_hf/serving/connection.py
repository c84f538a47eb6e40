"""uvicorn's protocol of an HTTP connection, of which every wait has an end.

uvicorn ends a connection that is idle between two requests, but its timer stops at the first byte: a request line that
is never finished, a body that nobody reads any more and a client that does not read its reply are waited for.
"""

import asyncio
import json
import time
from collections import deque
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError


HEAD_SECONDS = 10.0
"""For the first line and the headers of a request, at most."""

PIECE = 1 << 9
"""Bytes that are parsed before other connections get their turn: a body may come in very many very small chunks."""

TURN_SECONDS = 0.005
"""For what is left of all connections together, before the loop goes on with everything else."""


def bounded_protocol(timeout: float) -> type[H11Protocol]:
    """The protocol for `uvicorn.run(http=...)`.

    Args:
        timeout (`float`): seconds after which a client that does not read its reply is left; for the headers of a
            request it has no longer either.
    """
    settings = {"head_seconds": min(HEAD_SECONDS, timeout), "stall_seconds": timeout, "turns": _Turns()}
    return type("BoundedProtocol", (_Bounded,), settings)


class _Turns:
    """Lets connections parse what they have left, a piece of each in turn, for a short time in each round of the loop.

    Were each to parse a piece in every round, a round would take longer the more of them there are.
    """

    def __init__(self) -> None:
        self._waiting: deque[_Bounded] = deque()

    def wait(self, connection: "_Bounded") -> None:
        """Calls the connection's `parse` later on."""
        self._waiting.append(connection)
        if len(self._waiting) == 1:
            connection.loop.call_soon(self._go_on, connection.loop)

    def _go_on(self, loop: asyncio.AbstractEventLoop) -> None:
        end = time.monotonic() + TURN_SECONDS
        try:
            while self._waiting and time.monotonic() < end:
                connection = self._waiting.popleft()
                if connection.parse():
                    self._waiting.append(connection)
        finally:
            if self._waiting:
                loop.call_soon(self._go_on, loop)


class _Lingering:
    """A transport that closes in two steps while its client still sends: no more is written, then no more is read.

    Closed at once, the bytes that nobody reads would reset the connection, and the client would not see its reply.
    """

    def __init__(self, transport: asyncio.Transport, protocol: "_Bounded"):
        self._transport, self._protocol, self._lingers = transport, protocol, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._lingers or self._transport.is_closing()

    def close(self) -> None:
        sends = self._protocol.conn.their_state in (h11.SEND_BODY, h11.ERROR)
        if self.is_closing() or not sends or not self._transport.can_write_eof():
            self._transport.close()
            return
        self._lingers = True
        self._transport.write_eof()
        self._transport.resume_reading()
        self._protocol.loop.call_later(self._protocol.head_seconds, self._transport.abort)


class _Bounded(H11Protocol):
    head_seconds: float
    stall_seconds: float
    turns: _Turns

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(_Lingering(transport, self))  # type: ignore[arg-type]
        self._unread = bytearray()
        self._head_timer: asyncio.TimerHandle | None = None
        self._abort_timer: asyncio.TimerHandle | None = None
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unread.clear()
        for timer in (self._head_timer, self._abort_timer):
            if timer is not None:
                timer.cancel()

    # ---- a request's head ----------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        waits = bool(self._unread)
        self._unread += data
        if not waits and self.parse():
            self.turns.wait(self)

    def parse(self) -> bool:
        """Parses a piece of what has arrived, and says whether there is more."""
        if not self._unread:
            return False
        piece = bytes(self._unread[:PIECE])
        del self._unread[:PIECE]
        super().data_received(piece)
        self._watch_head()
        if self.transport.is_closing():
            self._unread.clear()
        elif self._unread:
            self.transport.pause_reading()  # also where what was parsed has just resumed it
        elif not self.flow.read_paused:
            self.transport.resume_reading()
        return bool(self._unread)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_head()
        if self.transport.is_closing():
            self._abort_later()

    def _watch_head(self) -> None:
        """Between two replies the next request has so long, whatever arrives of it or of the last one's body."""
        if self.cycle is not None and not self.cycle.response_complete:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_seconds, self._end)

    def _end(self) -> None:
        begun, _ = self.conn.trailing_data
        if begun and (self.cycle is None or self.conn.our_state is self.conn.their_state):
            error = ApiError(
                408, f"The request's headers were not complete within {self.head_seconds} s.", code="timeout"
            )
            body = json.dumps(error.body).encode()
            self.transport.write(
                b"HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\nConnection: close\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
            )
        self.transport.close()
        self._abort_later()

    # ---- a reply that is not read --------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        self._abort_later()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._abort_timer is not None and not self.transport.is_closing():
            self._abort_timer.cancel()
            self._abort_timer = None

    def _abort_later(self) -> None:
        if self._abort_timer is None:
            self._abort_timer = self.loop.call_later(self.stall_seconds, self.transport.abort)
