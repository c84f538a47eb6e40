"""Answers while they are decided: text of several rows for people, updates of the canvas for programs.

Both follow the protocol for batches of [`d3llm_hf.models.streaming.Stream`].
"""

import functools
import queue
import re
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TextIO

from .row_text import RowText
from .terminal import MASK_SIGN, printable


class BatchTextStreamer:
    """A streamer for `generate` that prints the answers of a batch, word by word as they become final.

    One row is printed as transformers' `TextStreamer` does. Of several rows, `[2] ` begins a line of row 2, and
    `[2]+` goes on with the line of row 2 that was left for another row; no printed line holds two rows.

        [0] First we add
        [1] Tom has
        [0]+ 8 and 7.

    Args:
        tokenizer: decodes the answers.
        skip_prompt (`bool`): do not print the prompts. Padding before a prompt of a batch is never printed.
        stream (`TextIO`, *optional*): where to print; stdout when unset. A terminal gets no control characters.
        decode_kwargs: of the tokenizer's `decode`, for example `skip_special_tokens=True`.
    """

    supports_batch = True

    def __init__(self, tokenizer, skip_prompt: bool = True, stream: TextIO | None = None, **decode_kwargs):
        self.tokenizer, self.decode_kwargs = tokenizer, decode_kwargs
        self.skip_prompt, self.stream = skip_prompt, stream
        self._reset()

    def _reset(self) -> None:
        self._texts: list[RowText] = []
        self._ended: set[int] = set()
        self._printing: int | None = None  # the row whose printed line is not ended yet
        self._in_line: set[int] = set()  # rows that are within a line of their text

    def put(self, value, row: int | None = None) -> None:
        """Takes the prompts `(B, P)`, and then newly decided tokens `(n,)` of a row."""
        if row is not None:
            self._give(self._texts[row].add(value.tolist()), row)
            return
        _check_first_put(self._texts)
        self._texts = [RowText(self.tokenizer, self.decode_kwargs, by_word=True) for _ in value]
        if not self.skip_prompt:
            for index, prompt in enumerate(value.tolist()):
                self._give(self._texts[index].add(self._without_padding(prompt)), index)

    def end_row(self, row: int) -> None:
        """Prints what was held back of a row."""
        self._ended.add(row)
        self.on_finalized_text(self._texts[row].finish(), row, row_end=True)

    def end(self) -> None:
        """Ends the rows that did not end by themselves, since the generation failed; ready for the next call."""
        for row in range(len(self._texts)):
            if row not in self._ended:
                self.end_row(row)
        self._reset()

    def on_finalized_text(self, text: str, row: int, row_end: bool = False) -> None:
        """Prints text that is final. Override it to send the text elsewhere.

        Args:
            text (`str`): what follows the text that this row had before; may be empty at the end of the row.
            row (`int`): index in the batch.
            row_end (`bool`): this is the row's last piece.
        """
        stream = sys.stdout if self.stream is None else self.stream
        if stream.isatty():
            text = printable(text)
        if len(self._texts) == 1:
            stream.write(text + "\n" * row_end)
        else:
            stream.write(self._lines(text, row, row_end))
        stream.flush()

    def _lines(self, text: str, row: int, row_end: bool) -> str:
        """The text as printed lines that each belong to one row."""
        out = ""
        for part in re.findall(r"[^\n]*\n|[^\n]+", text):
            if self._printing != row:
                out += "\n" * (self._printing is not None) + f"[{row}]" + ("+" if row in self._in_line else " ")
                self._printing = row
            out += part
            self._in_line.add(row)
            if part.endswith("\n"):
                self._printing = None
                self._in_line.discard(row)
        if row_end and self._printing == row:
            self._printing = None
            out += "\n"
        return out

    def _give(self, text: str, row: int) -> None:
        if text:
            self.on_finalized_text(text, row)

    def _without_padding(self, prompt: list[int]) -> list[int]:
        pad, start = self.tokenizer.pad_token_id, 0
        while len(self._texts) > 1 and start < len(prompt) and prompt[start] == pad:
            start += 1
        return prompt[start:]


@dataclass(frozen=True)
class CanvasUpdate:
    """What one forward has brought for one row.

    Args:
        row (`int`): index in the batch.
        text (`str`): newly final text; all of a row's, joined, are its decoded text up to and with the stop token.
            A character whose bytes are not all decided waits, so text may come after its tokens.
        draft (`str`, *optional*): the canvas behind that text as it looks now, up to the first decided stop token,
            with a placeholder for each undecided position. `None` where nothing is left to be decided.
        tokens (`list[int]`): newly final token ids; all of a row's, joined, are its answer up to the stop token.
        finished (`bool`): this is the row's last update.
        draft_tokens (`list[int]`, *optional*): token ids of the draft, the mask token where undecided.
        seconds (`float`): from the start of the decoding to the end of this forward.
    """

    row: int
    text: str
    draft: str | None
    tokens: list[int]
    finished: bool
    draft_tokens: list[int] | None = None
    seconds: float = field(default=0.0, compare=False)


