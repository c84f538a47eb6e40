"""Fills forms: every hole of every form at once, with the tokens that its type allows.

1. The prompts are encoded, and the forms laid out behind them.
2. Rows are padded on the left; holes at the same places of one language are one hole of several rows.
3. `generate` decides the holes, with both sides of each in view.
4. What a hole's text leaves of it is closed up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers.generation import LogitsProcessorList

from ..models import lattices
from ..models.text_config import text_setting
from ..models.token_ids import vocabulary_of
from ..text import encode_chat, encode_text
from .form import Form, LaidOut, lay_out
from .vocabulary import Vocabulary, vocabulary_of_tokenizer


Prompt = str | Sequence[Mapping[str, str]] | Sequence[int] | None

# Arguments of `generate` that a form decides itself.
OWN = {
    "input_ids": "the form and its prompt are encoded here",
    "inputs": "the form and its prompt are encoded here",
    "attention_mask": "the form and its prompt are encoded here",
    "infill_mask": "the form says where its holes are",
    "infill": "the form says where its holes are",
    "max_new_tokens": "the form says how long it is",
    "max_length": "the form says how long it is",
    "generation_config": "its length would be another one than the form's; pass its settings by name",
    "num_return_sequences": "a form is filled once; pass it several times",
    "return_dict_in_generate": "what comes back is a `Filled`",
}


@dataclass(frozen=True)
class Filled:
    """A form that was filled.

    Attributes:
        text: the whole form, without what its holes had left over.
        holes: text of each hole.
        num_forwards: forwards until the last position was decided.
        positions_computed: positions that were pushed through the model for it.
        num_tokens: tokens of the text.
        prompt_tokens, form_tokens: positions of the prompt, and of the form with all of its holes.
    """

    text: str
    holes: tuple[str, ...]
    num_forwards: int
    positions_computed: int
    num_tokens: int
    prompt_tokens: int
    form_tokens: int


def fill(
    model,
    tokenizer,
    form: Form | Sequence,
    *,
    prompt: Prompt = None,
    end_token_id: int | None = None,
    mask_token_id: int | None = None,
    **settings,
) -> Filled:
    """Fills a form, whose holes hold what their types allow and nothing else.

    The given text is on the canvas from the first forward, so every hole is decided with both of its sides in view, in
    parallel, by any method and cache that infilling takes. Positions are ranked by the model's distribution over the
    tokens that are allowed.

    Args:
        model: a masked diffusion LM of this package that sees the whole text, such as LLaDA or Dream.
        tokenizer: of the model, a byte-level BPE.
        form: a [`Form`] or its parts, see there; [`form_of_schema`] makes one of a JSON schema.
        prompt: text before the form, a conversation whose next turn the form is, or token ids.
        end_token_id (`int`, *optional*): fills what a hole's text leaves of it, on the canvas; the tokenizer's
            end-of-sequence token when unset.
        mask_token_id (`int`, *optional*): the model's own when unset.
        settings: further arguments of `generate`.

    Returns:
        [`Filled`].

    Raises:
        TypeError, ValueError: for a form, prompt or tokenizer that does not fit, for arguments that the form decides,
            and what `generate` raises.
    """
    return fill_batch(
        model, tokenizer, [form], prompts=[prompt], end_token_id=end_token_id, mask_token_id=mask_token_id, **settings
    )[0]


def fill_batch(
    model,
    tokenizer,
    forms: Sequence[Form | Sequence],
    *,
    prompts: Sequence[Prompt] | None = None,
    end_token_id: int | None = None,
    mask_token_id: int | None = None,
    **settings,
) -> list[Filled]:
    """Fills several forms in one batch; each is filled as it would be alone.

    Args:
        forms, prompts: one for each row; see [`fill`], as for all others.

    Returns:
        one [`Filled`] for each form.

    Raises:
        TypeError, ValueError: as [`fill`], and for another number of prompts than of forms.
    """
    # 1. The prompts are encoded, and the forms laid out behind them
    for name, reason in OWN.items():
        if name in settings:
            raise ValueError(f"`{name}` is no argument of `fill` (got one): {reason}. Leave it out.")
    prompts = [None] * len(forms) if prompts is None else prompts
    if not forms or len(prompts) != len(forms):
        raise ValueError(
            f"`prompts` must be one for each form, of which there is at least one (got {len(prompts)} for "
            f"{len(forms)}). Pass `None` for a form without a prompt."
        )
    known = [form if isinstance(form, Form) else Form(form) for form in forms]
    mask = mask_of(model, mask_token_id)
    vocabulary = vocabulary_of_model(model, tokenizer, end_token_id, mask)
    laid = {form: lay_out(form, tokenizer, vocabulary, mask) for form in set(known)}
    before = [encoded_prompt(tokenizer, prompt) for prompt in prompts]
    return fill_laid_out(
        model, before, [laid[form] for form in known], pad_token_id=tokenizer.pad_token_id or 0, mask_token_id=mask,
        **settings,
    )  # fmt: skip


def fill_laid_out(
    model,
    prompts: Sequence[list[int]],
    layouts: Sequence[LaidOut],
    *,
    pad_token_id: int,
    mask_token_id: int,
    **settings,
) -> list[Filled]:
    """Stages 2 to 4 of [`fill_batch`], of prompts as token ids and forms that are laid out."""
    # 2. Rows are padded on the left; holes at the same places of one language are one hole of several rows
    rows = [before + layout.ids for before, layout in zip(prompts, layouts, strict=True)]
    width = max(map(len, rows))
    lefts = [width - len(row) for row in rows]
    ids = torch.tensor([[pad_token_id] * left + row for left, row in zip(lefts, rows, strict=True)])
    seen = torch.tensor([[0] * left + [1] * len(row) for left, row in zip(lefts, rows, strict=True)])
    holes, marked = _holes(layouts), torch.zeros_like(ids, dtype=torch.bool)
    for hole in holes:
        marked[list(hole.rows), hole.span(width)] = True

    # 3. `generate` decides the holes, with both sides of each in view
    processors = LogitsProcessorList([*(settings.pop("logits_processor", None) or []), lattices.HoleLanguages(holes)])
    more = {} if model.generation_config.pad_token_id is not None else {"pad_token_id": pad_token_id}
    output = model.generate(
        input_ids=ids.to(model.device), attention_mask=seen.to(model.device), infill_mask=marked.to(model.device),
        mask_token_id=mask_token_id, logits_processor=processors, return_dict_in_generate=True, **more | settings,
    )  # fmt: skip

    # 4. What a hole's text leaves of it is closed up
    found = []
    for row, (before, layout) in enumerate(zip(prompts, layouts, strict=True)):
        tokens = output.sequences[row, lefts[row] + len(before) :].tolist()
        texts = [layout.vocabulary.content(tokens[at : at + size]).decode() for at, size in layout.spans]
        end = layout.vocabulary.end_token_id
        left_over = sum(tokens[at : at + size].count(end) for at, size in layout.spans)
        found.append(
            Filled(
                text=layout.form.written(texts),
                holes=tuple(texts),
                num_forwards=int(output.num_forwards[row]),
                positions_computed=int(output.positions_computed[row]),
                num_tokens=len(tokens) - left_over,
                prompt_tokens=len(before),
                form_tokens=len(layout.ids),
            )
        )
    return found


def _holes(layouts: Sequence[LaidOut]) -> list[lattices.Hole]:
    """The holes of all rows; forms end at the canvas' end, so those of one layout lie at the same places."""
    holes = []
    for layout in dict.fromkeys(layouts):
        rows = tuple(row for row, other in enumerate(layouts) if other is layout)
        length, end = len(layout.ids), layout.vocabulary.end_token_id
        for (at, size), automaton, closing in zip(layout.spans, layout.automata, layout.closings, strict=True):
            holes.append(lattices.Hole(rows, length - at, size, automaton, closing, end))
    return holes


