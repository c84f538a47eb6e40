"""Publishing a checkpoint folder on the Hugging Face Hub: checked first, then sent in one commit."""

import fnmatch
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..registration.families import FAMILIES
from .checkpoints import TOKENIZER_FILES


SENT = (
    "config.json", "generation_config.json", "README.md", "model.safetensors", "model-*.safetensors",
    "model.safetensors.index.json", *TOKENIZER_FILES, "LICENSE*", "NOTICE*", "decoding.yaml", "results.json",
)  # fmt: skip
"""Names of what is sent, besides the code that config.json names. All else in the folder stays where it is."""

LARGEST_FILE = 50 * 10**9
"""Bytes of one file that the Hub takes through git-LFS."""

# Weights of an earlier push that would be loaded in place of, or beside, those of this one.
_STALE = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json")
_RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import", re.MULTILINE)
_TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")


def push_folder(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
):
    """Sends a checkpoint folder to the Hub, in one commit: there it is whole or unchanged.

    1. Check the folder and the arguments; nothing is sent yet.
    2. Make the repository, and the branch, where they do not exist.
    3. Upload the files, and commit them together with the removal of weights that they replace.

    What an interrupted push has uploaded is kept by the Hub and not sent again.

    Args:
        folder (path): as `d3llm init`, `d3llm export` or a trainer writes it.
        repo_id (`str`): `"owner/name"`, or a name in your own namespace.
        private (`bool`, *optional*): whether a repository that is made now is private.
        revision (`str`, *optional*): branch to commit to, made if need be; `main` when unset.
        message (`str`, *optional*): of the commit.
        create_pr (`bool`): open a pull request instead of committing.
        token (`str`, *optional*): of the Hub; the one that `hf auth login` or `HF_TOKEN` set when unset.

    Returns:
        `huggingface_hub.CommitInfo`: `commit_url`, `pr_url`, `oid`.

    Raises:
        ValueError: for a malformed `repo_id`, an incomplete or damaged folder, or an empty message.
        FileNotFoundError: when `folder` does not exist.
        PermissionError: without a token, or with one that may not write there.
        ConnectionError: when the connection is lost; nothing is committed then.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    # 1. Check the folder and the arguments
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"`repo_id` must be 'owner/name' of letters, digits, '-', '_' and '.' (got {repo_id!r})."
        ) from error
    if message is not None and not message.strip():
        raise ValueError("`message` must not be empty. Leave it out for a standard one.")
    files = checked_files(folder)
    token = token or get_token()
    if token is None:
        raise PermissionError(
            "The Hub needs a token that may write (got none). Log in with `hf auth login`, or set HF_TOKEN."
        )
    api = HfApi(token=token, library_name="d3llm-hf")

    # 2. Make the repository and the branch
    def prepare() -> tuple[str, list[str]]:
        full_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(full_id, branch=revision, exist_ok=True)
        return full_id, api.list_repo_files(full_id, revision=revision)

    full_id, present = _reported(prepare, repo_id)

    # 3. Upload the files, and commit them together with the removal of weights that they replace
    names = {file.name for file in files}
    stale = [name for name in present if name not in names and _matches(name, _STALE)]
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=str(file)) for file in files
    ]
    operations += [CommitOperationDelete(path_in_repo=name) for name in stale]
    return _reported(
        lambda: api.create_commit(
            full_id,
            operations,
            commit_message=message or "Upload a checkpoint with its code",
            revision=revision,
            create_pr=create_pr,
        ),
        repo_id,
    )


def checked_files(folder: str | os.PathLike) -> list[Path]:
    """The files of a folder that a push sends, in the order of their names, once the folder is found complete.

    Raises:
        FileNotFoundError: when `folder` does not exist.
        ValueError: naming everything that is missing or damaged, and what writes it.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(
            f"`folder` must be a checkpoint folder (got {str(folder)!r}, which is none). `d3llm init` and "
            "`d3llm export` write one."
        )
    config = _json(folder / "config.json")
    code, problems = _code(folder, config or {})
    export = "`d3llm export FOLDER NEW_FOLDER`"
    if config is None:
        problems.append(f"config.json, readable ({export} or `model.save_pretrained`)")
    weights = _weight_problems(folder)
    problems += weights or _misfits(folder, config or {})
    if not _is_tokenizer(folder):
        problems.append("a tokenizer (`tokenizer.save_pretrained(FOLDER)`)")
    if _json(folder / "generation_config.json") is None:
        problems.append(f"generation_config.json, readable ({export})")
    problems += [f"README.md {problem} ({export} writes one)" for problem in _card_problems(folder / "README.md")]
    files = sorted({file for file in folder.iterdir() if file.is_file() and _matches(file.name, SENT)} | set(code))
    for file in files:
        if file.stat().st_size > LARGEST_FILE:
            problems.append(f"{file.name} in files of at most {LARGEST_FILE / 1e9:g} GB (`max_shard_size='5GB'`)")
        elif file.suffix != ".safetensors" and _TOKEN.search(file.read_bytes()):
            problems.append(f"{file.name} without what looks like a token of the Hub in it")
    if problems:
        raise ValueError(
            f"`folder` must be a whole checkpoint (got {str(folder)!r}, which needs: {'; '.join(problems)})."
        )
    return files


