"""`d3llm serve`: answer the clients of OpenAI's API."""

import argparse
import logging
import os

from ..settings import SETTINGS
from . import serve_replicas, serve_vllm
from .common import check_address, new_parser, tell
from .generate import add_settings


# Limit of `create_app` -> type and help.
LIMITS: dict[str, tuple[type, str]] = {
    "max_batch_size": (int, "requests at work at once (8)"),
    "max_wait_ms": (float, "milliseconds that a request waits for others where nobody is at work (5)"),
    "max_queue": (int, "requests that may wait, more are refused (64)"),
    "timeout": (float, "seconds from a request to the end of its reply, its body included (120)"),
    "max_tokens": (int, "longest answer that a request may ask for (1024)"),
    "max_prompt_tokens": (int, "longest prompt (what the model has positions for)"),
    "max_body_bytes": (int, "of a request (1048576)"),
}


def add_parser(subparsers) -> None:
    parser = new_parser(subparsers, "serve", run, "Answer clients of OpenAI's API")
    parser.add_argument("model", help="a checkpoint folder, an id on the Hub, or the name of an embedded checkpoint")
    parser.add_argument("--name", help="what clients call the model (default: the last part of MODEL)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (%(default)s)")
    parser.add_argument("--api-key-env", metavar="NAME", help="environment variable with the key that clients send")
    parser.add_argument(
        "--allow-origin", action="append", default=[], metavar="URL", help="web pages of it may use the server (CORS)"
    )
    parser.add_argument("--engine", choices=["vllm"], help="decode inside a serving engine (default: our own server)")
    group = parser.add_argument_group("limits")
    for name, (kind, text) in LIMITS.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=kind.__name__.upper(), help=text)
    group = parser.add_argument_group("model")
    group.add_argument("--device", default="auto", help="cpu, cuda, ... (default: cuda where there is one)")
    group.add_argument("--dtype", default="auto", help="float32, bfloat16, ... (default: the checkpoint's)")
    group.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="length where a request names none")
    group.add_argument("--temperature", type=float, metavar="T", help="where a request names none; 0 does not sample")
    serve_replicas.add_options(parser)
    add_settings(parser, without=("seed",))
    serve_vllm.add_options(parser)


def run(args: argparse.Namespace) -> None:
    if args.engine == "vllm":
        serve_vllm.run(args, _api_key(args.api_key_env))
        return
    serve_vllm.refuse_without_engine(args)
    try:
        import uvicorn

        from ..serving.app import TIMEOUT
        from ..serving.connection import bounded_protocol
        from ..serving.recipe import Recipe
    except ModuleNotFoundError as error:
        raise ImportError(
            f"`d3llm serve` needs FastAPI and uvicorn (got: {error}). Install them with "
            "`pip install 'd3llm-hf[serve]'`."
        ) from error

    serve_replicas.check_options(args)
    check_address(args.host, args.port)
    limits = {name: getattr(args, name) for name in LIMITS if getattr(args, name) is not None}
    key = _api_key(args.api_key_env)
    names = [name for name in SETTINGS if name != "seed"]
    settings = {name: getattr(args, name) for name in (*names, "max_new_tokens") if getattr(args, name) is not None}
    if args.temperature is not None:
        settings |= {"do_sample": True, "temperature": args.temperature} if args.temperature else {"do_sample": False}
    name = args.name or args.model.rstrip("/").rpartition("/")[2]
    recipe = Recipe(
        args.model, name, args.device, args.dtype, args.revision, settings, limits, key, tuple(args.allow_origin)
    )
    if args.replicas is not None:
        serve_replicas.serve_replicas(args, recipe, lambda: _greet(args, recipe))
        return
    app = recipe.app()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    _greet(args, recipe)
    protocol = bounded_protocol(limits.get("timeout", TIMEOUT))
    uvicorn.run(
        app, host=args.host, port=args.port, log_config=None, timeout_graceful_shutdown=10, http=protocol, ws="none"
    )
    if app.state.worker.is_stuck:
        # Nothing can interrupt a forward, and an interpreter that ends beside it may crash.
        logging.shutdown()
        os._exit(0)


def _greet(args: argparse.Namespace, recipe) -> None:
    is_locked = recipe.api_key is not None
    tell(f"serving {recipe.name} on http://{args.host}:{args.port}/v1" + (" (with a key)" if is_locked else ""))
    if not is_locked and args.host not in ("127.0.0.1", "::1", "localhost"):
        tell("anyone who reaches this address can use the server; --api-key-env asks for a key")


def _api_key(variable: str | None) -> str | None:
    """The key, which stands in no command line and no log."""
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise ValueError(
            f"`--api-key-env` must name a variable that holds the key (got {variable!r}, which is empty)."
        )
    return key
