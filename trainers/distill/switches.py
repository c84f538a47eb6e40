"""Which switches of distillation have an effect beside which others; one that would have none is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any


Holds = Callable[[Any], bool]  # of a `PseudoTrajectoryDistillConfig`, which imports this file

_ROLLOUT: tuple[str, Holds] = ("`objective='rollout'`", lambda args: args.objective == "rollout")
_WINDOWS: tuple[str, Holds] = (
    "steps that draw windows (another `objective`, or `rollout_every` above 1)",
    lambda args: args.draws_windows,
)
_SOFT: tuple[str, Holds] = (
    "`target` or `far_target` of 'teacher' or 'self'",
    lambda args: bool(args.soft_targets),
)
_ORDER: tuple[str, Holds] = ("`objective='trajectory'`", lambda args: args.objective == "trajectory")
# Switch -> what it needs, and whether that is so.
_NEEDS: dict[str, tuple[str, Holds]] = {
    "rollout_threshold": _ROLLOUT,
    "rollout_block_length": _ROLLOUT,
    "rollout_max_forwards": _ROLLOUT,
    "rollout_states": _ROLLOUT,
    "rollout_every": _ROLLOUT,
    "noise_curriculum": _WINDOWS,
    "teacher_reveal": _SOFT,
    "teacher_model_name_or_path": (
        "`target` or `far_target` of 'teacher'",
        lambda args: "teacher" in args.soft_targets,
    ),
    "far_target": _ORDER,
    "distance_weight": _ORDER,
    "near_steps": ("`far_target`", lambda args: args.far_target is not None),
    "entropy_below": ("`entropy_weight` above 0", lambda args: args.entropy_weight > 0),
    "wrong_confidence": ("`wrong_entropy_weight` above 0", lambda args: args.wrong_entropy_weight > 0),
    "rank_margin": ("`rank_weight` above 0", lambda args: args.rank_weight > 0),
    "state_region": (
        "`blockwise` windows with `objective='trajectory'` or `'random'` (a rollout has open blocks of its own)",
        lambda args: args.draws_windows and args.objective != "certainty" and args.blockwise,
    ),
}


def check_switches(args: Any) -> None:
    """Refuse a switch that is set and read by nothing.

    Raises:
        ValueError: Naming it, and what it needs.
    """
    for field in fields(args):
        if field.name not in _NEEDS:
            continue
        needed, holds = _NEEDS[field.name]
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if getattr(args, field.name) != default and not holds(args):
            raise ValueError(
                f"`{field.name}` needs {needed} (got {getattr(args, field.name)!r}), and has no effect otherwise. "
                f"Set that, or leave it at {default!r}."
            )
    _check_targets(args)


def _check_targets(args: Any) -> None:
    if args.far_target is not None and args.near_steps is None:
        raise ValueError(
            f"`near_steps` must say where `far_target` begins (got None and {args.far_target!r}). Set it, for example "
            "to 8."
        )
    if args.far_target == args.target:
        raise ValueError(
            f"`far_target` must be another than `target` (got {args.far_target!r} for both). Unset it, or change one."
        )
    if len(args.soft_targets) > 1:
        raise ValueError(
            f"`target` and `far_target` must ask one model at most (got {args.target!r} and {args.far_target!r}). Set "
            "one of them to 'token'."
        )
    if "self" in args.soft_targets and args.teacher_reveal is None:
        raise ValueError(
            "`teacher_reveal` must be set where the student is its own target (got None): at the same state there is "
            "nothing to learn from itself. Set it, for example to 0.5."
        )
    if args.teacher_reveal is not None and not 0 < args.teacher_reveal < 1:
        raise ValueError(
            f"`teacher_reveal` must be between 0 and 1, and neither (got {args.teacher_reveal}): 0 is the same state, "
            "as when it is unset, and 1 would show all tokens, as `target='token'` learns them. Change it."
        )
