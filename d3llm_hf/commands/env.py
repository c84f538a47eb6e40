"""`d3llm env`: what a bug report needs to know of the machine. It asks no network and shows no secrets."""

import argparse
import importlib
import importlib.util
import json
import os
import platform
import re
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import __version__
from .common import new_parser


# Distribution -> the module that it brings.
PACKAGES = {
    "torch": "torch", "transformers": "transformers", "accelerate": "accelerate", "huggingface_hub": "huggingface_hub",
    "safetensors": "safetensors", "tokenizers": "tokenizers", "numpy": "numpy", "jinja2": "jinja2",
    "datasets": "datasets", "peft": "peft", "trl": "trl", "evaluate": "evaluate", "lm-eval": "lm_eval",
    "flash-attn": "flash_attn", "gradio": "gradio",
}  # fmt: skip
IMPORTED = ("torch", "transformers", "flash-attn")  # the first two are needed anyway, the third is often miscompiled

PREFIXES = ("HF_", "HUGGING", "D3LLM_", "TRANSFORMERS_", "PYTORCH_")
# The values of these are shown; of all others with such a prefix only that they are set, since they may be secrets.
SHOWN = (
    "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE",
    "HF_MODULES_CACHE", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_XET", "HF_HUB_ENABLE_HF_TRANSFER",
    "D3LLM_HF_NO_METRIC", "TRANSFORMERS_CACHE", "TRANSFORMERS_OFFLINE", "TRANSFORMERS_VERBOSITY",
    "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_ENABLE_MPS_FALLBACK",
    "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "TOKENIZERS_PARALLELISM",
    "WORLD_SIZE", "LOCAL_RANK", "TERM", "NO_COLOR", "LANG", "LC_ALL", "PYTHONIOENCODING", "PYTHONUTF8",
)  # fmt: skip


def add_parser(subparsers) -> None:
    parser = new_parser(subparsers, "env", run, "Print what a bug report needs: versions, devices, settings")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--imports", action="store_true", help="import every installed package to see whether it works; takes longer"
    )


def run(args: argparse.Namespace) -> None:
    facts = environment(imports=args.imports)
    sys.stdout.write(json.dumps(facts, indent=1) + "\n" if args.json else as_text(facts))


def environment(*, imports: bool = False) -> dict[str, Any]:
    """Facts about this machine, by section. Whatever cannot be found out is an error message in its place."""
    packages = {name: _attempt(_package, name, imports or name in IMPORTED) for name in PACKAGES}
    return {
        "d3llm-hf": _attempt(_own),
        "system": {
            "python": platform.python_version(),
            "platform": _attempt(platform.platform),
            "processors": os.cpu_count(),
        },
        "packages": packages,
        "torch": _attempt(_torch),
        "variables": {"HF_HOME": _attempt(_hf_home)} | _variables(),
        "checkpoints": _attempt(_checkpoints),
        "decoding": _attempt(_decoding),
    }


def as_text(facts: dict[str, Any]) -> str:
    """The facts as lines that can be pasted into a report."""
    lines = []
    for section, content in facts.items():
        if isinstance(content, dict):
            lines += [f"{section}:", *(f"  {name}: {_line(value)}" for name, value in content.items())]
        else:
            lines.append(f"{section}: {_line(content)}")
    return "\n".join(lines) + "\n"


def _line(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _attempt(find: Callable[..., Any], *arguments: Any) -> Any:
    """What `find` finds, or the error that it meets: a broken package is what the report may be about."""
    try:
        return find(*arguments)
    except (Exception, SystemExit) as error:
        return f"error: {type(error).__name__}: {_homeless(' '.join(str(error).split())[:300])}"


def _own() -> dict[str, Any]:
    facts: dict[str, Any] = {"version": __version__, "folder": _homeless(str(Path(__file__).parents[1]))}
    try:
        installed = metadata.distribution("d3llm-hf")
    except metadata.PackageNotFoundError:
        return facts | {"installed": "not installed, runs from its sources"}
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    return facts | {"installed": installed.version, "editable": bool(origin.get("dir_info", {}).get("editable"))}


def _package(name: str, imported: bool) -> str:
    """Version of a package, and the error of importing it."""
    found = importlib.util.find_spec(PACKAGES[name]) is not None
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        if not found:
            return "not installed"
        version = "unknown version"
    if not found:
        return f"{version} (error: there is no module {PACKAGES[name]})"
    problem = _attempt(importlib.import_module, PACKAGES[name]) if imported else None
    return f"{version} ({problem})" if isinstance(problem, str) else str(version)


def _torch() -> dict[str, Any]:
    import torch

    facts: dict[str, Any] = {"threads": torch.get_num_threads(), "built for": "CPU"}
    if torch.version.cuda:
        facts["built for"] = f"CUDA {torch.version.cuda}"
    elif torch.version.hip:
        facts["built for"] = f"ROCm {torch.version.hip}"
    facts["CUDA or ROCm available"] = _attempt(torch.cuda.is_available)
    if facts["CUDA or ROCm available"] is True:
        facts["devices"] = _attempt(_devices)
    facts["MPS available"] = _attempt(torch.backends.mps.is_available)
    return facts


def _devices() -> list[str]:
    import torch

    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [f"{device.name} ({device.total_memory / 2**30:.0f} GiB)" for device in found]


def _variables() -> dict[str, str]:
    """What the environment says to the libraries. Of names that are not known to be harmless no value is shown."""
    found = {
        name: _homeless(re.sub(r"//[^/@]*@", "//***@", value)) if name in SHOWN else "set"
        for name, value in sorted(os.environ.items())
        if name in SHOWN or name.startswith(PREFIXES)
    }
    return found | {"HF_TOKEN": "set" if os.environ.get("HF_TOKEN") else "not set"}


def _hf_home() -> str:
    from huggingface_hub import constants

    return _homeless(constants.HF_HOME)


def _checkpoints() -> list[str]:
    from ..hub.sources import embedded_checkpoints

    return list(embedded_checkpoints())


def _decoding() -> dict[str, list[str]]:
    from ..models.methods import CACHES, METHODS

    return {"methods": list(METHODS), "caches": list(CACHES)}


def _homeless(path: str) -> str:
    """A text without the name of the user's folder, which is often that of the user."""
    home = os.path.expanduser("~")
    return path.replace(home, "~") if len(home) > 1 else path
