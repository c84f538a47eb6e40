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


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a results file that is complete or absent."""
    replace_file(path, (json.dumps(content, indent=1) + "\n").encode())
