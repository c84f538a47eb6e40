"""Checkpoint folders that carry their own code: from the Hub, from disk, or from the ones embedded in this package."""

import difflib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from ..files import check_writable_folder
from ..progress import progress_bar
from ..registration.families import AUTO_CLASSES, FAMILIES
from .chat_templates import own_template
from .engines import check_for_engine, prepare_for_engine
from .model_card import complete_card, render_card
from .sources import embedded_checkpoints, loading


# Everything that is copied from the source. No code: the source's own would shadow ours, and was not asked for.
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
DOCUMENTS = ("LICENSE*", "NOTICE*")

_CHUNK = 2**24  # bytes that are copied at a time
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")
_RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import", re.MULTILINE)


def init_checkpoint(name: str, destination: str | os.PathLike | None = None, *, overwrite: bool = False) -> Path:
    """Writes a checkpoint that is embedded in this package, with its code, tokenizer and card. Needs no network.

    One of a class of transformers needs no code and is written as it is.

    Args:
        name (`str`): name of the checkpoint, for example `"d3llm-llada"`.
        destination (path, *optional*): folder to write; `name` in the working directory when unset.
        overwrite (`bool`): replace a checkpoint folder that is there already.

    Returns:
        `Path`: the folder written.

    Raises:
        ValueError: for a name that does not exist.
        FileExistsError: when `destination` exists and is not empty.
    """
    known = embedded_checkpoints()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"`name` must be an embedded checkpoint, one of {sorted(known)} (got {name!r}).{hint}")
    folder = known[name]
    if _read_json(folder / "config.json")["model_type"] in FAMILIES:
        return export_checkpoint(folder, destination or name, name=name, overwrite=overwrite)
    return _copy_stock(folder, Path(destination or name).expanduser().absolute(), name, overwrite)


def _copy_stock(folder: Path, destination: Path, name: str, overwrite: bool) -> Path:
    """Writes an embedded checkpoint of a class of transformers, which needs no code."""
    _check_destination(destination, overwrite)
    files = [*_weight_files(folder, folder), *_matching(folder, TOKENIZER_FILES)]
    files += [folder / "config.json", folder / "generation_config.json"]
    card = (folder / "README.md").read_text(encoding="utf-8")
    with _appearing(destination) as target:
        _copy(files, target)
        text = complete_card(card, name, results=folder / "results.json", tags=())
        (target / "README.md").write_text(text, encoding="utf-8")
    return destination


