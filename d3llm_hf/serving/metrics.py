"""Counts of a server in Prometheus' text format; no text of any request is among them."""

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping


BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Upper bounds of the latency histogram, in seconds."""

HELP = {
    "d3llm_requests_total": "Requests for text by how they ended.",
    "d3llm_prompt_tokens_total": "Tokens of answered prompts.",
    "d3llm_completion_tokens_total": "Tokens of answers.",
    "d3llm_forwards_total": "Forwards that answered rows took part in.",
    "d3llm_batches_total": "Batches that were decoded; one goes on as long as anybody is at work in it.",
    "d3llm_batch_rows_total": "Rows of these batches, those that joined included.",
    "d3llm_steps_total": "Forwards that the server made.",
    "d3llm_step_rows_total": "Rows that were at work in these forwards.",
}


class Metrics:
    """Counters of one server; may be used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter({name: 0 for name in HELP if name != "d3llm_requests_total"})
        self._outcomes: Counter[str] = Counter()
        self._latency = [0] * (len(BUCKETS) + 1)
        self._seconds = 0.0

    def add(self, **counts: int) -> None:
        """Adds to counters by their names without `d3llm_` and `_total`."""
        with self._lock:
            for name, count in counts.items():
                self._counts[f"d3llm_{name}_total"] += count

    def count(self, name: str) -> int:
        """A counter, by its name as for [`add`]."""
        with self._lock:
            return self._counts[f"d3llm_{name}_total"]

    def request(self, outcome: str, seconds: float) -> None:
        """Books a request: `ok`, `refused`, `queue_full`, `timeout`, `left` or `failed`."""
        with self._lock:
            self._outcomes[outcome] += 1
            self._latency[bisect_left(BUCKETS, seconds)] += 1
            self._seconds += seconds

    def render(self, gauges: Mapping[str, float]) -> str:
        """All counts, and `gauges` of this moment."""
        with self._lock:
            lines = []
            for name, text in HELP.items():
                lines += [f"# HELP {name} {text}", f"# TYPE {name} counter"]
                if name in self._counts:
                    lines.append(f"{name} {self._counts[name]}")
                else:
                    lines += [f'{name}{{outcome="{key}"}} {count}' for key, count in sorted(self._outcomes.items())]
            for name, value in gauges.items():
                lines += [f"# TYPE {name} gauge", f"{name} {value}"]
            name, total = "d3llm_request_seconds", 0
            lines += [f"# HELP {name} From the request to the end of its reply.", f"# TYPE {name} histogram"]
            for bound, count in zip([*BUCKETS, "+Inf"], self._latency, strict=True):
                total += count
                lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
            lines += [f"{name}_sum {self._seconds:.6f}", f"{name}_count {total}"]
        return "\n".join(lines) + "\n"
