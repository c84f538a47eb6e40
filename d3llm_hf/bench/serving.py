"""What it brings that requests join those at work: `d3llm bench serve`.

Requests come as a Poisson process, word problems of mixed lengths, to the server's worker. It lets them join before
any forward, or, as it once did, decodes those of equal settings and lengths that wait at the same time as a batch in
which nobody joins. What HTTP costs is left out: it is the same for both.
"""

import itertools
import math
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..evaluation.provenance import on_device
from ..evaluation.tasks.word_problems import generate_problems
from ..progress import progress_bar
from ..serving.errors import ApiError
from ..serving.jobs import Answer, Event, Job
from ..serving.metrics import Metrics
from ..serving.worker import Worker
from .memory import threads
from .pictures import drawing, saved


SUITE = "bench_serve"
JOINING, BATCHES = "requests join", "batches only"
SCHEDULERS = {BATCHES: False, JOINING: True}
QUANTITIES = {
    "tokens_per_second": "tokens/s",
    "first_p95": "p95 to the first token, s",
    "last_p95": "p95 to the last token, s",
}


@dataclass(frozen=True)
class ServeBench:
    """What is measured.

    Args:
        model: a checkpoint.
        requests: of a turn.
        slots: rows at work at most.
        lengths: longest answers that requests ask for, each as often.
        loads: requests a second, as multiples of what the server without joining answers when all wait at once.
        settings: of decoding.
        repeats: turns of each at each load.
        seed: of the arrivals.
    """

    model: str = "d3llm-llada"
    requests: int = 60
    slots: int = 8
    lengths: tuple[int, ...] = (24, 32, 40, 48, 56, 64)
    loads: tuple[float, ...] = (0.5, 1.0, 2.0)
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    repeats: int = 1
    seed: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("requests", "slots", "threads", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1 (got {getattr(self, name)}). Leave it out.")
        for name in ("lengths", "loads"):
            values = getattr(self, name)
            if not values or min(values) <= 0:
                raise ValueError(f"`{name}` must hold positive numbers (got {list(values)}). Leave it out.")


@dataclass
class _Request:
    """One request, and when what came of it came."""

    prompt: list[int]
    length: int
    due: float  # seconds from the beginning of the turn
    first: float = 0.0
    answer: Answer | None = None
    last: float = 0.0


def measure_serving(bench: ServeBench) -> dict[str, Any]:
    """Measures both schedulers at each load, the two by turns.

    Returns:
        the results; each row has its `load`, the `rate` of requests a second, and the `name` of its scheduler.

    Raises:
        RuntimeError: if a request gets an error for an answer.
    """
    from ..hub.loading import load
    from ..serving.admission import with_settings

    turns = len(bench.loads) * bench.repeats * len(SCHEDULERS) + 2
    with threads(bench.threads), progress_bar(turns, "turn", "serve") as bar:
        model, tokenizer = load(bench.model, device=bench.device, dtype=bench.dtype)
        if bench.settings:
            model.generation_config = with_settings(model, bench.settings)
        prompts = _prompts(bench, tokenizer)

        def turn(name: str, rate: float | None, number: int = 0) -> dict[str, Any]:
            found = _turn(bench, model, tokenizer, prompts, SCHEDULERS[name], rate, number)
            bar.update()
            return found

        # 1. Once to warm up, and what the server without joining does when all wait at once
        turn(JOINING, None)
        capacity = turn(BATCHES, None)["requests_per_second"]

        # 2. The loads; the arrivals of a turn are the same for both
        rows = []
        for load_ in bench.loads:
            found: dict[str, list[dict[str, Any]]] = {name: [] for name in SCHEDULERS}
            for number in range(bench.repeats):
                for name in SCHEDULERS:
                    found[name].append(turn(name, load_ * capacity, number))
            for name, each in found.items():
                row = {key: statistics.median(one[key] for one in each) for key in each[0] if key != "texts"}
                texts, wanted = ([text for one in many for text in one["texts"]] for many in (each, found[BATCHES]))
                same = [text == other for text, other in zip(texts, wanted, strict=True)]
                row |= {
                    "equal_answers": 100 * sum(same) / len(same),
                    "gain": statistics.median(_ratios(each, found[BATCHES], "tokens_per_second")),
                    "cpu_gain": statistics.median(_ratios(found[BATCHES], each, "cpu_seconds")),
                    "wait": statistics.median(_ratios(each, found[BATCHES], "last_p95")),
                }
                rounded = {key: round(value, 4) for key, value in row.items()}
                rows.append({"load": load_, "rate": round(load_ * capacity, 3), "name": name} | rounded)
    return {
        "suite": SUITE,
        "bench": asdict(bench),
        "capacity": round(capacity, 3),
        "provenance": on_device(bench.device, bench.threads),
        "rows": rows,
    }


def _ratios(each: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]], key: str) -> list[float]:
    return [one[key] / other[key] for one, other in zip(each, base, strict=True)]