def export_checkpoint(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    name: str | None = None,
    revision: str | None = None,
    decoding_method: str | None = None,
    engine: str | None = None,
    results: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> Path:
    """Makes a self-contained folder of a LLaDA, Dream or d3LLM checkpoint: `AutoModel` loads it without this package.

    Weights are copied as they are, never loaded: official tensor names stay, and the size of the model does not
    matter. The folder appears whole or not at all.

    Args:
        source (`str` or path): a checkpoint folder, or an id on the Hugging Face Hub.
        destination (path): folder to write.
        name (`str`, *optional*): name in the model card; that of `destination` when unset.
        revision (`str`, *optional*): branch, tag or commit of a `source` on the Hub.
        decoding_method (`str`, *optional*): default of the folder's `generate`; the source's stays when unset.
        engine (`str`, *optional*): a serving engine that the folder is for as well; see `engines.ENGINES`.
        results (path, *optional*): a results file whose figures the card's metadata shall hold; the source's
            results.json when unset, if it has one.
        overwrite (`bool`): replace a checkpoint folder that is there already. A folder that holds anything but a
            checkpoint is never replaced.

    Returns:
        `Path`: the folder written.

    Raises:
        FileNotFoundError: when `source` is no checkpoint folder, or lacks a shard that its index names.
        FileExistsError: when `destination` exists and may not be replaced.
        ValueError: for an architecture that is not ours, tensors that are missing or have no place, settings that it
            does not have, pickled weights, or what an engine would load wrongly.
    """
    destination = Path(destination).expanduser().absolute()
    _check_destination(destination, overwrite)
    folder, hub_id = _resolve_source(source, revision)
    if destination.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise ValueError(
            f"`destination` must not be `source`, nor hold it (got {str(destination)!r} for {str(folder)!r}). Choose "
            "another folder."
        )
    config = _read_json(folder / "config.json")
    if config.get("model_type") not in FAMILIES and "logit_shift" in config:
        raise ValueError(
            f"`source` must be a checkpoint whose code is of this package (got {config.get('model_type')!r} in "
            f"{str(source)!r}, a class of transformers that `as_diffusion_lm` saved). There is no code to add: share "
            "the folder as it is, which `d3llm generate` and `as_diffusion_lm` know by its config; or let "
            "`block_causal_lm` make a Qwen2, Qwen3 or Llama in blocks one of our classes, and export that."
        )
    if config.get("model_type") not in FAMILIES:
        raise ValueError(
            f"`source` must be a checkpoint of model_type {list(FAMILIES)} (got {config.get('model_type')!r} in "
            f"{str(source)!r}). Other architectures are not supported."
        )
    shards = _weight_files(folder, source)
    generation = _generation_config(folder, config, decoding_method)
    if engine is not None:
        check_for_engine(engine, config["model_type"], folder)
    embedded = folder in embedded_checkpoints().values()
    if not embedded:  # those are validated by our tests; `init` need not wait for torch
        generation = _validated(config, generation)
        _check_tensors(folder, config, source)

    with _appearing(destination) as target:
        _copy([*shards, *_matching(folder, TOKENIZER_FILES), *_matching(folder, DOCUMENTS)], target)
        _make_tokenizer_standard(target)
        _put_own_template(target, config["model_type"])
        _write_json(target / "config.json", with_auto_map(config))
        _write_json(target / "generation_config.json", generation)
        for file in code_files(config["model_type"]):
            shutil.copyfile(file, target / file.name)
        section = "" if engine is None else prepare_for_engine(engine, target)
        name = name or destination.name
        if results is None and (folder / "results.json").is_file():
            results = folder / "results.json"
        card = folder / "README.md"
        if card.is_file() and embedded:
            text = complete_card(card.read_text(encoding="utf-8"), name, results=results)
        else:
            text = render_card(
                target,
                name,
                base_model=hub_id,
                source_card=card,
                license="apache-2.0" if embedded else None,
                results=results,
            )
        (target / "README.md").write_text(text + section, encoding="utf-8")
    return destination


def with_auto_map(config: dict) -> dict:
    """A copy of `config` (the content of config.json) that names our code for every Auto class."""
    family = FAMILIES[config["model_type"]]
    model = f"{family.model_file}.{family.model_class}"
    return config | {
        "architectures": [family.model_class],
        "auto_map": {"AutoConfig": f"{family.config_file}.{family.config_class}"} | dict.fromkeys(AUTO_CLASSES, model),
    }


def code_files(model_type: str) -> list[Path]:
    """The files that the model of a family needs: its own, and what they import from one another."""
    root = Path(str(resources.files("d3llm_hf"))) / "models"
    found: list[Path] = []
    pending = [FAMILIES[model_type].config_file, FAMILIES[model_type].model_file]
    while pending:
        file = root / f"{pending.pop()}.py"
        if file not in found:
            found.append(file)
            pending += _RELATIVE_IMPORT.findall(file.read_text(encoding="utf-8"))
    return sorted(found)


# ---- reading the source ------------------------------------------------------------------------------------------


def _resolve_source(source: str | os.PathLike, revision: str | None) -> tuple[Path, str | None]:
    """The folder to read, and the Hub id if it came from there."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ValueError(
                f"`revision` applies to a `source` on the Hub (got {revision!r} with a folder). Leave it out."
            )
        if not (folder / "config.json").is_file():
            hint = " It holds an adapter: merge it first." if (folder / "adapter_config.json").is_file() else ""
            raise FileNotFoundError(f"`source` must hold a config.json (got {str(source)!r}).{hint}")
        return folder.absolute(), None
    if not _REPO_ID.fullmatch(str(source)) or str(source).startswith("."):
        raise FileNotFoundError(
            f"`source` must be a checkpoint folder or a Hub id such as 'owner/name' (got {str(source)!r}). "
            "For an embedded checkpoint use `d3llm init`."
        )
    from huggingface_hub import snapshot_download

    patterns = [*WEIGHTS, *TOKENIZER_FILES, *DOCUMENTS, "config.json", "generation_config.json", "README.md"]
    with loading(str(source), "source"):
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns)), str(source)


def _weight_files(folder: Path, source: str | os.PathLike) -> list[Path]:
    """The safetensors files of a checkpoint and their index, complete."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(_read_json(index)["weight_map"].values()))
        missing = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"`source` must hold every shard that its index names (got {str(source)!r} without {missing[:3]}). "
                "Fetch the checkpoint again."
            )
        return [index, *(folder / name for name in names)]
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    pickled = _matching(folder, ("*.bin", "*.pt", "*.pth"))
    found = f"only {pickled[0].name}, which is a pickle and can run code" if pickled else "no weights"
    raise ValueError(
        f"`source` must hold model.safetensors or its shards (got {str(source)!r} with {found}). Convert it first "
        "with `model.save_pretrained` where you trust it."
    )


