"""From conversations to padded batches: tokenisation and collation for masked-diffusion fine-tuning."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase


def to_messages(example: dict[str, Any]) -> list[dict[str, str]]:
    """The conversation of one example with columns `messages`, or `prompt` and `completion`.

    Raises:
        ValueError: If it has neither, or does not end with an assistant turn.
    """
    if "messages" in example:
        messages = list(example["messages"])
    elif "prompt" in example and "completion" in example:
        messages = [*_turns(example["prompt"], "user"), *_turns(example["completion"], "assistant")]
    else:
        raise ValueError(
            f"A dataset must have the columns `prompt` and `completion`, or `messages` (got {sorted(example)}). "
            "Rename its columns with `dataset.rename_column`."
        )
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError(
            "A conversation must have at least two turns and end with one of the role `assistant` "
            f"(got the roles {[message['role'] for message in messages]}). Drop or cut such rows."
        )
    return messages


def _turns(value: str | list[dict[str, str]], role: str) -> list[dict[str, str]]:
    return [{"role": role, "content": value}] if isinstance(value, str) else list(value)


def tokenize_conversations(
    batch: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[list[int]]]:
    """Tokenise a batch of a dataset (a dictionary of columns) for `Dataset.map(batched=True)`.

    Prompt and answer are tokenised apart, as they are when the model is used: the prompt ends with the assistant's
    header, the answer with its end-of-turn token. Without a chat template the turns are joined by newlines and the
    answer ends with the end-of-text token.

    Returns:
        `dict` with `prompt_ids` and `response_ids`.

    Raises:
        ValueError: If the chat template does not render a conversation as its prompt plus the answer.
    """
    columns = list(batch)
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    prompts, responses = [], []
    for messages in map(to_messages, rows):
        prompt, response = _render(messages, tokenizer)
        prompts.append(prompt)
        responses.append(response)
    return {
        "prompt_ids": tokenizer(prompts, add_special_tokens=False)["input_ids"],
        "response_ids": tokenizer(responses, add_special_tokens=False)["input_ids"],
    }


def render_prompt(turns: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text before an answer: the turns in the chat template with the assistant's header, or lines without one."""
    if tokenizer.chat_template is None:
        return (tokenizer.bos_token or "") + "\n".join(turn["content"] for turn in turns) + "\n"
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)


def _render(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    prompt = render_prompt(messages[:-1], tokenizer)
    if tokenizer.chat_template is None:
        return prompt, messages[-1]["content"] + tokenizer.eos_token
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    if not whole.startswith(prompt):
        raise ValueError(
            "The chat template must render a conversation as its prompt, with the assistant's header, followed by the "
            f"answer (got {whole!r}, which does not start with {prompt!r}). Set another `tokenizer.chat_template`."
        )
    return prompt, whole[len(prompt) :]


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
    >>> from trainers.sft_collator import MaskedDiffusionSFTCollator
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
