"""What is sent back: OpenAI's objects, with the counts of diffusion decoding beside them."""

import json
import secrets
import time
from typing import Any

from .errors import ApiError
from .jobs import Answer


DONE = "data: [DONE]\n\n"


class Reply:
    """The reply to one request.

    Args:
        name (`str`): of the model.
        is_chat (`bool`): a chat completion, not a completion.
    """

    def __init__(self, name: str, is_chat: bool):
        self.is_chat, self.object = is_chat, "chat.completion" if is_chat else "text_completion"
        prefix = "chatcmpl" if is_chat else "cmpl"
        self._frame = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": name}

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The body of a reply that is no stream."""
        said = {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
        choice = {"index": 0, "finish_reason": answer.finish_reason, "logprobs": None}
        choice |= said if self.is_chat else {"text": answer.text}
        return {"object": self.object, **self._frame, "choices": [choice], "usage": usage(answer)}

    def first(self) -> str:
        """The event with which the stream of a chat begins."""
        return self._chunk([self._choice({"role": "assistant", "content": ""})]) if self.is_chat else ""

    def text(self, text: str) -> str:
        """The event of newly final text."""
        return self._chunk([self._choice({"content": text}, text)]) if text else ""

    def draft(self, draft: str) -> str:
        """The event of a draft: a chunk without choices, so that clients which do not ask for it see no text."""
        return "event: draft\n" + self._chunk([], d3llm={"draft": draft})

    def last(self, answer: Answer, include_usage: bool) -> str:
        """The events that end a stream."""
        ending = self._chunk([self._choice({}, "", answer.finish_reason)])
        return ending + (self._chunk([], usage=usage(answer)) if include_usage else "") + DONE

    def _choice(self, delta: dict[str, str], text: str = "", finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "finish_reason": finish_reason, "logprobs": None}
        return choice | ({"delta": delta} if self.is_chat else {"text": text})

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> str:
        kind = self.object + (".chunk" if self.is_chat else "")
        return event({"object": kind, **self._frame, "choices": choices, **more})


def event(content: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def failure(error: ApiError) -> str:
    """The event of an error in a stream that had begun."""
    return event(error.body)


def usage(answer: Answer) -> dict[str, Any]:
    """OpenAI's counts, and forwards and tokens per forward as `generate` reports them."""
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
        "forwards": answer.forwards,
        "tokens_per_forward": answer.completion_tokens / answer.forwards,
    }
