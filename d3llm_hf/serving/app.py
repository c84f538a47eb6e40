"""The server as a FastAPI app: reads requests, waits for the worker, and notices when a client leaves."""

import asyncio
import contextlib
import gc
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from .admission import Admission
from .desk import Desk
from .errors import ApiError
from .jobs import Answer, Event, Job, Piece
from .keys import check_key
from .metrics import Metrics
from .replies import Reply, failure
from .room import room
from .schemas import ChatRequest, CompletionRequest, parse
from .worker import Worker


logger = logging.getLogger(__name__)

OUTCOMES = {401: "refused", 408: "timeout", 429: "queue_full", 504: "timeout"}
CLIENT_LEFT = 499
"""Status of a reply that nobody reads, as nginx logs it."""
STOP_SECONDS = 5.0
"""For a forward to end when the server stops."""
TIMEOUT = 120.0
LAST_WORD_SECONDS = 1.0

Result = TypeVar("Result")


def create_app(
    model,
    tokenizer,
    name: str,
    *,
    max_batch_size: int = 8,
    max_wait_ms: float = 5.0,
    max_queue: int = 64,
    timeout: float = TIMEOUT,
    max_tokens: int = 1024,
    max_prompt_tokens: int | None = None,
    max_body_bytes: int = 1 << 20,
    api_key: str | None = None,
    allow_origins: Sequence[str] = (),
) -> FastAPI:
    """A server of one model with the endpoints of OpenAI's API. Its lifespan starts and ends the worker.

    Args:
        model: with this library's `generate`; settings that a request leaves open are its `generation_config`'s.
        tokenizer: its tokenizer, for chats with a chat template.
        name (`str`): what clients call the model.
        max_batch_size (`int`): requests that are at work at once; others join when one has ended.
        max_wait_ms (`float`): milliseconds that a request waits for others where nobody is at work.
        max_queue (`int`): requests that may wait; more get status 429.
        timeout (`float`): seconds from a request's headers to the end of its reply; then status 504, or 408 where its
            body is not there.
        max_tokens (`int`): longest canvas that a request may ask for.
        max_prompt_tokens (`int`, *optional*): longest prompt; what the model has positions for when unset.
        max_body_bytes (`int`): of a request; more get status 413.
        api_key (`str`, *optional*): what clients must send as `Authorization: Bearer`, everywhere but to `/health`.
        allow_origins: web pages of these origins may use the server (CORS); none by default.

    Raises:
        ValueError: for a limit that is not positive, or an empty name or key.
    """
    limits = {
        "max_batch_size": max_batch_size, "max_queue": max_queue, "timeout": timeout, "max_tokens": max_tokens,
        "max_body_bytes": max_body_bytes, "max_prompt_tokens": 1 if max_prompt_tokens is None else max_prompt_tokens,
    }  # fmt: skip
    for option, value in limits.items():
        if not value > 0:
            raise ValueError(f"`{option}` must be positive (got {value}). Leave it out for the default.")
    if not max_wait_ms >= 0:
        raise ValueError(f"`max_wait_ms` must not be negative (got {max_wait_ms}). Pass 0 not to wait.")
    if not name:
        raise ValueError("`name` must not be empty (got ''). Pass what clients call the model.")
    if api_key is not None and not api_key:
        raise ValueError("`api_key` must not be empty. Leave it out to serve without a key.")

    metrics = Metrics()
    worker = Worker(
        model, tokenizer, max_batch_size=max_batch_size, max_wait=max_wait_ms / 1000, max_queue=max_queue,
        metrics=metrics,
    )  # fmt: skip
    admission, desk = Admission(model, tokenizer, name, max_tokens, max_prompt_tokens), Desk(max_queue)
    server = _Server(admission, desk, worker, metrics, timeout, max_body_bytes, api_key)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # A full collection looks at all that was imported, half a million objects, and nobody is answered meanwhile.
        logger.info(room(model, max_batch_size, admission.longest, max_tokens))
        gc.freeze()
        desk.start()
        worker.start()
        yield
        desk.close()
        await asyncio.to_thread(worker.close, STOP_SECONDS)
        gc.unfreeze()

    # Neither schema nor documentation pages: those load scripts from another host.
    app = FastAPI(title="d3llm", lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    app.state.worker = worker
    # Each is called with the kind of error that it is for.
    app.add_exception_handler(ApiError, _refused)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, _http_error)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, _unexpected)
    if allow_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(allow_origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    locked = [Depends(server.check_key)]
    app.add_api_route("/v1/chat/completions", server.chat, methods=["POST"], dependencies=locked)
    app.add_api_route("/v1/completions", server.completion, methods=["POST"], dependencies=locked)
    app.add_api_route("/v1/models", server.models, methods=["GET"], dependencies=locked)
    app.add_api_route("/v1/models/{name:path}", server.model, methods=["GET"], dependencies=locked)
    app.add_api_route("/metrics", server.show_metrics, methods=["GET"], dependencies=locked)
    app.add_api_route("/health", server.health, methods=["GET"])
    return app


class _Server:
    """The endpoints."""

    def __init__(
        self,
        admission: Admission,
        desk: Desk,
        worker: Worker,
        metrics: Metrics,
        timeout: float,
        max_body_bytes: int,
        api_key: str | None,
    ):
        self.admission, self.desk, self.worker, self.metrics = admission, desk, worker, metrics
        self.timeout, self.max_body_bytes = timeout, max_body_bytes
        self._key = api_key
        self._created = int(time.time())

    async def check_key(self, request: Request) -> None:
        """Refuses requests without the server's key."""
        check_key(self._key, request.headers.get("authorization", ""))

    async def chat(self, request: Request) -> Response:
        return await self._generate(request, ChatRequest)

    async def completion(self, request: Request) -> Response:
        return await self._generate(request, CompletionRequest)

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._model()]}

    async def model(self, name: str) -> dict[str, Any]:
        self.admission.check_model(name)
        return self._model()

    def _model(self) -> dict[str, Any]:
        return {"id": self.admission.name, "object": "model", "created": self._created, "owned_by": "d3llm-hf"}

    async def show_metrics(self) -> PlainTextResponse:
        gauges = {"d3llm_queue_length": self.worker.waiting, "d3llm_running_rows": self.worker.running}
        return PlainTextResponse(self.metrics.render(gauges), media_type="text/plain; version=0.0.4")

    async def health(self) -> JSONResponse:
        alive = self.worker.alive
        return JSONResponse({"status": "ok" if alive else "worker has ended"}, status_code=200 if alive else 503)

    # ---- text ----------------------------------------------------------------------------------------------------

    async def _generate(self, request: Request, kind: type[ChatRequest] | type[CompletionRequest]) -> Response:
        visit, deadline = _Visit(self.metrics), time.monotonic() + self.timeout
        left: asyncio.Future[None] | None = None
        try:
            body = await self._body(request, deadline)
            left = asyncio.ensure_future(_departure(request))
            loop = asyncio.get_running_loop()
            events: asyncio.Queue[Event] = asyncio.Queue()

            def tell(event: Event) -> None:  # in the worker's thread
                with contextlib.suppress(RuntimeError):  # the loop has ended, and the reader with it
                    loop.call_soon_threadsafe(events.put_nowait, event)

            def admit() -> tuple[ChatRequest | CompletionRequest, Job]:  # in the desk's thread
                asked = parse(kind, body)
                return asked, self.admission.job(asked, tell)

            asked, job = await self._within(self.desk.run(len(body), admit), left, deadline)
            self.worker.submit(job)
            reading = self._events(job, events, left, deadline)
            reply = Reply(self.admission.name, kind is ChatRequest)
            # What goes wrong before the first text has a status of its own, also of a stream.
            first = await anext(reading)
            if isinstance(first, Answer) and not asked.stream:
                await reading.aclose()
                visit.end("ok")
                return JSONResponse(reply.whole(first))
            usage = asked.stream_options is not None and asked.stream_options.include_usage

            async def finish() -> None:
                await reading.aclose()
                visit.end(visit.outcome)

            # Beyond the deadline there is time for the event that tells of it, to a client that reads.
            seconds = deadline - time.monotonic() + LAST_WORD_SECONDS
            stream, left = _EventStream(self._stream(reply, first, reading, usage, visit), finish, seconds), None
            return stream
        except ApiError as error:
            visit.end(OUTCOMES.get(error.status, "refused" if error.status < 500 else "failed"))
            raise
        except ClientDisconnect:
            visit.end("left")
            return Response(status_code=CLIENT_LEFT)
        except Exception:
            visit.end("failed")
            raise
        finally:
            if left is not None:
                left.cancel()

    async def _body(self, request: Request, deadline: float) -> bytes:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            # Web pages of any origin may send other types without asking, wherever they cannot read the reply.
            raise ApiError(415, "The body must be JSON. Send `Content-Type: application/json`.", code="invalid_json")
        declared = request.headers.get("content-length", "0")
        if len(declared) > 20 or not declared.isdecimal() or int(declared) > self.max_body_bytes:
            raise self._too_large()
        try:
            return await asyncio.wait_for(self._read(request), max(0.0, deadline - time.monotonic()))
        except asyncio.TimeoutError:
            raise ApiError(
                408, f"The body was not complete within {self.timeout} s. Send it at once.", code="timeout"
            ) from None

    async def _read(self, request: Request) -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self.max_body_bytes:
                raise self._too_large()
        return bytes(body)

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"The body must have at most {self.max_body_bytes} bytes. Send a shorter one.", code="too_large"
        )

    async def _within(self, work: Coroutine[Any, Any, Result], left: asyncio.Future[None], deadline: float) -> Result:
        """The result of `work`, unless the client leaves before it is there, or the deadline passes.

        Raises:
            ApiError: 504.
            ClientDisconnect: when the client leaves.
        """
        task = asyncio.ensure_future(work)
        try:
            seconds = max(0.0, deadline - time.monotonic())
            waits: set[asyncio.Future[Any]] = {task, left}
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if left.done():
                raise ClientDisconnect
            raise ApiError(
                504, f"The answer was not complete within {self.timeout} s. Lower `max_tokens`.", code="timeout"
            )
        finally:
            task.cancel()

    async def _events(
        self, job: Job, events: asyncio.Queue[Event], left: asyncio.Future[None], deadline: float
    ) -> AsyncGenerator[Piece | Answer, None]:
        """What the worker tells of a job, up to its answer.

        Raises:
            ApiError: the worker's, or 504.
            ClientDisconnect: when the client leaves.
        """
        try:
            while True:
                told = await self._within(events.get(), left, deadline)
                if isinstance(told, ApiError):
                    raise told
                if isinstance(told, Answer):
                    self.metrics.add(
                        prompt_tokens=told.prompt_tokens,
                        completion_tokens=told.completion_tokens,
                        forwards=told.forwards,
                    )
                yield told
                if isinstance(told, Answer):
                    return
        finally:
            left.cancel()
            job.leave()

    async def _stream(
        self, reply: Reply, event: Piece | Answer, reading: AsyncIterator[Piece | Answer], usage: bool, visit: "_Visit"
    ) -> AsyncGenerator[str, None]:
        """The events of a reply, the worker's first one having been read."""
        try:
            yield reply.first()
            while isinstance(event, Piece):
                if shown := reply.text(event.text):
                    yield shown
                if event.draft is not None:
                    yield reply.draft(event.draft)
                event = await anext(reading)
            if shown := reply.text(event.rest):
                yield shown
            visit.outcome = "ok"
            yield reply.last(event, usage)
        except ApiError as error:
            visit.outcome = OUTCOMES.get(error.status, "failed")
            yield failure(error)
        except ClientDisconnect:
            logger.debug("the client of a stream has left")


