"""Conversations of a data set: read strictly, written by the chat template, and encoded as inference encodes them."""

import json
import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from d3llm_hf.text import check_roles, check_text, content_spans, render_chat, rendered_ids


Turns = list[dict[str, Any]]

_ROLES = ("system", "user", "assistant")
_FOREIGN_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
_CALLS = ("tool_calls", "function_call")
_OF_TEMPLATES = ("tools", "chat_template_kwargs")  # columns that other trainers hand to the chat template


def to_messages(example: Mapping[str, Any], chat_template: str | None = None) -> Turns:
    """The conversation of one example with columns `messages`, or `prompt` and `completion`.

    Args:
        example: a row.
        chat_template (`str`, *optional*): one that writes `tool_calls` allows turns with them.

    Raises:
        ValueError: If it has neither, holds something else than turns of text, or does not end with an assistant turn.
    """
    check_template_columns(example)
    if "messages" in example:
        messages = as_turns(example["messages"], "messages", chat_template=chat_template)
    elif "prompt" in example and "completion" in example:
        messages = [
            *as_turns(example["prompt"], "prompt", "user", chat_template),
            *as_turns(example["completion"], "completion", "assistant", chat_template),
        ]
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


def check_template_columns(example: Mapping[str, Any]) -> None:
    """Refuse what would be left out of a conversation that is written with it elsewhere.

    Raises:
        ValueError: naming the column of a conversation in turns.
    """
    if all(isinstance(example.get(name), str | None) for name in ("messages", "prompt")):
        return
    for name in _OF_TEMPLATES:
        value = example.get(name)
        if hasattr(value, "tolist"):
            value = value.tolist()
        if value not in (None, "", "[]", "{}", [], {}) and not _is_unset(value):
            raise ValueError(
                f"`{name}` must be unset (got {_short(value)}): the chat template is not given it. Write it as text "
                "into a system turn, or remove the column."
            )


def _is_unset(value: Any) -> bool:
    """Whether a mapping holds nothing, as where only other rows have its keys."""
    return isinstance(value, Mapping) and all(each is None for each in value.values())


def as_turns(value: Any, column: str, role: str | None = None, chat_template: str | None = None) -> Turns:
    """The turns of a column, each with the text of its content.

    Args:
        value: a list of turns, or a text where the column has a `role`.
        column (`str`): named in errors.
        role (`str`, *optional*): of a turn that is given as text alone.
        chat_template (`str`, *optional*): see [`to_messages`].

    Raises:
        ValueError: for anything else; null, numbers and other key names among it.
    """
    if isinstance(value, str) and role is not None:
        check_text(value, column)
        return [{"role": role, "content": value}]
    if hasattr(value, "tolist"):  # an array, of a data set with another format
        value = value.tolist()
    if not isinstance(value, list | tuple):
        kinds = "a list of turns" if role is None else "text, or a list of turns"
        raise ValueError(
            f"`{column}` must be {kinds} with `role` and `content` (got {_short(value)}). Leave such rows out, or "
            "convert them."
        )
    return [_turn(turn, f"turn {number} of `{column}`", chat_template) for number, turn in enumerate(value)]


