"""What acts on a model from outside of its modules, as some adapters of PEFT do, and how a forward gets through it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


# Kinds of PEFT that put keys in front of a text. The other kinds of learnt prompts put embeddings there, so that the
# wrapper's logits begin with theirs, and drop `position_ids`.
_PREFIXES = ("PREFIX_TUNING", "CARTRIDGE")


def learnt_prompt(model: Any) -> Any | None:
    """The PEFT config of the prompt that a wrapper puts in front of every text; `None` for all other models."""
    config = getattr(model, "active_peft_config", None)
    if config is None or not config.is_prompt_learning or model._adapters_disabled:
        return None
    return config


def lengthened_by(model: Any) -> int:
    """Rows of logits that a wrapper's forward returns before those of the text."""
    config = learnt_prompt(model)
    return 0 if config is None or config.peft_type in _PREFIXES else int(config.num_virtual_tokens)


def virtual_tokens(model: Any) -> int:
    """Positions that a learnt prompt takes before the text, as embeddings or as keys."""
    config = learnt_prompt(model)
    return 0 if config is None else int(config.num_virtual_tokens)


def moves_padded(model: Any) -> bool:
    """Whether padding moves a text behind a learnt prompt: PEFT drops positions, and the model counts padding too."""
    return lengthened_by(model) > 0 and not getattr(base_of(model), "counts_positions", False)


def base_of(model: Any) -> Any:
    """The model that PEFT wraps; any other as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def wrapper_of(model: Any) -> Any | None:
    """PEFT's wrapper with a learnt prompt whose `generate` is running, which is known by the hook that it leaves.

    Raises:
        ValueError: for a hook of anyone else: the decoder would never call it.
    """
    hook = vars(model).get("prepare_inputs_for_generation")
    owner = getattr(hook, "__self__", None)
    if hook is None or owner is model:
        return None
    config = learnt_prompt(owner)
    if config is None:
        raise ValueError(
            "`prepare_inputs_for_generation` must be left as it is: decoding over a canvas never calls it (got "
            f"{getattr(hook, '__qualname__', type(hook).__name__)} set on this {type(model).__name__}). Delete it, "
            "and override `forward` or `canvas_logits` in a class of yours."
        )
    if config.task_type != "CAUSAL_LM":
        raise unfit_task(config)
    return owner


def unfit_task(config: Any) -> ValueError:
    """For a learnt prompt that PEFT's `generate` leaves out, or puts elsewhere than its forward does."""
    kind, task = _kind(config), _word(config.task_type)
    return ValueError(
        f'`task_type` of the {kind} adapter must be "CAUSAL_LM" for `generate` (got {task}): with any other '
        "PEFT does not decode as it forwards. Set it in the adapter's config."
    )


@contextmanager
def hooks_of_a_call(model: Any) -> Iterator[None]:
    """Takes PEFT's hooks of a call off where it raises; PEFT leaves them on, and later calls would decode by them."""
    try:
        yield
    except BaseException:
        for module in model.modules():
            for key, hook in list(module._forward_pre_hooks.items()):
                if _of_a_call(hook):
                    del module._forward_pre_hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
        raise


def marked_logits(model: Any, inputs: dict[str, Any], wanted: torch.Tensor) -> torch.Tensor:
    """Logits `(n, V)` of the wanted slots `(B, Q)` of a model or of PEFT's wrapper around one."""
    base, before = base_of(model), lengthened_by(model)
    if before:  # counted from the mask by the forward: see `check_wrapping`
        inputs = {name: value for name, value in inputs.items() if name != "position_ids"}
    if base.supports_position_mask and not _weighs_positions(model):
        marked = {"logits_to_keep": torch.nn.functional.pad(wanted, (before, 0)) if before else wanted}
        inputs = inputs | base.accepted(marked)
    logits = model(**inputs).logits
    # A forward that was replaced on the instance may not know `logits_to_keep`.
    return logits if logits.ndim == 2 else logits[:, -wanted.shape[1] :][wanted]


def _weighs_positions(model: Any) -> bool:
    """Whether X-LoRA gives each position adapters of its own, for which every layer has to compute all of them."""
    config = getattr(model, "active_peft_config", None)
    running = any("scalings" in _of_a_call(hook) for hook in model._forward_pre_hooks.values())
    return running or (config is not None and config.peft_type == "XLORA")


