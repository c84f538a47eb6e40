"""What one call of `generate` asks of the decoding loop, and what came of it."""

import copy
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from transformers.generation import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria

from .canvas import Canvas
from .decoding import Rules, stop_position
from .processors import is_row_wise
from .scoring import Sampler
from .static_shapes import is_compiled
from .streaming import Stream
from .wrappers import check_wrapping, wrapper_of


@dataclass
class Counts:
    """What was counted of B rows, `(B,)` long each: see `D3LLMGenerationOutput`; `extent` is its `canvas_length`."""

    forwards: torch.Tensor
    reference: torch.Tensor
    stored: torch.Tensor
    computed: torch.Tensor
    revoked: torch.Tensor
    extent: torch.Tensor


@dataclass
class Ended:
    """The rows of a call when the last of them has ended.

    Attributes:
        tokens, step_map (`(B, N)` long): of the positions to decide.
        length (`(B,)` long): tokens of the answer, fewer where a criterion ended it.
        counts: of each row.
    """

    tokens: torch.Tensor
    step_map: torch.Tensor
    length: torch.Tensor
    counts: Counts


@dataclass(eq=False)
class Call:
    """B prompts with their settings, ready for their first forward. Stage 1 of `generate`.

    Args:
        canvas: of the prompts.
        rules: of the decoding method.
        config: of the call.
        shown (`(B, P')`): the prompts as the caller passed them; criteria see them before the answer.
        processors: as `generate` prepared them.
        criteria: transformers' stopping criteria. Length and stop tokens are the loop's own affair; all others are
            asked token by token of the decided prefixes, as if these had been written left to right.
        stream (*optional*): is told of every step.
        sampler: of the call's random numbers.

    Attributes:
        places: of its rows among those at work, while it is one of them.
        left: how many of its rows are.
        ended: what came of it.
        error: why it ended before its time, if it did.
    """

    canvas: Canvas
    rules: Rules
    config: Any
    shown: torch.Tensor
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    stream: Stream | None
    sampler: Sampler
    compiled: bool = False
    wrapped: bool = False
    places: list[int] = field(default_factory=list)
    left: int = 0
    ended: Ended | None = None
    error: Exception | None = None
    rates: list[list[float]] | None = None  # of each row and round, where slots are decided

    @classmethod
    def of(
        cls,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> "Call":
        """Settings become rules, the prompts become canvases, all of it checked.

        Args:
            model: a `CanvasContract`; the others are what `GenerationMixin.generate` prepared.

        Raises:
            ValueError: for what the model, its wrapper, the canvas or the criteria cannot keep.
        """
        topology = generation_config.topology(model.traits)
        canvas = Canvas.of_prompt(model, input_ids, generation_config, model_kwargs, topology)
        rules = generation_config.rules(canvas.slots.shape[1], model.traits)
        check_contract(model, canvas.mask, rules, batch=canvas.batch, in_blocks=topology is not None)
        compiled = is_compiled(generation_config)
        check_wrapping(model, canvas, rules, compiled)
        sampler = model._sampler(generation_config)
        sampler.check_batch(canvas.batch)
        call = cls(
            canvas, rules, generation_config, input_ids, logits_processor, stopping_criteria,
            None if streamer is None else Stream.of(streamer), sampler, compiled, wrapper_of(model) is not None,
        )  # fmt: skip
        call._check_criteria()
        if rules.slot_size and compiled:
            raise ValueError(
                '`compile_config` does not go together with decoding_method="refusion", whose rows feed what each of '
                "them needs (got one). Leave it unset."
            )
        return call

    def like(
        self,
        model: Any,
        prompt: list[int],
        seed: int | Sequence[int],
        criteria: Sequence[StoppingCriteria] = (),
        streamer: Any = None,
    ) -> "Call":
        """A call with the same settings and length for another prompt, without all that transformers prepares.

        Of a call of some `kind` without criteria of its own, which may know when it began.

        Args:
            model: the one that this call was made for.
            prompt: token ids of one row.
        """
        if self.kind is None or self.criteria:
            raise ValueError(
                "`like` needs a call that others may join, without stopping criteria (got another). Prepare each call "
                "by itself."
            )
        config = copy.copy(self.config)
        config.seed, config.max_length = seed, len(prompt) + self.canvas.new_length
        ids = torch.tensor([prompt], dtype=torch.long, device=self.shown.device)
        canvas, rules = Canvas.of_prompt(model, ids, config, {}, config.topology(model.traits)), self.rules
        if canvas.slots.shape[1] != self.canvas.slots.shape[1]:  # blocks of text that end elsewhere
            rules = config.rules(canvas.slots.shape[1], model.traits)
        call = Call(
            canvas, rules, config, ids, self.processors, StoppingCriteriaList(criteria),
            None if streamer is None else Stream.of(streamer), model._sampler(config),
        )  # fmt: skip
        call._check_criteria()
        return call

    def _check_criteria(self) -> None:
        self.criteria = StoppingCriteriaList(
            c for c in self.criteria if not isinstance(c, (EosTokenCriteria, MaxLengthCriteria))
        )
        if self.criteria and self.canvas.fill_token_id is None:
            raise ValueError(
                "`pad_token_id` must be set when a stopping criterion can end a row early (got None). Pass it to "
                "`generate` or set it in the generation config."
            )
        readers = [criterion for criterion in self.criteria if not isinstance(criterion, MaxTimeCriteria)]
        if readers and self.canvas.is_infilling:
            names = sorted({type(criterion).__name__ for criterion in readers})
            raise ValueError(
                f"Stopping criteria read a text from left to right, which infilling does not write (got {names}). "
                "Leave them out (`max_time` may stay), or give `max_new_tokens` without `infill_mask`."
            )
        if self.stream is not None:
            self.stream.check_batch(self.canvas.batch)
        self._prefix = [0] * self.canvas.batch  # decided tokens of each row
        self._awaited: StoppingCriteriaList | None = None

    # ---- beside other calls --------------------------------------------------------------------------------------

    @property
    def stop_ids(self) -> torch.Tensor | None:
        """The stop tokens `(S,)`, if there are any."""
        return self.config._eos_token_tensor

    @property
    def sampling(self) -> bool:
        """Whether tokens are drawn."""
        return bool(self.config.do_sample)

    @property
    def least(self) -> int:
        """Positions that an answer must have, at least one."""
        least = (self.config.min_length or 0) - self.shown.shape[1]
        return max(1, least, self.config.min_new_tokens or 0)

    @property
    def suspects(self) -> dict[str, float]:
        """Settings that can take a finite logit beyond float32, with their values."""
        return {"cfg_scale": self.rules.cfg_scale} if self.rules.cfg_scale else {}

    @property
    def width(self) -> int:
        """Columns of the answer: those to decide, without what lies behind the tokens that were asked for."""
        return self.canvas.slots.shape[1] if self.canvas.blocks is None else self.canvas.new_length

    @cached_property
    def kind(self) -> Hashable:
        """Calls of one kind may share forwards; `None` where a call can only be decoded by itself.

        By itself: with infilling, embeddings, token types or arguments for the forward, whose canvases differ; with
        processors that read texts, which are made for one batch; with compiled forwards, whose shapes stay; with a
        length that finds itself, whose limit is its canvas' width; within a wrapper whose hooks hold for one call.
        """
        canvas = self.canvas
        special = canvas.is_infilling or canvas.model_kwargs or self.compiled or self.wrapped or self.rules.length_rule
        given = (canvas.prompt_embeds, canvas.token_types)
        if special or any(value is not None for value in given) or not is_row_wise(self.processors):
            return None
        stops = None if self.stop_ids is None else tuple(self.stop_ids.tolist())
        processors = tuple(map(_traits, self.processors))
        return self.rules, self.sampling, stops, processors, canvas.mask_token_id, canvas.fill_token_id

    # ---- while it is at work -------------------------------------------------------------------------------------

    def begin(self, places: list[int]) -> None:
        """Takes note that its rows are at work, at these places."""
        self.places, self.left = places, len(places)
        if self.stream is not None:
            self.stream.__enter__()

    def follow(
        self, tokens: torch.Tensor, rows: list[int], ends: list[int], limits: list[int], extents: list[int]
    ) -> tuple[set[int], list[int]]:
        """Follows the decided prefixes after a forward: criteria first, then the stream.

        Args:
            tokens (`(B, N)` long): of all rows.
            rows: those that took part.
            ends, limits, extents: of all rows the length of the decided prefix, of the draft, and of the canvas.

        Returns:
            the rows that a criterion ends, and the lengths of all prefixes, which end there.
        """
        stopped = self._ask_criteria(tokens, rows, ends) if self.criteria else set()
        if self.stream is not None:
            self.stream.follow(tokens, rows, self._prefix, ends, limits, extents, stopped)
        self._prefix = ends
        return stopped, ends

    def _ask_criteria(self, tokens: torch.Tensor, rows: list[int], ends: list[int]) -> set[int]:
        """Asks at every length that some row has reached since; `ends` of rows that stop is set to where they do.

        Criteria may keep a state for each row, so they are always shown the whole batch. What they say of a row counts
        at the lengths that the row has just reached; where none has moved, it counts if it is the same for all (time).
        While nothing follows the prompt, only a change counts: a prompt may end in a stop string.
        """
        stopped: set[int] = set()
        lengths = sorted({length for row in rows for length in range(self._prefix[row] + 1, ends[row] + 1)})
        for length in lengths or [max(ends[row] for row in rows)]:
            text = torch.cat([self.shown, tokens[:, :length]], dim=1)
            verdict = (self.criteria if length else self._awaiting(text))(text, None).tolist()
            for row in rows:
                reached = self._prefix[row] < length <= ends[row] if lengths else all(verdict)
                if verdict[row] and reached and row not in stopped:
                    stopped.add(row)
                    ends[row] = min(length, ends[row])
        return stopped

    def _awaiting(self, prompt: torch.Tensor) -> StoppingCriteriaList:
        """The criteria that the prompt alone does not meet, and those of time."""
        if self._awaited is None:
            self._awaited = StoppingCriteriaList(
                c
                for c in self.criteria
                if isinstance(c, MaxTimeCriteria) or not torch.as_tensor(c(prompt, None)).any()
            )
        return self._awaited

    def close_step(self, ended: list[int]) -> None:
        """Tells the stream which rows ended in the forward that was told last, and that this was all."""
        if self.stream is not None:
            self.stream.close_step(ended)

    # ---- when it is over -----------------------------------------------------------------------------------------

    def end(self, ended: Ended) -> None:
        """Takes what came of it. No row is at work any more."""
        self.ended, self.left = ended, 0
        try:
            self.close(None)
        except Exception as error:  # of the streamer's own end
            self.error = error

    def fail(self, error: Exception) -> None:
        """Ends before its time, with what [`check`] raises. No row is at work any more."""
        self.error, self.left = error, 0
        self.close(error)

    def close(self, error: BaseException | None) -> None:
        """Ends the stream, unless `generate` does."""
        if self.stream is not None:
            self.stream.__exit__(None if error is None else type(error), error, None)

    def check(self) -> None:
        """Raises what ended the call before its time, if anything did."""
        error, self.error = self.error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # which holds this frame

    def answers(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The text `(B, L)`, padded behind its end; the step map; and tokens before the first stop token `(B,)`.

        The step map is `(B, N)` for the new tokens, and `(B, L)` with infilling. A hole that the time limit left
        undecided keeps the mask token.
        """
        found, canvas, may_stop = self.ended, self.canvas, self.canvas.may_stop
        answer, steps = found.tokens, found.step_map  # type: ignore[union-attr]  # for a call that is over
        column = torch.arange(answer.shape[1], device=answer.device)
        stop = stop_position(answer, (steps > 0) & may_stop, self.stop_ids)
        length = found.length  # type: ignore[union-attr]
        if canvas.fill_token_id is not None:
            end = torch.minimum(stop + 1, length)
            answer = torch.where((column < end[:, None]) | ~may_stop, answer, canvas.fill_token_id)
        tokens = torch.minimum(stop, length)
        if not canvas.is_infilling:
            return torch.cat([self.shown, answer[:, : self.width]], dim=1), steps[:, : self.width], tokens
        nowhere = replace(canvas, base=torch.full_like(canvas.base, -1))
        return canvas.fill(answer), nowhere.fill(steps), tokens

    @property
    def official_rates(self) -> torch.Tensor | None:
        """Tokens per forward `(B,)` as the code of a method in slots counts them: the mean over rounds."""
        if self.rates is None:
            return None
        means = [sum(rates) / max(len(rates), 1) for rates in self.rates]
        return torch.tensor(means, device=self.canvas.base.device)


def check_contract(model: Any, mask: torch.Tensor | None, rules: Rules, *, batch: int, in_blocks: bool) -> None:
    """What can be known of a model's contract before the first forward of so many rows; see there."""
    ragged = "length" if rules.length_rule else "suffix_length" if rules.suffix_length is not None else None
    model.check_contract(
        mask,
        cached=rules.kv_cache != "none",
        ragged=ragged if batch * rules.canvases > 1 else None,
        in_blocks=in_blocks,
        shadowed=rules.shadow_block,
    )


def _traits(processor: LogitsProcessor) -> Hashable:
    """What two processors of one class that do the same have in common."""
    values = {
        name: tuple(value.flatten().tolist()) if isinstance(value, torch.Tensor) else repr(value)
        for name, value in vars(processor).items()
    }
    return type(processor), tuple(sorted(values.items()))


__all__ = ["Call", "Counts", "Ended"]
