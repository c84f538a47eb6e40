"""Training of masked diffusion language models with the Hugging Face `Trainer`.

Names are imported on first use, so that a light one does not load the Trainer.
"""

from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .distill_callbacks import NoiseCurriculumCallback, WindowCurriculumCallback
    from .distill_collator import PseudoTrajectoryCollator
    from .distill_config import PseudoTrajectoryDistillConfig
    from .distill_trainer import PseudoTrajectoryDistillTrainer
    from .lora import lora_target_modules
    from .muon import MuonWithAdamW
    from .sft_collator import MaskedDiffusionSFTCollator
    from .sft_config import MaskedDiffusionSFTConfig
    from .sft_trainer import MaskedDiffusionSFTTrainer
    from .trajectories import TrajectoryConfig, extract_trajectories
    from .trajectory_records import TrajectoryError, canvas_at, read_published_states
    from .trajectory_store import read_trajectories

_MODULES = {
    "MaskedDiffusionSFTCollator": "sft_collator",
    "MaskedDiffusionSFTConfig": "sft_config",
    "MaskedDiffusionSFTTrainer": "sft_trainer",
    "MuonWithAdamW": "muon",
    "TrajectoryConfig": "trajectories",
    "TrajectoryError": "trajectory_records",
    "canvas_at": "trajectory_records",
    "extract_trajectories": "trajectories",
    "read_published_states": "trajectory_records",
    "read_trajectories": "trajectory_store",
    "NoiseCurriculumCallback": "distill_callbacks",
    "PseudoTrajectoryCollator": "distill_collator",
    "PseudoTrajectoryDistillConfig": "distill_config",
    "PseudoTrajectoryDistillTrainer": "distill_trainer",
    "WindowCurriculumCallback": "distill_callbacks",
    "lora_target_modules": "lora",
}

__all__ = [
    "MaskedDiffusionSFTCollator",
    "MaskedDiffusionSFTConfig",
    "MaskedDiffusionSFTTrainer",
    "MuonWithAdamW",
    "NoiseCurriculumCallback",
    "PseudoTrajectoryCollator",
    "PseudoTrajectoryDistillConfig",
    "PseudoTrajectoryDistillTrainer",
    "TrajectoryConfig",
    "TrajectoryError",
    "WindowCurriculumCallback",
    "canvas_at",
    "extract_trajectories",
    "lora_target_modules",
    "read_published_states",
    "read_trajectories",
]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value
