"""A model that drafts with a tokenizer of its own: what `generate` is given about the two."""

from typing import Any

from ..models.text_config import text_config


def drafter_arguments(model: Any, tokenizer: Any, assistant: tuple[Any, Any] | None) -> dict[str, Any]:
    """The arguments of [`~.generate.generate`] about an assistant; tokenizers only where the vocabularies differ.

    Args:
        model, tokenizer: the target's.
        assistant: model and tokenizer of what drafts.

    Raises:
        ValueError: for an assistant whose vocabulary is another one of the same size.
    """
    if assistant is None:
        return {"assistant_model": None}
    other, own = assistant
    sizes = {text_config(each.config).vocab_size for each in (model, other)}
    if len(sizes) > 1:
        return {"assistant_model": other, "tokenizer": tokenizer, "assistant_tokenizer": own}
    if tokenizer.get_vocab() != own.get_vocab():
        raise ValueError(
            "`assistant` must have the target's tokenizer, or a vocabulary of another size (got another vocabulary of "
            f"{sizes.pop()} tokens): its drafts would be other text. Choose another assistant."
        )
    return {"assistant_model": other}
