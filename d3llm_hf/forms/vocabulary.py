"""The bytes of every token of a byte-level BPE tokenizer, which is what masks over the vocabulary are made from."""

import json
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Tokens as bytes.

    Attributes:
        texts: `(token id, its bytes)`; added tokens are left out, for they are control tokens or whole words that no
            text is made of.
        size: tokens, the added ones included.
        end_token_id: fills what is left of a hole behind its text.
    """

    texts: tuple[tuple[int, bytes], ...]
    size: int
    end_token_id: int
    _bytes: dict[int, bytes] = field(init=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "_bytes", dict(self.texts))

    def content(self, tokens: list[int]) -> bytes:
        """The bytes of a hole's tokens, which end before the first end token."""
        end = tokens.index(self.end_token_id) if self.end_token_id in tokens else len(tokens)
        return b"".join(self._bytes[token] for token in tokens[:end])


@lru_cache(maxsize=64)
def closing(vocabulary: Vocabulary, behind: str) -> torch.Tensor:
    """Tokens `(V,)` bool with which a text may begin, or which begin with it; the end token always."""
    text = behind.encode()
    tokens = [
        token for token, begun in vocabulary.texts if text and (text.startswith(begun) or begun.startswith(text))
    ]
    marks = torch.zeros(vocabulary.size, dtype=torch.bool)
    marks[[*tokens, vocabulary.end_token_id]] = True
    return marks


def vocabulary_of_tokenizer(
    tokenizer, *, mask_token_id: int, end_token_id: int | None = None, vocab_size: int | None = None
) -> Vocabulary:
    """The vocabulary of a tokenizer; the same one for the same arguments, as long as the tokenizer is unchanged.

    Args:
        tokenizer: a fast tokenizer of transformers that is a byte-level BPE.
        mask_token_id (`int`): never a token of a text, whatever the tokenizer says of it.
        end_token_id (`int`, *optional*): the tokenizer's end-of-sequence token when unset.
        vocab_size (`int`, *optional*): tokens that the model knows; others are left out.

    Raises:
        TypeError: for another tokenizer.
        ValueError: for an end token that is the mask token or none of the tokenizer's added tokens, or where there is
            none.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise TypeError(
            f"`tokenizer` must be a fast tokenizer (got {type(tokenizer).__name__}): the bytes of its tokens are read "
            "from it. Load it with `AutoTokenizer`."
        )
    end = tokenizer.eos_token_id if end_token_id is None else end_token_id
    added = set(tokenizer.added_tokens_decoder)
    if end not in added or end == mask_token_id or (vocab_size is not None and end >= vocab_size):
        raise ValueError(
            f"`end_token_id` must be a special token of the model, not the mask token (got {end!r}): no text is "
            "written with it. Pass the id of one, such as the tokenizer's padding."
        )
    kept = getattr(tokenizer, "_d3llm_vocabularies", {})
    key = (end, mask_token_id, vocab_size, len(tokenizer))
    if key not in kept:
        stated = json.loads(backend.to_str())
        if stated["model"].get("type") != "BPE" or "ByteLevel" not in json.dumps(stated.get("decoder")):
            raise TypeError(
                f"`tokenizer` must be a byte-level BPE (got a model of type {stated['model'].get('type')!r}): the "
                "tokens of other kinds are not bytes of the text. Fill gaps without types by `generate(infill=True)`."
            )
        kept = {key: _read(tokenizer, end, added | {mask_token_id}, vocab_size)}
        tokenizer._d3llm_vocabularies = kept
    return kept[key]


def _read(tokenizer, end: int, without: set[int], vocab_size: int | None) -> Vocabulary:
    byte_of = {sign: byte for byte, sign in bytes_to_unicode().items()}
    tokens = sorted((token, text) for text, token in tokenizer.get_vocab().items())
    size = min(tokens[-1][0] + 1, vocab_size or tokens[-1][0] + 1)
    texts = tuple(
        (token, bytes(byte_of[sign] for sign in text))
        for token, text in tokens
        if token < size and token not in without and text and all(sign in byte_of for sign in text)
    )
    return Vocabulary(texts, size, end)
