"""The metric that a run is steered by, checked before it starts: the Trainer looks for it at the first evaluation."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any


_SPEED = frozenset({"runtime", "samples_per_second", "steps_per_second"})
_BY_METRIC = ("reduce_lr_on_plateau", "greedy")


def check_best_metric(args: Any, eval_dataset: Any, names: Collection[str]) -> None:
    """Refuses a `metric_for_best_model` that no evaluation reports.

    Args:
        args: Training arguments.
        eval_dataset: What is evaluated; each of several sets has metrics of its own.
        names: Metrics of an evaluation beside the loss.

    Raises:
        ValueError: Naming the metrics that there are.
    """
    steered = args.load_best_model_at_end or args.save_strategy == "best" or args.lr_scheduler_type in _BY_METRIC
    if not steered or args.metric_for_best_model is None or eval_dataset is None:
        return
    sets = [f"eval_{name}_" for name in eval_dataset] if isinstance(eval_dataset, dict) else ["eval_"]
    known = {prefix + name for prefix in sets for name in {"loss", *names, *_SPEED}}
    wanted = args.metric_for_best_model.removeprefix("eval_")
    if f"eval_{wanted}" not in known:
        shown = sorted(prefix + name for prefix in sets for name in {"loss", *names})
        raise ValueError(
            f"`metric_for_best_model` must be a metric of an evaluation (got {args.metric_for_best_model!r}). Choose "
            f"one of {shown}."
        )
