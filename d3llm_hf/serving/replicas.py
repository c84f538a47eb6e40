"""Replicas of a server on Ray Serve: the app of [`create_app`] as a deployment, reached by a handle of Ray's."""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..cluster import Share
from .gateway import Lost, Message, Scope
from .recipe import Recipe


logger = logging.getLogger(__name__)

DEPLOYMENT = "Replica"
STOP_SECONDS = 15.0
"""For a replica to end its requests."""
TELL_SECONDS = 10.0
"""For all replicas to tell their counts."""
HEALTH_SECONDS = 2.0
"""Between two looks at whether a replica lives."""
POLL_SECONDS = 0.25
STARTS = 3
"""Tries of Ray at starting a replica that ends while it starts."""


class Replica:
    """One model behind the app of [`create_app`], without a socket.

    A recipe that cannot be carried out is kept as [`refusal`]: Ray would try again, and tell a traceback.

    Args:
        recipe ([`Recipe`]): of the server.
    """

    async def __init__(self, recipe: Recipe):  # type: ignore[misc]  # Ray awaits it
        self.number = secrets.token_hex(8)
        self._refused: str | None = None
        try:
            self._app = recipe.app()
        except (ValueError, TypeError, OSError, ImportError) as error:
            self._refused = str(error) or type(error).__name__
            return
        self._lifespan = self._app.router.lifespan_context(self._app)
        await self._lifespan.__aenter__()

    async def refusal(self) -> str | None:
        """Why the recipe cannot be carried out."""
        return self._refused

    async def check_health(self) -> None:
        """Raises where a new replica should take this one's place.

        Raises:
            RuntimeError: when the thread that decodes has ended.
        """
        if self._refused is None and not self._app.state.worker.alive:
            raise RuntimeError("the worker has ended")

    async def told(self) -> tuple[str, str]:
        """This replica's number, and what its metrics say."""
        scope = {"type": "http", "method": "GET", "path": "/metrics", "query_string": b"", "headers": []}
        messages = [message async for message in self.reply(scope, b"")]
        return self.number, b"".join(message.get("body", b"") for message in messages).decode()

    async def reply(self, scope: Scope, body: bytes) -> AsyncGenerator[Message, None]:
        """The ASGI messages of the app's reply; when nobody takes them any more, its client has left."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        left, sent = asyncio.Event(), False

        async def receive() -> Message:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": body, "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self._app(dict(scope), receive, messages.put)
            finally:
                messages.put_nowait(None)

        running = asyncio.ensure_future(run())
        try:
            while (message := await messages.get()) is not None:
                yield message
            await running
        finally:
            left.set()
            await asyncio.wait({running}, timeout=STOP_SECONDS)
            running.cancel()


class RayFleet:
    """The replicas of an app of Ray Serve, as [`create_gateway`] asks them.

    Args:
        ray, serve: the modules.
        app (`str`): its name.
        handle: of its deployment.
    """

    def __init__(self, ray: Any, serve: Any, app: str, handle: Any):
        self._serve, self._app, self._handle = serve, app, handle
        self._reply = handle.options(method_name="reply", stream=True)
        self._gone = (
            ray.exceptions.RayActorError,
            ray.exceptions.ObjectLostError,
            serve.exceptions.DeploymentUnavailableError,
        )

    async def ask(self, scope: Scope, body: bytes) -> AsyncGenerator[Message, None]:
        """See [`Fleet`]."""
        response, is_done = self._reply.remote(scope, body), False
        try:
            async for message in response:
                yield message
            is_done = True
        except self._gone as error:
            is_done = True
            logger.warning("a replica has ended: %s", " ".join(str(error).split())[:200])
            raise Lost from error
        finally:
            if not is_done:
                await asyncio.to_thread(response.cancel)  # which waits until the request is placed

    async def told(self) -> Mapping[str, str]:
        """See [`Fleet`]."""
        with contextlib.suppress(TimeoutError, *self._gone):
            asked = self._handle.broadcast("told")
            found = await asked.results_async(timeout_s=TELL_SECONDS, return_exceptions=True)
            return dict(each for each in found if not isinstance(each, BaseException))
        return {}

    async def running(self) -> int:
        """See [`Fleet`]."""
        return await asyncio.to_thread(running_replicas, self._serve, self._app)


def running_replicas(serve: Any, app: str) -> int:
    """Replicas of an app that run now."""
    overview = serve.status().applications.get(app)
    deployment = None if overview is None else overview.deployments.get(DEPLOYMENT)
    return 0 if deployment is None else deployment.replica_states.get("RUNNING", 0)


@contextmanager
def deployed(
    serve: Any, app: str, recipe: Recipe, share: Share, max_ongoing: int, tell: Callable[[str], None]
) -> Iterator[Any]:
    """Inside, the replicas of an app run; yields the handle of their deployment.

    Args:
        serve: the module `ray.serve`, of a process that has joined a cluster.
        app (`str`): name of the app, which the cluster must not have yet.
        recipe ([`Recipe`]): of each replica.
        share ([`Share`]): how many there are, and what each has of a machine.
        max_ongoing (`int`): requests that a replica may be at; more wait at the gateway.
        tell: is told how many run, when that changes.

    Raises:
        ValueError: for a recipe that a replica cannot carry out, in its words, and where replicas do not start.
    """
    serve.start(proxy_location="Disabled")  # no address of Ray's: the gateway is the only one
    others = set(serve.status().applications)
    if app in others:
        raise ValueError(
            f"`--name` must be new to the cluster (got {app!r}, which is served there). Pass another one, or end that "
            f"app: `python -c \"import ray, ray.serve; ray.init('auto'); ray.serve.delete({app!r})\"`."
        )
    try:
        yield _deploy(serve, app, recipe, share, max_ongoing, tell)
    finally:
        serve.delete(app)
        if not others and not serve.status().applications:
            serve.shutdown()  # a later user of the cluster may want addresses of Ray's


def _deploy(serve: Any, app: str, recipe: Recipe, share: Share, max_ongoing: int, tell: Callable[[str], None]) -> Any:
    """Starts the replicas, and waits until all of them run."""
    deployment = serve.deployment(
        Replica,
        name=DEPLOYMENT,
        num_replicas=share.count,
        ray_actor_options={"num_cpus": share.num_cpus, "num_gpus": share.num_gpus},
        max_ongoing_requests=max_ongoing,
        graceful_shutdown_timeout_s=STOP_SECONDS,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=HEALTH_SECONDS,
        max_constructor_retry_count=STARTS,
    )
    target = serve.RunTarget(
        target=deployment.bind(recipe), name=app, route_prefix=None, logging_config={"enable_access_log": False}
    )
    (handle,) = serve.run_many([target], wait_for_applications_running=False)
    _wait(serve, app, share.count, tell)
    for refusal in _refusals(serve, handle, share.count):
        if refusal is not None:
            raise ValueError(refusal)
    return handle


def _refusals(serve: Any, handle: Any, count: int) -> list[str | None]:
    """What replicas say of their recipe. A handle learns a little later than its app of the replicas that run."""
    end = time.monotonic() + TELL_SECONDS
    while True:
        with contextlib.suppress(serve.exceptions.DeploymentUnavailableError):
            found = handle.broadcast("refusal").results(timeout_s=TELL_SECONDS)
            if len(found) >= count or time.monotonic() > end:
                return found
        if time.monotonic() > end:
            return []
        time.sleep(POLL_SECONDS)


def _wait(serve: Any, app: str, count: int, tell: Callable[[str], None]) -> None:
    """Waits until an app runs.

    Raises:
        ValueError: where its replicas do not start.
    """
    before = None
    while True:
        overview = serve.status().applications[app]
        running = running_replicas(serve, app)
        if running != before:
            tell(f"{running} of {count} replicas run")
            before = running
        if overview.status == "RUNNING":
            return
        if overview.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            said = [overview.message, *(each.message for each in overview.deployments.values())]
            raise ValueError(
                f"Every replica must start (got {running} of {count}: {' '.join(' '.join(said).split())[-600:]}). "
                "Ray's logs have more, on the machine of the replica: /tmp/ray/session_latest/logs/serve."
            )
        time.sleep(POLL_SECONDS)
