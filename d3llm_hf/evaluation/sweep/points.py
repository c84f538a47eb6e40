"""Points of (tokens per forward, accuracy): the lines of a results file of `d3llm sweep`, checked, and their curves.

A results file holds one JSON object a line, each a point: one model, decoded with one setting on one task. Points of
one model, method and task make a curve. `key_of` names what was measured, so that nothing is measured twice.
"""

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...files import replace_file
from ...locks import only_writer


logger = logging.getLogger(__name__)

SCHEMA = 1
Point = dict[str, Any]

NUMBER = (int, float)
# Field -> its types. Further fields are allowed, so that a newer version can add some.
FIELDS: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "method": (str,),
    "parameter": (str, type(None)),
    "value": (str, bool, *NUMBER, type(None)),
    "settings": (dict,),
    "task": (str,),
    "num_samples": (int,),
    "seed": (int,),
    "accuracy": NUMBER,
    "accuracy_interval": (list,),
    "tpf": NUMBER,
    "tpf_interval": (list,),
    "tpf_reference": NUMBER,
    "tokens_per_second": NUMBER,
    "positions_per_token": NUMBER,
    "seconds": NUMBER,
    "cpu_seconds": NUMBER,
    "samples": (dict,),
    "provenance": (dict,),
}
SAMPLES = ("tokens", "forwards", "forwards_reference", "correct")
# Of the samples of a causal model: forwards of its drafter, and 1 where the tokens are those of plain greedy decoding.
CAUSAL_SAMPLES = ("draft_forwards", "equal_to_plain")
CAUSAL_SUMS = ("draft_positions",)  # over the samples: positions pushed through the drafter
# Of the provenance: what drafted.
DRAFTED_BY = ("assistant_fingerprint", "draft_head_fingerprint")
# What a point is about. The rest of it is what was found.
KEY = ("model", "method", "parameter", "value", "settings", "task", "num_samples", "seed")
KEY_PROVENANCE = ("model_fingerprint", "task_fingerprint", "dtype", "device", "max_new_tokens", "batch_size")
# What all points of a curve share besides.
SAME = ("model_fingerprint", "task_fingerprint", "dtype", "device", "max_new_tokens", *DRAFTED_BY)


def read_points(*paths: str | os.PathLike) -> list[Point]:
    """The points of results files, in their order; one that a file has twice, with equal samples, counts once.

    Raises:
        FileNotFoundError: for a file that does not exist.
        ValueError: for results of another kind, a line that is no point, one whose figures are not those of its
            samples, or two measurements of one point that found different samples; the message names file and line.
    """
    points = []
    for path in map(Path, paths):
        if not path.is_file():
            raise FileNotFoundError(
                f"`paths` must name results files (got {str(path)!r}, which is none). Make one with `d3llm sweep`."
            )
        lines = path.read_bytes().splitlines()
        if lines and lines[0].strip() == b"{":
            raise ValueError(
                f"`paths` must name results of `d3llm sweep`, JSON lines (got {str(path)!r}, one object over many "
                "lines, as `d3llm bench` and `d3llm_hf.evaluation.measure` write it). Choose another file."
            )
        found: dict[str, tuple[Point, str]] = {}
        for number, line in enumerate(lines, 1):
            where = f"{path.name}, line {number}"
            point = _parse(line, where)
            first, earlier = found.setdefault(key_of(point), (point, where))
            if earlier != where:
                _check_repeated(point, first, where, earlier)
        points += [point for point, _ in found.values()]
    return points


def _check_repeated(point: Point, first: Point, where: str, earlier: str) -> None:
    if any(point["samples"][name] != first["samples"][name] for name in SAMPLES):
        raise ValueError(
            f"{where}: a point must be measured once (got the one of {earlier}, same settings and samples, with other "
            "answers). Delete one of the two lines."
        )
    logger.warning("%s repeats %s, which counts. Delete the line to be told no more.", where, earlier)


