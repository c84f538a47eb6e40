"""`d3llm serve --replicas N`: one model in each of N processes of a Ray cluster, behind one address."""

import argparse
import dataclasses
import logging
import re
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING

from ..cluster import Share, imported, joined
from .common import tell


if TYPE_CHECKING:
    from ..serving.recipe import Recipe


OPTIONS = ("num_cpus", "num_gpus", "ray_address")
NAMES = {"count": "--replicas", "num_cpus": "--num-cpus", "num_gpus": "--num-gpus", "address": "--ray-address"}
USER = "`d3llm serve --replicas`"
MORE_REQUESTS = 16
"""That a replica takes beside those for text: for its health, and what models it has."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a group."""
    group = parser.add_argument_group("replicas", "on Ray, which `pip install 'd3llm-hf[ray]'` brings")
    group.add_argument("--replicas", type=int, metavar="N", help="processes with a model of their own")
    group.add_argument("--num-cpus", type=float, metavar="X", help="CPU cores that each asks for, such as 0.5 (1)")
    group.add_argument("--num-gpus", type=float, metavar="X", help="part of a GPU that each asks for (none)")
    group.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="a cluster that is there: auto, or HOST:PORT of its head (one of this machine alone)",
    )


def check_options(args: argparse.Namespace) -> None:
    """Refuses options of replicas without `--replicas`, and a device that the cluster would not give.

    Raises:
        ValueError: naming the option.
    """
    if args.replicas is None:
        for name in OPTIONS:
            if getattr(args, name) is not None:
                option = f"--{name.replace('_', '-')}"
                raise ValueError(
                    f"`{option}` needs `--replicas` (got {getattr(args, name)} without it). Add `--replicas 1`, or "
                    "more, or leave it out."
                )
        return
    share_of(args)
    wants_gpu = args.device.startswith("cuda")
    if wants_gpu and not args.num_gpus:
        raise ValueError(
            f"`--device` {args.device} needs `--num-gpus` with `--replicas` (got none of it): Ray says who has which "
            "GPU. Add `--num-gpus 1`, or a part of it."
        )
    if args.num_gpus and args.device not in ("auto", "cuda"):
        raise ValueError(
            f"`--num-gpus` must go with `--device` auto or cuda (got {args.device}): Ray says which one it is. Leave "
            "one of them out."
        )


def share_of(args: argparse.Namespace) -> Share:
    """What each replica has of a machine."""
    asked = {name: getattr(args, name) for name in ("num_cpus", "num_gpus") if getattr(args, name) is not None}
    return Share(args.replicas, **asked, names=NAMES)


def serve_replicas(args: argparse.Namespace, recipe: "Recipe", greet: Callable[[], None]) -> None:
    """Runs the replicas, and before them a server that passes requests on, until that ends.

    Args:
        args: of the command, checked.
        recipe ([`Recipe`]): of the server.
        greet: tells that the server is there.

    Raises:
        ValueError, ImportError: see [`joined`] and [`deployed`].
    """
    import uvicorn

    from ..serving.app import create_app
    from ..serving.connection import bounded_protocol
    from ..serving.gateway import create_gateway
    from ..serving.replicas import RayFleet, deployed

    limits = {name: parameter.default for name, parameter in signature(create_app).parameters.items()}
    limits |= recipe.limits
    share, app = share_of(args), "d3llm-" + re.sub(r"[^\w.-]", "-", recipe.name)
    max_ongoing = max(1, limits["max_queue"] + limits["max_batch_size"] + MORE_REQUESTS)
    with joined(args.ray_address, USER, "--ray-address") as ray:
        share.check_room(ray.cluster_resources())
        serve = imported("ray.serve", USER)
        with deployed(serve, app, _elsewhere(recipe, share), share, max_ongoing, tell) as handle:
            gateway = create_gateway(
                RayFleet(ray, serve, app, handle),
                timeout=limits["timeout"],
                max_body_bytes=limits["max_body_bytes"],
                api_key=recipe.api_key,
                allow_origins=recipe.allow_origins,
            )
            logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
            greet()
            uvicorn.run(
                gateway,  # type: ignore[arg-type]  # an ASGI app
                host=args.host,
                port=args.port,
                log_config=None,
                timeout_graceful_shutdown=10,
                http=bounded_protocol(limits["timeout"]),
                ws="none",
                lifespan="off",
            )


def _elsewhere(recipe: "Recipe", share: Share) -> "Recipe":
    """A recipe as a replica carries it out: in another folder, on its own device, without what the gateway checks."""
    model = str(Path(recipe.model).absolute()) if Path(recipe.model).is_dir() else recipe.model
    device = "cpu" if recipe.device == "auto" and not share.num_gpus else recipe.device
    return dataclasses.replace(recipe, model=model, device=device, api_key=None, allow_origins=())