def _prompts(bench: ServeBench, tokenizer: Any) -> list[list[int]]:
    """Word problems, as token ids."""
    from ..text import encode_chat

    problems = generate_problems(bench.requests, split="test", seed=bench.seed)
    chats = [[{"role": "user", "content": problem.question}] for problem in problems]
    return [encode_chat(tokenizer, chat)["input_ids"][0].tolist() for chat in chats]


def _turn(
    bench: ServeBench,
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    joining: bool,
    rate: float | None,
    number: int,
) -> dict[str, Any]:
    """All requests once: at times of a Poisson process of so many a second, or at once where there is no rate."""
    # 1. When which request comes
    rng = random.Random(f"{bench.seed} {number}")
    gaps = [rng.expovariate(1.0) for _ in prompts]
    lengths = [bench.lengths[index % len(bench.lengths)] for index in range(len(prompts))]
    rng.shuffle(lengths)
    due = [0.0 if rate is None else at / rate for at in itertools.accumulate(gaps)]
    requests = [_Request(*each) for each in zip(prompts, lengths, due, strict=True)]

    # 2. They come, and are answered
    metrics, ended = Metrics(), threading.Semaphore(0)
    worker = Worker(
        model, tokenizer, max_batch_size=bench.slots, max_wait=0.005, max_queue=len(requests) + 1, metrics=metrics,
        joining=joining,
    )  # fmt: skip
    errors: list[ApiError] = []
    worker.start()
    begin, computed = time.monotonic(), time.process_time()

    def teller(request: _Request) -> Callable[[Event], None]:
        def tell(event: Event) -> None:  # in the worker's thread
            now = time.monotonic() - begin
            request.first = request.first or now
            if isinstance(event, Answer):
                request.answer, request.last = event, now
            if isinstance(event, ApiError):
                errors.append(event)
            if isinstance(event, Answer | ApiError):
                ended.release()

        return tell

    try:
        for index, request in enumerate(requests):
            time.sleep(max(0.0, begin + request.due - time.monotonic()))
            worker.submit(Job(request.prompt, request.length, {}, (), index, teller(request), streamed=True))
        for _ in requests:
            ended.acquire()
    finally:
        worker.close()
    if errors:
        raise RuntimeError(f"A request was not answered (got status {errors[0].status}: {errors[0]}).")
    return _figures(requests, metrics) | {"cpu_seconds": time.process_time() - computed}


def _figures(requests: list[_Request], metrics: Metrics) -> dict[str, Any]:
    answers = [request.answer for request in requests if request.answer is not None]
    seconds = max(request.last for request in requests) - min(request.due for request in requests)
    first = [request.first - request.due for request in requests]
    last = [request.last - request.due for request in requests]
    steps, rows = (metrics.count(name) for name in ("steps", "step_rows"))
    return {
        "tokens_per_second": sum(answer.completion_tokens for answer in answers) / seconds,
        "requests_per_second": len(requests) / seconds,
        "seconds": seconds,
        "first_p50": percentile(first, 50),
        "first_p95": percentile(first, 95),
        "last_p50": percentile(last, 50),
        "last_p95": percentile(last, 95),
        "steps": steps,
        "rows_per_step": rows / max(1, steps),
        "texts": [answer.text for answer in answers],
    }


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that `share` percent of all are at most."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * share / 100) - 1)]


def draw(found: dict[str, Any], kind: str) -> bytes:
    """The picture of a results file: each of `QUANTITIES` by load, a line per scheduler.

    Args:
        kind: "png" or "svg".

    Raises:
        ImportError: Without matplotlib.
    """
    with drawing("d3llm bench serve", 9, 2.9) as figure:
        plots = figure.subplots(1, len(QUANTITIES), squeeze=False)[0]
        for plot, (quantity, label) in zip(plots, QUANTITIES.items(), strict=True):
            for name, marker in zip(SCHEDULERS, "os", strict=True):
                mine = [row for row in found["rows"] if row["name"] == name]
                plot.plot([row["rate"] for row in mine], [row[quantity] for row in mine], label=name, marker=marker)
            plot.set_ylim(bottom=0)
            plot.grid(color="#dddddd", linewidth=0.6)
            plot.set_xlabel("requests/s")
            plot.set_title(label, fontsize=9)
        figure.legend(*plots[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False)
        return saved(figure, kind)
