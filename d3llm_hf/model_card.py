"""Fills in the model card template for a checkpoint folder, from what the folder itself says."""

import json
import math
import struct
from importlib import resources
from pathlib import Path


_FAMILY_NAMES = {"llada": "LLaDA", "Dream": "Dream"}
_EXAMPLE = "Tom has 8 apples. He buys 7 more. How many apples does Tom have now?"


def render_card(
    folder: Path,
    name: str,
    *,
    base_model: str | None = None,
    source_card: Path | None = None,
    license: str | None = None,
) -> str:
    """The README.md of a checkpoint folder.

    Args:
        folder (`Path`): the folder, with config.json, generation_config.json and weights in place.
        name (`str`): name of the checkpoint; the code of the card loads it by this name.
        base_model (`str`, *optional*): Hub id that the weights come from.
        source_card (`Path`, *optional*): the card of the source; its licence, language and data sets are kept.
        license (`str`, *optional*): identifier of the licence, where the source has no card that says it.

    Returns:
        `str`: Markdown with the metadata block that the Hub reads.
    """
    from huggingface_hub import ModelCardData
    from jinja2 import Environment, StrictUndefined

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    tensors = tensor_headers(folder).values()
    family = _FAMILY_NAMES[config["model_type"]]
    kept = {"license": license} if license else {}
    kept |= _kept_metadata(source_card)
    if base_model is not None:
        kept["base_model"] = base_model
    metadata = ModelCardData(
        **kept,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["diffusion-language-model", "masked-diffusion", "d3llm", family.lower()],
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
            example=_EXAMPLE,
            family=family,
            base_model=kept["base_model"] if isinstance(kept.get("base_model"), str) else None,
            parameters=sum(math.prod(tensor["shape"]) for tensor in tensors),
            dtype=", ".join(sorted({tensor["dtype"] for tensor in tensors})),
            context=config.get("max_sequence_length") or config.get("max_position_embeddings") or "unknown",
            decoding_method=f"`{generation.get('decoding_method') or 'd3llm'}`",
        )
    )


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
