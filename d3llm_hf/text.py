"""Text to token ids where what a user wrote can never become a control token.

Tokenizers read `<|eot_id|>` in a text as the control token of that name, wherever it came from. A message could so end
its own turn, open another one, or plant mask tokens for the model to fill in. Here the special tokens of the chat
template are control tokens, and those in a message are the characters they are written with.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import BatchEncoding


def encode_text(tokenizer, text: str):
    """Encodes plain text, as one row.

    Args:
        tokenizer: a fast tokenizer of transformers.
        text (`str`): the text; special tokens in it are encoded as ordinary characters.

    Returns:
        `BatchEncoding` with `input_ids` and `attention_mask` of shape `(1, P)`.

    Raises:
        TypeError: when `text` is no string.
        ValueError: when it encodes to nothing, or this tokenizer cannot keep the special tokens out.
    """
    check_text(text, "text")
    return _encoding(tokenizer, _plain_ids(tokenizer, text, add_special_tokens=True))


def encode_infill(
    tokenizer, parts: Sequence[str | int], mask_token_id: int | None = None, *, add_special_tokens: bool = True
):
    """Encodes a text with gaps, as one row: what `generate` takes to fill them.

    Each piece of text is tokenized by itself. A fixed prompt and suffix are `[prompt, n, suffix]`. Several rows can
    be padded on the left as any others if `generate` is called with `infill=True`, which finds the mask tokens.

    Args:
        tokenizer: a fast tokenizer of transformers.
        parts: strings, of which special tokens are encoded as ordinary characters, and integers: a gap of so many
            positions each.
        mask_token_id (`int`, *optional*): stands in the gaps; the tokenizer's when unset.
        add_special_tokens (`bool`): put around the whole what the tokenizer puts around any text; False for the rest
            of a text that has begun, such as an answer behind [`encode_chat`].

    Returns:
        `BatchEncoding` with `input_ids`, `attention_mask` and `infill_mask` (bool, True in the gaps), `(1, P)` each.

    Raises:
        TypeError: when `parts` is a string or holds something else than strings and integers.
        ValueError: without a gap or a mask token, for a gap of less than one position, or when this tokenizer cannot
            keep the special tokens out.
    """
    mask_token_id = tokenizer.mask_token_id if mask_token_id is None else mask_token_id
    if mask_token_id is None:
        raise ValueError(
            "`mask_token_id` must be given for a tokenizer without a mask token (got None). Pass the model's."
        )
    if isinstance(parts, str):
        raise TypeError('`parts` must be a sequence of strings and integers (got str). Pass ["Paris is ", 3, "."].')
    before, behind = surroundings(tokenizer, add_special_tokens=add_special_tokens)
    ids, holes = list(before), [False] * len(before)
    for part in parts:
        if isinstance(part, bool) or not isinstance(part, str | int):
            raise TypeError(f"`parts` must hold strings and integers only (got {type(part).__name__}). Take it out.")
        if isinstance(part, int) and part < 1:
            raise ValueError(f"`parts` must have gaps of at least one position (got {part}). Leave it out.")
        piece = [mask_token_id] * part if isinstance(part, int) else _plain_ids(tokenizer, part)
        ids += piece
        holes += [isinstance(part, int)] * len(piece)
    if not any(holes):
        raise ValueError("`parts` must hold at least one gap (got none). Put an integer where text is missing.")
    encoding = _encoding(tokenizer, ids + behind)
    encoding["infill_mask"] = encoding["input_ids"].new_tensor([holes + [False] * len(behind)]).bool()
    return encoding


def surroundings(tokenizer, **special: bool) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and behind any text: those around a letter show which.

    Args:
        tokenizer: of transformers.
        special: `add_special_tokens` of the call, where it is given.
    """
    letter = tokenizer("a", return_special_tokens_mask=True, **special)
    inside = [place for place, is_special in enumerate(letter["special_tokens_mask"]) if not is_special]
    return letter["input_ids"][: inside[0]], letter["input_ids"][inside[-1] + 1 :]


