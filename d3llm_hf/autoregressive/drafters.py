"""What drafts beside a model: the kinds there are, and what `generate` is given about one."""

from dataclasses import dataclass
from typing import Any

from ..models.text_config import text_config


@dataclass(frozen=True)
class Drafter:
    """A kind of drafter that has to be given.

    Attributes:
        option: its name in sweeps, benches and evaluations; of a command with dashes.
        arguments: of [`~.generate.generate`] about it; the first is what drafts.
        way_out: what to do where it is missing.
    """

    option: str
    arguments: tuple[str, ...]
    way_out: str


ASSISTANT = Drafter(
    "assistant", ("assistant_model", "tokenizer", "assistant_tokenizer"), "Pass a smaller model, loaded."
)
DRAFT_HEAD = Drafter("draft_head", ("draft_head",), "Pass an `Eagle3Head` made for the model.")
DRAFTERS = (ASSISTANT, DRAFT_HEAD)


def drafter_arguments(
    model: Any, tokenizer: Any, assistant: tuple[Any, Any] | None = None, draft_head: Any = None
) -> dict[str, Any]:
    """The arguments of [`~.generate.generate`] about all that could draft.

    Args:
        model, tokenizer: the target's.
        assistant: model and tokenizer of one that drafts; its tokenizers are passed where the vocabularies differ.
        draft_head: a head for the target.

    Raises:
        ValueError: for an assistant whose vocabulary is another one of the same size.
    """
    found = {"assistant_model": None, "draft_head": draft_head}
    if assistant is None:
        return found
    other, own = assistant
    sizes = {text_config(each.config).vocab_size for each in (model, other)}
    if len(sizes) > 1:
        return found | {"assistant_model": other, "tokenizer": tokenizer, "assistant_tokenizer": own}
    if tokenizer.get_vocab() != own.get_vocab():
        raise ValueError(
            "`assistant` must have the target's tokenizer, or a vocabulary of another size (got another vocabulary of "
            f"{sizes.pop()} tokens): its drafts would be other text. Choose another assistant."
        )
    return found | {"assistant_model": other}
