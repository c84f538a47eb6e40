"""How likely a masked diffusion language model finds a text: a Monte-Carlo bound, and whether greedy decoding agrees.

A completion is any set of positions of a text; all others are its condition. So a continuation, an infilling and a
prefix are the same request. Everything but the model runs on the CPU, in float64, and so do the results.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch

from .models.contract import CanvasContract
from .models.half_precision import fast_products
from .models.methods import decides_slots
from .models.modeling_common import positions_of
from .models.plain_values import plain
from .models.prompt_checks import check_mask, check_tokens
from .models.scoring import CHUNK_ELEMENTS, Sampler, confidence_cost, statistics
from .models.stock_settings import MOST
from .models.text_config import text_setting
from .models.token_ids import check_inside, check_kind, vocabulary_of
from .models.wrappers import base_of, marked_logits, moves_padded, virtual_tokens


@dataclass(frozen=True, eq=False)
class LogLikelihood:
    """Estimated log-likelihoods of B completions, on the CPU.

    Attributes:
        mean (`(B,)` float64): nats; estimate of a lower bound of the completion's log-probability. 0 where it is
            empty, -inf where a token has probability 0.
        standard_error (`(B,)` float64): of `mean`, as if the draws were independent. They are stratified, so that it
            is rather too large than too small. 0 for a completion of at most one token, where nothing is random; NaN
            where it cannot be told, with a single draw or infinite values.
        num_tokens (`(B,)` long): tokens of the completion.
    """

    mean: torch.Tensor
    standard_error: torch.Tensor
    num_tokens: torch.Tensor

    @property
    def per_token(self) -> torch.Tensor:
        """Nats per token `(B,)`; 0 for an empty completion."""
        return self.mean / self.num_tokens.clamp_min(1)

    @property
    def perplexity(self) -> torch.Tensor:
        """`exp(-per_token)` `(B,)`: since `mean` estimates a lower bound, this estimates an upper one."""
        return torch.exp(-self.per_token)


@torch.no_grad()
def log_likelihood(
    model,
    input_ids: torch.Tensor,
    completion_mask: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    num_samples: int = 128,
    batch_size: int = 32,
    seed: int = 0,
    cfg_scale: float = 0.0,
    mask_token_id: int | None = None,
) -> LogLikelihood:
    r"""Monte-Carlo estimate of the bound of log p(completion | condition) (LLaDA, arXiv:2502.09992, eq. 6).

    For a completion of n tokens a draw takes l uniformly from 1..n, masks l of the n positions chosen uniformly, and
    gives n / l times the summed log-probabilities of the masked tokens. Its expectation over draws is the bound. Over
    the draws l is stratified, as in LLaDA's evaluation: each value comes up equally often, up to one.

    1. Check the arguments.
    2. Draw the masked subsets of each row; a subset drawn twice is run once.
    3. Run the canvases of all rows, `batch_size` a forward.
    4. Average over the draws.

    A draw is a function of `seed`, its index and the positions *within the completion*. A row so has the same value
    alone and in any batch, whatever its condition, and completions of the same length are compared under the same
    draws. torch's global generator is neither read nor advanced.

    Args:
        model: a masked diffusion LM of this package. It is run as it is: call `model.eval()` after training.
        input_ids (`(B, L)` long): texts, padded to one length on either side.
        completion_mask (`(B, L)` bool): True on the tokens whose likelihood is asked. Everything else that is not
            padding is the condition.
        attention_mask (`(B, L)`, *optional*): 0 on padding.
        num_samples (`int`): draws a row.
        batch_size (`int`): canvases of a forward; with guidance a forward holds twice as many.
        seed (`int`): of the draws.
        cfg_scale (`float`): classifier-free guidance against the same canvas with its condition masked, 0 is off.
        mask_token_id (`int`, *optional*): the model's own when unset.

    Returns:
        [`LogLikelihood`].

    Raises:
        ValueError, TypeError: for arguments of the wrong type, shape or range; without a mask token; for a completion
            on padding or with mask tokens in it, padding inside a text, a text beyond the model's positions, or logits
            that are not finite (naming the row).
    """
    # 1. Check the arguments
    texts = _Texts.checked(model, input_ids, completion_mask, attention_mask, mask_token_id, cfg_scale)
    num_samples, batch_size, seed = plain(num_samples), plain(batch_size), plain(seed)
    _check_count("num_samples", num_samples)
    _check_count("batch_size", batch_size)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"`seed` must be an integer (got {seed!r}). Pass for example `seed=0`.")
    num_tokens = texts.completion.sum(1)
    uniform, offset = _uniform_numbers(seed, num_samples, max(num_tokens.tolist(), default=0))

    # 2. Draw the masked subsets of each row; a subset drawn twice is run once
    weights, which, order = [], [], texts.longest_first()

    def canvases() -> Iterator[tuple[int, torch.Tensor]]:
        for row in order:
            size = int(num_tokens[row])
            drawn = _draw_subsets(uniform[:, :size], _subset_sizes(size, num_samples, offset))  # (S, n)
            subsets, index = drawn.unique(dim=0, return_inverse=True)
            weights.append(size / subsets.sum(1).double())
            which.append(index)
            yield from ((row, subset) for subset in subsets)

    # 3. Run the canvases of all rows, `batch_size` a forward
    sums = []
    pending = canvases()
    while batch := list(islice(pending, batch_size)):
        rows = torch.tensor([row for row, _ in batch], device="cpu")
        subsets = torch.cat([subset for _, subset in batch])
        hidden = torch.zeros_like(texts.completion[rows]).masked_scatter(texts.completion[rows], subsets)
        sums.append(texts.summed_log_probabilities(rows, hidden))

    # 4. Average over the draws
    mean, standard_error = torch.zeros(2, len(num_tokens), dtype=torch.float64, device="cpu")
    values = torch.cat(sums).split([len(weight) for weight in weights]) if sums else ()
    for row, value, weight, index in zip(order, values, weights, which, strict=True):
        draws = (weight * value)[index]
        mean[row] = draws.mean()
        if num_tokens[row] > 1:
            standard_error[row] = draws.std() / num_samples**0.5 if num_samples > 1 else math.nan
    return LogLikelihood(mean, standard_error, num_tokens)


@torch.no_grad()
def is_greedy(
    model,
    input_ids: torch.Tensor,
    completion_mask: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    mask_token_id: int | None = None,
    batch_size: int = 32,
    cfg_scale: float = 0.0,
) -> torch.Tensor:
    """Whether greedy decoding, one position a forward and the most confident first, gives the completion.

    This is what LLaDA's evaluation takes for lm-eval's `is_greedy`. The length of the completion is given, and the
    mask token is never decided, as in `generate`. A row leaves at its first mismatch.

    Args:
        batch_size (`int`): rows of a forward.
        model, input_ids, completion_mask, attention_mask, mask_token_id, cfg_scale: see [`log_likelihood`].

    Returns:
        `(B,)` bool on the CPU; True for an empty completion.

    Raises:
        ValueError, TypeError: as [`log_likelihood`].
    """
    texts = _Texts.checked(model, input_ids, completion_mask, attention_mask, mask_token_id, cfg_scale)
    batch_size = plain(batch_size)
    _check_count("batch_size", batch_size)
    hidden = texts.completion.clone()
    agrees = torch.ones(len(hidden), dtype=torch.bool, device="cpu")
    running = texts.longest_first()
    while running:
        rows = torch.tensor(running[:batch_size], device="cpu")
        tokens, cost = texts.best_tokens(rows, hidden[rows])
        column = cost.argmin(1)  # the first of equals
        agrees[rows] = tokens.gather(1, column[:, None])[:, 0] == texts.ids[rows, column]
        hidden[rows, column] = False
        running = [row for row in running if agrees[row] and hidden[row].any()]
    return agrees


# ---- draws -------------------------------------------------------------------------------------------------------


def _uniform_numbers(seed: int, num_samples: int, longest: int) -> tuple[torch.Tensor, float]:
    """Numbers in [0, 1): `(S, n)` that rank the positions of a completion in each draw, and the strata's offset.

    They do not depend on the row: the sampler's row is the index of the draw, its column the position.
    """
    sampler = Sampler(seed)
    places = (torch.arange(size, device="cpu") for size in (num_samples, longest))
    draw, position = torch.meshgrid(*places, indexing="ij")
    uniform = sampler.uniform(draw.flatten(), 0, position.flatten(), Sampler.POSITION).view(num_samples, longest)
    zero = torch.zeros(1, dtype=torch.long, device="cpu")
    return uniform, sampler.uniform(zero, 0, zero, Sampler.TOKEN).item()


def _subset_sizes(size: int, num_samples: int, offset: float) -> torch.Tensor:
    """How many of `size` tokens each draw masks `(S,)`: stratified, and uniform in 1..size over offsets in [0, 1)."""
    level = (torch.arange(num_samples, dtype=torch.float64, device="cpu") + offset) / num_samples
    return ((level * size).floor().long() + 1).clamp_max(size)  # rounding can take the last level to 1


def _draw_subsets(uniform: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """The positions `(S, n)` bool that each draw masks: those with its lowest numbers."""
    rank = uniform.argsort(dim=1, stable=True).argsort(dim=1)
    return rank < sizes[:, None]


# ---- texts and the model -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Texts:
    """Checked texts on the CPU, and the model that is asked about them. B rows, L columns.

    Attributes:
        ids (`(B, L)` long), completion (`(B, L)` bool).
        seen (`(B, L)` bool): False on padding.
        mask_token_id, cfg_scale: see [`log_likelihood`].
    """

    model: CanvasContract
    ids: torch.Tensor
    completion: torch.Tensor
    seen: torch.Tensor
    mask_token_id: int
    cfg_scale: float

    @classmethod
    def checked(cls, model, input_ids, completion_mask, attention_mask, mask_token_id, cfg_scale) -> "_Texts":
        """See [`log_likelihood`] for what is refused."""
        if getattr(model, "logit_shift", None) is None:
            raise TypeError(
                f"`model` must be a masked diffusion language model (got {type(model).__name__}, which has no "
                "`logit_shift`). Load LLaDA or Dream with `AutoModel.from_pretrained` after `import d3llm_hf`."
            )
        if model.traits.topology is not None:
            raise ValueError(
                f"`model` must see the whole text (got {type(model).__name__}, whose positions see nothing of later "
                "blocks): its likelihood is another one, which is not implemented. Score with LLaDA or Dream."
            )
        if decides_slots(model.traits):
            raise ValueError(
                f"`model` must see the whole text (got {type(model).__name__}, whose tokens see those that were "
                "decided before them): its likelihood is another one, which is not implemented. Score with "
                "LLaDA or Dream."
            )
        if mask_token_id is None:
            mask_token_id = getattr(model.generation_config, "mask_token_id", None)
        if mask_token_id is None:
            mask_token_id = text_setting(model.config, "mask_token_id")
        if mask_token_id is None:
            raise ValueError(
                "`mask_token_id` must name the token of a masked position (got None). Set it in the config or pass it."
            )
        mask_token_id, cfg_scale = plain(mask_token_id), plain(cfg_scale)
        check_kind("mask_token_id", mask_token_id)
        way_out = "Correct config.json, set `model.config.mask_token_id`, or pass it."
        check_inside("`mask_token_id`", mask_token_id, vocabulary_of(model.config), way_out)
        if isinstance(cfg_scale, bool) or not isinstance(cfg_scale, (int, float)) or not 0 <= cfg_scale <= MOST:
            raise ValueError(
                f"`cfg_scale` must be a finite number of at least 0 (got {cfg_scale!r}), at most {MOST:g}."
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(completion_mask) if isinstance(completion_mask, torch.Tensor) else None
        _check_tables(input_ids, completion_mask, attention_mask)
        check_tokens(input_ids, vocabulary_of(model.config))
        check_mask(attention_mask)
        ids, completion, seen = input_ids.cpu(), completion_mask.cpu(), attention_mask.cpu().bool()
        texts = cls(model, ids, completion, seen, mask_token_id, float(cfg_scale))
        texts._check_rows()
        model.check_contract(seen, cached=False)
        return texts

    def _check_rows(self) -> None:
        on_padding = (self.completion & ~self.seen).any(1)
        _refuse_rows(on_padding, "`completion_mask` must be False on padding", "Set it only where a token is seen.")
        span = self.seen.long().cumsum(1) * self.seen.long().flip(1).cumsum(1).flip(1) > 0
        holes = (span & ~self.seen).any(1)
        _refuse_rows(holes, "`attention_mask` must have its zeros at the ends", "Pad a text on its left or right.")
        masked = (self.completion & (self.ids == self.mask_token_id)).any(1)
        _refuse_rows(
            masked, "`input_ids` must not hold the mask token in the completion", "It has no likelihood of its own."
        )
        if moves_padded(self.model) and not self.seen.all():
            raise ValueError(
                "`attention_mask` must not hold zeros with a PEFT adapter that drops `position_ids`: padding would "
                "move the text. Pass texts of one length together."
            )
        longest = self.model.max_positions
        if longest is not None:
            longest -= virtual_tokens(self.model)
            rule = f"`input_ids` must fit into the model's {longest} positions"
            _refuse_rows(self.seen.sum(1) > longest, rule, "Shorten the condition.")

    def longest_first(self) -> list[int]:
        """Rows with a completion, so ordered that the canvases of a forward need little padding."""
        lengths, asked = self.seen.sum(1).tolist(), self.completion.any(1).tolist()
        return sorted((row for row, ask in enumerate(asked) if ask), key=lambda row: -lengths[row])

    def summed_log_probabilities(self, rows: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Masks `hidden` `(b, L)` of the texts `rows` `(b,)`, and sums the hidden tokens' log-probabilities `(b,)`."""
        logits = self._logits(rows, hidden)
        tokens = self.ids[rows][hidden].to(logits.device)[:, None]
        parts = []
        for part in _parts(logits):
            chunk = logits[part].float()
            log_z = chunk.logsumexp(1)  # over the whole vocabulary, the mask token too
            parts.append(torch.stack([chunk.gather(1, tokens[part])[:, 0] - log_z, log_z]))
        log_probability, log_z = torch.cat(parts, 1).cpu()
        _refuse_broken(rows, hidden, log_z.isfinite())
        table = torch.zeros(hidden.shape, dtype=torch.float64, device="cpu")
        table[hidden] = log_probability.double()
        return table.sum(1)

    def best_tokens(self, rows: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The token that greedy decoding takes at each hidden position, and its rank: `(b, L)`, inf elsewhere."""
        logits = base_of(self.model).text_logits(self._logits(rows, hidden))
        parts = []
        for part in _parts(logits):
            stats, best, finite = statistics(logits[part].float(), self.mask_token_id)
            parts.append((best.cpu(), confidence_cost(stats, stats.top, None).cpu(), finite.cpu()))
        best, cost, finite = (torch.cat(part) for part in zip(*parts, strict=True))
        _refuse_broken(rows, hidden, finite)
        tokens = torch.zeros_like(self.ids[rows])
        costs = torch.full(hidden.shape, math.inf, dtype=torch.float32, device="cpu")
        tokens[hidden], costs[hidden] = best, cost
        return tokens, costs

    def _logits(self, rows: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Runs the model once: `(n, V)` logits that predict the n hidden positions of `(b, L)`, row by row."""
        # 1. The canvases, without the columns in which all of them are padding
        used = self.seen[rows].any(0).nonzero()[:, 0]
        window = slice(int(used[0]), int(used[-1]) + 1)
        hidden, seen = hidden[:, window], self.seen[rows, window]
        ids = self.ids[rows, window].masked_fill(hidden, self.mask_token_id)

        # 2. The slot that predicts a position; where nothing precedes it, its own
        row, column = hidden.nonzero(as_tuple=True)
        slot = torch.maximum(column - self.model.logit_shift, seen.long().argmax(1)[row])
        wanted = torch.zeros_like(hidden)
        wanted[row, slot] = True

        # 3. The forward, beside an unconditional one under guidance, and the head only where it is asked
        keep = wanted
        if self.cfg_scale:
            unconditional = ids.masked_fill(seen & ~self.completion[rows, window], self.mask_token_id)
            ids, seen, keep = torch.cat([ids, unconditional]), torch.cat([seen, seen]), torch.cat([wanted, wanted])
        device = self.model.device
        inputs = {
            "input_ids": ids.to(device),
            "attention_mask": None if seen.all() else seen.to(device),  # none keeps fast kernels
            "position_ids": (positions_of(seen) + self.model.position_offset).to(device),
            "use_cache": False,
        }
        with fast_products(self.model, compiled=False):
            if base_of(self.model) is self.model:
                logits = self.model.canvas_logits(inputs, keep.to(device))
            else:  # through a wrapper's own forward
                logits = marked_logits(self.model, self.model.accepted(inputs), keep.to(device))
        if self.cfg_scale:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + (self.cfg_scale + 1) * (conditional - unconditional)

        # 4. Two positions may share a slot: the first two of a text under a shift
        if logits.shape[0] != len(row):
            at = wanted.flatten().cumsum(0)[row * wanted.shape[1] + slot] - 1
            logits = logits[at.to(logits.device)]
        return logits


def _parts(logits: torch.Tensor) -> list[slice]:
    """Rows of `(n, V)` logits that are worked on at once, which bounds their float32 copies."""
    size = max(1, CHUNK_ELEMENTS // logits.shape[1])
    return [slice(start, start + size) for start in range(0, len(logits), size)]


# ---- checks ------------------------------------------------------------------------------------------------------


def _check_tables(input_ids, completion_mask, attention_mask) -> None:
    wanted = {"input_ids": torch.long, "completion_mask": torch.bool, "attention_mask": None}
    tables = (input_ids, completion_mask, attention_mask)
    for (name, dtype), table in zip(wanted.items(), tables, strict=True):
        if not isinstance(table, torch.Tensor) or (dtype is not None and table.dtype != dtype):
            kind = f"a tensor of dtype {table.dtype}" if isinstance(table, torch.Tensor) else type(table).__name__
            rule = "a tensor" if dtype is None else f"a tensor of dtype {dtype}"
            raise TypeError(f"`{name}` must be {rule} (got {kind}). Convert it first.")
        if table.ndim != 2 or table.shape != input_ids.shape:
            raise ValueError(
                f"`{name}` must have the shape (B, L) of `input_ids` (got {tuple(table.shape)} with `input_ids` of "
                f"{tuple(input_ids.shape)}). Pass one entry per token, and a single text as one row."
            )


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be a positive integer (got {value!r}). Pass for example 32.")
    if value < 1:
        raise ValueError(f"`{name}` must be a positive integer (got {value}). Pass for example 32.")


def _refuse_rows(wrong: torch.Tensor, rule: str, way_out: str) -> None:
    if wrong.any():
        raise ValueError(f"{rule} (got otherwise in row {int(wrong.long().argmax())}). {way_out}")


def _refuse_broken(rows: torch.Tensor, hidden: torch.Tensor, finite: torch.Tensor) -> None:
    if not finite.all():
        row = int(rows[hidden.nonzero()[~finite][0, 0]])
        raise ValueError(
            f"The model's logits must be finite (got NaN or inf for row {row} of the batch). Check the weights and "
            "the dtype; other rows are not at fault."
        )
