"""Fills in the model card template for a checkpoint folder, from what the folder itself says."""

import json
import math
import os
import struct
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ..registration.families import FAMILIES


TAGS = ("diffusion-language-model", "masked-diffusion", "d3llm")
EXAMPLE = "Tom has 8 apples. He buys 7 more. He gives 4 to a friend. How many apples does Tom have now?"
"""What cards ask a model: a problem that the embedded checkpoints can do."""


def render_card(
    folder: Path,
    name: str,
    *,
    base_model: str | None = None,
    source_card: Path | None = None,
    license: str | None = None,
    results: str | os.PathLike | None = None,
) -> str:
    """The README.md of a checkpoint folder.

    Args:
        folder (`Path`): the folder, with config.json, generation_config.json and weights in place.
        name (`str`): name of the checkpoint; the code of the card loads it by this name.
        base_model (`str`, *optional*): Hub id that the weights come from.
        source_card (`Path`, *optional*): the card of the source; its licence, language and data sets are kept.
        license (`str`, *optional*): identifier of the licence, where the source has no card that says it.
        results (path, *optional*): a results file, see [`results_metadata`].

    Returns:
        `str`: Markdown with the metadata block that the Hub reads.

    Raises:
        ValueError: for results that are none.
    """
    from huggingface_hub import ModelCardData
    from jinja2 import Environment, StrictUndefined

    from ..models.methods import DEFAULT_METHOD, METHODS

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    tensors = tensor_headers(folder).values()
    family = FAMILIES[config["model_type"]].label
    model_class: Any = FAMILIES[config["model_type"]].model()
    method = generation.get("decoding_method") or model_class.default_method or DEFAULT_METHOD
    by_entropy = "entropy_threshold" in METHODS[method]
    kept: dict[str, Any] = {"license": license} if license else {}
    kept |= _kept_metadata(source_card)
    if base_model is not None:
        kept["base_model"] = base_model
    if results is not None:
        kept |= results_metadata(results, name)
    metadata = ModelCardData(
        **kept,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*TAGS, family.lower()],
    )
    template = (resources.files(__package__) / "templates" / "model_card.md").read_text(encoding="utf-8")
    return (
        Environment(undefined=StrictUndefined, keep_trailing_newline=True)
        .from_string(template)
        .render(
            metadata=metadata.to_yaml(),
            name=name,
            description=f"A masked diffusion language model of the {family} family.",
            chat=_has_chat_template(folder),
            example=EXAMPLE,
            family=family,
            base_model=kept["base_model"] if isinstance(kept.get("base_model"), str) else None,
            parameters=sum(math.prod(tensor["shape"]) for tensor in tensors),
            dtype=", ".join(sorted({tensor["dtype"] for tensor in tensors})),
            context=config.get("max_sequence_length") or config.get("max_position_embeddings") or "unknown",
            decoding_method=f"`{method}`",
            threshold="entropy_threshold" if by_entropy else "confidence_threshold",
            bolder="Raising" if by_entropy else "Lowering",
        )
    )


def complete_card(
    text: str,
    name: str,
    *,
    results: str | os.PathLike | None = None,
    tags: Sequence[str] = TAGS,
    **metadata: Any,
) -> str:
    """A card whose metadata say what the Hub shows: what is missing is added, what is there stays.

    Args:
        text (`str`): the card, with or without a metadata block.
        name (`str`): name of the checkpoint.
        results (path, *optional*): a results file, whose figures replace those of the card.
        tags: that are added to the card's.
        metadata: further entries, such as `base_model`; None stands for none.

    Returns:
        `str`: Markdown with a metadata block; the text behind it as it was.

    Raises:
        ValueError: for metadata that cannot be read, or results that are none.
    """
    from huggingface_hub import ModelCard, ModelCardData
    from yaml import YAMLError

    try:
        card = ModelCard(text)
    except (ValueError, YAMLError) as error:
        raise ValueError(f"The card of {name!r} must begin with YAML metadata (got {error}). Correct it.") from error
    found = card.data.to_dict()
    found["tags"] = list(dict.fromkeys([*(found.get("tags") or []), *tags]))
    wanted = {"library_name": "transformers", "pipeline_tag": "text-generation"} | metadata
    found = {key: value for key, value in wanted.items() if value is not None} | found
    if results is not None:
        found.pop("model-index", None)
        found |= results_metadata(results, name)
    return f"---\n{ModelCardData(**found).to_yaml()}\n---\n{card.text}"