def _generation_config(folder: Path, config: dict, decoding_method: str | None) -> dict:
    """The source's generation_config.json, made explicit about what would otherwise be guessed.

    Pipelines sample unless the file says that they should not; and where the file exists, transformers no longer looks
    for special tokens in config.json. Settings of the source's method are left out for another one, as by `generate`.
    """
    from ..models.foreign_settings import translated
    from ..models.methods import CACHE_FIELDS, COMMON, DEFAULT_METHOD, METHODS

    file = folder / "generation_config.json"
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "mask_token_id")
    settings = {"do_sample": False} | {name: config[name] for name in names if config.get(name) is not None}
    settings |= translated(_read_json(file)) if file.is_file() else {}
    settings.pop("_from_model_config", None)  # transformers would drop our fields when it reads the file
    if decoding_method is not None:
        own = settings.get("decoding_method") or DEFAULT_METHOD
        if decoding_method != own:
            theirs = {*METHODS.get(own, ()), *COMMON, *CACHE_FIELDS}
            settings = {name: value for name, value in settings.items() if name not in theirs}
        settings["decoding_method"] = decoding_method
    return settings


def _validated(config: dict, generation: dict) -> dict:
    """Builds both configs as a call would, which refuses what our code lacks; returns the settings with a meaning."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import GenerationConfig

    from ..models.generation_config_d3llm import D3LLMGenerationConfig
    from ..models.token_ids import check_inside
    from ..models.topology import Traits

    model_class: Any = FAMILIES[config["model_type"]].model()
    try:
        model_config: Any = model_class.config_class.from_dict(config)
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from error
    way_out = "Correct config.json, which takes that of the 8B or 7B model where it names none; null is none."
    for name in ("mask_token_id", "pad_token_id"):
        value = getattr(model_config, name)
        check_inside(f"`{name}` of the model's config", value, model_config.vocab_size, way_out)
    traits = Traits.of(model_class, model_config)
    settings, call = D3LLMGenerationConfig.coerce(GenerationConfig.from_dict(generation)), D3LLMGenerationConfig()
    call.inherit(settings, {}, traits)
    call.refuse_unfitting()
    call.check_against(model_config.vocab_size, model_config.mask_token_id)
    call.rules(1, traits)
    return {name: value for name, value in generation.items() if hasattr(settings, name)}


def _check_tensors(folder: Path, config: dict, source: str | os.PathLike) -> None:
    from .whole_model import misfits

    wrong = misfits(folder, config)
    if wrong:
        raise ValueError(
            f"`source` must hold the tensors of its model and no others (got {str(source)!r} {wrong}). It is damaged, "
            "or of another architecture; fetch it again, or correct config.json."
        )


def _make_tokenizer_standard(folder: Path) -> None:
    """Replaces a tokenizer class that would need the source's code (Dream's is Qwen2's under another name)."""
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return
    config = _read_json(file)
    references = config.pop("auto_map", None)
    if references is None:
        return
    if config.get("tokenizer_class") == "DreamTokenizer":
        config["tokenizer_class"] = "Qwen2Tokenizer"
        _declare_added_tokens(folder / "vocab.json", config.get("added_tokens_decoder") or {})
    elif (folder / "tokenizer.json").is_file():
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    else:
        raise ValueError(
            "`source` must have a tokenizer.json or a tokenizer class of transformers (got the custom class "
            f"{config.get('tokenizer_class')!r}). Convert the tokenizer first."
        )
    _write_json(file, config)


