"""Dream's published tokenizer without its code: it is Qwen2's under another name."""

from collections.abc import Mapping

from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer


def with_declared(vocabulary: Mapping[str, int], declared: Mapping[str, int]) -> dict[str, int]:
    """A vocabulary in which added tokens get the ids that are declared for them.

    The published code takes them from `added_tokens_decoder`. The fast tokenizers count on from the vocabulary, which
    is the same unless there is a gap between the two; then the tokens have to stand in the vocabulary.
    """
    missing = {token: index for token, index in declared.items() if token not in vocabulary}
    follow_on = sorted(missing.values()) == list(range(len(vocabulary), len(vocabulary) + len(missing)))
    return dict(vocabulary) if follow_on else dict(vocabulary) | missing


class _WithDeclaredIds(Qwen2Tokenizer):
    def __init__(self, vocab=None, merges=None, **kwargs):
        declared = {str(token): int(index) for index, token in (kwargs.get("added_tokens_decoder") or {}).items()}
        if isinstance(vocab, str) and isinstance(merges, str):  # names of files
            vocab, merges = BPE.read_file(vocab, merges)
        if isinstance(vocab, dict):
            vocab = with_declared(vocab, declared)
        super().__init__(vocab=vocab, merges=merges, **kwargs)


class DreamTokenizer(Qwen2Tokenizer):
    """What `tokenizer_config.json` of Dream names; makes Qwen2's tokenizer, which any transformers loads again."""

    @classmethod
    def from_pretrained(cls, *args, **kwargs) -> PreTrainedTokenizerBase:
        """As `Qwen2Tokenizer.from_pretrained`; what it saves names no code that would lie elsewhere."""
        tokenizer = _WithDeclaredIds.from_pretrained(*args, **kwargs)
        tokenizer.__class__ = Qwen2Tokenizer
        tokenizer.init_kwargs.pop("auto_map", None)
        return tokenizer
