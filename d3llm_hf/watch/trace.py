"""What happened in one call of `generate`: which token was decided in which forward, for people to look at.

A forward decides positions, so that a canvas of any forward is known from the last one and the step map. Only what
lies behind the first stop token goes away: a trace keeps it for the forwards before. Where a token was replaced
(`edit_threshold`), a trace shows the last one from the forward that decided its position on; where it was taken back
(`"wino"`), it shows it from the forward that decided it for good.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..text import encode_text
from .row_text import UNFINISHED
from .streamers import _mask_token_id, stream_generate


FORMAT = 1


@dataclass(frozen=True)
class Piece:
    """The text of neighbouring tokens that only together are characters; nearly always of one token.

    Args:
        tokens (`int`): how many, at least one.
        text (`str`): of all of them; empty for an undecided position.
        special (`bool`): a control token, such as one that ends the answer.
    """

    tokens: int
    text: str
    special: bool = False


@dataclass(frozen=True)
class Trace:
    """One answer and how it came about: C positions that were ever seen on the canvas, F forwards.

    Args:
        model (`str`): its name, for people.
        prompt (`str`): as it was written, without a chat template.
        settings: arguments of `generate`, with the method where none was given; values that JSON knows, or their text.
        tokens (`(C,)` int): token ids, -1 where none was decided.
        step_map (`(C,)` int): the forward, from 1, that decided each; -1 where none did.
        lengths (`(F,)` int): positions of the canvas after each forward, up to the first decided stop token.
        seconds (`(F,)` float): from the start of the decoding to the end of each forward.
        pieces: the text of the positions, in order.
        answer_tokens (`int`): tokens before the first stop token.
        positions_computed (`int`, *optional*): pushed through the model; `None` while the generation is at work, or
            where it was stopped.
    """

    model: str
    prompt: str
    settings: dict[str, Any]
    tokens: list[int]
    step_map: list[int]
    lengths: list[int]
    seconds: list[float]
    pieces: list[Piece]
    answer_tokens: int
    positions_computed: int | None = None

    @property
    def forwards(self) -> int:
        """Forwards that the answer took."""
        return len(self.lengths)

    @property
    def tokens_per_forward(self) -> float:
        """Tokens before the first stop token, over the forwards."""
        return self.answer_tokens / max(self.forwards, 1)

    @property
    def tokens_per_second(self) -> float:
        """Tokens before the first stop token, over the time of decoding."""
        return self.answer_tokens / max(self.seconds[-1] if self.seconds else 0.0, 1e-9)

    @property
    def text(self) -> str:
        """The answer, without control tokens."""
        shown, at = [], 0
        for piece in self.pieces:
            if at < self.length(self.forwards) and not piece.special:
                shown.append(piece.text)
            at += piece.tokens
        return "".join(shown)

    def length(self, forward: int) -> int:
        """Positions of the canvas after so many forwards."""
        if forward < 0 or forward > self.forwards:
            raise ValueError(f"`forward` must be in 0...{self.forwards} (got {forward}). Pass one of the trace.")
        return self.lengths[forward - 1] if forward else max(self.lengths, default=0)

    def canvas(self, forward: int) -> list[int]:
        """Token ids of the canvas after so many forwards, -1 where undecided."""
        shown = zip(self.tokens[: self.length(forward)], self.step_map, strict=False)
        return [token if 0 < step <= forward else -1 for token, step in shown]

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps({"format": FORMAT} | dataclasses.asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Trace":
        """The trace that `to_json` wrote.

        Raises:
            ValueError: for text that is none.
        """
        try:
            values = json.loads(text)
            written = values.pop("format")
            pieces = [Piece(**piece) for piece in values.pop("pieces")]
            if written != FORMAT:
                raise KeyError(written)
            return cls(**values, pieces=pieces)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"`text` must be what `Trace.to_json` wrote, of format {FORMAT} (got {text[:40]!r}). Record it again."
            ) from error


class Recording(Iterator[int]):
    """A generation at work, and its trace so far. Leaving it (`with`, `close`) stops the generation.

    Iterating gives the number of each forward when it is done.

    Args:
        model: one with this library's `generate`.
        tokenizer: its tokenizer.
        prompt (`str`): what the trace shows as the prompt.
        inputs: the encoded prompt, one row, for example of `encode_chat`; `encode_text(prompt)` when unset.
        name (`str`, *optional*): of the model, for people; that of its config when unset.
        settings: arguments of `generate`.

    Raises:
        ValueError, TypeError: for several rows or gaps to fill; what `generate` refuses, some of it while iterating.
    """

    def __init__(self, model, tokenizer, prompt: str, inputs=None, *, name: str | None = None, **settings):
        inputs = encode_text(tokenizer, prompt) if inputs is None else inputs
        _check_inputs(inputs, settings)
        chosen = {key: value for key, value in settings.items() if key != "generation_config"}
        config, _ = model._prepare_generation_config(settings.get("generation_config"), **chosen)
        self._tokenizer, self._prompt = tokenizer, prompt
        self._name = name or model.config._name_or_path or type(model).__name__
        self._settings = {"decoding_method": config.method_of(model.traits)} | settings
        self._mask = _mask_token_id(model, settings)
        self._prefix: list[int] = []
        self._tokens: list[int] = []
        self._steps: list[int] = []
        self._lengths: list[int] = []
        self._seconds: list[float] = []
        self._output: Any = None
        tensors = {key: value.to(model.device) for key, value in inputs.items()}
        self._stream = stream_generate(model, tokenizer, **tensors, **settings)

    def __next__(self) -> int:
        try:
            update = next(self._stream)
        except StopIteration:
            self._finish()
            raise
        self._prefix += update.tokens
        canvas = self._prefix + (update.draft_tokens or [])
        new = len(canvas) - len(self._tokens)
        self._tokens += [-1] * new
        self._steps += [-1] * new
        forward = len(self._lengths) + 1
        for position, token in enumerate(canvas):
            if token == self._mask:
                self._tokens[position] = self._steps[position] = -1
            else:
                self._tokens[position] = token
                if self._steps[position] < 0:
                    self._steps[position] = forward
        self._lengths.append(len(canvas))
        self._seconds.append(round(update.seconds, 6))
        return forward

    def trace(self) -> Trace:
        """What is known by now; all of it once the iteration has ended."""
        output, decided = self._output, len([step for step in self._steps[: self._end] if step > 0])
        if output is not None:
            decided = int(output.num_tokens[0])
        return Trace(
            model=self._name,
            prompt=self._prompt,
            settings={key: _plain(value) for key, value in self._settings.items()},
            tokens=list(self._tokens),
            step_map=list(self._steps),
            lengths=list(self._lengths),
            seconds=list(self._seconds),
            pieces=text_pieces(self._tokenizer, self._tokens),
            answer_tokens=decided,
            positions_computed=None if output is None else int(output.positions_computed[0]),
        )

    def close(self) -> None:
        """Stops the generation and waits for its thread."""
        self._stream.close()

    def __enter__(self) -> "Recording":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close()

    @property
    def decided(self) -> int:
        """Positions that are decided by now."""
        return len([step for step in self._steps if step > 0])

    @property
    def _end(self) -> int:
        return self._lengths[-1] if self._lengths else 0

    def _finish(self) -> None:
        """Without `early_stop`, forwards behind a final answer tell nothing, but they are counted."""
        self._output = self._stream.output
        silent = 0 if self._output is None else int(self._output.num_forwards[0]) - len(self._lengths)
        if silent > 0:
            self._lengths += self._lengths[-1:] * silent
            self._seconds += self._seconds[-1:] * silent


def record(model, tokenizer, prompt: str, inputs=None, *, name: str | None = None, **settings) -> Trace:
    """Generates, and gives the trace of it; arguments and errors are those of [`Recording`]."""
    with Recording(model, tokenizer, prompt, inputs, name=name, **settings) as recording:
        for _ in recording:
            pass
        return recording.trace()


def text_pieces(tokenizer, tokens: list[int]) -> list[Piece]:
    """The text of a canvas by position. Tokens that hold parts of a character are one piece, whose text is whole.

    A text is decoded with the piece before it, since some tokenizers write the first word without its space.

    Args:
        tokens (`(C,)` int): token ids, -1 where undecided.
    """
    special = set(tokenizer.all_special_ids)

    def decode(first: int, behind: int) -> str:
        return tokenizer.decode(tokens[first:behind], clean_up_tokenization_spaces=False)

    pieces: list[Piece] = []
    context = start = 0
    for at, token in enumerate(tokens):
        if token < 0 or token in special:
            pieces.append(Piece(1, "" if token < 0 else decode(at, at + 1), token >= 0))
            context = start = at + 1
            continue
        before, text = decode(context, start) if context < start else "", decode(context, at + 1)
        ends = at + 1 == len(tokens) or tokens[at + 1] < 0 or tokens[at + 1] in special
        if ends or (text.startswith(before) and len(text) > len(before) and not text.endswith(UNFINISHED)):
            pieces.append(Piece(at + 1 - start, text[len(before) :]))
            context, start = (at + 1, at + 1) if ends else (start, at + 1)
    return pieces


def _check_inputs(inputs: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    rows = len(inputs["input_ids"])
    if rows != 1:
        raise ValueError(f"`inputs` must be one row (got {rows}). Record the rows one by one.")
    if settings.get("infill") or any(source.get("infill_mask") is not None for source in (inputs, settings)):
        raise ValueError("`inputs` must have no gaps to fill (got some): a trace shows what follows a prompt.")
    if settings.get("num_return_sequences", 1) != 1:
        raise ValueError(
            f"`num_return_sequences` must be 1 in a trace (got {settings['num_return_sequences']}). Leave it out."
        )


def _plain(value: Any) -> Any:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return str(value)
    return value
