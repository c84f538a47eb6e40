"""What a key/value cache is called: `past_key_values`, or `cache` as transformers names it from 5.24 on.

The one place that asks which of them holds. Forwards of this package take both.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from transformers.masking_utils import create_bidirectional_mask


CACHE_NAMES = ("cache", "past_key_values")

# The name by which this transformers passes a cache to layers and mask functions, and has it in its outputs.
CACHE = next(name for name in CACHE_NAMES if name in inspect.signature(create_bidirectional_mask).parameters)


def given_cache(inputs: Mapping[str, Any]) -> tuple[str, Any] | None:
    """The cache among keyword arguments, with the name it came under; `None` where there is none.

    Raises:
        ValueError: for a cache under each name.
    """
    given = [(name, inputs[name]) for name in CACHE_NAMES if inputs.get(name) is not None]
    if len(given) > 1:
        raise ValueError(
            "`cache` and `past_key_values` are two names of one argument (got both). Pass one of them; transformers "
            f"{'5.24 and later' if CACHE == 'cache' else 'before 5.24'} says `{CACHE}`."
        )
    return given[0] if given else None


def takes_either_cache_name(forward: Callable) -> Callable:
    """Lets a forward whose parameter is `cache` be called with `past_key_values` as well."""

    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        if "past_key_values" in kwargs:
            given = given_cache(kwargs)
            del kwargs["past_key_values"]
            if given is not None:
                kwargs["cache"] = given[1]
        return forward(self, *args, **kwargs)

    return wrapper


__all__ = ["CACHE", "CACHE_NAMES", "given_cache", "takes_either_cache_name"]
