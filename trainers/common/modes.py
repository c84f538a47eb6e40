"""Forwards of a model in training that teach it nothing: no gradient, no dropout, and all as before afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def looked_at(model: torch.nn.Module) -> Iterator[None]:
    """Within it the model is in evaluation mode and keeps no gradients; each module's own mode comes back after it."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in before:
            module.training = training
