"""Whether a checkpoint folder holds all that its model needs, from its config and the headers of its weights alone."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..models.tensors import HEAD, described
from ..registration.families import FAMILIES
from .model_card import tensor_headers


def misfits(folder: Path, config: Mapping[str, Any]) -> str:
    """What is wrong with the tensors of a folder, in words; empty where the model loads from them as a whole.

    Args:
        folder (`Path`): its safetensors files.
        config: content of its config.json, of a family of this package. Quantised weights are not looked at: their
            quantiser knows what they consist of.

    Raises:
        ArchitectureError: (a `ValueError`) for a config that is not implemented.
    """
    import torch

    if config.get("quantization_config"):
        return ""
    model_class: Any = FAMILIES[config["model_type"]].model()
    with torch.device("meta"):
        model = model_class(model_class.config_class.from_dict(dict(config)))
    wanted = {name: tuple(tensor.shape) for name, tensor in model.stored_tensors().items()}
    found = {
        _stored(model_class, name): tuple(header["shape"])
        for name, header in tensor_headers(folder).items()
        if not name.endswith("rotary_emb.inv_freq")  # computed, whatever a file says
    }
    missing, unplaced = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    if model.config.tie_word_embeddings:
        missing.discard(HEAD)
    if missing or unplaced:
        return described(missing, unplaced)
    other = sorted(name for name, shape in found.items() if shape != wanted[name])
    return f"with {other[0]} of shape {found[other[0]]}, not {wanted[other[0]]}" if other else ""


def _stored(model_class: Any, name: str) -> str:
    name = model_class.own_tensor_name(name)
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"  # of a backbone that was saved alone
