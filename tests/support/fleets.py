"""Replicas in this process, which end when a test says so."""

import asyncio
import contextlib
import pickle

from d3llm_hf.serving.gateway import Lost
from d3llm_hf.serving.replicas import Replica


class Recipe:
    """Makes an app of what is loaded already.

    Args:
        make: the app, or what is raised.
    """

    def __init__(self, make):
        self.make = make

    def app(self):
        return self.make()


class Fleet:
    """Replicas that are asked in turn; what they get and give is pickled, as between processes.

    Args:
        replicas: of one app.
        ends: number of a request, from 0 -> messages after which its replica ends.
    """

    def __init__(self, replicas, ends=None):
        self.replicas, self.ends = list(replicas), dict(ends or {})
        self.asked, self.closed = 0, 0

    async def ask(self, scope, body):
        number, self.asked = self.asked, self.asked + 1
        left = self.ends.get(number)
        replica = self.replicas[number % len(self.replicas)]
        try:
            async with contextlib.aclosing(replica.reply(*pickle.loads(pickle.dumps((scope, body))))) as messages:
                async for message in messages:
                    if left == 0:
                        raise Lost
                    left = None if left is None else left - 1
                    yield pickle.loads(pickle.dumps(message))
            if left is not None:
                raise Lost
        finally:
            self.closed += 1

    async def told(self):
        return dict([await replica.told() for replica in self.replicas])

    async def running(self):
        return len(self.replicas)


class Scripted:
    """A replica that replies with these messages, or raises an error among them; `None` waits for ever."""

    def __init__(self, *messages):
        self.messages = messages

    async def reply(self, scope, body):
        for message in self.messages:
            if message is None:
                await asyncio.Event().wait()
            if isinstance(message, Exception):
                raise message
            yield message


async def started(make) -> Replica:
    """A replica as Ray makes it."""
    replica = object.__new__(Replica)
    await replica.__init__(Recipe(make))
    return replica


async def ended(replica: Replica) -> None:
    """Ends the threads of a replica; with Ray its process ends."""
    await replica._lifespan.__aexit__(None, None, None)
