"""Forwards counted by hooks: those of the target, and those of whatever drafts for it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch.nn.modules.module import register_module_forward_hook

from ..models.text_config import text_config


@dataclass
class Forwards:
    """Positions of each forward, in order: of the `target`, and of those that made `drafts`."""

    target: list[int] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)


@contextmanager
def counted(model: Any, assistant: Any = None, draft_class: type | None = None) -> Iterator[Forwards]:
    """Counts inside of it, where the drafter is a module of its own.

    Args:
        model: the target.
        assistant: the model or draft head that drafts, if one does.
        draft_class: class of the module that drafts, where `generate` makes it itself.
    """
    found = Forwards()

    def target(module, args, kwargs, output):
        found.target.append(_width(args, kwargs))

    def draft(module, args, kwargs, output):
        if draft_class is None or isinstance(module, draft_class):
            found.drafts.append(_width(args, kwargs))

    with ExitStack() as hooks:
        hooks.enter_context(model.register_forward_hook(target, with_kwargs=True))
        if assistant is not None:
            hooks.enter_context(assistant.register_forward_hook(draft, with_kwargs=True))
        if draft_class is not None:
            hooks.enter_context(register_module_forward_hook(draft, with_kwargs=True))
        yield found


@contextmanager
def counted_by_last_layer(model: Any, exit_after: int) -> Iterator[Forwards]:
    """Counts inside of it, where a model drafts with its own first layers: what reaches the last one is the target.

    transformers sets `config.num_hidden_layers` while the model drafts, and does not set it back after an error; it is
    what it was when this ends.

    Args:
        model: the target.
        exit_after: layers that draft.

    Raises:
        ValueError: where a further layer runs while the model drafts, so that the setting has no effect.
    """
    found, base = Forwards(), getattr(model, model.base_model_prefix)
    layers = model.get_decoder().layers
    full = base.config.num_hidden_layers

    def any_depth(module, args, kwargs, output):
        if base.config.num_hidden_layers < full:
            found.drafts.append(_width(args, kwargs))

    def behind_the_exit(module, args):
        if base.config.num_hidden_layers < full:
            raise ValueError(
                "`assistant_early_exit` must be followed by the model, which runs all of its layers whatever "
                f"`num_hidden_layers` says (got {type(model).__name__}). Choose another method."
            )

    def full_depth(module, args, kwargs, output):
        found.target.append(_width(args, kwargs))

    try:
        with ExitStack() as hooks:
            hooks.enter_context(model.register_forward_hook(any_depth, with_kwargs=True))
            hooks.enter_context(layers[exit_after].register_forward_pre_hook(behind_the_exit))
            hooks.enter_context(layers[-1].register_forward_hook(full_depth, with_kwargs=True))
            yield found
    finally:
        base.config.num_hidden_layers = full


def _width(args: tuple, kwargs: dict[str, Any]) -> int:
    """Positions of a row in a forward, whichever way its input is given."""
    given = [kwargs.get(name) for name in ("input_ids", "inputs_embeds", "hidden_states")]
    found = next(value for value in [*given, *args] if value is not None)
    return found.shape[-2 if found.is_floating_point() else -1]  # states have a width, tokens have none


def num_layers(model: Any) -> int | None:
    """Decoder layers of a model whose decoder lists them as `layers`, else `None`."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    if getattr(decoder, "layers", None) is None or not hasattr(model, model.base_model_prefix):
        return None
    return text_config(model.config).num_hidden_layers