def encode_chat(
    tokenizer, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True, **template_kwargs
):
    """Encodes a conversation with the tokenizer's chat template, as one row.

    Where no message holds a special token, the ids are those of `tokenizer.apply_chat_template`.

    Args:
        tokenizer: a fast tokenizer of transformers, with a chat template.
        messages: the turns, each `{"role": ..., "content": ...}` with string values.
        add_generation_prompt (`bool`): end with the header of the answer.
        template_kwargs: further variables of the template.

    Returns:
        `BatchEncoding` with `input_ids` and `attention_mask` of shape `(1, P)`.

    Raises:
        TypeError: when `messages` are no turns, or a role or content is no string.
        ValueError: without messages or template, when the template refuses them or one is no valid Unicode, when a
            role holds a special token, or when a message that holds one is rewritten by the template, so that it
            cannot be told from the template's own text.
    """
    _check_messages(messages)
    if not messages:
        raise ValueError("`messages` must hold at least one turn (got none). Pass [{'role': 'user', 'content': ...}].")
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "`tokenizer` must have a chat template (got one without). Set `tokenizer.chat_template`, or encode a "
            "plain prompt with `encode_text` (`d3llm generate` without `--chat`)."
        )
    for turn in messages:
        check_text(turn.get("role"), "role")
        check_text(turn.get("content"), "content")
    special = special_tokens(tokenizer)
    check_roles(messages, special)

    def render(turns) -> str:
        return render_chat(tokenizer, turns, add_generation_prompt=add_generation_prompt, **template_kwargs)

    rendered = render(messages)
    if not any(special.search(turn["content"]) for turn in messages):
        return _encoding(tokenizer, tokenizer(rendered, add_special_tokens=False)["input_ids"])
    return _encoding(tokenizer, rendered_ids(tokenizer, rendered, content_spans(messages, rendered, render)))


def check_roles(messages: Sequence[dict[str, Any]], special: re.Pattern) -> None:
    """Refuses a special token in a role: templates write roles between their own control tokens.

    Raises:
        ValueError: naming the role.
    """
    for turn in messages:
        if special.search(turn["role"]):
            raise ValueError(
                f"`role` must not hold a special token (got {turn['role']!r}). Use 'user' or 'assistant'."
            )


def render_chat(tokenizer, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool, **template_kwargs):
    """A conversation in the tokenizer's chat template, as text.

    Raises:
        ValueError: when the template refuses the conversation.
    """
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt, **template_kwargs
        )
    except TemplateError as error:
        raise ValueError(
            f"`messages` must be what the chat template takes (got the roles {[turn['role'] for turn in messages]}, "
            f"and the template says: {error}). Leave out what it refuses, often the system message."
        ) from error


def rendered_ids(tokenizer, rendered: str, spans: Sequence[tuple[int, int]], start: int = 0) -> list[int]:
    """Ids of a rendered conversation from the character `start` on.

    Args:
        tokenizer: a fast tokenizer of transformers.
        rendered (`str`): text in which special tokens are control tokens, but not in `spans`.
        spans: the characters from which to which somebody wrote, see [`content_spans`].
        start (`int`): the first character that is encoded.

    Raises:
        ValueError: when this tokenizer cannot keep the special tokens out.
    """
    ids: list[int] = []
    behind = [(first - start, end - start) for first, end in spans]
    for piece, is_control in _split(rendered[start:], behind, special_tokens(tokenizer)):
        ids += [tokenizer.convert_tokens_to_ids(piece)] if is_control else _plain_ids(tokenizer, piece)
    return ids


