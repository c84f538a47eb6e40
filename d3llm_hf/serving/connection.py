"""uvicorn's protocol of an HTTP connection, of which every wait has an end.

uvicorn ends a connection that is idle between two requests, but its timer stops at the first byte: a request line that
is never finished, a body that nobody reads any more and a client that does not read its reply are waited for.
"""

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError


HEAD_SECONDS = 10.0
"""For the first line and the headers of a request, at most."""

PIECE = 1 << 13
"""Bytes that are parsed before other connections get their turn: a body may come in very many very small chunks."""


def bounded_protocol(timeout: float) -> type[H11Protocol]:
    """The protocol for `uvicorn.run(http=...)`.

    Args:
        timeout (`float`): seconds after which a client that does not read its reply is left; for the headers of a
            request it has no longer either.
    """
    return type("BoundedProtocol", (_Bounded,), {"head_seconds": min(HEAD_SECONDS, timeout), "stall_seconds": timeout})


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
        if not self.transport.is_closing():
            self._unread += data
            self._parse()

    def _parse(self) -> None:
        if not self._unread:
            return
        piece = bytes(self._unread[:PIECE])
        del self._unread[:PIECE]
        super().data_received(piece)
        self._watch_head()
        if self.transport.is_closing():
            self._unread.clear()
        elif self._unread:
            self.transport.pause_reading()
            self.loop.call_soon(self._parse)
        elif not self.flow.read_paused:
            self.transport.resume_reading()

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
