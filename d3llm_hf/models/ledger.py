"""What leaves the decoding loop: finished rows, their counts, streamed text, and rows that a criterion stops."""

from dataclasses import replace

import torch
from transformers.generation import StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria

from .canvas import Canvas
from .decoding import State, first_true, stop_position
from .scoring import NOT_FINITE, NOTHING_LEFT
from .streaming import Stream


class Ledger:
    """Collects the rows of a batch as they end, in the order in which they came.

    Args:
        canvas, state: of the whole batch, before the first forward.
        shown (`(B, P')`): the prompt as the caller passed it; criteria see it before the answer.
        stop_ids (`(S,)`, *optional*): the stop tokens.
        criteria: transformers' stopping criteria. Length and stop tokens are the loop's own affair; all others are
            asked token by token of the decided prefixes, as if these had been written left to right.
        streamer (*optional*): is told of every step; see [`Stream`].
        suspects: settings of this call that can take a finite logit beyond float32, with their values.
    """

    def __init__(
        self,
        canvas: Canvas,
        state: State,
        shown: torch.Tensor,
        stop_ids: torch.Tensor | None,
        criteria: StoppingCriteriaList,
        streamer,
        suspects: dict[str, float] | None = None,
    ):
        self.shown, self.stop_ids, self.suspects = shown, stop_ids, suspects
        self.stream = None if streamer is None else Stream.of(streamer)
        self.may_stop = canvas.may_stop
        self.fill_token_id = canvas.fill_token_id
        self.criteria = StoppingCriteriaList(
            c for c in criteria if not isinstance(c, (EosTokenCriteria, MaxLengthCriteria))
        )
        if self.criteria and self.fill_token_id is None:
            raise ValueError(
                "`pad_token_id` must be set when a stopping criterion can end a row early (got None). Pass it to "
                "`generate` or set it in the generation config."
            )
        readers = [criterion for criterion in self.criteria if not isinstance(criterion, MaxTimeCriteria)]
        if readers and canvas.is_infilling:
            names = sorted({type(criterion).__name__ for criterion in readers})
            raise ValueError(
                f"Stopping criteria read a text from left to right, which infilling does not write (got {names}). "
                "Leave them out (`max_time` may stay), or give `max_new_tokens` without `infill_mask`."
            )
        if self.stream is not None:
            self.stream.check_batch(canvas.batch)
        self.canvas = canvas
        self.tokens = state.tokens.clone()
        self.step_map = state.step_map.clone()
        self.unsettled = state.unsettled.clone()
        # Columns of the answer: those to decide, without what lies behind the tokens that were asked for.
        self.width = self.tokens.shape[1] if canvas.blocks is None else canvas.new_length
        self.length = state.length.clamp_max(self.width)  # of the row, fewer where a criterion ends it
        self.extent = state.length.clone()  # positions of the row's canvas behind the prompt
        counts = (torch.zeros_like(state.rows) for _ in range(5))
        self.forwards, self.reference, self.computed, self.stored, self.revoked = counts
        self.prefix = [0] * canvas.batch
        self.awaited: StoppingCriteriaList | None = None

    def __enter__(self) -> "Ledger":
        if self.stream is not None:
            self.stream.__enter__()
        return self

    def __exit__(self, kind, error, trace) -> None:
        """Ends the stream whatever happened, unless `generate` does."""
        if self.stream is not None:
            self.stream.__exit__(kind, error, trace)

    def leave(
        self, state: State, done: torch.Tensor, filled: torch.Tensor, further: torch.Tensor, broken: torch.Tensor
    ) -> torch.Tensor | None:
        """Books a forward and takes out the rows that ended in it.

        Args:
            done, filled (`(B,)` bool): finished rows; rows with undecided positions before the fill behind a stop
                token.
            further (`(B,)` long): forwards that the reference makes beside this one.
            broken (`(B,)` long): what is wrong with the logits of a row, as in [`Scores`].

        Returns:
            `(B',)` indices of the rows that go on, `None` where all do.

        Raises:
            ValueError: for logits that are not finite, or a position without any token left, naming the row of the
                batch and the forward.
        """
        self.tokens[state.rows], self.step_map[state.rows] = state.tokens, state.step_map
        open_ended = state.unsettled | state.held[:, None]
        self.unsettled[state.rows] = open_ended & ~done[:, None]  # nothing changes in a row that has ended
        self.extent[state.rows] = state.length
        self.length[state.rows] = state.length.clamp_max(self.width)
        self.revoked[state.rows] = state.revoked
        flags, wrong, rows = torch.stack([done.long(), broken.long(), state.rows]).tolist()  # a host sync
        if NOT_FINITE in wrong:
            raise ValueError(
                f"The model's logits must be finite (got NaN or inf for row {rows[wrong.index(NOT_FINITE)]} of the "
                f"batch in forward {state.forward}). {self._way_out()}; other rows are not at fault."
            )
        if NOTHING_LEFT in wrong:
            raise ValueError(
                "The constraints must leave a token for every position (got none for row "
                f"{rows[wrong.index(NOTHING_LEFT)]} of the batch in forward {state.forward}). Relax `bad_words_ids`, "
                "`no_repeat_ngram_size`, `suppress_tokens`, the minimum length or your `logits_processor`."
            )
        self.forwards[state.rows] = state.forward
        self.reference[state.rows] += 1 + further + (filled & done).long()
        if self.criteria or self.stream is not None:
            stopped = self._advance(rows)
            flags = [flag or row in stopped for flag, row in zip(flags, rows, strict=True)]
            if self.stream is not None:
                self.stream.close_step([row for row, flag in zip(rows, flags, strict=True) if flag])
        if not any(flags):
            return None
        return torch.tensor([i for i, flag in enumerate(flags) if not flag], dtype=torch.long, device=done.device)

    def _way_out(self) -> str:
        named = ", ".join(f"{name}={value:g}" for name, value in (self.suspects or {}).items())
        return f"Lower {named}, or check the weights and the dtype" if named else "Check the weights and the dtype"

    def _advance(self, rows: list[int]) -> set[int]:
        """Follows the decided prefixes: criteria first, then the stream. Returns the rows that a criterion ends.

        What may still change is not decided: nobody is shown a token that turns out to be another one.
        """
        decided = (self.step_map > 0) & ~self.unsettled
        stop = stop_position(self.tokens, decided & self.may_stop, self.stop_ids)
        ends = torch.minimum(first_true(~decided), stop + 1).clamp_max(self.width).tolist()
        stopped = self._ask_criteria(rows, ends) if self.criteria else set()
        if self.stream is not None:
            limits = torch.minimum(stop + 1, self.length).tolist()
            self.stream.follow(self.tokens, rows, self.prefix, ends, limits, self.extent.tolist(), stopped)
        self.prefix = ends
        return stopped

    def _ask_criteria(self, rows: list[int], ends: list[int]) -> set[int]:
        """Asks at every length that some row has reached since; `ends` of rows that stop is set to where they do.

        Criteria may keep a state for each row, so they are always shown the whole batch. What they say of a row counts
        at the lengths that the row has just reached; where none has moved, it counts if it is the same for all (time).
        While nothing follows the prompt, only a change counts: a prompt may end in a stop string.
        """
        stopped: set[int] = set()
        lengths = sorted({length for row in rows for length in range(self.prefix[row] + 1, ends[row] + 1)})
        for length in lengths or [max(ends[row] for row in rows)]:
            text = torch.cat([self.shown, self.tokens[:, :length]], dim=1)
            verdict = (self.criteria if length else self._awaited(text))(text, None).tolist()
            for row in rows:
                reached = self.prefix[row] < length <= ends[row] if lengths else all(verdict)
                if verdict[row] and reached and row not in stopped:
                    stopped.add(row)
                    ends[row] = min(length, ends[row])
                    self.length[row] = ends[row]
        return stopped

    def _awaited(self, prompt: torch.Tensor) -> StoppingCriteriaList:
        """The criteria that the prompt alone does not meet, and those of time."""
        if self.awaited is None:
            self.awaited = StoppingCriteriaList(
                c
                for c in self.criteria
                if isinstance(c, MaxTimeCriteria) or not torch.as_tensor(c(prompt, None)).any()
            )
        return self.awaited

    def answers(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The text `(B, L)`, padded behind its end; the step map; and tokens before the first stop token `(B,)`.

        The step map is `(B, N)` for the new tokens, and `(B, L)` with infilling. A hole that the time limit left
        undecided keeps the mask token.
        """
        column = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        stop = stop_position(self.tokens, (self.step_map > 0) & self.may_stop, self.stop_ids)
        end = torch.minimum(stop + 1, self.length)
        answer, steps = self.tokens, self.step_map
        if self.fill_token_id is not None:
            answer = torch.where((column < end[:, None]) | ~self.may_stop, answer, self.fill_token_id)
        tokens = torch.minimum(stop, self.length)
        if not self.canvas.is_infilling:
            return torch.cat([self.shown, answer[:, : self.width]], dim=1), steps[:, : self.width], tokens
        nowhere = replace(self.canvas, base=torch.full_like(self.canvas.base, -1))
        return self.canvas.fill(answer), nowhere.fill(steps), tokens
