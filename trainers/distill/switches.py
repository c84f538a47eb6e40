"""Which switches of distillation have an effect beside which others; one that would have none is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .config import PseudoTrajectoryDistillConfig

    Holds = Callable[[PseudoTrajectoryDistillConfig], bool]

_ROLLOUT: tuple[str, Holds] = ("`objective='rollout'`", lambda args: args.objective == "rollout")
_WINDOWS: tuple[str, Holds] = (
    "steps that draw windows (another `objective`, or `rollout_every` above 1)",
    lambda args: args.draws_windows,
)
# Switch -> what it needs, and whether that is so.
_NEEDS: dict[str, tuple[str, Holds]] = {
    "rollout_threshold": _ROLLOUT,
    "rollout_block_length": _ROLLOUT,
    "rollout_max_forwards": _ROLLOUT,
    "rollout_states": _ROLLOUT,
    "rollout_every": _ROLLOUT,
    "noise_curriculum": _WINDOWS,
    "state_region": (
        "`blockwise` windows with `objective='trajectory'` or `'random'` (a rollout has open blocks of its own)",
        lambda args: args.draws_windows and args.objective != "certainty" and args.blockwise,
    ),
}


def check_switches(args: PseudoTrajectoryDistillConfig) -> None:
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
