"""Ids of tokens that settings name: each is a row of the model's embedding, whoever named it."""

from typing import Any

from .text_config import text_setting


# Settings that name tokens which decoding reads, writes or forces; the value is whether there may be several.
NAMING_TOKENS = {
    "mask_token_id": False,
    "pad_token_id": False,
    "bos_token_id": False,
    "eos_token_id": True,
    "forced_bos_token_id": False,
    "forced_eos_token_id": True,
}
BANNING = ("suppress_tokens", "begin_suppress_tokens")
"""Lists of tokens that are not written; as in transformers, those that do not exist change nothing."""


def check_kind(name: str, value: Any) -> None:
    """Raises a TypeError for what is no token id, nor a list of them where `name` may have several."""
    several = NAMING_TOKENS.get(name, True)
    ids = value if several and isinstance(value, list | tuple) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        rule = "a token id or a list of them" if several else "a token id"
        raise TypeError(f"`{name}` must be {rule} (got {value!r}). `tokenizer.convert_tokens_to_ids` finds it.")


def check_inside(title: str, value: Any, vocab_size: int | None, way_out: str) -> None:
    """Raises a ValueError for a token id that is outside the vocabulary; unset is inside.

    Args:
        title: what the message calls the setting: its name in backticks, and whose it is unless the caller's.
        value: a token id, a list of them, or `None`.
        vocab_size: rows of the embedding; `None` where a model does not say.
        way_out: the message's last sentence.
    """
    ids = value if isinstance(value, list | tuple) else [value]
    wrong = [token for token in ids if token is not None and vocab_size is not None and not 0 <= token < vocab_size]
    if wrong:
        got = wrong[0] if len(wrong) == 1 else wrong
        raise ValueError(f"{title} must lie inside the vocabulary of {vocab_size} tokens (got {got}). {way_out}")


def vocabulary_of(config: Any) -> int | None:
    """Tokens that a model of this config knows, `None` where it does not say."""
    return text_setting(config, "vocab_size")


__all__ = ["BANNING", "NAMING_TOKENS", "check_inside", "check_kind", "vocabulary_of"]