def results_metadata(results: str | os.PathLike, name: str) -> dict[str, Any]:
    """Figures of a results file, as arguments of `ModelCardData`: the Hub shows them beside the card as model-index.

    Args:
        results (path): what `python -m d3llm_hf.evaluation.measure` writes (results.json), or `d3llm sweep` (JSON
            lines).
        name (`str`): name of the model.

    Returns:
        `dict`: `model_name` and `eval_results`: for each row or point its accuracy in percent and its tokens per
        forward, named after the settings of decoding.

    Raises:
        FileNotFoundError: for a file that does not exist.
        ValueError: for a file that holds no results.
    """
    from huggingface_hub import EvalResult

    file = Path(results)
    if not file.is_file():
        raise FileNotFoundError(
            f"`results` must be a results file (got {str(results)!r}, which is none). Make one with `d3llm sweep`."
        )
    found = []
    for row in _rows(file):
        told = ", ".join(f"{key}={value!r}" for key, value in row["settings"].items())
        for kind, label, value in (
            ("accuracy", "accuracy (%)", row["accuracy"]),
            ("tokens_per_forward", "tokens per forward", row["tpf"]),
        ):
            found.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=row["task"].split(",")[0].replace(" ", "-"),
                    dataset_name=row["task"],
                    dataset_args={"samples": row["samples"], "seed": row["seed"]},
                    metric_type=kind,
                    metric_name=f"{label}, {told}",
                    metric_value=round(value, 2),
                )
            )
    return {"model_name": name, "eval_results": found}


def _rows(file: Path) -> list[dict[str, Any]]:
    """The rows of either kind of results file, under one set of names."""
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix != ".jsonl":
            whole = json.loads(text)
            about = {"task": whole["task"], "samples": whole["problems"], "seed": whole["seed"]}
            return [about | {key: row[key] for key in ("settings", "accuracy", "tpf")} for row in whole["rows"]]
        points = [json.loads(line) for line in text.splitlines()]
        names = ("task", "settings", "accuracy", "tpf", "seed")
        return [{name: point[name] for name in names} | {"samples": point["num_samples"]} for point in points]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"`results` must be what `d3llm_hf.evaluation.measure` (.json) or `d3llm sweep` (.jsonl) writes (got "
            f"{file.name!r} with {type(error).__name__}: {error}). Measure again."
        ) from error


def tensor_headers(folder: Path) -> dict[str, dict]:
    """Shape and dtype of every tensor of a checkpoint folder, from the safetensors headers alone."""
    headers: dict[str, dict] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            headers |= json.loads(stream.read(length))
    headers.pop("__metadata__", None)
    return headers


def _kept_metadata(source_card: Path | None) -> dict:
    """The entries of a card's metadata that stay true of a copy with the same weights."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    if source_card is None or not source_card.is_file():
        return {}
    try:
        found = ModelCard.load(source_card).data.to_dict()
    except (ValueError, YAMLError):  # a card without readable metadata has nothing to keep
        return {}
    names = ("license", "license_name", "license_link", "language", "datasets", "base_model")
    return {name: found[name] for name in names if isinstance(found.get(name), str | list)}


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    file = folder / "tokenizer_config.json"
    return file.is_file() and bool(json.loads(file.read_text(encoding="utf-8")).get("chat_template"))
