"""Numbers of numpy and torch as Python's own, whoever computed a setting."""

from typing import Any


def plain(value: Any) -> Any:
    """A number, bool or list of Python for one of numpy or torch, also inside lists, tuples and dicts."""
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(map(plain, value))
    if type(value) is dict:
        return {plain(name): plain(each) for name, each in value.items()}
    if hasattr(value, "tolist") and hasattr(value, "item") and hasattr(value, "ndim"):
        return value.item() if value.ndim == 0 or tuple(value.shape) == (1,) else value.tolist()
    return value


__all__ = ["plain"]
