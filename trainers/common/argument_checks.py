"""Checks of training arguments as soon as they are made: kinds and ranges of values, and what would have no effect."""

from __future__ import annotations

import dataclasses
import json
import math
import types
from collections.abc import Mapping
from functools import cache
from numbers import Integral, Real
from typing import Any, Union, get_args, get_origin, get_type_hints

import torch
from transformers import get_scheduler

from .argument_table import REFUSED, REFUSED_PARAMETERS
from .shards import under_deepspeed


ADAMW = ("adamw_torch", "adamw_torch_fused")  # of the same states and steps
# Of which transformers reads neither of these; the optimizers of others read `optim_args` at least.
_WITHOUT_OPTIONS = (*ADAMW, "adafactor")
_UNBOUNDED = math.inf
_RANGES = {  # of transformers' arguments, which it leaves to whatever fails later
    "per_device_train_batch_size": (1, _UNBOUNDED),
    "per_device_eval_batch_size": (1, _UNBOUNDED),
    "gradient_accumulation_steps": (1, _UNBOUNDED),
    "num_train_epochs": (0, _UNBOUNDED),
    "learning_rate": (0, _UNBOUNDED),
    "weight_decay": (0, _UNBOUNDED),
    "max_grad_norm": (0, _UNBOUNDED),
    "adam_epsilon": (0, _UNBOUNDED),
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "logging_steps": (0, _UNBOUNDED),
    "eval_steps": (0, _UNBOUNDED),
    "eval_delay": (0, _UNBOUNDED),
    "dataloader_num_workers": (0, _UNBOUNDED),
    "seed": (0, 2**32 - 1),
    "data_seed": (0, 2**32 - 1),
}
_MAY_BE_INFINITE = ("max_grad_norm",)  # measures gradients and clips none
_KINDS = {int: "an integer", float: "a finite number", bool: "True or False", str: "text"}


def check_kinds(args: Any, inherited: frozenset[str]) -> None:
    """Refuses values of another kind than their field's annotation says.

    Args:
        args: A dataclass.
        inherited: Fields of transformers, of which numbers and switches alone are checked: the rest it converts.

    Raises:
        TypeError: For a value of another kind, naming the field.
        ValueError: For text that is no JSON where a mapping may be given as text.
    """
    mappings = type(args)._VALID_DICT_FIELDS
    annotations = _annotations(type(args))
    for field in dataclasses.fields(args):
        value, kinds = getattr(args, field.name), _kinds(annotations[field.name])
        if field.name in mappings:
            _check_mapping(field.name, value, may_be_path=str in kinds and field.name in inherited)
            continue
        if value is None and type(None) in kinds:
            continue
        kinds = [kind for kind in kinds if kind in _KINDS]
        if not kinds or (field.name in inherited and not {int, float, bool}.issuperset(kinds)):
            continue
        if not any(_is(kind, value, field.name in _MAY_BE_INFINITE) for kind in kinds):
            rule = " or ".join(_KINDS[kind] for kind in kinds)
            raise TypeError(f"`{field.name}` must be {rule} (got {value!r}). Set it in `{type(args).__name__}`.")


@cache
def _annotations(config_class: type) -> dict[str, Any]:
    """Not the fields' types, which `HfArgumentParser` overwrites with what it asks a command line for."""
    return get_type_hints(config_class)


def _kinds(annotation: Any) -> list[Any]:
    """The types that an annotation allows, those of lists and mappings without their elements."""
    if get_origin(annotation) in (Union, types.UnionType):
        return [get_origin(kind) or kind for kind in get_args(annotation)]
    return [get_origin(annotation) or annotation]


def _is(kind: type, value: Any, may_be_infinite: bool) -> bool:
    if kind is bool:
        return isinstance(value, Integral) and value in (0, 1)
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if kind is float:
        number = isinstance(value, Real) and not isinstance(value, bool)
        return number and (math.isfinite(value) or (may_be_infinite and value == math.inf))
    return isinstance(value, kind)


def _check_mapping(name: str, value: Any, may_be_path: bool) -> None:
    if isinstance(value, str) and value.startswith("{"):
        try:
            json.loads(value)
        except ValueError as error:
            example = '{"key": 1}'
            raise ValueError(
                f"`{name}` must be JSON (got {value[:80]!r}: {error}). Write for example {example}."
            ) from error
    elif isinstance(value, str) and not may_be_path:
        raise TypeError(f"`{name}` must map names to values (got {value[:80]!r}). Pass a dictionary, or JSON.")
    elif isinstance(value, list | tuple | Real) and not (isinstance(value, bool) and may_be_path):
        raise TypeError(f"`{name}` must map names to values (got {value!r}). Pass a dictionary, or JSON.")


