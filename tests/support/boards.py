"""Points made by hand: results of a few samples that have the wanted accuracy and tokens per forward."""

import json
from pathlib import Path

from d3llm_hf.evaluation.sweep.points import intervals, ratios


COUNT = 10


def point(method: str, tpf: int, accuracy: int, *, task: str = "sums", model: str = "tiny", **changes) -> dict:
    """A point of ten samples, each of `tpf` tokens in one forward; `accuracy` is a multiple of 10 percent."""
    samples = {
        "tokens": [tpf] * COUNT,
        "forwards": [1] * COUNT,
        "forwards_reference": [2] * COUNT,
        "correct": [int(10 * place < accuracy) for place in range(COUNT)],
    }
    provenance = {
        "d3llm_hf": "0.1",
        "torch": "2.13.0",
        "transformers": "5.23.0",
        "device": "cpu",
        "dtype": "float32",
        "model_fingerprint": f"weights of {model}",
        "task_fingerprint": task,
        "date": "2026-01-02",
        "max_new_tokens": 64,
        "batch_size": 5,
    }
    made = {
        "schema": 1,
        "kind": "point",
        "model": model,
        "method": method,
        "parameter": "entropy_threshold",
        "value": tpf / 10,
        "settings": {"entropy_threshold": tpf / 10},
        "task": task,
        "num_samples": COUNT,
        "seed": 4242,
        **ratios(samples),
        **intervals(samples),
        "tokens_per_second": 100.0 * tpf,
        "positions_per_token": 100.0 / tpf,
        "seconds": 1.0,
        "cpu_seconds": 1.0,
        "samples": samples,
        "provenance": provenance,
    }
    return made | changes


def three_curves(task: str = "sums", **more) -> list[dict]:
    """Curves whose areas are known: see the test of the table."""
    pairs = {"steady": [(1, 90), (3, 90)], "bold": [(5, 80), (1, 80)], "rash": [(1, 60), (9, 60), (10, 50)]}
    return [point(method, *pair, task=task, **more) for method, found in pairs.items() for pair in found]


def write(path: Path, points: list[dict]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in points))
    return path
