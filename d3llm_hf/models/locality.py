"""What configs and modules say about attention that does not reach all positions, under every name that is in use."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from .text_config import text_config


# Keys that describe a window, chunks or blocks; a value that asks for nothing describes none.
LOCAL = (
    r"(^|_)(sliding_windows?|sliding_window_(size|pattern)|(attention|attn|local)_window(_size)?|window_(size|pattern)"
    r"|(attention|attn)_chunk_size|chunked_attention|local_attention|local_attn_chunk_length|attn_layers|is_sliding"
    r"|is_local(_attention)?|global_attn_every_n_layers|attention_types|attn_types?_list|block_sparse"
    r"|sparse_attention(_config)?|block_(causal|diffusion)(_mask)?|causal_attention|prefix_lm)$"
)
RECURRENT = (
    r"(^|_)(mamba|ssm|rwkv|rnn|recurrent|hybrid|lru_width|linear_attn|linear_attention|linear_(num|key|value|conv)\w*"
    r"|conv_l_cache|layers_block_type|state_size)(_|$)"
)
_NAMES = re.compile(f"{LOCAL}|{RECURRENT}", re.IGNORECASE)
_FULL = ("full_attention", "attention", "global", "original_full", "full")


def asks_for_nothing(value: Any) -> bool:
    """Whether the value of a key means that there is none of what its name says."""
    if isinstance(value, (list, tuple)):
        return all(asks_for_nothing(entry) for entry in value)
    return value is None or value is False or value in (0, -1, "", {}, *_FULL)


def limited_reach(model: Any) -> str | None:
    """What says that some layer of a model does not attend to all positions: `"sliding_window=4"`, or `None`.

    A cache that is addressed by slots does not work there: windows are counted from where a cache ends, and a
    recurrent state holds what it has seen in order.
    """
    config = text_config(model.config)
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    unusual = sorted({str(kind) for kind in kinds if not asks_for_nothing(kind)})
    if unusual:
        return f"layer_types={unusual}"
    held = vars(config) | {"attention_type": getattr(config, "attention_type", None)}
    return _first(held) or next(filter(None, map(_first, _held_by(model.modules()))), None)


def _first(held: Mapping[str, Any]) -> str | None:
    off = held.get("use_sliding_window") is False
    for name, value in held.items():
        if name.startswith("_") or not isinstance(value, (int, str, list, tuple, dict)) or asks_for_nothing(value):
            continue
        if name == "attention_type" or (_NAMES.search(name) and not (off and name.startswith("sliding_window"))):
            return f"{name}={value!r}"
    return None


def _held_by(modules: Iterable[Any]) -> Iterable[Mapping[str, Any]]:
    return (vars(module) for module in modules)