class _Visit:
    """Books the end of one request."""

    def __init__(self, metrics: Metrics):
        self._metrics, self._began = metrics, time.monotonic()
        self.outcome = "left"  # of a stream, until it ends otherwise

    def end(self, outcome: str) -> None:
        self._metrics.request(outcome, time.monotonic() - self._began)


class _EventStream(StreamingResponse):
    """A stream whose source notices by itself that the client has left; `finish` is awaited whatever happens.

    One that the client does not read is given up after so many `seconds`.
    """

    media_type = "text/event-stream"

    def __init__(
        self, content: AsyncGenerator[str, None], finish: Callable[[], Awaitable[None]], seconds: float | None = None
    ):
        super().__init__(content, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._source, self._finish, self._seconds = content, finish, seconds

    async def __call__(self, scope, receive, send) -> None:
        try:
            await asyncio.wait_for(self.stream_response(send), self._seconds)
        except asyncio.TimeoutError:
            logger.info("a stream was not read in time")
        except OSError:  # some servers raise it when they send to a client that has left
            logger.debug("the client of a stream has left")
        finally:
            await self._source.aclose()
            await self._finish()


async def _departure(request: Request) -> None:
    """Returns when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _refused(request: Request, error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    told = ApiError(
        error.status_code, f"{error.detail}. See docs/serving.md for the endpoints.", code="no_such_endpoint"
    )
    return JSONResponse(told.body, status_code=error.status_code, headers=error.headers)


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    told = ApiError(500, "The request failed, see the server's log.")
    return JSONResponse(told.body, status_code=500)
