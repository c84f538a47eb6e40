"""How a server is made: what a command line says of it, to be carried out here or in a replica elsewhere."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI

from ..hub.loading import load
from .admission import with_settings
from .app import create_app


@dataclass(frozen=True)
class Recipe:
    """A checkpoint, and how it is served.

    Args:
        model (`str`): a folder, an id on the Hub, or the name of an embedded checkpoint.
        name (`str`): what clients call it.
        device, dtype (`str`): where and in what it is loaded, see [`load`].
        revision (`str`, *optional*): of a model on the Hub.
        settings (`Mapping`): of `generate`, in place of the checkpoint's own.
        limits (`Mapping`): further arguments of [`create_app`].
        api_key (`str`, *optional*), allow_origins: see [`create_app`].
    """

    model: str
    name: str
    device: str = "auto"
    dtype: str = "auto"
    revision: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    limits: Mapping[str, Any] = field(default_factory=dict)
    api_key: str | None = field(default=None, repr=False)
    allow_origins: Sequence[str] = ()

    def app(self) -> FastAPI:
        """The server, its checkpoint loaded.

        Raises:
            ValueError, TypeError, OSError: what [`load`], `generate` and [`create_app`] say.
        """
        model, tokenizer = load(self.model, device=self.device, dtype=self.dtype, revision=self.revision)
        if self.settings:
            model.generation_config = with_settings(model, dict(self.settings))
        return create_app(
            model, tokenizer, self.name, api_key=self.api_key, allow_origins=self.allow_origins, **self.limits
        )
