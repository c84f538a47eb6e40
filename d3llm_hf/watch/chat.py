"""A conversation with a model: its history, its settings, and one answer at a time as it is decided."""

import time
from collections.abc import Iterator
from typing import Any

from ..models.generation_config_d3llm import D3LLMGenerationConfig
from ..models.methods import CACHE_FIELDS, METHODS
from ..text import encode_chat
from .streamers import CanvasUpdate, GenerationStream, stream_generate


DEFAULT_NEW_TOKENS = 128  # as `d3llm generate`

# Arguments of `generate` that a chat gives itself or has no use for, and why.
REFUSED = {
    "max_length": "the prompt grows from turn to turn; set `max_new_tokens`",
    "num_return_sequences": "a turn has one answer",
    "return_dict_in_generate": "a chat needs the counts",
    "infill": "a message has no gaps",
    "max_time": "an answer can be stopped at any time",
}


class Turn(Iterator[CanvasUpdate]):
    """An answer on its way: an iterator over what each forward brings; see [`Chat.ask`].

    Args:
        chat: the conversation that remembers the answer.
        message: what the user wrote.
        stream: the generation.
        left_out: earlier turns that were not sent, since they no longer fit.

    Attributes:
        text (`str`): what is decided so far, from the left.
        tokens (`int`): tokens of it, stop token included.
        stopped (`bool`): whether the answer was stopped before its end.
        seconds (`float`): that the answer took; `None` until its end.
    """

    def __init__(self, chat: "Chat", message: str, stream: GenerationStream, left_out: int):
        self.left_out = left_out
        self.text, self.tokens = "", 0
        self.stopped = False
        self.seconds: float | None = None
        self._chat, self._message, self._stream = chat, message, stream
        self._start = time.perf_counter()

    @property
    def output(self) -> Any:
        """What `generate` returned, with its counts; `None` until the end, and of a stopped answer."""
        return None if self.stopped else self._stream.output

    def __next__(self) -> CanvasUpdate:
        try:
            update = next(self._stream)
        except StopIteration:
            self._end()
            raise
        except Exception:  # there is no answer to remember
            self._chat._forget(self)
            raise
        self.text += update.text
        self.tokens += len(update.tokens)
        return update

    def stop(self) -> None:
        """Ends the answer at the next forward. What is decided is kept as the answer; a turn without any is dropped.

        Does nothing once the answer has ended.
        """
        if self.seconds is None and self._chat._turn is self:
            self.stopped = True
            self._stream.close()
            self._end()

    def _end(self) -> None:
        if self.seconds is None:
            self.seconds = time.perf_counter() - self._start
            self._chat._remember(self)