def vocabulary_of_model(model, tokenizer, end_token_id: int | None, mask_token_id: int) -> Vocabulary:
    """The tokens of a tokenizer that the model knows."""
    known = vocabulary_of(model.config)
    return vocabulary_of_tokenizer(tokenizer, mask_token_id=mask_token_id, end_token_id=end_token_id, vocab_size=known)


def mask_of(model, mask_token_id: int | None) -> int:
    """The token of an undecided position: the argument, the generation config's, or the model's.

    Raises:
        ValueError: where nobody names one.
    """
    own = getattr(model.generation_config, "mask_token_id", None)
    for value in (mask_token_id, own, text_setting(model.config, "mask_token_id")):
        if value is not None:
            return value
    raise ValueError("`mask_token_id` must name the token of an undecided position (got None). Pass it.")


def encoded_prompt(tokenizer, prompt: Prompt) -> list[int]:
    """Token ids of what stands before a form, or before a choice."""
    if prompt is None or prompt == "":
        return []
    if not isinstance(prompt, str) and len(prompt) and isinstance(prompt[0], int):
        return list(prompt)  # type: ignore[arg-type]  # numbers throughout, or `generate` refuses the ids
    encoded = encode_text(tokenizer, prompt) if isinstance(prompt, str) else encode_chat(tokenizer, prompt)  # type: ignore[arg-type]
    return encoded["input_ids"][0].tolist()
