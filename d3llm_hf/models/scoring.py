"""From logits to a token and a rank for every candidate position, in one float32 pass over the vocabulary."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib.util import find_spec

import torch
from transformers.utils import logging

from .canvas import Canvas
from .credit import Credit
from .decoding import Rules, State
from .drift import Drift
from .processors import Processors


logger = logging.get_logger(__name__)

# Vocabulary entries that are worked on at once; bounds the float32 copies, whatever the canvas and the batch.
CHUNK_ELEMENTS = 1 << 24

_COLD = 1e-20  # a temperature that costs are not divided by
_FLOOR = -110.0  # exp of it rounds to 0 in float32

# What can be wrong with a row.
NOT_FINITE, NOTHING_LEFT = 1, 2


@dataclass
class Scores:
    """One entry per position of the answer region, `(B, N)`; meaningful at the candidates.

    Attributes:
        tokens: the token to commit (sampled when sampling); the present one at what may be taken back.
        best_tokens: the token of a forced commit.
        cost: rank of the position with that token; lower is committed earlier, inf where nothing was scored.
        force_cost: rank for forced commits.
        entropy, surprise: in nats, of the distribution, and minus the logarithm of the token's probability; with
            `lookahead` only, `cost` otherwise.
        broken (long): `NOT_FINITE` where logits held NaN, +inf, or nothing but -inf, `NOTHING_LEFT` where processors
            left no token, 0 elsewhere.
    """

    tokens: torch.Tensor
    best_tokens: torch.Tensor
    cost: torch.Tensor
    force_cost: torch.Tensor
    entropy: torch.Tensor
    surprise: torch.Tensor
    broken: torch.Tensor

    def select(self, index: torch.Tensor) -> "Scores":
        """The scores of the rows with the `(B',)` indices `index`."""
        return Scores(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def moved(self, columns: int, more: int) -> "Scores":
        """The same for answers of so many columns, with `more` rows of which nothing was scored."""
        further, inf = columns - self.cost.shape[1], float("inf")
        value = {"tokens": 0, "best_tokens": 0, "broken": 0}
        pad = torch.nn.functional.pad
        tables = {f.name: (getattr(self, f.name), value.get(f.name, inf)) for f in fields(self)}
        return Scores(
            **{name: pad(table, (0, further, 0, more), value=blank) for name, (table, blank) in tables.items()}
        )


@dataclass
class Statistics:
    """What the scores need of a distribution; `others` and `second` are relative to the reference logit `peak`."""

    top: torch.Tensor  # (n,) the best token's logit
    peak: torch.Tensor  # (n,) the largest logit, the mask token's included
    log_z: torch.Tensor  # (n,) log sum exp(logits - peak), exact near 0
    others: torch.Tensor  # (n,) sum exp(logits - peak) over all tokens but the best
    second: torch.Tensor  # (n,) exp(second best logit - peak)
    entropy: torch.Tensor  # (n,) nats


def entropy_cost(stats: Statistics, chosen: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
    """Entropy in nats (d3LLM, dParallel, Dream's `entropy`)."""
    return stats.entropy


def confidence_cost(stats: Statistics, chosen: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
    """Negative log-probability of the chosen token (LLaDA's low-confidence remasking, Dream's `maskgit_plus`).

    It orders positions as the probability does, and still tells them apart where that rounds to 1 in float32.
    """
    return stats.log_z + (stats.peak - chosen)


def probability_cost(stats: Statistics, chosen: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
    """Minus the probability of the chosen token, for the temperature that Dream puts on it (`alg_temp`)."""
    return -torch.exp(-confidence_cost(stats, chosen, noise))


def margin_cost(stats: Statistics, chosen: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
    """One minus the difference of the two highest probabilities (Dream's `topk_margin`), exact near 0."""
    return (stats.others + stats.second) / stats.log_z.exp()


def noise_cost(stats: Statistics, chosen: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
    """A uniform number (random remasking, Dream's `origin`)."""
    return noise  # type: ignore[return-value]  # `Scorer._cost` draws it for this score


# Each takes the statistics, the logit of the chosen token, and noise where it asks for it; `(n,)` all of them.
SCORES: dict[str, Callable[[Statistics, torch.Tensor, torch.Tensor | None], torch.Tensor]] = {
    "entropy": entropy_cost,
    "confidence": confidence_cost,
    "probability": probability_cost,
    "margin": margin_cost,
    "noise": noise_cost,
}


class Sampler:
    """Counter-based random numbers: a function of (seed, row, step, position), whatever else is in the batch.

    No generator is kept or advanced, so a row's numbers do not depend on which other rows are still running, and the
    same seed gives the same text on every device. With a seed for each row, a row draws what it would draw alone.
    """

    TOKEN, POSITION = 0, 1  # streams: one draws tokens, the other ranks positions

    def __init__(self, seed: int | Sequence[int] | None):
        # torch's global generator is touched only when nobody gave a seed, and then `set_seed` makes calls repeatable.
        self._seed = seed

    def check_batch(self, batch: int) -> None:
        """Refuses seeds of single rows that are not one for each."""
        if isinstance(self._seed, Sequence) and len(self._seed) != batch:
            raise ValueError(
                f"`seed` must be one integer, or one for each row (got {len(self._seed)} for {batch} rows). Pass as "
                "many as there are rows."
            )

    @property
    def seed(self) -> int | Sequence[int]:
        """The seed of this call, drawn when first needed where none was given."""
        if self._seed is None:
            self._seed = int(torch.randint(2**62, ()))
        return self._seed

    def uniform(
        self, rows: torch.Tensor, step: torch.Tensor | int, columns: torch.Tensor, stream: int
    ) -> torch.Tensor:
        """Uniform numbers in [0, 1) for `(n,)` rows, steps and columns, float64."""
        step = torch.as_tensor(step, device=rows.device)  # arithmetic that wraps
        counter, rows = self._start(rows)
        for part in (rows, columns, step * 2 + stream):
            counter = _mix(counter + _GOLDEN * (part + 1))
        return (counter.bitwise_right_shift(11) & ((1 << 53) - 1)).double() * 2.0**-53

    def _start(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the numbers of `(n,)` rows begin with: the seed, and the row where it has none of its own."""
        if isinstance(self.seed, Sequence):
            return rows.new_tensor([_signed(seed) for seed in self.seed])[rows], torch.zeros_like(rows)
        return torch.full_like(rows, _signed(self.seed)), rows

    def noise(self, rows: torch.Tensor, step: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """The costs of remasking at random, known before the forward: uniform numbers `(n,)` float32."""
        return self.uniform(rows, step, columns, self.POSITION).float()

    def tokens(
        self, logits: torch.Tensor, rows: torch.Tensor, step: torch.Tensor, columns: torch.Tensor
    ) -> torch.Tensor:
        """Draws one token per `(n, V)` row of logits by inverting the cumulative distribution: `(n,)`."""
        total = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
        level = self.uniform(rows, step, columns, self.TOKEN)[:, None] * total[:, -1:]
        return torch.searchsorted(total, level, right=True).clamp_max(logits.shape[1] - 1)[:, 0]

    def positions(
        self, cost: torch.Tensor, temperature: float, rows: torch.Tensor, step: torch.Tensor, columns: torch.Tensor
    ) -> torch.Tensor:
        """Perturbs costs so that taking the k lowest draws k positions from softmax(-cost / temperature): `(n,)`."""
        uniform = self.uniform(rows, step, columns, self.POSITION).clamp_min(1e-300)
        gumbel = -torch.log(-torch.log(uniform))
        if temperature < _COLD:  # the order is the same, and nothing overflows
            return (cost - temperature * gumbel).to(cost.dtype)
        return (cost / temperature - gumbel).to(cost.dtype)


class SamplerOfMany(Sampler):
    """Of rows that came with several calls: each draws what it draws in its own call.

    Its rows are places of the rows at work, which `admit` gives to the rows of a call.
    """

    def __init__(self) -> None:
        super().__init__(None)
        self._origin: dict[int, tuple[Sampler, int]] = {}  # place -> its call's sampler, and the row there
        self._counters: tuple[torch.Tensor, torch.Tensor] | None = None

    def admit(self, sampler: Sampler, places: Sequence[int]) -> None:
        """Takes in the rows of a call, in their order; whoever had their places has left."""
        self._origin |= {place: (sampler, row) for row, place in enumerate(places)}
        self._counters = None

    def _start(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._counters is None:
            table = torch.zeros(2, max(self._origin) + 1, dtype=torch.long, device=rows.device)
            for place, (sampler, row) in self._origin.items():
                counter, number = sampler._start(rows.new_tensor([row]))
                table[0, place], table[1, place] = counter[0], number[0]
            self._counters = table[0], table[1]
        return self._counters[0][rows], self._counters[1][rows]


_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)


def _signed(value: int) -> int:
    """The int64 with the same low 64 bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Finaliser of SplitMix64 (Steele, Lea, Flood 2014) on int64, whose arithmetic wraps as the unsigned one does."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x.bitwise_right_shift(shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return x ^ (x.bitwise_right_shift(31) & ((1 << 33) - 1))


def statistics(logits: torch.Tensor, mask_token_id: int) -> tuple[Statistics, torch.Tensor, torch.Tensor]:
    """Entropy and the like of `(n, V)` float32 logits, over all tokens; the best token is never the mask token.

    The mask token's logits are overwritten with -inf. Sums leave out the best token's 1 and use log1p, so that costs
    near 0 keep their order in float32.

    Returns:
        the statistics, the best tokens `(n,)`, and whether the logits were finite `(n,)`.
    """
    mask_logit = logits[:, mask_token_id].clone()
    logits[:, mask_token_id] = float("-inf")
    top, best = logits.max(-1)
    peak = torch.maximum(top, mask_logit)

    # Under the floor a weight is 0 in float32, and 0 times a number is 0; 0 times -inf would be NaN.
    distance = (logits - peak[:, None]).clamp_(min=_FLOOR)  # (n, V), one of two large temporaries
    weight = distance.exp()
    best_weight = weight.gather(1, best[:, None])[:, 0]
    weight.scatter_(1, best[:, None], 0.0)
    mask_weight = (mask_logit - peak).exp()
    second = torch.maximum(weight.amax(-1), mask_weight)
    others = weight.sum(-1) + mask_weight
    # -p log p with the logarithm that is there already: taking it anew is most of the pass on a CPU.
    spread = torch.special.entr(mask_weight) - weight.mul_(distance).sum(-1)
    return _of_sums(best, top, peak, others, second, spread, best_weight)


def _of_sums(best, top, peak, others, second, spread, best_weight):
    """What [`statistics`] returns, of `(n,)` sums; `spread` is the entropy's over all tokens but the best."""
    log_z = torch.log1p(others + torch.expm1(top - peak))
    spread = spread + torch.special.entr(best_weight)
    stats = Statistics(top, peak, log_z, others, second, log_z + spread / (others + best_weight))
    return stats, best, top.isfinite() & peak.isfinite()


def kernel_for(logits: torch.Tensor) -> Callable | None:
    """What stands in for [`statistics`] without a float32 copy of `logits`, `None` where nothing does."""
    wide = logits.dtype in (torch.float32, torch.bfloat16, torch.float16) and logits.stride(-1) == 1
    return _kernel_on(logits.device) if logits.is_cuda and wide else None


@lru_cache
def _kernel_on(device: torch.device) -> Callable | None:
    """The Triton kernel, where Triton is installed and the device computes with it what torch does."""
    if find_spec("triton") is None:
        return None
    from .triton_statistics import row_sums

    def by_kernel(logits: torch.Tensor, mask_token_id: int):
        best, top, peak, others, second, spread = row_sums(logits, mask_token_id)
        return _of_sums(best, top, peak, others, second, spread, (top - peak).exp())

    # Tried once: a compiler may be missing, or the device be too old.
    table = torch.arange(3 * 5000, device=device).mul(7919).remainder(10007).view(3, 5000).float() / 500
    try:
        found, best, _ = by_kernel(table, 1)
        wanted, best_wanted, _ = statistics(table, 1)
        right = torch.equal(best, best_wanted) and torch.allclose(found.entropy, wanted.entropy, rtol=1e-3)
        reason = "its entropies are wrong"
    except Exception as error:  # whatever it is, torch computes the same, only slower
        right, reason = False, str(error)
    if not right:
        logger.warning_once(f"Logits on {device} are scored without the Triton kernel: {reason}.")
    return by_kernel if right else None


class Scorer:
    """Logits of the candidates to tables over the answer region, a chunk of candidates at a time.

    Args:
        rules: of the method.
        mask_token_id: never chosen.
        sampler: random numbers, asked only where the rules or `sampling` need them.
        sampling: draw the tokens; otherwise take the best.
        processors: transformers' logits processors, applied to each candidate.
    """

    def __init__(self, rules: Rules, mask_token_id: int, *, sampler: Sampler, sampling: bool, processors: Processors):
        self.rules, self.mask_token_id = rules, mask_token_id
        self.sampler, self.sampling, self.processors = sampler, sampling, processors
        self.credit = Credit(*rules.credit) if rules.credit else None
        self.drift = None if rules.kl_threshold is None else Drift(rules.kl_threshold)
        self.force_score = rules.force_score or ("entropy" if rules.score == "noise" else None)

    def __call__(
        self, logits: torch.Tensor, state: State, canvas: Canvas, where: tuple[torch.Tensor, torch.Tensor]
    ) -> Scores:
        """`(n, V)` logits (overwritten) of the candidates at rows and columns `where` of the canvases.

        With a `kl_threshold` the state's `calm` counts this forward as well.
        """
        if self.processors:
            self.processors.look(state, canvas)
        rows, steps, columns = state.rows[where[0]], state.step[where[0]], where[1]
        size = max(1, CHUNK_ELEMENTS // logits.shape[1])
        if self.drift is not None:  # the model's own distributions, before anything is taken from them
            state.calm = self.drift(logits, state, where, size)
        held = None  # tokens that are asked about, -1 where one is looked for
        if self.rules.revoke is not None:
            held = state.tokens.masked_fill(~state.unsettled, -1)[where]
        untouched = not (self.processors or self.sampling or self.credit) and held is None
        kernel = kernel_for(logits) if untouched else None
        if kernel is not None:
            stats, best, finite = kernel(logits, self.mask_token_id)
            cost = self._cost(stats, stats.top, rows, steps, columns)
            force, looks = self._force_cost(stats, stats.top, cost), self._looks(stats, stats.top, cost)
            tokens, fault = best, torch.where(finite, 0, NOT_FINITE)
        else:
            chunks = [slice(start, start + size) for start in range(0, logits.shape[0], size)]
            parts = [
                self._chunk(
                    logits[chunk].float(),
                    where[0][chunk],
                    rows[chunk],
                    steps[chunk],
                    columns[chunk],
                    None if held is None else held[chunk],
                )
                for chunk in chunks
            ]
            joined = (torch.cat(part) for part in zip(*parts, strict=True))
            tokens, best, cost, force, entropies, surprises, fault = joined
            looks = entropies, surprises

        rules = self.rules
        if rules.alg_temp:
            cost = self.sampler.positions(cost, rules.alg_temp, rows, steps, columns)
        table = torch.full(state.tokens.shape, float("inf"), dtype=torch.float32, device=logits.device)
        costs = table.index_put(where, cost)
        chosen = state.tokens.index_put(where, tokens)
        entropy, surprise = (table.index_put(where, look) if rules.lookahead else costs for look in looks)
        return Scores(
            tokens=chosen,
            best_tokens=state.tokens.index_put(where, best) if rules.greedy_force else chosen,
            cost=costs,
            force_cost=costs if self.force_score is None else table.index_put(where, force),
            entropy=entropy,
            surprise=surprise,
            broken=torch.zeros_like(state.tokens).index_put(where, fault),
        )

    def admit(self, rows: torch.Tensor, columns: int) -> None:
        """Remembers nothing of rows `(n,)`, which are new; the longest answer has so many columns."""
        if self.credit is not None:
            self.credit.forget(rows)
        if self.drift is not None:
            self.drift.admit(rows, columns)

    def _chunk(
        self,
        raw: torch.Tensor,
        index: torch.Tensor,
        rows: torch.Tensor,
        steps: torch.Tensor,
        columns: torch.Tensor,
        held: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        """Tokens, best tokens, costs, those of forced commits, looks ahead and faults of candidates, `(m,)` each.

        Args:
            index: rows of the state; `rows` are those of the batch that `generate` was given.
            held (`(m,)` long, *optional*): the token of a position that is decided already, -1 of any other.
        """
        if self.credit is not None:
            raw = self.credit(raw, self.mask_token_id, rows, steps, columns)
        processed, valid = raw, None
        if self.processors:
            raw = self.processors.repair(raw)
            valid = raw.amax(-1).isfinite()
            processed = self._processed(raw.masked_fill(~valid[:, None], 0.0), index, columns)
            if self.rules.score_processed or self.processors.languages is not None:
                raw = processed.clone()
        if self.rules.score_temperature != 1:
            raw = raw / self.rules.score_temperature
        stats, best, finite = statistics(raw, self.mask_token_id)
        fault = torch.where(finite, 0, NOT_FINITE)
        if valid is not None:
            best = processed.argmax(-1)
            left = processed.amax(-1).isfinite()
            fault = torch.where(valid, torch.where(left, fault, NOTHING_LEFT), NOT_FINITE)
        tokens = self.sampler.tokens(processed, rows, steps, columns) if self.sampling else best
        if held is not None:  # whatever processors leave of it
            tokens = torch.where(held < 0, tokens, held)
            fault = torch.where((held >= 0) & (fault == NOTHING_LEFT), 0, fault)
        chosen = raw.gather(1, tokens[:, None])[:, 0]
        cost = self._cost(stats, chosen, rows, steps, columns)
        force, looks = self._force_cost(stats, chosen, cost), self._looks(stats, chosen, cost)
        return tokens, best, cost, force, *looks, fault

    def _cost(
        self, stats: Statistics, chosen: torch.Tensor, rows: torch.Tensor, steps: torch.Tensor, columns: torch.Tensor
    ) -> torch.Tensor:
        """Ranks `(m,)` candidates, whose tokens have the logits `chosen`."""
        noise = self.sampler.noise(rows, steps, columns) if self.rules.score == "noise" else None
        return SCORES[self.rules.score](stats, chosen, noise)

    def _force_cost(self, stats: Statistics, chosen: torch.Tensor, cost: torch.Tensor) -> torch.Tensor:
        """Ranks `(m,)` candidates for forced commits; by their `cost` unless said otherwise."""
        return cost if self.force_score is None else SCORES[self.force_score](stats, chosen, None)

    def _looks(self, stats: Statistics, chosen: torch.Tensor, cost: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Entropies and surprises of `(m,)` candidates, what lookaheads are ranked by; their `cost` without any."""
        return (stats.entropy, confidence_cost(stats, chosen, None)) if self.rules.lookahead else (cost, cost)

    def _processed(self, scores: torch.Tensor, index: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """Processed `(m, V)` scores; the mask token takes no part in them, so that it is no rank of a top-k."""
        scores[:, self.mask_token_id] = float("-inf")
        scores = self.processors(scores, index, columns)
        scores[:, self.mask_token_id] = float("-inf")
        return scores
