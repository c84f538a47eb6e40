"""Loading a training checkpoint into a model whose tensors have other names on disk than in memory."""

from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME


def load_converted_weights(model: torch.nn.Module, checkpoint: str) -> bool:
    """Load `checkpoint` into `model` through `from_pretrained`, which undoes the renaming that saving does.

    `Trainer` reads the file as it is: for LLaDA, saved under its official tensor names, it finds no tensor that it
    knows, warns, and resumes from whatever weights the model was made with.

    Args:
        model (`torch.nn.Module`): The trained model, not wrapped.
        checkpoint (`str`): A folder that `Trainer` saved.

    Returns:
        `bool`: Whether it was loaded; `False` for adapters and for sharded formats of FSDP or DeepSpeed, whose files
        hold the names of the tensors in memory.
    """
    files = (Path(checkpoint) / name for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    if not isinstance(model, PreTrainedModel) or not any(file.is_file() for file in files):
        return False
    loaded = type(model).from_pretrained(checkpoint, dtype=model.dtype)
    model.load_state_dict(loaded.state_dict())
    return True
