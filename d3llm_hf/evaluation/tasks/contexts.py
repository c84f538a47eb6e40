"""Contexts of lm-eval's tasks: conversations as text, and text as token ids.

lm-eval has conversations written as text before it asks for their ids. What a document says must not become a control
token on the way, so that it is remembered which part of a text is a document's, and which the chat template's.
"""

from typing import Any

from ...text import content_spans, rendered_ids, special_tokens, surroundings


class Contexts:
    """Writes and encodes the contexts of one tokenizer.

    Args:
        tokenizer: a fast tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._special = special_tokens(tokenizer)
        self._written: dict[str, list[tuple[int, int]]] = {}  # text -> where its contents lie, if they spell anything
        self._lengths: set[int] = set()

    def write(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as a text; without `add_generation_prompt` its last message is the answer's beginning.

        Raises:
            ValueError: when a message spells a special token and the template rewrites it.
        """

        def render(turns: list[dict[str, str]]) -> str:
            return self.tokenizer.apply_chat_template(
                turns,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

        text = render(messages)
        spelt = any(self._special.search(turn["content"]) for turn in messages)
        spans = content_spans(messages, text, render) if spelt else []
        for written in (text, text.rstrip()):  # lm-eval moves spaces at the end of a context to what follows
            self._written[written] = spans
            self._lengths.add(len(written))
        return text

    def encode(self, text: str, **special: bool) -> list[int]:
        """Ids of a context, or of one and what follows it.

        Args:
            text (`str`): special tokens are control tokens where the chat template wrote them, and else characters.
            special: `add_special_tokens` of the tokenizer.
        """
        if not any(self._special.search(text, start, end) for start, end in self._foreign(text)):
            return self.tokenizer(text, **special)["input_ids"]
        before, behind = surroundings(self.tokenizer, **special)
        return before + rendered_ids(self.tokenizer, text, self._foreign(text)) + behind

    def _foreign(self, text: str) -> list[tuple[int, int]]:
        """From where to where a text is not the template's."""
        if text in self._written:
            return self._written[text]
        for length in sorted(self._lengths, reverse=True):
            if text[:length] in self._written:
                return [*self._written[text[:length]], (length, len(text))]
        # A control token at the very beginning is that of a template which was applied elsewhere. Whatever was written
        # here for an evaluation before says nothing about this text.
        return [] if self._special.match(text) else [(0, len(text))]