class StreamClosed(RuntimeError):
    """Raised within `generate` when the reader of its [`CanvasIterator`] has closed it."""


class CanvasIterator(Iterator[CanvasUpdate]):
    """A streamer for `generate` in one thread, and an iterator over [`CanvasUpdate`] in another.

    It serves one call. Generation never waits for the reader. When `generate` raises, be it for its arguments, the
    reader gets that exception after the updates before it. A reader who leaves early calls `close` (or uses `with`):
    `generate` then raises [`StreamClosed`] in its thread at the next forward. [`stream_generate`] does all that by
    itself.

        updates = CanvasIterator(tokenizer, skip_special_tokens=True)
        Thread(target=model.generate, kwargs={**inputs, "streamer": updates}).start()
        for update in updates:
            ...

    Args:
        tokenizer: decodes the answers.
        mask_text (`str`): stands for each undecided position in a draft.
        mask_token_id (`int`, *optional*): the model's mask token; the tokenizer's when unset.
        timeout (`float`, *optional*): seconds to wait for an update; forever when unset.
        decode_kwargs: of the tokenizer's `decode`, for example `skip_special_tokens=True`.

    Raises:
        ValueError: for a timeout that is not positive, or without a mask token.
        TimeoutError: from `next`, when `timeout` has passed without an update. Reading may go on.
    """

    supports_batch = True

    def __init__(
        self,
        tokenizer,
        *,
        mask_text: str = MASK_SIGN,
        mask_token_id: int | None = None,
        timeout: float | None = None,
        **decode_kwargs,
    ):
        if timeout is not None and not (isinstance(timeout, int | float) and 0 < timeout <= threading.TIMEOUT_MAX):
            raise ValueError(
                f"`timeout` must be a positive number of seconds (got {timeout!r}). Leave it out to wait forever."
            )
        if mask_token_id is None:
            mask_token_id = tokenizer.mask_token_id
        if mask_token_id is None:
            raise ValueError(
                "`mask_token_id` must be given where the tokenizer has no mask token (got None). Pass "
                "`model.config.mask_token_id`."
            )
        self.tokenizer, self.mask_text, self.mask_token_id = tokenizer, mask_text, mask_token_id
        self.timeout, self.decode_kwargs = timeout, decode_kwargs
        self._texts: list[RowText] = []
        self._tokens: dict[int, list[int]] = {}  # of this forward, by row
        self._drafts: dict[int, list[int]] = {}
        self._finished: set[int] = set()
        self._start = 0.0
        self._updates: queue.SimpleQueue[CanvasUpdate | None] = queue.SimpleQueue()  # None: nothing comes after it
        self.ended = False
        self._error: BaseException | None = None
        self._closed = threading.Event()

    # ---- for `generate` ------------------------------------------------------------------------------------------

    def put(self, value, row: int | None = None) -> None:
        """Takes the prompts `(B, P)`, and then newly decided tokens `(n,)` of a row."""
        self._check_open()
        if row is None:
            _check_first_put(self._texts)
            self._start = time.perf_counter()
            by_word = self.decode_kwargs.get("clean_up_tokenization_spaces")
            if by_word is None:
                by_word = self.tokenizer.clean_up_tokenization_spaces  # may take back a space before punctuation
            self._texts = [RowText(self.tokenizer, self.decode_kwargs, by_word=by_word) for _ in value]
        else:
            self._tokens[row] = value.tolist()

    def put_draft(self, value, row: int) -> None:
        """Takes the canvas of a row behind its decided prefix."""
        self._drafts[row] = value.tolist()

    def end_row(self, row: int) -> None:
        """Takes note that a row ended in this forward."""
        self._finished.add(row)

    def end_step(self) -> None:
        """Makes this forward's updates."""
        self._check_open()
        seconds = time.perf_counter() - self._start
        for row in sorted({*self._tokens, *self._drafts, *self._finished}):
            tokens, draft = self._tokens.get(row, []), self._drafts.get(row)
            text = self._texts[row].add(tokens)
            finished = row in self._finished
            if finished:
                text, draft = text + self._texts[row].finish(), None
            shown = None if draft is None else self._texts[row].draft(draft, self.mask_token_id, self.mask_text)
            self._updates.put(CanvasUpdate(row, text, shown, tokens, finished, draft, seconds))
        self._tokens, self._drafts, self._finished = {}, {}, set()

    def fail(self, error: BaseException) -> None:
        """Takes the exception that the reader will get."""
        if not self.ended and not isinstance(error, StreamClosed):
            self._error = error

    def end(self) -> None:
        """Ends the iteration, behind the updates that wait to be read."""
        if not self.ended:
            self.ended = True
            self._updates.put(None)

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise StreamClosed("The reader of this generation's `CanvasIterator` has closed it.")

    # ---- for the reader ------------------------------------------------------------------------------------------

    def __next__(self) -> CanvasUpdate:
        if self._closed.is_set():
            raise StopIteration
        try:
            update = self._updates.get(timeout=self.timeout)
        except queue.Empty:
            raise TimeoutError(
                f"`timeout` must be longer than any forward (got {self.timeout} s, which passed without an update). "
                "Pass a longer one, or go on reading."
            ) from None
        if update is not None:
            return update
        self._updates.put(None)  # whoever asks again, or waits in another thread, gets the same answer
        error, self._error = self._error, None
        if error is not None:
            raise error
        raise StopIteration

    def close(self) -> None:
        """Ends the iteration, and the generation at its next forward. Does nothing the second time."""
        self._closed.set()
        self._updates.put(None)

    def __enter__(self) -> "CanvasIterator":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close()


