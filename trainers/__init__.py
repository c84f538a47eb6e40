"""Training of masked diffusion language models with the Hugging Face `Trainer`.

Names are imported on first use, so that a light one does not load the Trainer.
"""

from importlib import import_module
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from .common.lora import lora_target_modules
    from .common.muon import MuonWithAdamW
    from .distill.callbacks import NoiseCurriculumCallback, WindowCurriculumCallback
    from .distill.collator import PseudoTrajectoryCollator
    from .distill.config import PseudoTrajectoryDistillConfig
    from .distill.trainer import PseudoTrajectoryDistillTrainer
    from .sft.block_collator import BlockSFTCollator
    from .sft.collator import MaskedDiffusionSFTCollator
    from .sft.config import MaskedDiffusionSFTConfig
    from .sft.trainer import MaskedDiffusionSFTTrainer
    from .trajectories.extract import TrajectoryConfig, extract_trajectories
    from .trajectories.records import TrajectoryError, canvas_at, read_published_states
    from .trajectories.store import read_trajectories

_MODULES = {
    "BlockSFTCollator": "sft.block_collator",
    "MaskedDiffusionSFTCollator": "sft.collator",
    "MaskedDiffusionSFTConfig": "sft.config",
    "MaskedDiffusionSFTTrainer": "sft.trainer",
    "MuonWithAdamW": "common.muon",
    "TrajectoryConfig": "trajectories.extract",
    "TrajectoryError": "trajectories.records",
    "canvas_at": "trajectories.records",
    "extract_trajectories": "trajectories.extract",
    "read_published_states": "trajectories.records",
    "read_trajectories": "trajectories.store",
    "NoiseCurriculumCallback": "distill.callbacks",
    "PseudoTrajectoryCollator": "distill.collator",
    "PseudoTrajectoryDistillConfig": "distill.config",
    "PseudoTrajectoryDistillTrainer": "distill.trainer",
    "WindowCurriculumCallback": "distill.callbacks",
    "lora_target_modules": "common.lora",
}

__all__ = [
    "BlockSFTCollator",
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