class Chat:
    """A conversation with a masked diffusion language model.

        chat = Chat(model, tokenizer, entropy_threshold=0.3)
        for update in (turn := chat.ask(question)):
            print(turn.text, update.draft)
        print(turn.output.tokens_per_forward)

    What a user writes never becomes a control token ([`encode_chat`]). A turn enters the history when its answer has
    ended. Where history, message and answer together exceed the model's positions, the oldest turns are not sent.

    Args:
        model: one with this library's `generate`.
        tokenizer: a fast tokenizer with a chat template.
        system (`str`, *optional*): system message.
        history (`int`, *optional*): earlier turns that are sent at most; all that fit when unset.
        settings: arguments of `generate` for every answer; see [`Chat.set`].

    Attributes:
        messages (`list[dict[str, str]]`): the finished turns, `user` and `assistant` by turns, without the system
            message.
        settings (`dict[str, Any]`): what was set.

    Raises:
        ValueError, TypeError: without a chat template, for a system message that it refuses, a negative `history`, or
            settings that `generate` refuses.
    """

    def __init__(self, model, tokenizer, *, system: str | None = None, history: int | None = None, **settings):
        if history is not None and (isinstance(history, bool) or not isinstance(history, int) or history < 0):
            raise ValueError(
                f"`history` must be a number of turns (got {history!r}). Pass 0 to send every message by itself, or "
                "leave it unset."
            )
        self.model, self.tokenizer, self.history = model, tokenizer, history
        self.messages: list[dict[str, str]] = []
        self.settings: dict[str, Any] = {}
        self.system: str | None = None
        self._turn: Turn | None = None
        self.set_system(system)
        self.set(**settings)

    # ---- settings ------------------------------------------------------------------------------------------------

    def set_system(self, text: str | None) -> None:
        """Sets the system message, or removes it. It counts from the next answer on.

        Raises:
            ValueError, TypeError: what the chat template or the tokenizer refuses; nothing has changed then.
        """
        encode_chat(self.tokenizer, [*_system(text), _message("user", "a")])
        self.system = text

    def set(self, **settings) -> None:
        """Sets arguments of `generate`, for the answers to come; None goes back to the checkpoint's value.

        Raises:
            ValueError, TypeError: what `generate` refuses of them together, names that it does not know, or arguments
                that have no meaning in a chat; nothing has changed then.
        """
        chosen = {name: value for name, value in (self.settings | settings).items() if value is not None}
        self._config(chosen)
        self.settings = chosen

    def use_method(self, name: str) -> dict[str, Any]:
        """Changes the decoding method. Settings of the method before it, its cache included, are forgotten.

        Returns:
            what was forgotten.

        Raises:
            ValueError: for an unknown method; nothing has changed then.
        """
        of_methods = CACHE_FIELDS.union(*METHODS.values(), ["kv_cache"])
        forgotten = {name: value for name, value in self.settings.items() if name in of_methods}
        self.set(**dict.fromkeys(forgotten), decoding_method=name)
        return forgotten

    def effective(self) -> dict[str, Any]:
        """All decoding settings with the values that count now, whoever said them; None is unset."""
        config = self._config(self.settings)
        method = {"decoding_method": config.method_of(self.model.traits)}
        values = config._values(self.model.traits)
        names = ("max_new_tokens", "do_sample", *(("temperature", "top_p", "top_k") if config.do_sample else ()))
        return method | values | {name: getattr(config, name) for name in names} | self.settings

    def _config(self, settings: dict[str, Any]) -> D3LLMGenerationConfig:
        """The config that `generate` would make of some settings, checked."""
        for name in settings:
            if name in REFUSED:
                raise ValueError(
                    f"`{name}` has no meaning in a chat: {REFUSED[name]} (got {settings[name]!r}). Leave it unset."
                )
        length = self._max_new_tokens(settings)
        config = self.model.check_settings(**(settings | {"max_new_tokens": length}))
        # Some options of transformers are checked by the processors that they become.
        self.model._prepare_special_tokens(config, True, device="cpu")
        self.model._get_logits_processor(config, input_ids_seq_length=1, device="cpu")
        return config

    def _max_new_tokens(self, settings: dict[str, Any]) -> int:
        own = self.model.generation_config.max_new_tokens
        length = settings.get("max_new_tokens", DEFAULT_NEW_TOKENS if own is None else own)
        limit = self._positions
        if type(length) is not int or length < 1 or (limit is not None and length >= limit):
            rule = "a positive integer" + ("" if limit is None else f" less than the model's {limit} positions")
            raise ValueError(f"`max_new_tokens` must be {rule} (got {length!r}). Set another number.")
        return length

    @property
    def _positions(self) -> int | None:
        return self.model.max_positions

    # ---- turns ---------------------------------------------------------------------------------------------------

    def ask(self, message: str) -> Turn:
        """Begins the answer to a message. An answer that is still on its way is stopped.

        Args:
            message (`str`): what the user says; special tokens in it are ordinary characters.

        Returns:
            [`Turn`]: reading it to its end, or `Turn.stop`, makes the turn part of the history.

        Raises:
            ValueError, TypeError: for a message that is empty or no text, or with which an answer does not fit into
                the model's positions even without earlier turns. What `generate` raises comes from `next`.
        """
        self._settle()
        if isinstance(message, str) and not message.strip():
            raise ValueError("`message` must not be empty (got nothing but space). Write something.")
        length = self._max_new_tokens(self.settings)
        inputs, left_out = self._encode(message, length)
        stream = stream_generate(
            self.model,
            self.tokenizer,
            **inputs.to(self.model.device),
            **(self.settings | {"max_new_tokens": length}),
        )
        self._turn = Turn(self, message, stream, left_out)
        return self._turn

    def undo(self) -> None:
        """Takes back the last turn.

        Raises:
            ValueError: when there is none.
        """
        self._settle()
        if not self.messages:
            raise ValueError("`undo` needs a turn to take back (got an empty conversation).")
        del self.messages[-2:]

    def reset(self) -> None:
        """Forgets all turns; settings and system message stay."""
        self._settle()
        self.messages = []

    def conversation(self) -> list[dict[str, str]]:
        """The whole conversation, system message first, in the form of conversational data sets."""
        self._settle()
        return [*_system(self.system), *map(dict, self.messages)]

    def _encode(self, message: str, length: int):
        """The prompt, without the oldest turns as far as they do not fit, and how many these are."""
        asked, limit = _message("user", message), self._positions
        first = 0 if self.history is None else max(0, len(self.messages) - 2 * self.history)
        for start in range(first, len(self.messages) + 1, 2):
            inputs = encode_chat(self.tokenizer, [*_system(self.system), *self.messages[start:], asked])
            count = inputs["input_ids"].shape[1]
            if limit is None or count + length <= limit:
                return inputs, (start - first) // 2
        raise ValueError(
            f"`message` must leave room for the answer in the model's {limit} positions (got {count} tokens with "
            f"template{' and system message' if self.system else ''}, and `max_new_tokens` {length}). Shorten it, or "
            "lower `max_new_tokens`."
        )

    def _settle(self) -> None:
        if self._turn is not None:
            self._turn.stop()

    def _forget(self, turn: Turn) -> None:
        if self._turn is turn:
            self._turn = None

    def _remember(self, turn: Turn) -> None:
        self._forget(turn)
        if turn.text or not turn.stopped:
            self.messages += [_message("user", turn._message), _message("assistant", turn.text)]


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _system(text: str | None) -> list[dict[str, str]]:
    return [] if text is None else [_message("system", text)]


__all__ = ["Chat", "Turn"]
