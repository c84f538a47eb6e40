"""The folder of a draft head as EAGLE-3 publishes it: `config.json` beside one file of weights."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


WEIGHTS = ("model.safetensors", "pytorch_model.bin")
BASE = 10_000.0  # of RoPE: published configs name none, and the target's own is not taken over


@dataclass(frozen=True)
class HeadConfig:
    """The sizes of a draft head.

    Attributes:
        hidden_size, intermediate_size, num_attention_heads, num_key_value_heads, head_dim, rms_norm_eps, hidden_act:
            of its layer, as in a Llama.
        vocab_size: tokens of the target.
        draft_vocab_size: tokens that the head can draft.
        target_hidden_size: width of the target's hidden states.
        rope_theta (`float`): base of the rotation.
        rope_factor (`float`): positions are divided by it.
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    hidden_act: str
    vocab_size: int
    draft_vocab_size: int
    target_hidden_size: int
    rope_theta: float = BASE
    rope_factor: float = 1.0

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], source: str = "config.json") -> "HeadConfig":
        """Reads the content of a `config.json`.

        Args:
            source: what a message calls the checkpoint.

        Raises:
            ValueError: for a missing size, more than one layer, or a rotation that is neither plain nor linear.
        """
        needed = (
            "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "draft_vocab_size",
        )  # fmt: skip
        missing = [name for name in needed if content.get(name) is None]
        if missing:
            raise ValueError(
                f"The config of a draft head must name {', '.join(needed)} (got {source!r} without "
                f"{', '.join(missing)}). Take a head of EAGLE-3; those of EAGLE-1 and -2 have another form."
            )
        layers = content.get("num_hidden_layers", 1)
        if layers != 1:
            raise ValueError(
                f"`num_hidden_layers` of a draft head must be 1 (got {layers!r} in {source!r}). Take a head of "
                "EAGLE-3."
            )
        rope = content.get("rope_parameters") or {}  # where transformers 5 keeps what were two keys
        theta = content.get("rope_theta") or rope.get("rope_theta") or BASE
        heads, width = content["num_attention_heads"], content["hidden_size"]
        return cls(
            hidden_size=width,
            intermediate_size=content["intermediate_size"],
            num_attention_heads=heads,
            num_key_value_heads=content.get("num_key_value_heads") or heads,
            head_dim=content.get("head_dim") or width // heads,
            rms_norm_eps=content.get("rms_norm_eps", 1e-6),
            hidden_act=content.get("hidden_act", "silu"),
            vocab_size=content["vocab_size"],
            draft_vocab_size=content["draft_vocab_size"],
            target_hidden_size=content.get("target_hidden_size") or width,
            rope_theta=float(theta),
            rope_factor=_rope_factor(content.get("rope_scaling") or rope, source),
        )


def _rope_factor(scaling: Mapping[str, Any], source: str) -> float:
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return 1.0
    if kind != "linear":
        raise ValueError(
            f"The rotation of a draft head must be plain or linear (got {kind!r} in {source!r}): of others the keys "
            "that are kept would turn with the length. Take a head that was trained without scaling."
        )
    return float(scaling["factor"])


def read_checkpoint(name: str, revision: str | None = None) -> tuple[HeadConfig, dict[str, torch.Tensor]]:
    """Config and tensors of a draft head.

    Args:
        name (`str`): a folder, or an id on the Hub.
        revision (`str`, *optional*): branch, tag or commit on the Hub.

    Raises:
        OSError: where there is no such folder, or a file of it is missing.
        ValueError: for a revision of a folder, a config that is not one of a head, or a file that holds more than
            tensors.
    """
    # 1. The folder
    folder = Path(name).expanduser()
    if folder.is_dir() and revision is not None:
        raise ValueError(f"`revision` has no effect on a folder (got {revision!r} with {name!r}). Leave it out.")
    if not folder.is_dir():
        folder = _fetched(name, revision)

    # 2. The config
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise FileNotFoundError(
            f"A draft head must have a config.json (got {str(folder)!r} without). Pass the folder that holds it."
        )
    config = HeadConfig.from_dict(json.loads(config_file.read_text(encoding="utf-8")), str(folder))

    # 3. The tensors; of two files the one that cannot hold code
    found = [folder / file for file in WEIGHTS if (folder / file).is_file()]
    if not found:
        raise FileNotFoundError(
            f"A draft head must have its weights in {' or '.join(WEIGHTS)} (got {str(folder)!r} without). Fetch them."
        )
    return config, _tensors(found[0])


def _fetched(name: str, revision: str | None) -> Path:
    """The folder of a head on the Hub, in the cache of this machine."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["config.json", *WEIGHTS]))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"`name` must be the folder of a draft head or its id on the Hub (got {name!r}, which is no folder here, "
            "and the Hub does not give it). Correct the name, or the connection."
        ) from error


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    """What a file of weights holds; nothing in it is run."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers have errors of their own for each way in which a file is damaged
        raise ValueError(
            f"The weights of a draft head must be whole, and tensors alone (got {str(file)!r}, which is damaged or "
            "holds other objects). Fetch it again, or convert it to model.safetensors where you trust it."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(
            f"The weights of a draft head must be a table of tensors (got another content in {str(file)!r}). Save "
            "`head.state_dict()`."
        )
    return content


__all__ = ["BASE", "WEIGHTS", "HeadConfig", "read_checkpoint"]
