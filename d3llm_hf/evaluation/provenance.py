"""What a results file says of itself: versions, machine, weights; and how it is written."""

import hashlib
import json
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers

from .. import __version__
from ..files import replace_file
from ..models.half_precision import is_slow


def provenance(folder: Path) -> dict[str, Any]:
    """What is needed to repeat a measurement: versions, machine, and which weights."""
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    return environment() | {"device": "cpu", "threads": torch.get_num_threads(), "weights_sha256": weights}


def environment() -> dict[str, Any]:
    """Versions, and the day of a measurement."""
    return {
        "d3llm_hf": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def on_device(device: str, threads: int) -> dict[str, Any]:
    """What a bench says of itself: versions, and the device with what decides how fast it multiplies."""
    made = environment() | {"device": device, "threads": threads, "machine": machine(device)}
    return made | {"instructions": instructions()} if device == "cpu" else made


def machine(device: str) -> str:
    """What the device is called."""
    return torch.cuda.get_device_name() if device == "cuda" else platform.machine()


# Instructions that multiply bfloat16 -> torch's word whether the processor has them. Both are of x86.
_BFLOAT16 = {"AVX512_BF16": "_is_avx512_bf16_supported", "AMX": "_is_amx_tile_supported"}


def instructions() -> dict[str, Any]:
    """What a processor's speed depends on, in bfloat16 several times over.

    Returns:
        `torch`, the instructions that torch's kernels use; `bfloat16`, those that the processor has for bfloat16, or
        `None` where torch does not say; `widened`, whether decoding widens products in bfloat16 to float32.
    """
    questions = {name: getattr(torch.cpu, question, None) for name, question in _BFLOAT16.items()}
    answers = {name: asked() for name, asked in questions.items() if asked is not None}
    known = platform.machine().lower() in ("x86_64", "amd64") and len(answers) == len(questions)
    return {
        "torch": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": [name for name, has in answers.items() if has] if known else None,
        "widened": is_slow(torch.bfloat16),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a results file that is complete or absent."""
    replace_file(path, (json.dumps(content, indent=1) + "\n").encode())