def check_ranges(args: Any, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Refuses numbers outside `{field: (least, most)}`; what is unset is in range.

    Raises:
        ValueError: Naming the field.
    """
    for name, (low, high) in ranges.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            rule = f"at least {low}" if high == _UNBOUNDED else f"between {low} and {high}"
            raise ValueError(f"`{name}` must be {rule} (got {value}). Set it in `{type(args).__name__}`.")


def check_inherited(args: Any) -> None:
    """Ranges of transformers' arguments, and those that would be taken and have no effect.

    Raises:
        ValueError: Naming the field.
    """
    check_ranges(args, _RANGES)
    defaults = {field.name: field for field in dataclasses.fields(args) if field.name in REFUSED}
    for name, field in defaults.items():
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if getattr(args, name) != default:
            raise ValueError(
                f"`{name}` has no effect here and must be left at {default!r} (got {getattr(args, name)!r}): "
                f"{REFUSED[name]}."
            )
    _check_optimizer_options(args)
    _check_schedule(args)
    if args.use_cpu and (args.deepspeed or under_deepspeed()):
        raise ValueError(
            "`use_cpu` must be unset with DeepSpeed (got True): accelerate leaves DeepSpeed out then and trains whole "
            "copies. Without a GPU set `ddp_backend='gloo'` and DS_ACCELERATOR=cpu in its place."
        )
    if args.label_names not in (None, ["labels"]):
        raise ValueError(
            f"`label_names` must be ['labels'] or unset (got {args.label_names!r}): batches have no other. Unset it."
        )
    split = {name: getattr(args.parallelism_config, name, 1) for name in ("cp_size", "sp_size")}
    if any(size not in (None, 1) for size in split.values()):
        raise ValueError(
            f"`parallelism_config` must not split texts along their positions (got {split}): the answer is the last "
            "part of a canvas. Use data or tensor parallelism."
        )


def _check_optimizer_options(args: Any) -> None:
    optim = str(getattr(args.optim, "value", args.optim))
    if getattr(args, "use_muon", False) or optim not in _WITHOUT_OPTIONS:
        return
    for name in ("optim_args", "optim_target_modules"):
        if getattr(args, name) is not None:
            raise ValueError(
                f"`{name}` is not read with `optim={optim!r}` (got {getattr(args, name)!r}). Set `learning_rate`, "
                "`weight_decay` and `adam_*`, or choose an optimizer that reads it."
            )


def _check_schedule(args: Any) -> None:
    """Makes a schedule of a weight that nobody has: transformers makes the run's own when all data are prepared."""
    if not args.lr_scheduler_kwargs:
        return
    optimizer = torch.optim.SGD([torch.zeros(1, device="cpu", requires_grad=True)], lr=args.learning_rate)
    options = dict(args.lr_scheduler_kwargs)
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, 1, 10, scheduler_specific_kwargs=options)
    except (TypeError, ValueError) as error:
        kind = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
        raise ValueError(
            f"`lr_scheduler_kwargs` must be options of the schedule {kind!r} (got {options}: {error}). Correct them, "
            "or choose another `lr_scheduler_type`."
        ) from error


def check_parameters(args: Any, config_class: type, parameters: dict[str, Any]) -> None:
    """Checks what a trainer is given beside its model and data.

    Args:
        args: Its training arguments.
        config_class: Their class.
        parameters: What is passed on to `Trainer`.

    Raises:
        TypeError: For arguments of another class.
        ValueError: For a parameter that would have no effect.
    """
    if not isinstance(args, config_class):
        raise TypeError(
            f"`args` must be a `{config_class.__name__}` (got {type(args).__name__}). It takes all of "
            "`TrainingArguments`, too."
        )
    for name, reason in REFUSED_PARAMETERS.items():
        if parameters.get(name) is not None:
            raise ValueError(f"`{name}` has no effect here and must be None (got {parameters[name]!r}): {reason}.")
    if getattr(args, "use_muon", False):
        _check_muon(parameters)


def _check_muon(parameters: dict[str, Any]) -> None:
    optimizer = (parameters.get("optimizers") or (None,))[0]
    for name, value in (
        ("optimizers", optimizer),
        ("optimizer_cls_and_kwargs", parameters.get("optimizer_cls_and_kwargs")),
    ):
        if value is not None:
            raise ValueError(
                f"`use_muon` must be False where `{name}` gives an optimizer (got True and {value!r}). Unset one of "
                "them."
            )


def check_muon_arguments(args: Any) -> None:
    """Refuses another optimizer beside Muon, and Muon's settings without it.

    Raises:
        ValueError: Naming the argument.
    """
    if not args.use_muon:
        for field in dataclasses.fields(args):
            if field.name.startswith("muon_") and getattr(args, field.name) != field.default:
                raise ValueError(
                    f"`{field.name}` needs `use_muon=True` (got {getattr(args, field.name)} and False). Set that, or "
                    "leave it unset."
                )
        return
    if args.optim not in ADAMW:
        raise ValueError(
            f"`optim` must be {' or '.join(ADAMW)} with `use_muon`, which trains with Muon and AdamW (got "
            f"{str(getattr(args.optim, 'value', args.optim))!r}). Unset one of them."
        )
    for name in ("optim_args", "optim_target_modules"):
        if getattr(args, name) is not None:
            raise ValueError(f"`{name}` is not read with `use_muon` (got {getattr(args, name)!r}). Unset one of them.")
