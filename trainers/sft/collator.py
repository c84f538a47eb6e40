"""From conversations to padded batches: tokenisation and collation for masked-diffusion fine-tuning."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from d3llm_hf.text import special_tokens

from ..common.conversations import encode_answer, encode_prompt, render, spells_control_tokens, to_messages
from ..common.rows import in_row


def tokenize_conversations(
    batch: dict[str, list[Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    control_tokens_in_text: bool = False,
    numbers: Sequence[int] | None = None,
) -> dict[str, list[list[int]]]:
    """Tokenise a batch of a dataset (a dictionary of columns) for `Dataset.map(batched=True)`.

    Prompt and answer are tokenised apart, as they are when the model is used: the prompt ends with the assistant's
    header, the answer with its end-of-turn token. Without a chat template the turns are joined by newlines and the
    answer ends with the end-of-text token.

    Args:
        batch: columns as in [`to_messages`].
        tokenizer: of the model.
        control_tokens_in_text (`bool`, defaults to `False`): Take text in a content that spells a special token as
            that token. By default it is the characters it is written with, as in [`~d3llm_hf.encode_chat`].
        numbers (*optional*): numbers of the rows, for errors; counted from 0 if unset.

    Returns:
        `dict` with `prompt_ids` and `response_ids`.

    Raises:
        ValueError: naming the row, for one that is no conversation, or if the chat template does not render it as its
            prompt plus the answer.
    """
    columns = list(batch)
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    special = special_tokens(tokenizer)
    prompts, responses = [], []
    plain: dict[int, tuple[list[int], list[int]]] = {}
    for place, row in enumerate(rows):
        with in_row(place if numbers is None else numbers[place]):
            messages = to_messages(row, tokenizer.chat_template)
            prompt, response = render(messages, tokenizer)
            if not control_tokens_in_text and spells_control_tokens(messages, special):
                plain[place] = encode_prompt(messages[:-1], tokenizer), encode_answer(messages, tokenizer)
                prompt = response = ""
        prompts.append(prompt)
        responses.append(response)
    prompt_ids, response_ids = (
        tokenizer(texts, add_special_tokens=False)["input_ids"] for texts in (prompts, responses)
    )
    for place, found in plain.items():
        prompt_ids[place], response_ids[place] = found
    return {"prompt_ids": prompt_ids, "response_ids": response_ids}


@dataclass
class MaskedDiffusionSFTCollator:
    """Pads examples with `prompt_ids` and `response_ids` into one canvas; it masks nothing.

    Prompts are padded on the left and answers on the right, so that the answers of all rows are the last
    `response_length` columns. Masking is left to the trainer, because batches are collated ahead of the step that
    uses them.

    Args:
        pad_token_id (`int`): Token to the left of shorter prompts (not attended to).
        eos_token_id (`int`): Token to the right of shorter answers.
        response_length (`int`): Length R of the answer canvas.
        supervise_eos_fill (`bool`): Whether the fill is attended to and learnt.
        prompt_length (`int`, *optional*): Pad prompts to this length instead of the longest one in the batch.

    Returns (when called on a list of examples):
        `dict` with `input_ids` and `attention_mask` of shape `(B, L)`, `labels` of shape `(B, R)` with -100 where
        nothing is learnt, and `content_lengths` of shape `(B,)`, the answer lengths without the fill.

    Example:

    ```python
    >>> from trainers.sft.collator import MaskedDiffusionSFTCollator
    >>> collate = MaskedDiffusionSFTCollator(pad_token_id=0, eos_token_id=0, response_length=3)
    >>> examples = [{"prompt_ids": [5, 6], "response_ids": [7, 8]}, {"prompt_ids": [5], "response_ids": [9]}]
    >>> collate(examples)["input_ids"]
    tensor([[5, 6, 7, 8, 0],
            [0, 5, 9, 0, 0]])
    ```
    """

    pad_token_id: int
    eos_token_id: int
    response_length: int
    supervise_eos_fill: bool = True
    prompt_length: int | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        prompt_length = self.prompt_length or max(len(example["prompt_ids"]) for example in examples)
        input_ids, attention_mask, labels, content_lengths = [], [], [], []
        for example in examples:
            prompt, response = list(example["prompt_ids"]), list(example["response_ids"])
            left, right = prompt_length - len(prompt), self.response_length - len(response)
            if left < 0 or right < 0:
                raise ValueError(
                    f"An example must fit a prompt of {prompt_length} and an answer of {self.response_length} tokens "
                    f"(got {len(prompt)} and {len(response)}). Raise `max_prompt_length` or `response_length`, or "
                    "let the trainer leave long examples out."
                )
            fill = [self.eos_token_id] * right
            input_ids.append([self.pad_token_id] * left + prompt + response + fill)
            attention_mask.append(
                [0] * left + [1] * (len(prompt) + len(response)) + [int(self.supervise_eos_fill)] * right
            )
            labels.append(response + (fill if self.supervise_eos_fill else [-100] * right))
            content_lengths.append(len(response))
        return {
            "input_ids": torch.tensor(input_ids, device="cpu"),
            "attention_mask": torch.tensor(attention_mask, device="cpu"),
            "labels": torch.tensor(labels, device="cpu"),
            "content_lengths": torch.tensor(content_lengths, device="cpu"),
        }
