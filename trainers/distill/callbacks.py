"""The two curricula: noisier views and wider windows as training goes on, as functions of its progress alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


if TYPE_CHECKING:
    from .config import PseudoTrajectoryDistillConfig

logger = logging.getLogger(__name__)


def noise_floor(step: int, max_steps: int, start: float, end: float) -> float:
    """Smallest noise level at an optimizer step: from `start` to `end`, linearly over the run."""
    return start + min(step / max_steps, 1.0) * (end - start) if max_steps > 0 else start


def floor_at(step: int, max_steps: int, args: PseudoTrajectoryDistillConfig) -> float:
    """Smallest noise level at an optimizer step of a run with these arguments."""
    return noise_floor(
        step, max_steps, args.noise_start, args.noise_end if args.noise_curriculum else args.noise_start
    )


def window_size(epoch: float | None, sizes: Sequence[int]) -> int:
    """Window at a (fractional) epoch: one size an epoch, interpolated linearly to the next one within it."""
    epoch = epoch or 0.0
    index = min(int(epoch), len(sizes) - 1)
    if index == len(sizes) - 1:
        return sizes[index]
    return int(sizes[index] + (epoch - index) * (sizes[index + 1] - sizes[index]))


class Curricular(Protocol):
    """What a curriculum needs of a trainer.

    Attributes:
        noise_floor: smallest noise level of a view from the next step on.
        window: positions of the answer that a view decides in.
        resumed_max_steps: length of the run that is resumed; `None` for a new one.
    """

    noise_floor: float
    window: int
    resumed_max_steps: int | None


class _Curriculum(TrainerCallback):
    """Sets a value of the trainer before each optimizer step. It keeps no state, so a resumed run needs none."""

    def __init__(self, trainer: Curricular):
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        self.on_step_begin(args, state, control)


class NoiseCurriculumCallback(_Curriculum):
    """Raises `trainer.noise_floor` from `noise_start` to `noise_end` linearly over the run, if `noise_curriculum`.

    The noise level of a sample is uniform between the floor and `noise_end`, so early views hide little or much, late
    ones only much.

    Args:
        trainer ([`Curricular`]): Whose `noise_floor` to set; added by the trainer itself. For a
            curriculum of your own, remove this callback and add one that sets the same attribute.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        """Warn where a resumed run has another length: its curriculum then jumps."""
        before = self.trainer.resumed_max_steps
        if before is not None and before != state.max_steps:
            logger.warning(
                "The run is resumed with max_steps=%d, but was begun with %d: the noise level jumps from where it "
                "was. Resume with the former number to go on as planned.",
                state.max_steps,
                before,
            )
        super().on_train_begin(args, state, control, **kwargs)

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.noise_floor = floor_at(state.global_step, state.max_steps, args)


class WindowCurriculumCallback(_Curriculum):
    """Sets `trainer.window` from `window_sizes`, one entry per epoch, interpolated within it.

    Where the run's length is given by `max_steps`, the entries are spread over the run instead.

    Args:
        trainer ([`Curricular`]): Whose `window` to set; added by the trainer itself.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        """Warn where the run ends before its last window."""
        if args.max_steps <= 0 and args.num_train_epochs < len(args.window_sizes):
            logger.warning(
                "window_sizes=%s has one entry per epoch, but there are num_train_epochs=%s: the last ones are not "
                "reached. Set as many epochs as entries.",
                args.window_sizes,
                args.num_train_epochs,
            )
        super().on_train_begin(args, state, control, **kwargs)

    def on_step_begin(self, args, state, control, **kwargs):
        sizes = args.window_sizes
        epoch = state.global_step / args.max_steps * len(sizes) if args.max_steps > 0 else state.epoch
        self.trainer.window = window_size(epoch, sizes)