def encode_prompt(turns: Turns, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of what stands before an answer, where special tokens in a content are the characters that they are."""
    text = render_prompt(turns, tokenizer)
    if tokenizer.chat_template is None:
        start = len(tokenizer.bos_token or "")
        return rendered_ids(tokenizer, text, [(start, len(text))])
    spans = content_spans(turns, text, lambda others: _written(others, tokenizer, for_answer=True))
    return rendered_ids(tokenizer, text, spans)


def encode_answer(messages: Turns, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of a conversation's last turn, its end included; see [`encode_prompt`]."""
    prompt, answer = render(messages, tokenizer)
    if tokenizer.chat_template is None:
        return rendered_ids(tokenizer, answer, [(0, len(messages[-1]["content"]))])
    whole = prompt + answer
    spans = content_spans(messages, whole, lambda others: _written(others, tokenizer, for_answer=False))
    return rendered_ids(tokenizer, whole, spans, start=len(prompt))


def render_prompt(turns: Turns, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text before an answer: the turns in the chat template with the assistant's header, or lines without one."""
    if tokenizer.chat_template is None:
        return (tokenizer.bos_token or "") + "\n".join(turn["content"] for turn in turns) + "\n"
    return _written(turns, tokenizer, for_answer=True)


def render(messages: Turns, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """Prompt and answer of a conversation as texts.

    Raises:
        ValueError: If the chat template refuses the conversation, or does not write it as its prompt plus the answer.
    """
    prompt = render_prompt(messages[:-1], tokenizer)
    if tokenizer.chat_template is None:
        return prompt, messages[-1]["content"] + tokenizer.eos_token
    whole = _written(messages, tokenizer, for_answer=False)
    if not whole.startswith(prompt):
        raise ValueError(
            "The chat template must render a conversation as its prompt, with the assistant's header, followed by the "
            f"answer (got {whole!r}, which does not start with {prompt!r}). Set another `tokenizer.chat_template`."
        )
    return prompt, whole[len(prompt) :]


def spells_control_tokens(messages: Turns, special: re.Pattern) -> bool:
    """Whether a content holds the characters of a special token.

    Args:
        messages: the turns.
        special: finds special tokens, see `d3llm_hf.text.special_tokens`.

    Raises:
        ValueError: for one anywhere else in a turn, where it cannot be told from the template's own.
    """
    check_roles(messages, special)
    for turn in messages:
        others = {name: value for name, value in turn.items() if name not in ("role", "content") and value}
        found = special.search(json.dumps(others, ensure_ascii=False, default=str)) if others else None
        if found:
            raise ValueError(
                f"Special tokens may be spelt in the `content` of a turn only (got {found.group()!r} in "
                f"{sorted(others)}). Take it out, or set `control_tokens_in_text`."
            )
    return any(special.search(turn["content"]) for turn in messages)


def _written(turns: Turns, tokenizer: PreTrainedTokenizerBase, *, for_answer: bool) -> str:
    return render_chat(tokenizer, turns, add_generation_prompt=for_answer)


def _turn(turn: Any, where: str, chat_template: str | None) -> dict[str, Any]:
    if not isinstance(turn, Mapping) or not {"role", "content"} <= turn.keys():
        raise ValueError(
            f"A turn must have `role` and `content` (got {_short(turn)} as {where}). Rename its keys, and roles such "
            "as `human` and `gpt` to `user` and `assistant`."
        )
    _check_role(turn["role"], where)
    calls = [name for name in _CALLS if turn.get(name)]
    for name in calls:
        if name not in str(chat_template or ""):
            raise ValueError(
                f"`{name}` must be unset (got {_short(turn[name])} in {where}): the chat template does not write it, "
                "and it would not be learnt. Write the call as text into `content`."
            )
    return dict(turn) | {"content": "" if turn["content"] is None and calls else _text(turn["content"], where)}


def _check_role(role: Any, where: str) -> None:
    known = role if not isinstance(role, str) else _FOREIGN_ROLES.get(role.lower(), role.lower())
    if not isinstance(role, str) or not role.strip() or (known in _ROLES and known != role):
        raise ValueError(
            f"`role` must be one that the model is used with, such as `user` or `assistant` (got {role!r} in "
            f"{where}). Rename it."
        )


def _text(content: Any, where: str) -> str:
    """The text of a content, which may come in parts."""
    if hasattr(content, "tolist"):
        content = content.tolist()
    if isinstance(content, list | tuple) and content:
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise ValueError(
                    f"`content` must be text, or parts of type 'text' (got {_short(part)} in {where}): these models "
                    "read nothing else. Leave such rows out, or take the part away."
                )
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(
            f"`content` must be text (got {_short(content)} in {where}): it would be learnt as it is written. Leave "
            "such rows out, or put the text there; an answer of no text is ''."
        )
    check_text(content, "content")
    return content


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