def left_out(folder: str | os.PathLike) -> list[str]:
    """Names in a folder that a push does not send: optimizer states, pickles, checkpoints of a run, notes."""
    folder = Path(folder).expanduser()
    sent = {file.name for file in checked_files(folder)}
    return sorted(entry.name for entry in folder.iterdir() if entry.name not in sent)


def _reported(action: Callable[[], Any], repo_id: str):
    """Runs what talks to the Hub, and says of an error what it means for the user. Tokens are in none of them."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return action()
    except OfflineModeIsEnabled as error:
        raise ConnectionError("The Hub cannot be reached with HF_HUB_OFFLINE=1 set. Unset it.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise PermissionError(
                f"The Hub does not let this token write to {repo_id!r} (status {status}). Log in with "
                "`hf auth login` and a token that may write, or choose another repository."
            ) from error
        if status in (409, 412):
            raise ConnectionError(
                f"{repo_id!r} was changed by another commit meanwhile (status {status}). Nothing was committed; push "
                "again."
            ) from error
        raise
    except Exception as error:  # the HTTP library's errors share no base class with Python's own
        if not _is_lost_connection(error):
            raise
        raise ConnectionError(
            f"The connection to the Hub was lost ({type(error.__cause__ or error).__name__}). Nothing was committed "
            f"to {repo_id!r}; push again: what has been uploaded is not sent twice."
        ) from error


def _is_lost_connection(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ConnectionError | TimeoutError):
            return True
        if type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2"):
            return True
        error = error.__cause__
    return False


# ---- what a folder must hold -------------------------------------------------------------------------------------


def _code(folder: Path, config: dict[str, Any]) -> tuple[list[Path], list[str]]:
    """The code files that `auto_map` names, with what they import from one another; and what is wrong."""
    if config.get("model_type") not in FAMILIES and "logit_shift" in config and "auto_map" not in config:
        way_out = (
            "`block_causal_lm` makes a Qwen2, Qwen3 or Llama in blocks one of our classes; or `model.push_to_hub`"
        )
        return [], [f"code of its own, which a class of transformers that `as_diffusion_lm` saved has not ({way_out})"]
    auto_map = config.get("auto_map") or {}
    missing = [name for name in ("AutoConfig", "AutoModel") if name not in auto_map]
    if missing:
        return [], [f"`auto_map` in config.json with {missing} (`d3llm export FOLDER NEW_FOLDER`)"]
    found: list[Path] = []
    pending = sorted({str(reference).split("--")[-1].split(".")[0] for reference in auto_map.values()})
    problems = []
    while pending:
        file = folder / f"{pending.pop()}.py"
        if file in found:
            continue
        if not file.is_file():
            problems.append(f"{file.name}, which config.json or its code names (`d3llm export FOLDER NEW_FOLDER`)")
            continue
        found.append(file)
        pending += _RELATIVE_IMPORT.findall(file.read_text(encoding="utf-8"))
    return found, problems


def _weight_problems(folder: Path) -> list[str]:
    saved = "`model.save_pretrained(FOLDER)`"
    names = ["model.safetensors"]
    if (folder / "model.safetensors.index.json").is_file():
        index = _json(folder / "model.safetensors.index.json")
        if index is None or not isinstance(index.get("weight_map"), dict):
            return [f"model.safetensors.index.json, readable ({saved})"]
        names = sorted(set(index["weight_map"].values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        return [f"the weights {', '.join(missing[:3])} as safetensors; pickles are never sent ({saved})"]
    return [f"{name} whole, not damaged ({saved})" for name in names if not _is_whole(folder / name)]


def _misfits(folder: Path, config: dict[str, Any]) -> list[str]:
    """Of a model of this package: tensors that are missing or have no place, or another architecture."""
    from ..models.architecture import brings_own_code

    if config.get("model_type") not in FAMILIES or brings_own_code(config):
        return []
    from .whole_model import misfits

    try:
        wrong = misfits(folder, config)
    except ValueError as error:
        return [f"a config.json of what its code implements ({error.__cause__ or error})"]
    return (
        [f"the tensors of its model and no others, not weights {wrong} (`d3llm export` of a whole one)"]
        if wrong
        else []
    )


def _is_whole(file: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length)) if length < size else {}
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        return bool(ends) and size == 8 + length + max(ends)
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return False


def _is_tokenizer(folder: Path) -> bool:
    config = _json(folder / "tokenizer_config.json")
    parts = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    return config is not None and "auto_map" not in config and ((folder / "tokenizer.json").is_file() or parts)


def _card_problems(card: Path) -> list[str]:
    """What the Hub, or a reader of its page, would miss in a card's metadata."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    if not card.is_file():
        return ["with metadata"]
    try:
        data = ModelCard.load(card).data
    except (ValueError, YAMLError):
        return ["with readable metadata"]
    problems = [f"with `{name}` in its metadata" for name in ("library_name", "pipeline_tag") if not data.get(name)]
    base = data.get("base_model")
    for name in [base] if isinstance(base, str) else base or []:
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(name)):
            problems.append(f"with a Hub id as `base_model` (it says {name!r})")
    return problems


def _json(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