class GenerationStream(Iterator[CanvasUpdate]):
    """A generation at work in a thread of its own, as an iterator over its updates; see [`stream_generate`].

    When it is closed, left with `with`, or nobody refers to it any more, the generation ends at its next forward and
    the thread with it.

    Args:
        updates: the streamer that `call` was given.
        call: runs `generate`.
    """

    def __init__(self, updates: CanvasIterator, call: Callable[[], Any]):
        self._updates = updates
        self._outputs: list[Any] = []
        # The thread must not refer to `self`, which would never be collected. As a daemon it does not hold up the end
        # of the program; the finalizer, which runs at exit too, ends it.
        self._thread = threading.Thread(
            target=_run, args=(call, updates, self._outputs), name="stream_generate", daemon=True
        )
        self._leave = weakref.finalize(self, _leave, updates, self._thread)
        self._thread.start()

    @property
    def output(self) -> Any:
        """What `generate` returned; `None` until all updates were read, or where it returned nothing."""
        return self._outputs[0] if self._outputs and not self._thread.is_alive() else None

    def __next__(self) -> CanvasUpdate:
        try:
            return next(self._updates)
        except BaseException:
            if self._updates.ended:  # the thread has nothing more to do but to end
                self._thread.join()
            raise

    def close(self) -> None:
        """Stops the generation and waits for its thread. Does nothing once it has ended."""
        self._leave()

    def __enter__(self) -> "GenerationStream":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close()


def stream_generate(
    model,
    tokenizer,
    *,
    mask_text: str = MASK_SIGN,
    skip_special_tokens: bool = True,
    timeout: float | None = None,
    **generate_kwargs,
) -> GenerationStream:
    """Generates in a thread of its own, and yields what each forward brings.

    The reader gets whatever `generate` raises. When the reader leaves early (`break`, an exception, `close`), the
    generation stops at its next forward, and the model is ready for another call. Contexts that hold for one thread,
    such as `torch.autocast`, do not reach it.

    Args:
        model: one with this library's `generate`.
        tokenizer: decodes the answers; also `generate`'s, for `stop_strings`.
        mask_text (`str`): stands for each undecided position in a draft.
        skip_special_tokens (`bool`): leave special tokens out of the text.
        timeout (`float`, *optional*): seconds to wait for an update; forever when unset.
        generate_kwargs: of `generate`, prompts included; by default `return_dict_in_generate=True`.

    Returns:
        [`GenerationStream`], an iterator over [`CanvasUpdate`]. Its `output` is what `generate` returned, once all
        updates were read.

    Raises:
        ValueError: for a streamer among the arguments, a timeout that is not positive, or without a mask token.
        TimeoutError: from `next`, when `timeout` has passed without an update. Reading may go on.
    """
    if "streamer" in generate_kwargs:
        raise ValueError(
            f"`streamer` is what `stream_generate` makes itself (got {type(generate_kwargs['streamer']).__name__}). "
            "Leave it out, or call `model.generate`."
        )
    updates = CanvasIterator(
        tokenizer,
        mask_text=mask_text,
        mask_token_id=_mask_token_id(model, generate_kwargs),
        timeout=timeout,
        skip_special_tokens=skip_special_tokens,
    )
    arguments = {"return_dict_in_generate": True, "tokenizer": tokenizer} | generate_kwargs
    return GenerationStream(updates, functools.partial(model.generate, streamer=updates, **arguments))


def _run(call: Callable[[], Any], updates: CanvasIterator, outputs: list[Any]) -> None:
    """The thread: `generate` ends the stream itself, unless what failed lies before it."""
    try:
        outputs.append(call())
    except BaseException as error:  # it is raised in the reader's thread
        updates.fail(error)
    finally:
        updates.end()


def _leave(updates: CanvasIterator, thread: threading.Thread) -> None:
    updates.close()
    if thread is not threading.current_thread():  # garbage may be collected in any thread
        thread.join()


def _mask_token_id(model, generate_kwargs: dict[str, Any]) -> int | None:
    """The mask token as `generate` finds it, `None` where it will not find one."""
    if generate_kwargs.get("mask_token_id") is not None:
        return generate_kwargs["mask_token_id"]
    holders = generate_kwargs.get("generation_config"), model.generation_config, model.config
    found = (getattr(holder, "mask_token_id", None) for holder in holders)
    return next((token for token in found if token is not None), None)


def _check_first_put(texts: list) -> None:
    if texts:
        raise ValueError(
            "`row` must be given with every put behind the prompts (got None): this streamer serves one call at a "
            "time, of a masked diffusion model. Make another one, or use transformers' `TextStreamer`."
        )
