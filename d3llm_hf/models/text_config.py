"""Settings of a model's text part, which some configs keep in a config of their own."""

from typing import Any


def text_config(config: Any) -> Any:
    """The config of the text part: the nested one, or the whole."""
    return config.get_text_config()


def text_setting(config: Any, name: str) -> Any:
    """A setting of the config itself or, where it has none, of its text part; `None` where neither has it."""
    value = getattr(config, name, None)
    return getattr(text_config(config), name, None) if value is None else value
