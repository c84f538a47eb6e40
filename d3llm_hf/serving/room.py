"""What the rows at work may take of the memory, said before any request comes."""

from typing import Any

from ..models.text_config import text_setting
from ..models.token_ids import vocabulary_of


def room(model: Any, rows: int, prompt: int, answer: int) -> str:
    """In words, what the longest rows take beside the weights.

    Args:
        model: with this library's `generate`; only its config and dtype are read.
        rows: at work at most.
        prompt, answer: tokens of the longest ones.
    """
    longest = model.max_positions
    positions = prompt + answer if longest is None else min(prompt + answer, longest)
    text = f"at most {rows} rows at work, of {positions} positions each"
    size = model.dtype.itemsize
    layers, heads, width = (
        text_setting(model.config, name) for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")
    )
    parts = []
    if None not in (layers, heads, width):
        kept = text_setting(model.config, "num_key_value_heads") or heads
        head = text_setting(model.config, "head_dim") or width // heads
        parts.append(f"keys and values {_mib(2 * layers * kept * head * size * rows * positions)} with a cache")
    vocabulary = vocabulary_of(model.config)
    if vocabulary is not None:
        parts.append(f"logits {_mib((size + 4) * vocabulary * rows * min(answer, positions))}")
    if parts:
        text += f": {', '.join(parts)}; times the canvases of a row with `lossless`, `lookahead` or `cfg_scale`"
    return text


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
