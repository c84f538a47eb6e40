"""What is measured: named lists of decoding settings, and how the tables show them.

card        what the model card of an embedded checkpoint compares
block_card  what that of a block-causal one compares
methods     every decoding method
caches      every kind of cache against none, also on a larger random model
lossless    one token a forward against the same tokens in fewer forwards
suffix      the whole canvas against a shortened suffix
windows     blocks against windows that slide, relaxed thresholds and lookahead
length      a length that finds itself against fixed ones, good and bad
causal      what the model card of an embedded causal checkpoint compares
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


Settings = dict[str, Any]

# Of every row; further figures are kept where a column shows them (`measure.Tally` explains them all).
FIGURES = ("accuracy", "tpf", "tpf_reference", "positions_per_token", "tokens", "forwards", "seconds")


@dataclass(frozen=True)
class Suite:
    """Rows that are measured together.

    Args:
        rows: name -> arguments of `generate`.
        columns: keys of `tables.fill.COLUMNS`.
        against: row -> the row that it is compared with, which comes first and is compared with itself.
        problems: how many are decoded where nothing else is asked for.
        notes: what a reader must know to read the table, in Markdown.
        larger: settings that are timed on a larger random model as well.
    """

    rows: dict[str, Settings]
    columns: tuple[str, ...]
    against: dict[str, str] = field(default_factory=dict)
    problems: int = 300
    notes: str = ""
    larger: "Suite | None" = None


def with_variants(name: str, base: Settings, variants: dict[str, Settings]) -> tuple[dict, dict[str, str]]:
    """A row and its variants: `rows` and `against` of a suite."""
    rows = {name: base} | {f"{name}, {variant}": base | more for variant, more in variants.items()}
    return rows, dict.fromkeys(rows, name)


def _joined(*groups: tuple[dict, dict[str, str]]) -> dict[str, Any]:
    rows: dict[str, Settings] = {}
    against: dict[str, str] = {}
    for more, compared in groups:
        rows |= more
        against |= compared
    return {"rows": rows, "against": against}


ONE_TOKEN: Settings = {"decoding_method": "llada", "block_length": 16}
RANDOM_ORDER: Settings = ONE_TOKEN | {"remasking": "random", "seed": 0}
ONE_BLOCK: Settings = {"decoding_method": "dparallel", "block_length": 16, "entropy_threshold": 0.3}
MULTI_BLOCK: Settings = {"decoding_method": "d3llm", "block_length": 16, "entropy_threshold": 0.3}
FAST_DLLM: Settings = {"decoding_method": "fast_dllm", "block_length": 16, "confidence_threshold": 0.9}
DINFER: Settings = {"decoding_method": "dinfer", "block_length": 16}
ENTROPY_BOUND: Settings = {"decoding_method": "entropy_bound", "block_length": 16, "entropy_bound": 0.1}

CARD = Suite(
    rows={
        "one token a forward": ONE_TOKEN,
        "block by block": ONE_BLOCK,
        "multi-block": MULTI_BLOCK,
        "multi-block, bolder": MULTI_BLOCK | {"entropy_threshold": 0.6},
        "multi-block, cached": MULTI_BLOCK | {"kv_cache": "delayed", "cache_delay": 1},
    },
    columns=("name", "settings", "accuracy", "tpf", "positions_per_token"),
    problems=500,
)

CAUSAL = Suite(
    rows={
        "from left to right": {"decoding_method": "ar"},
        "prompt lookup": {"decoding_method": "ar_prompt_lookup"},
        "prompt lookup, short drafts": {"decoding_method": "ar_prompt_lookup", "prompt_lookup_num_tokens": 3},
    },
    columns=CARD.columns,
    problems=500,
)

BLOCK_CARD = Suite(
    rows={name: settings for name, settings in CARD.rows.items() if "kv_cache" not in settings}
    | {"multi-block, computed anew": MULTI_BLOCK | {"kv_cache": "none"}},
    columns=CARD.columns,
    problems=CARD.problems,
)

METHODS = Suite(
    rows={
        "LLaDA": ONE_TOKEN,
        "LLaDA, by margin": ONE_TOKEN | {"remasking": "topk_margin"},
        "LLaDA, at random": RANDOM_ORDER,
        "Dream": {"decoding_method": "dream", "block_length": 16},
        "Dream, no blocks": {"decoding_method": "dream"},
        "dParallel": ONE_BLOCK,
        "d3LLM": MULTI_BLOCK,
        "Fast-dLLM, threshold": FAST_DLLM,
        "Fast-dLLM, factor": {"decoding_method": "fast_dllm", "block_length": 16, "factor": 1.0},
        **{
            f"dInfer, {decoder}, {label}": DINFER | {"decoder": decoder, "kv_cache": cache}
            for decoder in ("threshold", "hierarchy", "credit")
            for label, cache in (("no cache", "none"), ("vicinity", "vicinity"))
        },
        "EB-Sampler": ENTROPY_BOUND,
        "EB-Sampler, stricter": ENTROPY_BOUND | {"entropy_bound": 0.01},
        "dKV-Cache": {"decoding_method": "dkv", "block_length": 16},
        "LocalLeap": {"decoding_method": "local_leap", "block_length": 16},
        "KLASS": {"decoding_method": "klass", "block_length": 16},
        "WINO": {"decoding_method": "wino", "block_length": 16},
    },
    columns=("name", "settings", "accuracy", "tpf", "positions_per_token", "cpu_seconds"),
    notes=(
        "At most 64 new tokens, greedy, in batches of 25. A setting that is not shown has its method's default. "
        "Tokens per forward stay under 1 where one token is decided in each forward, because those behind the stop "
        "token do not count. CPU s: processor seconds in `generate` of one thread, the settings taking turns batch "
        "by batch. The thresholds were not tuned for this checkpoint, so the table compares settings, not papers."
    ),
)

_TIMES = ("seconds", "cpu_seconds", "relative_cpu")
_COMPARED = ("name", "added", "accuracy", "equal_tokens", "forwards", "positions_per_token", "tpf", *_TIMES)
_KINDS = {kind: {"kv_cache": kind} for kind in ("prefix", "dual", "delayed", "dkv", "vicinity")}
_GREEDY = {"dkv_greedy": {"kv_cache": "dkv_greedy"}}
_IN_ORDER = with_variants("one token a forward", ONE_TOKEN, _KINDS)
_AT_RANDOM = with_variants("at random", RANDOM_ORDER, _GREEDY)

CACHES = Suite(
    **_joined(
        _IN_ORDER,
        _AT_RANDOM,
        with_variants("by confidence", FAST_DLLM, _KINDS),
        with_variants(
            "multi-block",
            MULTI_BLOCK,
            {f"delayed by {delay}": {"kv_cache": "delayed", "cache_delay": delay} for delay in (1, 2)},
        ),
    ),
    columns=_COMPARED,
    notes=(
        "The first row of each group is the method without a cache, `kv_cache='none'`; the others add what they show. "
        "Same tokens: the share of answer tokens, stop tokens left out, that equal those without a cache. At most 64 "
        "new tokens, greedy, in batches of 25. Seconds are those in `generate`, the settings taking turns batch by "
        "batch; CPU s is the processor's time of one thread, which other programs disturb less, and the last column "
        "is its ratio to the group's first row. Fewer positions become less time only as far as positions are what a "
        "forward spends its time on: the more so the larger the model, the batch and the text."
    ),
    larger=Suite(
        **_joined(_IN_ORDER, _AT_RANDOM),
        columns=("name", "batch", "added", "forwards", "positions_per_token", *_TIMES),
        notes=(
            "The same caches where positions cost more: a random, untrained model, so there is no accuracy, and a "
            "method that decides several tokens at once would have nothing to show. Every row of a batch is decoded "
            "to the end. Seconds are the least of the rounds, after a warm-up. These are times of this implementation "
            "on a CPU; on other hardware, and for longer texts, the balance is another one."
        ),
    ),
)

LOSSLESS = Suite(
    **_joined(
        *(
            with_variants(
                name,
                ONE_TOKEN | {"remasking": remasking},
                {f"drafts {n}": {"lossless": True, "draft_length": n} for n in (1, 2, 4, 8)},
            )
            for name, remasking in (("by confidence", "low_confidence"), ("by entropy", "entropy"))
        )
    ),
    columns=(
        *("name", "added", "accuracy", "differing_answers"),
        *("forwards", "forwards_saved", "positions_per_token", *_TIMES),
    ),
    notes=(
        "The first row of each group decides one token a forward; the others must give the same tokens, and "
        "“answers that differ” counts those that do not. Every drafted canvas is one more to compute in a "
        "forward: forwards are saved at the price of positions, and time only where several canvases cost about as "
        "much as one, which on a CPU they do not. At most 64 new tokens, greedy, in batches of 25; seconds are those "
        "in `generate`, the settings taking turns batch by batch, CPU s the processor's time of one thread, the last "
        "column its ratio to the group's first row."
    ),
)

_SHORTER = {f"suffix of {n}": {"suffix_length": n} for n in (32, 16, 0)}

SUFFIX = Suite(
    **_joined(
        with_variants("one token a forward", ONE_TOKEN, _SHORTER),
        with_variants("by confidence", FAST_DLLM, _SHORTER),
        with_variants(
            "by confidence, dual",
            FAST_DLLM | {"kv_cache": "dual"},
            {"suffix of 16": {"suffix_length": 16}},
        ),
        with_variants("multi-block", MULTI_BLOCK, _SHORTER),
    ),
    columns=_COMPARED,
    notes=(
        "The first row of each group sees the whole canvas; the others see so many undecided positions behind the "
        "last open block. Same tokens: the share of answer tokens, stop tokens left out, that equal those of the "
        "whole canvas. At most 64 new tokens, greedy, in batches of 25; a batch is as wide as its furthest row. "
        "Seconds are those in `generate`, the settings taking turns batch by batch, CPU s the processor's time of one "
        "thread, the last column its ratio to the group's first row. What a shorter suffix costs depends on the "
        "length for which a model plans, so it has to be measured for each."
    ),
)

_SLIDING: Settings = {"window": "slide_span"}
_RELAXED: Settings = {"threshold_relaxation": 0.3}
_BOLDER: dict[str, Settings] = {
    "window": {"window": "slide"},
    "span": _SLIDING,
    "relaxed": _RELAXED,
    "span, relaxed": _SLIDING | _RELAXED,
    "span, ahead": _SLIDING | {"lookahead": 1},
    "span, relaxed, ahead": _SLIDING | _RELAXED | {"lookahead": 1},
    "span, relaxed, 2 ahead": _SLIDING | _RELAXED | {"lookahead": 2, "lookahead_threshold": 0.6},
}

WINDOWS = Suite(
    **_joined(
        with_variants(
            "by confidence",
            FAST_DLLM,
            _BOLDER | {"ahead": {"lookahead": 1}, "span, cached": _SLIDING | {"kv_cache": "sliding"}},
        ),
        with_variants("multi-block", MULTI_BLOCK, _BOLDER | {"ahead": {"lookahead": 1}}),
    ),
    columns=("name", "added", "accuracy", "tpf", "positions_per_token", "cpu_seconds"),
    notes=(
        "The first row of each group decides in blocks; the others add what they show. At most 64 new tokens, greedy, "
        "in batches of 25. CPU s: processor seconds in `generate` of one thread, the settings taking turns batch by "
        "batch. Positions per token count every canvas that is looked ahead with; on a CPU, where several canvases "
        "cost as much as they are, time follows them, and not the forwards."
    ),
)

_FOUND: dict[str, Settings] = {
    "rho-EOS": {"length_rule": "rho_eos"},
    "rho-EOS, as its code": {"length_rule": "rho_eos_tail"},
    "DAEDAL": {"length_rule": "daedal"},
    "DAEDAL, near end": {"length_rule": "daedal", "length_window": 8},
}


def _found(names: Sequence[str]) -> dict[str, Settings]:
    """Rules that find a length, from a first one and under a limit."""
    return {
        f"{name}, {first} to {limit}": _FOUND[name]
        | {"length": "adaptive", "initial_length": first, "max_new_tokens": limit}
        for first, limit in ((32, 64), (64, 128))
        for name in names
    }


LENGTH = Suite(
    **_joined(
        with_variants(
            "by confidence",
            FAST_DLLM,
            {f"{n} positions": {"max_new_tokens": n} for n in (32, 48, 80, 128, 192)} | _found([*_FOUND]),
        ),
        with_variants("multi-block", MULTI_BLOCK, _found(["rho-EOS", "DAEDAL, near end"])),
    ),
    columns=("name", "added", "accuracy", "positions", "forwards", "tpf", "seconds", "cpu_seconds"),
    notes=(
        "The first row of each group has a canvas of 64 positions, as long as the answers on which these checkpoints "
        "were trained; others are shorter, or 1.25, 2 and 3 times as long (4 times as long does not fit into their "
        "256 positions), or find their length between a first one and a limit. Positions and forwards are those of "
        "all problems together. Greedy, in batches of 25, which are as wide as their longest row; seconds are those "
        "in `generate`, the settings taking turns batch by batch, CPU s the processor's time of one thread."
    ),
)

SUITES: dict[str, Suite] = {
    "card": CARD, "block_card": BLOCK_CARD, "methods": METHODS, "caches": CACHES, "lossless": LOSSLESS,
    "suffix": SUFFIX, "windows": WINDOWS, "length": LENGTH, "causal": CAUSAL,
}  # fmt: skip
