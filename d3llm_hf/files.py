"""Files that are complete or absent."""

import os
import uuid
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file that is complete or absent, also after a power cut; never two processes to one file."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with open(partial, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:  # the partial file's name would tell nothing
            error.filename = str(path)
        raise
    sync(path.parent)  # the new name is durable once the folder is


def replace_file(path: Path, content: bytes) -> None:
    """As [`write_whole`], in a folder that is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)


def without_folders(name: str | Path) -> str:
    """A file as a command names it that is to be repeated elsewhere; other words as they are."""
    path = Path(name)
    if path.is_absolute():
        return path.name
    return name if isinstance(name, str) else path.as_posix()


def check_writable(path: Path, argument: str) -> None:
    """Refuses a file that could not be written in the end, before the work on what it shall hold.

    Args:
        path (`Path`): of the file; its folder may have to be made.
        argument (`str`): what it was given as.

    Raises:
        ValueError: for a folder, and below a file or a folder that may not be written to.
    """
    if path.is_dir():
        raise ValueError(f"`{argument}` must be a file (got {str(path)!r}, which is a folder). Add a name to it.")
    check_writable_folder(path.absolute().parent, argument)


def check_writable_folder(folder: Path, argument: str) -> None:
    """As [`check_writable`], for a folder that is there or shall be made."""
    above = next(each for each in (folder, *folder.parents) if each.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(
            f"`{argument}` must lie in a folder that you may write to (got {str(folder)!r}, and {str(above)!r} is "
            f"{'not writable' if above.is_dir() else 'a file'}). Choose another place."
        )


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk, where the system can say so."""
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