def _parse(line: bytes, where: str) -> Point:
    try:
        point = json.loads(line)
    except ValueError as error:  # of JSON and of UTF-8
        raise _damaged(where, f"no JSON, {error}") from error
    return check_point(point, where)


def check_point(point: Any, where: str = "point") -> Point:
    """Returns a point that is well formed.

    Raises:
        ValueError: where a field is missing, has another type, or contradicts the samples; `where` begins the message.
    """
    if not isinstance(point, dict) or point.get("kind") != "point":
        raise _damaged(where, f"no point, {str(point)[:60]!r}")
    if point.get("schema") != SCHEMA:
        raise ValueError(
            f"{where}: `schema` must be {SCHEMA} (got {point.get('schema')!r}). Read the file with the version of "
            "d3llm-hf that wrote it, or measure again."
        )
    for name, types in FIELDS.items():
        value = point.get(name)
        if name not in point or not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise _damaged(where, f"{name}={str(value)[:60]!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise _damaged(where, f"{name}={value}")
    samples, count = point["samples"], point["num_samples"]
    for name in (*SAMPLES, *(name for name in CAUSAL_SAMPLES if name in samples)):
        values = samples.get(name)
        smallest = 1 if name.startswith("forwards") else 0
        if not isinstance(values, list) or len(values) != count or not values:
            raise _damaged(where, f"samples of {name} that are not num_samples={count} numbers")
        if any(type(value) is not int or value < smallest for value in values):
            raise _damaged(where, f"samples of {name} below {smallest} or no integers")
    for name in ("correct", "equal_to_plain"):
        if set(samples.get(name, ())) - {0, 1}:
            raise _damaged(where, f"samples of {name} other than 0 and 1")
    for name, value in ratios(samples).items():
        if abs(point[name] - value) > 1e-3:
            raise _damaged(where, f"{name}={point[name]}, where the samples give {value}")
    return point


def _damaged(where: str, found: str) -> ValueError:
    return ValueError(
        f"{where}: a line of a results file must be a point as `d3llm sweep` writes it (got {found}). Delete the line "
        "and run the sweep again, which measures what is missing, or choose another file."
    )


def ratios(samples: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """`accuracy` in percent, `tpf` (all tokens over all forwards) and `tpf_reference`, of per-sample counts."""
    tokens = sum(samples["tokens"])
    return {
        "accuracy": round(100 * sum(samples["correct"]) / len(samples["correct"]), 4),
        "tpf": round(tokens / sum(samples["forwards"]), 4),
        "tpf_reference": round(tokens / sum(samples["forwards_reference"]), 4),
    }


def intervals(samples: Mapping[str, Sequence[int]], **kwargs: Any) -> dict[str, list[float]]:
    """`accuracy_interval` in percent and `tpf_interval`; see [`bootstrap_ratio`] for the arguments."""
    correct = samples["correct"]
    accuracy = bootstrap_ratio([100 * value for value in correct], [1] * len(correct), **kwargs)
    return {
        "accuracy_interval": list(accuracy),
        "tpf_interval": list(bootstrap_ratio(samples["tokens"], samples["forwards"], **kwargs)),
    }


def bootstrap_ratio(
    numerators: Sequence[float],
    denominators: Sequence[float],
    *,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap of `sum(numerators) / sum(denominators)` over samples drawn with replacement.

    Args:
        numerators, denominators: one number per sample each.
        confidence: probability that the interval stands for, in (0, 1).
        num_resamples: how many times the samples are drawn.
        seed: the same arguments give the same interval.

    Returns:
        its lower and upper end, rounded to four digits.

    Raises:
        ValueError: for a confidence or a number of resamples outside its range.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be a probability in (0, 1) (got {confidence}). Pass for example 0.95.")
    if num_resamples < 1:
        raise ValueError(f"`num_resamples` must be a positive integer (got {num_resamples}). Pass for example 1000.")
    count = len(numerators)
    # How often each sample is drawn, (num_resamples, count): one product with the table gives all sums.
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=num_resamples)
    sums = drawn @ np.array([numerators, denominators], dtype=np.float64).T  # (num_resamples, 2)
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [(1 - confidence) / 2, (1 + confidence) / 2])
    return round(float(low), 4), round(float(high), 4)


def key_of(point: Point) -> str:
    """A digest of what a point is about: model, method, settings, task, samples and how they were decoded."""
    made = point["provenance"]
    about = [point[name] for name in KEY] + [made.get(name) for name in KEY_PROVENANCE]
    # points without a drafter keep the key that they had before there were any
    about += [made[name] for name in DRAFTED_BY if name in made]
    return digest(about)


def digest(content: Any) -> str:
    """SHA-256 of the canonical JSON of `content`."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def curves(points: Iterable[Point]) -> dict[tuple[str, str, str], list[Point]]:
    """Points by curve: `(model, method, task)` -> its points by rising tokens per forward.

    Raises:
        ValueError: where points of one curve were not measured alike: other weights, samples, lengths or devices, or
            the same settings twice.
    """
    found: dict[tuple[str, str, str], list[Point]] = {}
    for point in points:
        found.setdefault((point["model"], point["method"], point["task"]), []).append(point)
    for name, curve in found.items():
        _check_alike(curve, f"the curve {', '.join(name)}")
        settings = [digest(point["settings"]) for point in curve]
        if len(set(settings)) < len(settings):
            raise ValueError(
                f"The settings of the points of a curve must differ (got some twice in the curve {', '.join(name)}). "
                "Leave one of the files out, or measure with another label."
            )
        curve.sort(key=lambda point: point["tpf"])
    return found


def _check_alike(points: Sequence[Point], what: str, same: Sequence[str] = SAME) -> None:
    shared = [
        {"num_samples": point["num_samples"], "seed": point["seed"]}
        | {name: point["provenance"].get(name) for name in same}
        for point in points
    ]
    for name in shared[0] if shared else ():
        values = list(dict.fromkeys(entry[name] for entry in shared))
        if len(values) > 1:
            raise ValueError(
                f"Points of {what} must have the same `{name}` (got {values[0]!r} and {values[1]!r}). Give what was "
                "measured otherwise another label, as in `d3llm sweep LABEL=MODEL` or `--methods LABEL=METHOD`."
            )


def curve_aup(points: Sequence[Point], y_max: float | None = None, **kwargs: Any) -> Any:
    """Accuracy under parallelism of a curve with its bootstrap interval; see `bootstrap_aup` for the arguments.

    Args:
        points: of one curve, all over the same samples, which are resampled together.
        y_max: accuracy in percent that counts in full; the curve's own best where nothing is given.

    Returns:
        `AUPInterval`.

    Raises:
        ValueError: without points, or for points over different samples.
    """
    from ...metrics.aup.curve import bootstrap_aup

    if not points:
        raise ValueError("`points` must hold at least one point (got none). Pass those of one of `curves(...)`.")
    _check_alike(points, "one curve")
    columns = ([point["samples"][name] for point in points] for name in ("tokens", "forwards", "correct"))
    return bootstrap_aup(*columns, y_max=y_max, **kwargs)


def append_point(path: Path, point: Point) -> None:
    """Adds a line to a results file.

    The whole file is written anew beside the old one and takes its place, so that a reader, or a sweep that is killed
    at any moment, finds the line entirely or not at all.

    Raises:
        ValueError: for what is no point, and for a file that another process is writing.
    """
    line = json.dumps(check_point(point), ensure_ascii=False, allow_nan=False)
    with only_writer(path, "path"):
        lines = path.read_bytes() if path.exists() else b""
        if lines and not lines.endswith(b"\n"):
            lines += b"\n"
        replace_file(path, lines + line.encode() + b"\n")
