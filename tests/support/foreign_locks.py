"""A file or folder that somebody else is writing."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from d3llm_hf.locks import lock_file


@contextmanager
def foreign_lock(path: Path) -> Iterator[None]:
    """Inside, process 1 of the machine `elsewhere` seems to write it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = lock_file(path)
    with file.open("w") as held:
        held.write("1 elsewhere\n")
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
        file.unlink()
