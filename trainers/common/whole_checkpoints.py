"""Training checkpoints that are known to be whole.

`Trainer` writes the files of a checkpoint one after the other, and resumes from whatever it finds: without the
optimizer's file the optimizer silently starts anew, and a file that is cut short ends in an error that names none.

Here a checkpoint has one more file, `checkpoint_files.json`. It is written before all others, saying that they are not
complete, and replaced at the end by the list of them with sizes and checksums. So a checkpoint is one of these:

    whole        all files are as listed
    damaged      a file is absent, cut short or altered, or the list itself is
    unfinished   it was still being written when the run was killed
    unlisted     of plain `Trainer`, or of an earlier version: nothing can be said about it
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from d3llm_hf.files import sync, write_whole


logger = logging.getLogger(__name__)

FILE_LIST = "checkpoint_files.json"
_THREADS = 8  # that read files and wait for the disk
_FOLDER = re.compile(r"checkpoint-(\d+)")


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or none to resume from."""


class UnfinishedCheckpointError(CheckpointError):
    """A checkpoint that was still being written when its run was killed."""


class UnlistedCheckpointError(CheckpointError):
    """A checkpoint without a list of its files."""


def begin_checkpoint(folder: Path) -> None:
    """Makes an empty checkpoint that is unfinished; whatever lies there is removed."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / FILE_LIST, _encoded({"complete": False}))
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != FILE_LIST:
            path.unlink()


def finish_checkpoint(folder: Path, *, has_optimizer: bool = True) -> None:
    """Lists the files of a checkpoint, now that all of them are written and before any older one is deleted.

    Args:
        folder (`Path`): The checkpoint.
        has_optimizer (`bool`, defaults to `True`): Whether a run can go on from it, or it holds the model alone.
    """
    paths = _files(folder)
    with ThreadPoolExecutor(_THREADS) as threads:
        found = threads.map(_described, paths)
    files = {path.relative_to(folder).as_posix(): entry for path, entry in zip(paths, found, strict=True)}
    write_whole(folder / FILE_LIST, _encoded({"complete": True, "has_optimizer": has_optimizer, "files": files}))


def check_checkpoint(folder: str | os.PathLike) -> None:
    """Checks that a run can go on from a checkpoint.

    Raises:
        UnlistedCheckpointError: If it has no list of files.
        UnfinishedCheckpointError: If it was not written to its end.
        CheckpointError: If it does not exist, a file is absent, cut short or altered, naming it, or it holds no
            optimizer.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"`{folder}` must be the folder of a checkpoint (got none).")
    listed = _read_list(folder / FILE_LIST)
    if not listed["complete"]:
        raise UnfinishedCheckpointError(f"`{folder}` must be complete (got one whose saving was cut off).")
    for name, expected in listed["files"].items():  # all sizes before any checksum: these take longer
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"`{path}` must exist (got no such file).")
        if path.stat().st_size != expected["size"]:
            raise CheckpointError(f"`{path}` must have {expected['size']} bytes (got {path.stat().st_size}).")
    with ThreadPoolExecutor(_THREADS) as threads:
        found = list(threads.map(_sha256, (folder / name for name in listed["files"])))
    for (name, expected), checksum in zip(listed["files"].items(), found, strict=True):
        if checksum != expected["sha256"]:
            raise CheckpointError(f"`{folder / name}` must agree with its checksum (got other bytes).")
    if not listed["has_optimizer"]:
        raise CheckpointError(
            f"`{folder}` must hold the state of the optimizer (got a model alone, saved with `save_only_model`)."
        )


def last_whole_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The last checkpoint that a run can go on from; newer ones are named in warnings.

    Returns:
        `str`: Its folder, or `None` where no checkpoint was ever finished.

    Raises:
        CheckpointError: If there are checkpoints, but none is whole.
    """
    numbered = {}
    for path in Path(output_dir).glob("checkpoint-*"):
        if (match := _FOLDER.fullmatch(path.name)) and path.is_dir():
            numbered[int(match[1])] = path
    problems: list[CheckpointError] = []
    for _, folder in sorted(numbered.items(), reverse=True):
        try:
            check_checkpoint(folder)
        except CheckpointError as error:
            problems.append(error)
            continue
        for problem in problems:
            logger.warning("%s That checkpoint is skipped; the run goes on from %s.", problem, folder)
        return str(folder)
    if not all(isinstance(problem, UnfinishedCheckpointError) for problem in problems):
        raise CheckpointError(
            f"`{output_dir}` must hold a whole checkpoint to resume from (got none: "
            f"{' '.join(map(str, problems))}). Delete these to start anew, or name one that has no list of files."
        )
    for problem in problems:
        logger.warning("%s That checkpoint is skipped, and there is no other.", problem)
    return None


def checkpoint_to_resume(chosen: str | bool | None, output_dir: str | os.PathLike) -> str | None:
    """The checkpoint that a run goes on from.

    Args:
        chosen (`str` or `bool`, *optional*): A folder; `True` for the last whole checkpoint of `output_dir`; `"last"`
            for that one, or a new run where no checkpoint was ever finished.
        output_dir (path): Of the run.

    Returns:
        `str`: Its folder, or `None` for a new run.

    Raises:
        CheckpointError: If the folder that is named is damaged, or there is none where one is asked for.
    """
    if chosen is None or chosen is False:
        return None
    if chosen is True or chosen == "last":
        found = last_whole_checkpoint(output_dir)
        if found is None and chosen is True:
            raise CheckpointError(
                f"`resume_from_checkpoint` must find a checkpoint in `{output_dir}` (got none). Unset it, or pass "
                "'last' to start anew in that case."
            )
        return found
    try:
        check_checkpoint(chosen)
    except UnlistedCheckpointError as error:
        _check_unlisted(Path(chosen))
        logger.warning("%s Whether it is whole cannot be told, and the run goes on from it as it is.", error)
    return str(chosen)


def _check_unlisted(folder: Path) -> None:
    """Refuse what `Trainer` would resume from with a new optimizer; it writes its own state last."""
    names = [path.name for path in folder.iterdir()]
    # DeepSpeed keeps optimizer and scheduler in a folder of its own.
    by_deepspeed = any(name.startswith("global_step") for name in names)
    for kind in ["trainer_state"] if by_deepspeed else ["trainer_state", "optimizer", "scheduler"]:
        if not any(name.startswith(kind) for name in names):
            raise CheckpointError(
                f"`{folder}` must hold a file `{kind}.*` (got none): its saving was cut off, or it is a model alone. "
                "Name another checkpoint."
            )


def _read_list(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        if all(other.name.startswith(".") for other in path.parent.iterdir()):  # the list itself was never written
            return {"complete": False}
        raise UnlistedCheckpointError(
            f"`{path.parent}` must have a list of its files, {path.name} (got none)."
        ) from None
    try:
        listed = json.loads(content)
        whole = content == _encoded({name: value for name, value in listed.items() if name != "checksum"})
    except (ValueError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise CheckpointError(f"`{path}` must agree with its own checksum (got other bytes).")
    return listed


def _encoded(listed: dict[str, Any]) -> bytes:
    """The bytes of a list of files, with the checksum of the rest."""
    checksum = hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()
    return (json.dumps(listed | {"checksum": checksum}, indent=1, sort_keys=True) + "\n").encode()


def _files(folder: Path) -> list[Path]:
    """All files of a checkpoint but the list."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / FILE_LIST)


def _described(path: Path) -> dict[str, Any]:
    sync(path)  # the list must not outlive what it lists
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
