"""Peak memory of a piece of work: the allocator's on CUDA, the process' resident memory elsewhere."""

import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


_PROC = Path("/proc/self")


def peak_memory(work: Callable[[], object], device: torch.device) -> tuple[int, int]:
    """Runs `work` and measures how much memory was in use while it ran.

    On CUDA, what torch's allocator has handed out. On a CPU, resident memory as the operating system counts it, with
    the interpreter and its libraries, so each measurement wants a fresh process: memory that earlier work has given
    back may not be resident any more, or may be, and then is no growth. On Linux the peak is that of `work` alone,
    elsewhere that of the process so far.

    Returns:
        `(before, peak)` in bytes: in use when `work` began, and at most until it ended.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return before, torch.cuda.max_memory_allocated(device)
    if _PROC.joinpath("clear_refs").exists():
        _PROC.joinpath("clear_refs").write_text("5")  # the peak starts anew (proc(5)); ru_maxrss would not
        before = _status("VmRSS")
        work()
        return before, _status("VmHWM")
    before = _max_rss()
    work()
    return before, _max_rss()


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """What a function returns in a process of its own that starts from nothing."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(function, *args).result()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Lets torch use so many threads of a CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _status(field: str) -> int:
    text = _PROC.joinpath("status").read_text(encoding="ascii", errors="replace")
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return int(fields[field].split()[0]) * 1024  # "  1234 kB"


def _max_rss() -> int:
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
