"""The arguments of a resumed run: those that are given now hold, and each that differs from the checkpoint's is named.

`Trainer` restores an optimizer with its settings, so that a learning rate, a weight decay or a schedule of the new
arguments would be ignored. Here the states of the optimizer are the checkpoint's, and its settings the arguments'.
What cannot be changed within a run, such as the kind of optimizer, is refused.

A checkpoint keeps the arguments that its run was begun with in `run_arguments.json`.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from .argument_checks import ADAMW
from .argument_table import COURSE


logger = logging.getLogger(__name__)

ARGUMENTS = "run_arguments.json"

_OPTIMIZER = ("optim", "optim_args", "optim_target_modules", "use_muon")
_SCHEDULE = ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
# Their rate depends on the evaluations so far, and is part of the checkpoint's state.
_STATEFUL_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
_OF_DEEPSPEED = (*_SCHEDULE, "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
# The place in the data is counted in steps, and its order follows from these.
_ORDER = frozenset(
    [
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "world_size",
        "seed",
        "data_seed",
        "accelerator_config",
        "dataloader_drop_last",
        "train_sampling_strategy",
    ]
)
_SETTINGS = ("weight_decay", "betas", "eps", "momentum")


def course_of(args: Any) -> dict[str, Any]:
    """The arguments that change what a run learns, as JSON has them."""
    values = args.to_dict()
    names = [*(name for name in values if name in COURSE), *(n for n in args.own_names() if n not in args._FREE)]
    chosen = {name: values[name] for name in names} | {"world_size": args.world_size}
    return json.loads(json.dumps(chosen, default=lambda value: type(value).__name__))


def write_arguments(folder: Path, args: Any) -> None:
    """Keeps the arguments of a run in its checkpoint."""
    (folder / ARGUMENTS).write_text(json.dumps(course_of(args), indent=1) + "\n", encoding="utf-8")


def compare_arguments(args: Any, checkpoint: str, *, deepspeed: bool = False) -> None:
    """Says which arguments differ from a checkpoint's; one of plain `Trainer` or an earlier version names none.

    Args:
        args: Of the resumed run.
        checkpoint (`str`): Its folder.
        deepspeed (`bool`, defaults to `False`): Whether DeepSpeed restores optimizer and schedule.

    Raises:
        ValueError: For one that cannot change within a run.
    """
    path = Path(checkpoint) / ARGUMENTS
    if not path.is_file():
        return
    before, now = json.loads(path.read_text(encoding="utf-8")), course_of(args)
    changed = [name for name in now if name in before and now[name] != before[name]]
    if min(before["max_steps"], now["max_steps"]) > 0:
        changed = [name for name in changed if name != "num_train_epochs"]  # not read
    for name in changed:
        if reason := _bound(name, before, now, deepspeed):
            raise ValueError(
                f"`{name}` must be {before[name]!r}, as in `{checkpoint}` (got {now[name]!r}): {reason}. Set it back, "
                "or begin a new run from the checkpoint's model."
            )
    for name in changed:
        logger.warning(
            "`%s` is %r and was %r when %s was saved: the run goes on with %r%s. Set it to %r to go on as begun.",
            name,
            now[name],
            before[name],
            checkpoint,
            now[name],
            ", where samples of the present epoch may be seen twice or not at all" if name in _ORDER else "",
            before[name],
        )


def _bound(name: str, before: dict[str, Any], now: dict[str, Any], deepspeed: bool) -> str | None:
    """Why an argument cannot change, or `None` if it can."""
    if name == "optim" and {before[name], now[name]} <= set(ADAMW):
        return None
    if name in _OPTIMIZER:
        return "the state of one optimizer means nothing to another"
    kinds = {run["lr_scheduler_type"] for run in (before, now)}
    if name in _SCHEDULE and kinds.intersection(_STATEFUL_SCHEDULES):
        return "the learning rate depends on the evaluations so far"
    if deepspeed and name in _OF_DEEPSPEED:
        return "DeepSpeed restores optimizer and schedule as they were"
    return None


def settings_of(optimizer: Any) -> list[dict[str, Any]]:
    """The settings of each group of an optimizer that a schedule was made for."""
    names = ("initial_lr", *_SETTINGS)
    return [{name: group[name] for name in names if name in group} for group in optimizer.param_groups]


def set_again(optimizer: Any, schedule: Any, settings: list[dict[str, Any]], *, own_schedule: bool) -> None:
    """Gives settings back to an optimizer whose states, and whose schedule's, were loaded.

    Where they are the checkpoint's, nothing changes, to the bit.

    Args:
        optimizer, schedule: What the run goes on with.
        settings (`list[dict]`): Of [`settings_of`], before the states were loaded.
        own_schedule (`bool`): Whether the schedule was made by the user; one that is no function of the step alone
            may change any setting, and is left as it was restored.
    """
    by_step = isinstance(schedule, LambdaLR)
    if own_schedule and not by_step:
        return
    for group, asked in zip(optimizer.param_groups, settings, strict=True):
        group.update({name: value for name, value in asked.items() if by_step or name != "initial_lr"})
    if by_step:
        schedule.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        rates = [
            base * factor(schedule.last_epoch)
            for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        schedule._last_lr = rates
