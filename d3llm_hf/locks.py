"""One process at a time for what is written piece by piece: a results file, a folder of checkpoints.

The lock is the system's, on a hidden file beside what it protects: it ends with its process, however that ends, so
that no lock of a run that was killed keeps the next one out. The file holds the process' number and machine, for the
message.
"""

import errno
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path


logger = logging.getLogger(__name__)

_held: ContextVar[frozenset[Path]] = ContextVar("_held", default=frozenset())
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # of some network file systems


class InUseError(ValueError):
    """A file or folder that another process is writing."""


@contextmanager
def only_writer(path: str | os.PathLike | None, argument: str, *, wait: bool = False) -> Iterator[None]:
    """Inside, no other process that asks likewise writes a file or folder; who holds it already may ask again.

    Where the system or the file system has no such locks, nothing is kept out, which a warning says.

    Args:
        path: the file or folder; its folder is made if it is not there. `None` is nothing to write.
        argument (`str`): what it was given as.
        wait (`bool`): for the other one to end, where it takes a moment.

    Raises:
        InUseError: where another process, or another thread, is inside; with its number and machine.
    """
    if path is None:
        yield
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = lock_file(path)
    if os.name != "posix" or file in _held.get():
        yield
        return
    descriptor = _locked(file, wait)
    if descriptor is None:
        raise InUseError(
            f"`{argument}` must be written by one process at a time (got {str(path)!r}, which {_holder(file)} is "
            "writing). Wait until that has ended, or choose another place."
        )
    token = _held.set(_held.get() | {file})
    try:
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        _held.reset(token)
        file.unlink(missing_ok=True)  # before the lock ends: a file that others could have taken is left to them
        os.close(descriptor)


def lock_file(path: Path) -> Path:
    """The hidden file beside a file or folder; inside a folder that lies where nothing can be written."""
    whole = path.resolve() if path.is_dir() else path.parent.resolve() / path.name
    inside = whole.is_dir() and not (whole.name and os.access(whole.parent, os.W_OK))
    return whole / ".lock" if inside else whole.with_name(f".{whole.name}.lock")


def clear_left(folder: Path, pattern: str) -> None:
    """Removes lock files that processes left which were killed."""
    for file in folder.glob(pattern):
        if os.name == "posix" and (descriptor := _locked(file)) is not None:
            file.unlink(missing_ok=True)
            os.close(descriptor)


def _locked(file: Path, wait: bool = False) -> int | None:
    """A descriptor of the file with the lock on it; `None` where another one has it."""
    import fcntl

    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
                return descriptor
        except FileNotFoundError:  # of its stat: removed between the two
            pass
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                logger.warning("%s cannot be locked (%s): let one process alone write there.", file, error.strerror)
                return descriptor
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                return None
            raise
        os.close(descriptor)  # it was the lock of a process that has just ended


def _holder(file: Path) -> str:
    try:
        number, host = file.read_text(encoding="utf-8").split()
    except (OSError, ValueError):  # it has not written them yet, or has ended
        return "another process"
    return f"process {number} on {host}"
