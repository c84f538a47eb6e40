"""What is wrong with the name of a checkpoint that cannot be loaded, in words for the one who typed it."""

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

from .chat_templates import use_own_template


_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def embedded_checkpoints() -> dict[str, Path]:
    """Name and folder of each checkpoint that travels in this package."""
    root = Path(str(resources.files("d3llm_hf"))) / "checkpoints"
    return {folder.parent.name: folder.parent for folder in sorted(root.glob("*/config.json"))}


def checkpoint_source(name: str) -> str:
    """What to give `from_pretrained`: an existing path as it is, an embedded checkpoint's folder, or a Hub id."""
    return name if Path(name).exists() else str(embedded_checkpoints().get(name, name))


@contextmanager
def loading(name: str, argument: str = "model", gguf_file: str | None = None) -> Iterator[None]:
    """Inside, a checkpoint is loaded; errors name the argument, what is there, and the way out.

    Args:
        name (`str`): as it was typed: a folder, an id on the Hub or an embedded checkpoint.
        argument (`str`): what it was given as.
        gguf_file (`str`, *optional*): file in the folder that holds config and weights, in place of those.

    Raises:
        OSError: for a name of nothing, a file, a folder without a checkpoint, or one that cannot be read.
    """
    path = Path(name).expanduser()
    is_folder = bool(name) and path.is_dir()
    ours = f"a checkpoint folder, an id on the Hub or one of {sorted(embedded_checkpoints())}"
    if name and path.is_file():
        raise FileNotFoundError(f"`{argument}` must be {ours} (got {name!r}, which is a file). Pass its folder.")
    if is_folder and gguf_file is not None and not (path / gguf_file).is_file():
        raise FileNotFoundError(
            f"`gguf_file` must be a file of the checkpoint's folder (got {gguf_file!r}, which is not in {name!r}). "
            "Correct its name."
        )
    whole = ("config.json", "adapter_config.json") if gguf_file is None else (gguf_file,)
    if is_folder and not any((path / file).is_file() for file in whole):
        raise FileNotFoundError(
            f"`{argument}` must be {ours} (got {name!r}, a folder without config.json). `d3llm init` writes one that "
            "works."
        )
    known = name in embedded_checkpoints()
    near = "" if is_folder or known else "".join(difflib.get_close_matches(name, embedded_checkpoints(), n=1))
    hint = f"Did you mean {near!r}? " if near else ""
    if not is_folder and not known and not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"`{argument}` must be {ours} (got {name!r}, which is none). {hint}Correct the path.")
    try:
        yield
    except OSError as error:
        if is_folder or known:
            raise OSError(
                f"`{argument}` must be a whole checkpoint (got {name!r}: {_said(error)}). Fetch or save it again."
            ) from error
        raise OSError(
            f"`{argument}` must be {ours} (got {name!r}, which is no folder here, and the Hub does not give it: "
            f"{_said(error)}). {hint}Correct the name, or the connection; a private model needs `hf auth login`."
        ) from error


def load_tokenizer(source: str, name: str, argument: str = "model", **kwargs):
    """The tokenizer of a checkpoint, with the chat template of its family's code.

    Args:
        source (`str`): what `from_pretrained` takes.
        name, argument (`str`): as in [`loading`].
        kwargs: of `from_pretrained`; a tokenizer's own code is not run unless they say so.

    Raises:
        ValueError: if there is none that transformers can make.
        OSError: if nothing of that name is found on the Hub.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **({"trust_remote_code": False} | kwargs))
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and not Path(source).is_dir():
            raise  # there may be no such checkpoint at all
        raise ValueError(
            f"`{argument}` must have a tokenizer beside its weights (got {name!r}: {_said(error)}). Save one there "
            "with `tokenizer.save_pretrained`."
        ) from error
    return use_own_template(tokenizer, _model_type(source, kwargs.get("revision")))


def _model_type(source: str, revision: str | None) -> str | None:
    """That of the checkpoint's config, `None` beside which no config lies."""
    from transformers import PreTrainedConfig

    try:
        keys, _ = PreTrainedConfig.get_config_dict(source, revision=revision)
    except OSError:
        return None
    return keys.get("model_type")


def _said(error: Exception) -> str:
    """The beginning of a message, without its full stop."""
    return " ".join(str(error).split())[:250].rstrip(".")
