"""Configuration of MMaDA's text part, under the keys of the official checkpoints."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_llada import LLaDAConfig


# Tokens of LLaDA's tokenizer, of which its embedding has some rows more: the code of an image begins behind them.
_TOKENS_OF_LLADA = 126349
# The reserved tokens that stand for a task, or around an image or video.
_TASKS = (
    126084, 126085, 126086, 126087, 126088, 126089, 126090, 126091, 126092, 126093, 126094,
)  # fmt: skip
# Those of them that ask for an image or video: text to image and to video, video to video, long video, and reasoning
# to image.
_DRAWING = (126088, 126090, 126091, 126092, 126094)


@strict
class MMadaConfig(LLaDAConfig):
    r"""Configuration of a [`MMadaModelLM`]: the keys of `Gen-Verse/MMaDA-8B-Base`, which are LLaDA's and a few more.

    A vocabulary of text is followed by the codes of images, each a token of its own.

    Args:
        llm_vocab_size (`int`): rows of the embedding that LLaDA has.
        new_vocab_size (`int`): rows with the codes, `vocab_size`.
        codebook_size (`int`): codes of images.
        num_vq_tokens (`int`): codes of one image.
        num_new_special_tokens (`int`): kept, and not read.
        text_vocab_size (`int`, *optional*): `len(tokenizer)`, from which on tokens are codes; when unset that of
            LLaDA's tokenizer, or `llm_vocab_size` where that is less. (Not an official key: the official code asks the
            tokenizer, and never reads `llm_vocab_size`.)
        task_token_ids (`list[int]`): tokens that stand for a task or around an image; those that the vocabulary lacks
            change nothing. (Not an official key.)
        drawing_token_ids (`list[int]`): of them those that ask for an image or video. (Not an official key.)
        text_only (`bool`): whether decoding writes text alone, no codes and no tasks. (Not an official key: the
            official code hides nothing.)

    For all others see [`LLaDAConfig`].

    Raises:
        ArchitectureError: (a `ValueError`) as [`LLaDAConfig`], or for a text that is larger than the vocabulary.
    """

    model_type = "mmada"
    label: ClassVar[str] = "MMaDA"
    own_keys: ClassVar[frozenset[str]] = LLaDAConfig.own_keys | {"codebook_size", "num_vq_tokens"}

    vocab_size: int = 134656
    llm_vocab_size: int = 126464
    new_vocab_size: int = 134656
    codebook_size: int = 8192
    num_vq_tokens: int = 1024
    num_new_special_tokens: int = 0
    text_vocab_size: int | None = None
    task_token_ids: list[int] | tuple[int, ...] = _TASKS
    drawing_token_ids: list[int] | tuple[int, ...] = _DRAWING
    text_only: bool = True

    def __post_init__(self, **kwargs):
        if self.text_vocab_size is None:
            self.text_vocab_size = min(_TOKENS_OF_LLADA, self.llm_vocab_size)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """As [`LLaDAConfig`]'s, and whether there is text at all."""
        super().validate_architecture()
        if not 0 < self.text_vocab_size <= self.vocab_size:
            raise ValueError(
                f"`text_vocab_size` must lie between 1 and `vocab_size` (got {self.text_vocab_size} of "
                f"{self.vocab_size}). Set it to `len(tokenizer)`."
            )


__all__ = ["MMadaConfig"]