def encode_chats(tokenizer, chats: Sequence[Sequence[dict[str, str]]]):
    """Encodes conversations of one's own with the tokenizer's chat template, as rows that are padded on the left.

    Where the tokenizer names no token for padding, another stands there: the attention mask hides it.

    Args:
        tokenizer: of transformers, with a chat template.
        chats: the conversations; special tokens in them are control tokens, as `apply_chat_template` takes them.

    Returns:
        `BatchEncoding` with `input_ids` and `attention_mask` of shape `(B, P)`.
    """
    rows = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=True)["input_ids"]
    width = max(map(len, rows))
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    ids = [[pad] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return BatchEncoding({"input_ids": ids, "attention_mask": mask}, tensor_type="pt")


def _check_messages(messages: Any) -> None:
    """Refuses what is no conversation; several are encoded one by one."""
    if isinstance(messages, str):
        raise TypeError(
            "`messages` must be a sequence of turns (got str). Pass [{'role': 'user', 'content': ...}], or encode a "
            "plain prompt with `encode_text`."
        )
    if isinstance(messages, Mapping) or not isinstance(messages, Sequence):
        raise TypeError(
            f"`messages` must be a sequence of turns (got {type(messages).__name__}). Pass [{{'role': 'user', "
            "'content': ...}]."
        )
    for turn in messages:
        if isinstance(turn, list | tuple):
            raise TypeError(
                f"`messages` must be one conversation (got a batch of {len(messages)}). Encode them one by one, and "
                "pad them on the left with `tokenizer.pad`."
            )
        if not isinstance(turn, Mapping):
            raise TypeError(
                f"`messages` must hold turns (got {type(turn).__name__}). Pass [{{'role': 'user', 'content': ...}}]."
            )


def content_spans(messages: Sequence[dict[str, Any]], rendered: str, render) -> list[tuple[int, int]]:
    """Where each content lies in the rendered conversation: rendered again with placeholders, the rest must agree.

    Raises:
        ValueError: when the template rewrites a content, so that it cannot be followed.
    """
    # Private-use characters, which are in no template. What is empty stays so: a template may ask whether it is.
    placeholders = [f"\ue000{index}\ue001" if turn["content"] else "" for index, turn in enumerate(messages)]
    outline = render([turn | {"content": mark} for turn, mark in zip(messages, placeholders, strict=True)])
    spans, read, seen = [], 0, 0
    for turn, mark in zip(messages, placeholders, strict=True):
        if not mark:
            continue
        at = outline.find(mark, seen)
        start = read + at - seen
        # Templates often trim a message; other changes to it cannot be followed.
        content = next((c for c in (turn["content"], turn["content"].strip()) if rendered.startswith(c, start)), None)
        if at < 0 or content is None or rendered[read:start] != outline[seen:at]:
            raise _cannot_separate(turn["content"])
        spans.append((start, start + len(content)))
        read, seen = start + len(content), at + len(mark)
    if rendered[read:] != outline[seen:]:
        raise _cannot_separate(messages[-1]["content"])
    return spans


def _cannot_separate(content: str) -> ValueError:
    return ValueError(
        f"`content` must not hold special tokens with this chat template, which rewrites it (got {content[:80]!r}). "
        "Remove the special tokens from the message."
    )


def _split(text: str, spans: list[tuple[int, int]], special: re.Pattern):
    """Cuts `text` at the special tokens outside of `spans`: `(piece, is a control token)` in order."""
    read = 0
    for match in special.finditer(text):
        if any(match.start() < end and start < match.end() for start, end in spans):
            continue
        if match.start() > read:
            yield text[read : match.start()], False
        yield match.group(), True
        read = match.end()
    if read < len(text):
        yield text[read:], False


def special_tokens(tokenizer) -> re.Pattern:
    """Finds every control token of the tokenizer in a text, the longest first."""
    names = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    names |= set(tokenizer.all_special_tokens)
    # A pattern of nothing would match everywhere; `(?!)` matches nowhere.
    return re.compile("|".join(map(re.escape, sorted(filter(None, names), key=len, reverse=True))) or "(?!)")


def _plain_ids(tokenizer, text: str, *, add_special_tokens: bool = False) -> list[int]:
    """Ids of `text` with special tokens taken as ordinary characters."""
    around = tokenizer("", add_special_tokens=add_special_tokens)["input_ids"]
    ids = tokenizer(text, add_special_tokens=add_special_tokens, split_special_tokens=True)["input_ids"]
    control = set(tokenizer.convert_tokens_to_ids(sorted(set(special_tokens(tokenizer).findall(text)))))
    if control.intersection(ids) - set(around):
        raise ValueError(
            f"`text` must not hold special tokens with this tokenizer, which cannot split them (got {text[:80]!r}). "
            "Remove them, or use a fast tokenizer."
        )
    return ids


def _encoding(tokenizer, ids: list[int]):
    if not ids:
        raise ValueError("`text` must not be empty (got nothing to encode). Write a prompt.")
    # Not `tokenizer.pad`: one row needs no padding, and some tokenizers name no token for it.
    return BatchEncoding({"input_ids": [ids], "attention_mask": [[1] * len(ids)]}, tensor_type="pt")


def check_text(value: Any, name: str) -> None:
    """Refuses what is no string, and a string that holds bytes that were no text, as Python keeps them.

    Raises:
        TypeError, ValueError: naming `name`.
    """
    if not isinstance(value, str):
        raise TypeError(f"`{name}` must be a string (got {type(value).__name__}). Pass text only.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"`{name}` must be valid Unicode (got {value[:80]!r}). Convert its source to UTF-8."
        ) from None