def _put_own_template(folder: Path, model_type: str) -> None:
    """Replaces a chat template that the family's own code replaces as well (MMaDA's tokenizer has LLaDA's)."""
    file, apart = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    if not file.is_file():
        return
    config = _read_json(file)
    published = config.pop("chat_template", None)
    template = own_template(model_type, apart.read_text(encoding="utf-8") if apart.is_file() else published)
    if template is not None:
        apart.write_text(template, encoding="utf-8")
        _write_json(file, config)


def _declare_added_tokens(file: Path, added: dict[str, dict]) -> None:
    """Keeps the ids of added tokens where a gap lies before them."""
    from .tokenization_dream import with_declared

    if file.is_file():
        vocabulary = _read_json(file)
        _write_json(file, with_declared(vocabulary, {token["content"]: int(index) for index, token in added.items()}))


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


# ---- writing the destination -------------------------------------------------------------------------------------


def _check_destination(destination: Path, overwrite: bool) -> None:
    if destination.is_dir() and not any(destination.iterdir()):
        return
    if not destination.exists():
        check_writable_folder(destination.parent, "destination")
        return
    if overwrite and (destination / "config.json").is_file() and not (destination / ".git").exists():
        return
    if overwrite:
        raise FileExistsError(
            f"`overwrite` replaces checkpoint folders only (got {str(destination)!r}, which is none, or is a git "
            "repository). Choose another `destination`, or empty it yourself."
        )
    raise FileExistsError(
        f"`destination` must not exist or be empty (got {str(destination)!r}). Choose another folder, or pass "
        "`overwrite=True` (`--overwrite`)."
    )


@contextmanager
def _appearing(destination: Path) -> Iterator[Path]:
    """A temporary folder that becomes `destination` when the block ends without an error, and vanishes otherwise."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    # Beside the destination, so that the last step is a rename on one file system.
    work = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        fresh, old = work / "new", work / "old"
        fresh.mkdir()
        yield fresh
        if destination.exists():
            os.rename(destination, old)
        try:
            os.rename(fresh, destination)
        except OSError:
            if old.exists():
                os.rename(old, destination)
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _copy(files: list[Path], target: Path) -> None:
    total = sum(file.stat().st_size for file in files)
    with progress_bar(total, "B", "copying", unit_scale=True, leave=False) as bar:
        for file in files:
            with file.open("rb") as source, (target / file.name).open("wb") as copy:
                while chunk := source.read(_CHUNK):
                    bar.update(copy.write(chunk))


def _read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"`{file.name}` must be JSON (got {error} in {str(file)!r}). Fetch the file again."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"`{file.name}` must hold a JSON object (got {type(content).__name__} in {str(file)!r}).")
    return content


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
