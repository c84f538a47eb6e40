"""What a streamer is told while a batch is decided, and that it is always told when it is over."""

import contextlib

import torch


class Stream:
    """Stands before the streamer of one call of `generate`: follows the rows, and ends the streamer exactly once.

    A streamer of transformers sees one row: `put` with the prompt and then with the newly decided tokens of the
    prefix, `put_draft` (where it has one) with the canvas behind it, `end`.

    A streamer whose attribute `supports_batch` is true sees every row of the batch, under its index:

    - `put(value)`, once and first: the prompts `(B, P)`, padded on the left;
    - `put(tokens, row=i)`: the newly decided tokens `(n,)` of the row's prefix, n > 0;
    - `put_draft(value=tokens, row=i)`: the canvas behind that prefix, up to the first decided stop token, with mask
      tokens where undecided; after `put`, in each forward that leaves something of it undecided;
    - `end_row(i)`: the row has ended, nothing more comes of it;
    - `end_step()`: all that one forward has brought was told. It may raise to stop the generation, as may the others;
    - `fail(error)`: `generate` is about to raise this exception, wherever it comes from;
    - `end()`: the last call, whatever happened.

    Only `put` and `end` must exist; `fail` is told to a streamer of either kind. All values are copies on the CPU.

    Args:
        streamer: of either kind.
    """

    def __init__(self, streamer):
        if not all(callable(getattr(streamer, name, None)) for name in ("put", "end")):
            raise TypeError(
                f"`streamer` must have the methods `put` and `end` (got {type(streamer).__name__}). Pass one of "
                "transformers' or of this package's streamers."
            )
        self._streamer = streamer
        self._by_row = bool(getattr(streamer, "supports_batch", False))
        self._depth = 0
        self._ended = False

    @classmethod
    def of(cls, streamer) -> "Stream":
        """The stream of a streamer; a stream is its own, so that calls within a call share it."""
        return streamer if isinstance(streamer, cls) else cls(streamer)

    def __getattr__(self, name: str):
        """Whatever else code that is handed the stream wants of the streamer."""
        return getattr(object.__getattribute__(self, "_streamer"), name)

    def __enter__(self) -> "Stream":
        self._depth += 1
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Ends the stream with the outermost call, so that nobody waits for more text."""
        self._depth -= 1
        if self._depth:
            return
        if error is None:
            self.end()
            return
        with contextlib.suppress(Exception):  # what went wrong first is what the caller is told
            if hasattr(self._streamer, "fail"):
                self._streamer.fail(error)
        with contextlib.suppress(Exception):
            self.end()

    def put(self, value: torch.Tensor, **place) -> None:
        """Takes the prompts `(B, P)` from transformers' `generate`."""
        if value.ndim > 1:
            self.check_batch(len(value))
        self._streamer.put(value, **place)

    def end(self) -> None:
        """Ends the streamer if nobody has."""
        if not self._ended:
            self._ended = True
            self._streamer.end()

    def check_batch(self, batch: int) -> None:
        """Refuses several rows for a streamer that would take them for one."""
        if batch > 1 and not self._by_row:
            raise ValueError(
                f"`streamer` needs a batch of one row (got {batch} with {type(self._streamer).__name__}). Pass "
                "`d3llm_hf.BatchTextStreamer`, `d3llm_hf.CanvasIterator` or another streamer with "
                "`supports_batch = True`, or generate row by row."
            )

    def follow(
        self,
        tokens: torch.Tensor,
        rows: list[int],
        before: list[int],
        ends: list[int],
        limits: list[int],
        extents: list[int],
        stopped: set[int],
    ) -> None:
        """Tells what a forward has decided of some rows.

        Args:
            tokens (`(B, N)` long): the whole batch.
            rows: those that took part.
            before, ends: lengths of all rows' decided prefixes, until this forward and now.
            limits: lengths of all rows' drafts: behind the first stop token, or all that the row has to decide.
            extents: lengths of all rows' canvases, which a streamer of one row sees to their ends.
            stopped: rows that a criterion ends here.
        """
        tokens = tokens.to("cpu", copy=True)  # a streamer may keep what it is given
        for row in rows:
            place = {"row": row} if self._by_row else {}
            start, limit = ends[row], limits[row]
            if start > before[row]:
                self._streamer.put(tokens[row, before[row] : start], **place)
            if start < limit and row not in stopped and hasattr(self._streamer, "put_draft"):
                draft = tokens[row, start : limit if self._by_row else extents[row]]
                self._streamer.put_draft(value=draft, **place)

    def close_step(self, ended: list[int]) -> None:
        """Tells which rows ended in the forward that was told last, and that this was all."""
        if self._by_row and hasattr(self._streamer, "end_row"):
            for row in ended:
                self._streamer.end_row(row)
        if self._by_row and hasattr(self._streamer, "end_step"):
            self._streamer.end_step()
