"""What this library asks of Ray, in this process: tasks run at once, and a worker may be told to end."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any


class RayError(Exception):
    """Of Ray."""


class RayActorError(RayError):
    """Of a worker that ended."""


class ObjectLostError(RayError):
    """Of what a worker that ended had."""


class RayTaskError(RayError):
    """Of a call that raised `cause`."""

    def __init__(self, cause: Exception):
        super().__init__(f"ray::{type(cause).__name__} in another process")
        self.cause = cause


@dataclass(frozen=True, eq=False)
class Reference:
    """Of a call that has returned `value`, or raised it."""

    value: Any
    raised: bool = False


class FakeRay:
    """A module `ray`.

    Args:
        resources: of the cluster.
        refuses (*optional*): what joining a cluster raises.
        ends: calls of workers, counted from 0 over all of them, with which the worker ends.
    """

    __version__ = "0.fake"
    exceptions = SimpleNamespace(
        RayError=RayError, RayActorError=RayActorError, ObjectLostError=ObjectLostError, RayTaskError=RayTaskError
    )

    def __init__(self, resources=(("CPU", 2.0),), refuses: Exception | None = None, ends=()):
        self.resources, self.refuses, self.ends = dict(resources), refuses, set(ends)
        self.joined, self.options, self.workers, self.calls = None, None, [], []

    def init(self, **options):
        if self.refuses is not None:
            raise self.refuses
        self.joined = options

    def shutdown(self):
        self.joined = None

    def cluster_resources(self):
        return self.resources

    def remote(self, kind):
        def options(**chosen):
            self.options = chosen
            return SimpleNamespace(remote=lambda *arguments: self._worker(kind, arguments))

        return SimpleNamespace(options=options)

    def wait(self, asked, num_returns):
        return asked[-num_returns:], asked[:-num_returns]

    def get(self, asked):
        if asked.raised:
            raise asked.value
        return asked.value

    def _worker(self, kind, arguments):
        held, number = kind(*arguments), len(self.workers)

        def method(name):
            return SimpleNamespace(remote=lambda *given: self._call(number, getattr(held, name), given))

        self.workers.append(held)
        return SimpleNamespace(manifest=method("manifest"), records=method("records"))

    def _call(self, number, method, given):
        self.calls.append((number, method.__name__))
        if len(self.calls) - 1 in self.ends:
            return Reference(RayActorError(f"worker {number} ended"), raised=True)
        try:
            return Reference(method(*given))
        except Exception as error:  # as Ray does, whatever it is
            return Reference(RayTaskError(error), raised=True)


class DeploymentUnavailableError(Exception):
    """Of an app that is not there."""


class FakeServe:
    """A module `ray.serve`.

    Args:
        states: status of an app that is deployed, its running replicas and a message, in turn; the last one stays.
        tells: name of a method -> what a broadcast of it gives, or the error that it raises.
        replies: messages of each request in turn, an exception among them is raised.
        others: names of apps that are there already.
    """

    exceptions = SimpleNamespace(DeploymentUnavailableError=DeploymentUnavailableError)
    RunTarget = SimpleNamespace

    def __init__(self, states=(("RUNNING", 2, ""),), tells=None, replies=(), others=()):
        self.states, self.tells, self.replies = list(states), {"refusal": [None, None]} | (tells or {}), list(replies)
        self.others, self.app, self.log, self.cancelled = set(others), None, [], 0

    def start(self, **options):
        self.log.append(("start", options))

    def status(self):
        apps = dict.fromkeys(self.others, SimpleNamespace(status="RUNNING", message="", deployments={}))
        if self.app is not None:
            status, running, message = self.states.pop(0) if len(self.states) > 1 else self.states[0]
            deployment = SimpleNamespace(message=message, replica_states={"RUNNING": running})
            apps[self.app] = SimpleNamespace(status=status, message="", deployments={"Replica": deployment})
        return SimpleNamespace(applications=apps)

    def deployment(self, kind, **options):
        self.log.append(("deployment", options))
        return SimpleNamespace(bind=lambda recipe: (kind, recipe))

    def run_many(self, targets, wait_for_applications_running):
        (target,) = targets
        self.app, (_, self.recipe) = target.name, target.target
        self.log.append(("run", {"route_prefix": target.route_prefix, "waits": wait_for_applications_running}))
        return [self]

    def delete(self, app):
        self.log.append(("delete", app))
        self.app = None

    def shutdown(self):
        self.log.append(("shutdown", None))

    # ---- the handle ----------------------------------------------------------------------------------------------

    def options(self, method_name, stream):
        assert (method_name, stream) == ("reply", True)
        return SimpleNamespace(remote=lambda scope, body: _Response(self, self.replies.pop(0)))

    def broadcast(self, method_name):
        def results(timeout_s, return_exceptions=False):
            told = self.tells[method_name]
            if isinstance(told, Exception):
                raise told
            return told

        async def results_async(**options):
            return results(**options)

        return SimpleNamespace(results=results, results_async=results_async)


class _Response:
    def __init__(self, serve, messages):
        self._serve, self._messages = serve, iter(messages)

    def __aiter__(self):
        return self

    async def __anext__(self):
        message = next(self._messages, None)
        if message is None:
            raise StopAsyncIteration
        if isinstance(message, Exception):
            raise message
        return message

    def cancel(self):
        self._serve.cancelled += 1
