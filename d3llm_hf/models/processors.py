"""transformers' logits processors, for positions that are decided in any order."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from transformers.generation import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process as lp

from .canvas import Canvas
from .constraints import UNKNOWN, Constraints, Sequences, visible_text
from .decoding import Rules, State
from .lattices import HoleLanguages
from .stock_settings import MOST


@dataclass
class Places:
    """Where the candidates stand.

    Attributes:
        rows, columns (`(n,)` long): in the answers that are looked at.
        owners (`(T,)` long): rows of the batch that `generate` was given, one for each row of `text`.
        batch: how many these are.
        slots (`(n,)` long): tokens of the text before the candidate, the prompt's padding included.
        text (`(T, P + N)` long): `UNKNOWN` on padding, where undecided, and behind the first stop token.
        prompt_length: P.
        stop_ids (`(S,)`, *optional*): the stop tokens.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    owners: torch.Tensor
    batch: int
    slots: torch.Tensor
    text: torch.Tensor
    prompt_length: int
    stop_ids: torch.Tensor | None


def _ban(scores: torch.Tensor, tokens: torch.Tensor, where: torch.Tensor, *, others: bool = False) -> torch.Tensor:
    """Takes `tokens` (or all `others`) from the `(n, V)` scores of the candidates that `where` marks."""
    named = torch.isin(torch.arange(scores.shape[1], device=scores.device), tokens.to(scores.device))
    return scores.masked_fill(where[:, None] & (~named if others else named), float("-inf"))


def _min_length(processor: lp.MinLengthLogitsProcessor, scores: torch.Tensor, at: Places) -> torch.Tensor:
    return _ban(scores, processor.eos_token_id, at.slots < processor.min_length)


def _min_new_tokens(processor: lp.MinNewTokensLengthLogitsProcessor, scores: torch.Tensor, at: Places) -> torch.Tensor:
    new = at.slots - processor.prompt_length_to_skip
    return _ban(scores, processor.eos_token_id, new < processor.min_new_tokens)


def _forced_bos(processor: lp.ForcedBOSTokenLogitsProcessor, scores: torch.Tensor, at: Places) -> torch.Tensor:
    return _ban(scores, torch.tensor([processor.bos_token_id]), at.slots == 1, others=True)


def _forced_eos(processor: lp.ForcedEOSTokenLogitsProcessor, scores: torch.Tensor, at: Places) -> torch.Tensor:
    """Unlike transformers' own it takes the others away and gives nothing, so that a banned token stays banned."""
    return _ban(scores, processor.eos_token_id, at.slots == processor.max_length - 1, others=True)


def _begin_suppress(
    processor: lp.SuppressTokensAtBeginLogitsProcessor, scores: torch.Tensor, at: Places
) -> torch.Tensor:
    return _ban(scores, processor.begin_suppress_tokens, at.slots == processor.begin_index)


def _length_penalty(processor: lp.ExponentialDecayLengthPenalty, scores: torch.Tensor, at: Places) -> torch.Tensor:
    beyond = (at.slots - processor.regulation_start).clamp_min(0)[:, None]
    stop = scores[:, processor.eos_token_id]
    gain = stop.abs() * ((processor.regulation_factor ** beyond.to(scores.dtype)).clamp_max(MOST) - 1)
    scores[:, processor.eos_token_id] = stop + gain.masked_fill(~stop.isfinite(), 0.0)
    return scores


