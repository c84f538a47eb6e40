"""Which modules a LoRA adapter has to name to reach every projection of a model."""

from torch import nn


def lora_target_modules(model: nn.Module) -> list[str]:
    """Names of all linear projections inside the layers of a model, for `LoraConfig(target_modules=...)`.

    The published d3LLM and dParallel recipes name Llama's projections, of which LLaDA's own code has only four under
    those names: its output, gate and down projections got no adapter. Here the names are read off the model.

    Args:
        model (`torch.nn.Module`): The model, without an adapter.

    Returns:
        `list[str]`: Sorted last parts of the names (`q_proj`, ...), or the full names where a last part also names a
        module outside the layers (as BERT's `dense`). Head and embeddings are never among them.

    Raises:
        ValueError: If the layers hold no linear projection.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    inside = [name for name in linear if any(part.isdigit() for part in name.split("."))]
    if not inside:
        raise ValueError(
            f"`model` must have linear projections in its layers (got {type(model).__name__} with none). Name the "
            "modules that get an adapter yourself."
        )
    last = {name.rpartition(".")[2] for name in inside}
    outside = {name.rpartition(".")[2] for name in linear if name not in set(inside)}
    return sorted(inside) if last & outside else sorted(last)
