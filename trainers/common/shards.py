"""Weights that DeepSpeed divides over processes: up to which stage, and all of them in one place."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import torch


def under_deepspeed() -> bool:
    """Whether `accelerate launch` has been told to train with DeepSpeed; it tells its processes by the environment."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"


def zero_stage(accelerator: Any) -> int:
    """DeepSpeed's stage of dividing, up to 3, where the weights are divided themselves; 0 without DeepSpeed."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return 0 if plugin is None else plugin.zero_stage


@contextmanager
def whole_weights(model: torch.nn.Module) -> Iterator[None]:
    """Inside, each process has all weights of a model, and outside again what process 0 has made of them."""
    weights = [weight for weight in model.parameters() if hasattr(weight, "ds_id")]
    if not weights:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(weights, modifier_rank=0):
        yield


@contextmanager
def loaded_whole() -> Iterator[None]:
    """Inside, `from_pretrained` gives each process all weights, also where it would divide them for ZeRO-3.

    A model that nobody trains has no engine, which puts its parts together for a forward.
    """
    from transformers.integrations import deepspeed

    known = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = known