def check_wrapping(model: Any, canvas: Any, rules: Any, compiled: bool) -> None:
    """Refuses what would not get through a wrapper as a forward of it does.

    Args:
        model: a `CanvasContract` (of which this file knows nothing more, for it is built upon this one).
        canvas: a `Canvas`.
        rules: a `Rules`.
        compiled (`bool`): whether forwards are compiled.

    Raises:
        ValueError: with a learnt prompt for a cache, compiled forwards, a shadow block, a text that does not fit
            behind it or padding that would move the text; for adapters that belong to rows where the batch changes;
            for an activated LoRA.
    """
    wrapper = wrapper_of(model)
    if wrapper is not None:
        _check_learnt_prompt(model, wrapper, canvas, rules, compiled)
    found = _hooks(model)
    if "alora_offsets" in found:
        raise ValueError(
            "`alora_invocation_tokens` has no meaning in `generate`: PEFT counts from the end of the prompt what an "
            "activated LoRA is for, and a canvas goes on behind it. Train a plain LoRA."
        )
    changes = canvas.batch > 1 or bool(rules.cfg_scale) or rules.canvases > 1
    for name in sorted(found & {"adapter_names", "task_ids"}):
        if changes:
            raise ValueError(
                f"`{name}` belongs to the rows of a batch, and decoding changes the batch: rows leave it, guidance "
                f"and drafts add some (got {canvas.batch} rows). Generate the prompts of one adapter together after "
                "`set_adapter`, or one prompt a call."
            )


def refuse_homeless(names: Any, source: str, model: Any) -> None:
    """Refuses an adapter that has tensors for modules which the model has not, or to which it adds nothing.

    Raises:
        ValueError: naming the first ones.
    """
    homeless = sorted(names)
    if homeless:
        raise ValueError(
            f"Every tensor of an adapter must belong to a module that its config adapts (got {source!r} with "
            f"{len(homeless)} for none in {type(model).__name__}: {', '.join(homeless[:3])}). Name their modules in "
            "`target_modules` or `modules_to_save` of adapter_config.json, or load the model that it was trained on."
        )


def _check_learnt_prompt(model: Any, wrapper: Any, canvas: Any, rules: Any, compiled: bool) -> None:
    kind, size = _kind(learnt_prompt(wrapper)), virtual_tokens(wrapper)
    if rules.kv_cache != "none":
        raise ValueError(
            f'`kv_cache` must be "none" with a {kind} adapter (got "{rules.kv_cache}"): the cache has no slots for '
            f'its {size} virtual tokens. Pass `kv_cache="none"`.'
        )
    if compiled:
        raise ValueError(
            f"`compile_config` does not go together with a {kind} adapter, which changes the forward's inputs. Leave "
            "it unset."
        )
    if rules.shadow_block:
        raise ValueError(
            f"A shadow block does not go together with a {kind} adapter, whose virtual tokens its mask does not know. "
            'Choose another `decoding_method` than "wino".'
        )
    longest = model.max_positions
    if longest is not None and canvas.length + size > longest:
        raise ValueError(
            f"Prompt and `max_new_tokens` must fit into the model's {longest} positions behind the {size} virtual "
            f"tokens of the {kind} adapter (got {canvas.length}). Shorten one of them."
        )
    tasks = canvas.model_kwargs.get("task_ids")
    if tasks is not None and (tasks != tasks[0]).any():
        raise ValueError(
            f"`task_ids` must be the same for all rows of a batch, which rows leave while it is decoded (got "
            f"{tasks.tolist()}). Generate the prompts of one task together."
        )
    if moves_padded(wrapper) and canvas.mask is not None and not canvas.mask.all():
        raise ValueError(
            f"`attention_mask` must not hold zeros with a {kind} adapter around {type(model).__name__}: PEFT passes "
            "no `position_ids`, so padding would move the text. Generate prompts of one length together."
        )


def _hooks(model: Any) -> set[str]:
    """What PEFT's hooks hand to the layers of a model in this call."""
    found: set[str] = set()
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            found |= _of_a_call(hook)
    return found


def _of_a_call(hook: Any) -> set[str]:
    """The arguments that a hook of PEFT adds to a forward; none for all other hooks."""
    name = getattr(hook, "__qualname__", "")
    if name.startswith("XLoraModel."):
        return {"scalings"}
    if name.startswith("PolyModel."):
        return {"task_ids"}
    return {"adapter_names", "alora_offsets"} & getattr(hook, "keywords", {}).keys()


def _kind(config: Any) -> str:
    return _word(config.peft_type)


def _word(value: Any) -> str:
    return str(getattr(value, "value", value))


__all__ = [
    "base_of",
    "check_wrapping",
    "hooks_of_a_call",
    "learnt_prompt",
    "lengthened_by",
    "marked_logits",
    "moves_padded",
    "refuse_homeless",
    "unfit_task",
    "virtual_tokens",
    "wrapper_of",
]
