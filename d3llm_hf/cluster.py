"""A cluster of Ray to work on: one that is there, or one of this machine alone, without Ray's habits.

A cluster that is started here has no dashboard, reports nothing, and asks for a token that lies in no file. Who wants
Ray's own ways starts a cluster with `ray start --head` and names it, or sets Ray's environment variables, which count
wherever they are set.
"""

import importlib
import os
import secrets
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any


STORE_BYTES = 128 << 20
"""Of shared memory for what tasks return; Ray would take almost a third of the machine's memory."""
CONNECT_SECONDS = 5.0


@dataclass(frozen=True)
class Share:
    """What one of several workers has of a machine.

    Args:
        count (`int`): workers.
        num_cpus (`float`): CPU cores that each asks for.
        num_gpus (`float`): the part of one GPU that each asks for; 0 stays on the CPU.
        names (`Mapping[str, str]`): of these arguments and of the cluster's `address`, as the user gives them.

    Raises:
        ValueError: for a number that is out of range.
    """

    count: int
    num_cpus: float = 1.0
    num_gpus: float = 0.0
    names: Mapping[str, str] = field(
        default_factory=lambda: {name: name for name in ("count", "num_cpus", "num_gpus", "address")}
    )

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"`{self.names['count']}` must be at least 1 (got {self.count}). Raise it.")
        if not 0 < self.num_cpus < float("inf"):
            raise ValueError(
                f"`{self.names['num_cpus']}` must be a positive number of CPU cores (got {self.num_cpus}). Pass for "
                "example 1, or 0.5 for half of one."
            )
        if not 0 <= self.num_gpus <= 1:
            raise ValueError(
                f"`{self.names['num_gpus']}` must be from 0 to 1: each has a model of its own on one GPU (got "
                f"{self.num_gpus}). Pass 1, or 0.5 for two models on a GPU."
            )

    def filling(self, resources: Mapping[str, float]) -> "Share":
        """The same of as many workers as a cluster has room for, at least one."""
        asked = [("CPU", self.num_cpus), *([("GPU", self.num_gpus)] if self.num_gpus else [])]
        count = min(int(resources.get(kind, 0.0) / each + 1e-6) for kind, each in asked)
        return replace(self, count=max(1, count))

    def check_room(self, resources: Mapping[str, float]) -> None:
        """Refuses more workers than a cluster that does not grow has room for; Ray would wait for ever.

        Raises:
            ValueError: naming what there is too little of.
        """
        for kind, each, name in (("CPU", self.num_cpus, "num_cpus"), ("GPU", self.num_gpus, "num_gpus")):
            there = resources.get(kind, 0.0)
            if self.count * each > there + 1e-6:
                raise ValueError(
                    f"`{self.names['count']}` times `{self.names[name]}` must be at most what there is (got "
                    f"{self.count} times {each:g} {kind}s, and there are {there:g}). Lower one of them, or name a "
                    f"larger cluster with `{self.names['address']}`."
                )


def imported(module: str, user: str) -> Any:
    """Ray, or a module of it.

    Args:
        module (`str`): `"ray"`, `"ray.serve"`, ...
        user (`str`): what needs it, for the error.

    Raises:
        ImportError: where it is not installed, with the command that does so.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{user} needs Ray (got: {error}). Install it with `pip install 'd3llm-hf[ray]'`."
        ) from error


@contextmanager
def joined(address: str | None, user: str, argument: str) -> Iterator[Any]:
    """Inside, this process belongs to a cluster of Ray; yields the module `ray`.

    Args:
        address (`str`, *optional*): `HOST:PORT` of a cluster's head, or `"auto"` for the cluster that this machine
            is a part of. A cluster of this machine alone is started when unset, and ends afterwards.
        user (`str`): what needs Ray, for the errors.
        argument (`str`): that gave the address, for the errors.

    Raises:
        ImportError: where Ray is not installed.
        ValueError: for an address at which no cluster answers, or one of another version.
        OSError: where a cluster of this machine does not start.
    """
    if address is not None:
        _check_address(address, argument)
    with _environment({} if address is not None else _without_habits()):  # the import reads it already
        ray = imported("ray", user)
        try:
            if address is None:
                _start(ray)
            else:
                _join(ray, address, argument)
            yield ray
        finally:
            ray.shutdown()


def _without_habits() -> dict[str, str]:
    """What Ray's variables shall be where they are not set. A token of the environment asks for no file."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    plain = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}  # it would let all else go first
    return plain | ({} if "RAY_AUTH_MODE" in os.environ else token)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Inside, variables have these values unless they had others."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _start(ray: Any) -> None:
    try:
        ray.init(address="local", include_dashboard=False, object_store_memory=STORE_BYTES)
    except Exception as error:  # it has no class of its own for a node that is not there in time
        raise OSError(
            f"Ray must start on this machine (got: {' '.join(str(error).split())[:300].rstrip('.')}). Try again when "
            "the machine is less busy; the logs are in /tmp/ray/session_latest/logs."
        ) from error


def _join(ray: Any, address: str, argument: str) -> None:
    try:
        ray.init(address=address)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        said = " ".join(str(error).split())[:300].rstrip(".")
        raise ValueError(
            f"`{argument}` must name a running cluster that this Ray {ray.__version__} can join (got {address!r}: "
            f"{said}). {_way_out(argument)}"
        ) from error


def _check_address(address: str, argument: str) -> None:
    """Refuses what is no address, and one where nothing listens: Ray would try for minutes.

    Raises:
        ValueError: naming `argument`.
    """
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal():
        raise ValueError(
            f"`{argument}` must be auto, or HOST:PORT of a cluster's head (got {address!r}). Run this on a machine of "
            "the cluster, where `auto` finds it."
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise ValueError(
            f"`{argument}` must name a running cluster (got {address!r}: {error}). {_way_out(argument)}"
        ) from error


def _way_out(argument: str) -> str:
    return (
        f"Start one with `ray start --head --port 6379`, and pass its address; without `{argument}` a cluster of this "
        "machine alone is started."
    )