def _penalise(scores: torch.Tensor, text: torch.Tensor, rows: torch.Tensor, penalty: float) -> torch.Tensor:
    """Divides positive logits of the tokens in a candidate's row of `(B, L)` text by `penalty`, multiplies others."""
    size = scores.shape[1]
    known = (text != UNKNOWN) & (text < size)
    seen = torch.zeros(text.shape[0], size + 1, dtype=torch.bool, device=text.device)
    seen.scatter_(1, torch.where(known, text, size), True)
    return torch.where(seen[rows, :size], torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def _repetition(processor: lp.RepetitionPenaltyLogitsProcessor, scores: torch.Tensor, at: Places) -> torch.Tensor:
    """On both sides of the candidate, once each; the answer's own stop token is not text that could be repeated."""
    prompt, answer = at.text[:, : at.prompt_length], at.text[:, at.prompt_length :]
    if at.stop_ids is not None:
        answer = answer.masked_fill(torch.isin(answer, at.stop_ids), UNKNOWN)
    text = torch.cat([prompt, answer], dim=1)
    ignored = processor.prompt_ignore_length
    if ignored is not None:
        ignored = torch.as_tensor(ignored, device=text.device).reshape(-1, 1).expand(at.batch, 1)[at.owners]
        text = text.masked_fill(torch.arange(text.shape[1], device=text.device) < ignored, UNKNOWN)
    return _penalise(scores, text, at.rows, processor.penalty)


def _encoder_repetition(
    processor: lp.EncoderRepetitionPenaltyLogitsProcessor, scores: torch.Tensor, at: Places
) -> torch.Tensor:
    ids: torch.Tensor = processor.encoder_input_ids
    ids = ids.repeat_interleave(at.batch // ids.shape[0], dim=0)
    return _penalise(scores, ids.to(scores.device), at.owners[at.rows], processor.penalty)


def _sequence_bias(sequences: Sequences, scores: torch.Tensor, at: Places) -> torch.Tensor:
    return scores + sequences.bias(at.text, at.rows, at.slots, scores.shape[1])


def _row_wise(processor: LogitsProcessor, scores: torch.Tensor, at: Places) -> torch.Tensor:
    return processor(at.text, scores)


# These look at one row of logits alone, so all candidates pass through at once. Here as below a subclass is a user's
# own processor, which may look at the text.
ROW_WISE = (
    lp.TemperatureLogitsWarper,
    lp.TopKLogitsWarper,
    lp.TopPLogitsWarper,
    lp.TopHLogitsWarper,
    lp.MinPLogitsWarper,
    lp.TypicalLogitsWarper,
    lp.EpsilonLogitsWarper,
    lp.EtaLogitsWarper,
    lp.SuppressTokensLogitsProcessor,
    lp.LogitNormalization,
)


def is_row_wise(processors: LogitsProcessorList) -> bool:
    """Whether all of these look at one row of logits alone."""
    return all(type(processor) in (*ROW_WISE, lp.InfNanRemoveLogitsProcessor) for processor in processors)


# These are defined here for parallel commits.
PARALLEL: dict[type, Callable[..., torch.Tensor]] = {kind: _row_wise for kind in ROW_WISE} | {
    lp.MinLengthLogitsProcessor: _min_length,
    lp.MinNewTokensLengthLogitsProcessor: _min_new_tokens,
    lp.ForcedBOSTokenLogitsProcessor: _forced_bos,
    lp.ForcedEOSTokenLogitsProcessor: _forced_eos,
    lp.SuppressTokensAtBeginLogitsProcessor: _begin_suppress,
    lp.ExponentialDecayLengthPenalty: _length_penalty,
    lp.RepetitionPenaltyLogitsProcessor: _repetition,
    lp.EncoderRepetitionPenaltyLogitsProcessor: _encoder_repetition,
}

# These mean something only where the whole text to the left is decided; by the option that asks for them.
LEFT_TO_RIGHT: dict[type, str] = {
    lp.PrefixConstrainedLogitsProcessor: "prefix_allowed_tokens_fn",
    lp.EncoderNoRepeatNGramLogitsProcessor: "encoder_no_repeat_ngram_size",
    lp.WatermarkLogitsProcessor: "logits_processor",
    lp.SynthIDTextWatermarkLogitsProcessor: "logits_processor",
}

# These read the decided text on both sides of a position.
READING_AROUND = (lp.NoRepeatNGramLogitsProcessor, lp.RepetitionPenaltyLogitsProcessor)


def _biases(processor: lp.SequenceBiasLogitsProcessor) -> dict[tuple[int, ...], float]:
    """The sequences of a processor; as in transformers a word of no tokens is none."""
    return {tuple(map(int, sequence)): bias for sequence, bias in processor.sequence_bias.items() if sequence}


def _check_biases(processor: lp.SequenceBiasLogitsProcessor, vocab_size: int | None) -> None:
    """Refuses sequences of tokens that the model does not know, and biases that make a logit no number."""
    name = "bad_words_ids" if isinstance(processor, lp.NoBadWordsLogitsProcessor) else "sequence_bias"
    biases = _biases(processor)
    unknown = sorted({t for sequence in biases for t in sequence if vocab_size is not None and t >= vocab_size})
    if unknown:
        raise ValueError(
            f"`{name}` must hold token ids below the vocabulary size {vocab_size} (got {unknown}). Encode the words "
            "with the model's own tokenizer."
        )
    wrong = [bias for bias in biases.values() if bias != float("-inf") and not abs(bias) <= MOST]
    if wrong:
        raise ValueError(
            f"`{name}` must hold biases of at most {MOST:g}, or -inf (got {wrong[0]}). A bias of 100 forces a token."
        )


class Processors:
    """Applies processors to candidates; those that read the text see the canvas before the candidate.

    transformers' own are defined for parallel commits (`PARALLEL`, and `constraints` for what is promised of the whole
    text). Any other expects `(B, length)` ids and `(B, V)` scores of the batch that `generate` was given, so it is
    called once for each column that has a candidate. Undecided positions before it hold the mask token, and it is not
    asked again when they are decided.

    Args:
        processors: as `generate` prepared them.
        rules: of the decoding method.
        prompt (`(B, P)` long): of the whole batch.
        canvas: of the whole batch.
        tokens (`(B, N)` long): the answers of the whole batch, which the decoding loop keeps up to date.
        stop_ids (`(S,)`, *optional*): the stop tokens.
        vocab_size: tokens that the model knows.

    Raises:
        ValueError: for a processor that needs left-to-right decoding where `rules` decode otherwise, and for a
            sequence of tokens that the model does not know, and for languages of holes without holes.
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        rules: Rules,
        *,
        prompt: torch.Tensor,
        canvas: Canvas,
        tokens: torch.Tensor,
        stop_ids: torch.Tensor | None,
        vocab_size: int | None,
    ):
        # Where positions of the prompt are decided, the whole text is the answer, and no stop token ends it.
        self.infilling = canvas.is_infilling
        self.batch_canvas, self.batch_tokens = canvas, tokens
        self.prompt, self.stop_ids = (prompt[:, :0], None) if self.infilling else (prompt, stop_ids)
        seen = None if canvas.mask is None else canvas.mask[:, : self.prompt.shape[1]]
        self.known_prompt = self.prompt if seen is None else self.prompt.masked_fill(~seen, UNKNOWN)
        # Whether each looks at one row of logits alone: then rows of other calls may be among the candidates.
        self.row_wise = is_row_wise(processors)
        self.repairs = False
        self.languages: HoleLanguages | None = None
        self.steps: list[Callable[[torch.Tensor, Places], torch.Tensor]] = []
        words: dict[tuple[int, ...], float] = {}
        ngram_size = 0
        self.check(processors, rules, vocab_size)
        for processor in processors:
            kind = type(processor)
            if kind is lp.InfNanRemoveLogitsProcessor:
                self.repairs = True
            elif kind is HoleLanguages:
                self.languages = self._fitting(processor)
            elif kind is lp.NoRepeatNGramLogitsProcessor:
                # the smallest size implies the others
                ngram_size = min(ngram_size or processor.ngram_size, processor.ngram_size)
            elif kind in (lp.NoBadWordsLogitsProcessor, lp.SequenceBiasLogitsProcessor):
                biases = _biases(processor)
                words |= {sequence: bias for sequence, bias in biases.items() if bias == float("-inf")}
                soft = {sequence: bias for sequence, bias in biases.items() if bias != float("-inf")}
                if soft:
                    self.steps.append(partial(_sequence_bias, Sequences(soft, self.stop_ids, prompt.device)))
            elif kind in PARALLEL:
                self.steps.append(partial(PARALLEL[kind], processor))
            else:
                self.steps.append(partial(self._by_column, processor))
        if ngram_size > self.known_prompt.shape[1] + (prompt.shape[1] if self.infilling else 0) + tokens.shape[1]:
            ngram_size = 0  # no text that long, so nothing to look for
        self.constraints = Constraints(
            self.known_prompt, Sequences(words, self.stop_ids, prompt.device), ngram_size, self.stop_ids
        )

    @staticmethod
    def check(processors: LogitsProcessorList, rules: Rules, vocab_size: int | None) -> None:
        """Refuses what these rules cannot follow; see the class."""
        for processor in processors:
            kind = type(processor)
            if kind in LEFT_TO_RIGHT and not rules.left_to_right:
                raise ValueError(
                    f"`{LEFT_TO_RIGHT[kind]}` needs the whole text to the left of a position, so decoding must be "
                    f"left to right (got {kind.__name__} with blocks of {rules.block_length} positions, decided in "
                    'any order). Pass `block_length=1` with decoding_method "llada", "dparallel" or "d3llm".'
                )
            if rules.slot_size and kind not in ROW_WISE:
                raise ValueError(
                    f'decoding_method="refusion" takes what looks at one row of logits alone (got {kind.__name__}): '
                    "slots are verified as the model gives them. Leave its option out."
                )
            biased = kind in (lp.NoBadWordsLogitsProcessor, lp.SequenceBiasLogitsProcessor)
            if biased:
                _check_biases(processor, vocab_size)
            spans = biased and any(len(sequence) > 1 for sequence in _biases(processor))
            if rules.edit_threshold is not None and (spans or kind in READING_AROUND):
                raise ValueError(
                    "`edit_threshold` cannot be combined with what reads the text around a position: its own token, "
                    f"and tokens that may change, would count against it (got {kind.__name__}). Unset one of them."
                )

    def _fitting(self, languages: HoleLanguages) -> HoleLanguages:
        if not self.infilling:
            raise ValueError(
                "`logits_processor` must fit the call (got HoleLanguages without `infill_mask` or `infill`: there "
                "are no holes whose languages they could be). Call `d3llm_hf.fill`, or pass the mask of the holes."
            )
        return languages

    def __bool__(self) -> bool:
        return bool(self.steps) or bool(self.constraints) or self.repairs or self.languages is not None

    def repair(self, logits: torch.Tensor) -> torch.Tensor:
        """`remove_invalid_values`: of the model's logits, before any token is banned (it would be allowed again)."""
        return lp.InfNanRemoveLogitsProcessor()(self.prompt, logits) if self.repairs else logits

    def look(self, state: State, canvas: Canvas) -> None:
        """Shows the canvases that the next candidates stand on."""
        self.owners, self.place = state.rows, canvas.slots if self.infilling else None
        if self.row_wise:  # nobody reads the text
            self.text = self.tokens = state.tokens
            return
        self.tokens, self.decided = self._answers(state.tokens, canvas), state.step_map > 0
        if self.infilling:
            given = torch.ones_like(canvas.base, dtype=torch.bool) if canvas.mask is None else canvas.mask
            self.decided = replace(canvas, base=given).fill(self.decided)
        self.text = visible_text(self.known_prompt[self.owners], self.tokens, self.decided, self.stop_ids)
        if self.languages is not None:
            self.languages.look(self.tokens, self.decided, self.owners)

    def _answers(self, tokens: torch.Tensor, canvas: Canvas) -> torch.Tensor:
        """`(B, N)` tokens of the positions to decide as the answer, which is the whole text where these lie in it."""
        return canvas.fill(tokens) if self.infilling else tokens

    def __call__(self, scores: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """`(m, V)` scores of candidates at `(m,)` rows and columns of the canvases looked at, processed."""
        if self.place is not None:
            columns = self.place[rows, columns]
        banned = None
        if self.constraints:
            banned = self.constraints.banned(
                self.tokens, self.decided, rows, columns, scores.shape[1], owners=self.owners
            )
        if self.languages is not None:
            scores = self.languages.ended(scores, rows, columns)
            outside = self.languages.banned(rows, columns, scores.shape[1])
            banned = outside if banned is None else banned | outside
        if banned is not None:
            scores = scores.masked_fill(banned, float("-inf"))
        at = Places(
            rows,
            columns,
            owners=self.owners,
            batch=self.prompt.shape[0],
            slots=self.prompt.shape[1] + columns,
            text=self.text,
            prompt_length=self.prompt.shape[1],
            stop_ids=self.stop_ids,
        )
        for step in self.steps:
            scores = step(scores, at)
        # Whatever a user's processor made of them, banned tokens are banned.
        return scores if banned is None else scores.masked_fill(banned, float("-inf"))

    def _by_column(self, processor: LogitsProcessor, scores: torch.Tensor, at: Places) -> torch.Tensor:
        """Calls a user's processor once for each column, with the whole batch and the canvas before the column.

        Of several canvases of one row (drafts) each gets a call of its own.
        """
        earlier = (self.owners[:, None] == self.owners).tril(-1).sum(1)
        for copy in range(int(earlier.max()) + 1):
            of_copy = earlier == copy
            answers = self._answers(self.batch_tokens, self.batch_canvas).clone()
            answers[self.owners[of_copy]] = self.tokens[of_copy]
            for column in at.columns[of_copy[at.rows]].unique().tolist():
                here = (at.columns == column) & of_copy[at.rows]
                owners = self.owners[at.rows[here]]
                batch = scores.new_zeros(self.prompt.shape[0], scores.shape[1])
                batch[owners] = scores[here]
                text = torch.cat([self.prompt, answers[:, :column]], dim=1)
                scores[here] = processor(text, batch)[owners]
        return scores

    def compatible(
        self, commits: torch.Tensor, tokens: torch.Tensor, cost: torch.Tensor, state: State, canvas: Canvas
    ) -> torch.Tensor:
        """The commits `(B, N)` of one forward without those that break a promise together; see [`Constraints`]."""
        if not self.constraints and self.languages is None:
            return commits
        if not self.infilling:
            return self.constraints.compatible(commits, tokens, cost, state)

        def spread(table: torch.Tensor, elsewhere: float) -> torch.Tensor:  # (B, N) to (B, L)
            return replace(canvas, base=torch.full_like(canvas.base, elsewhere, dtype=table.dtype)).fill(table)

        known = torch.zeros_like(canvas.base, dtype=torch.bool) if canvas.mask is None else ~canvas.mask
        text = replace(
            state, tokens=canvas.fill(state.tokens), undecided=replace(canvas, base=known).fill(state.undecided)
        )
        wanted, costs, chosen = spread(commits, False), spread(cost, float("inf")), canvas.fill(tokens)
        kept = self.constraints.compatible(wanted, chosen, costs, text)
        if self.languages is not None:
            kept = self.languages.compatible(kept, chosen, ~text.undecided, costs, state.rows)
        return torch.nn.functional.pad(kept, (0, 1)).gather(1, canvas.slots)
