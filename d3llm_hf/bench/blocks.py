"""What block-causal attention saves: `d3llm bench blocks`.

The same random weights decode the same quota of tokens in every forward in three ways: with keys of finished blocks
kept, which is exact; with all up to the open block computed anew; and with full attention over Fast-dLLM's dual cache,
which recomputes least of those for bidirectional models. Then the first way alone, behind prompts of other lengths: a
forward there costs its block, and attending to what is kept.
"""

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ..models.configuration_sdar import SDARConfig
from ..models.modeling_sdar import SDARForCausalLM
from ..progress import progress_bar
from .decoding import Contestant, Turn, decode, equal_tokens, results, timed, warm_up
from .memory import threads
from .shapes import HEAD_WIDTH, DecodingBench, Work, random_work
from .split import steps_timed


SUITE = "bench_blocks"
SCHEDULE = 4
KEPT = "blocks, kept"
ANEW = "blocks, anew"
FULL = "full attention, dual cache"
CACHES = {ANEW: "none", FULL: "dual", KEPT: "exact"}


def blocks_bench(bench: DecodingBench) -> DecodingBench:
    """The bench with the quota of this suite, where none is chosen.

    Raises:
        ValueError: for a checkpoint, or settings of decoding, which are the suite's own.
    """
    if bench.model or bench.settings:
        raise ValueError(
            "`d3llm bench blocks` decodes a random model by a quota, with caches of its own (got "
            f"{bench.model or bench.settings!r}). Leave out the model and the settings of decoding."
        )
    return bench if bench.schedule else replace(bench, schedule=SCHEDULE)


def measure_blocks(bench: DecodingBench, prompt_lengths: Sequence[int] = ()) -> dict[str, Any]:
    """Measures all ways behind the shape's prompt, and kept blocks behind others.

    Args:
        bench: the shape.
        prompt_lengths: further lengths.

    Returns:
        the results; each row has its `name` and `prompt_length`; `tokens`, `forwards` and `positions_per_token`;
        `seconds` of a turn (median) and `tokens_per_second`; `ms_median_step`, from one forward to the next.

    Raises:
        ArithmeticError: if kept blocks change a token in float32.
    """
    bench = blocks_bench(bench)
    points = [(bench.prompt_length, list(CACHES)), *((length, [KEPT]) for length in prompt_lengths)]
    rows = []
    with progress_bar(sum(len(names) for _, names in points) * (bench.repeats + 1), "turn", "bench") as bar:
        for length, names in points:
            point = replace(bench, prompt_length=length)
            with _prepared(point) as work:
                turns, steps = {}, {}
                seconds: dict[str, list[float]] = {name: [] for name in names}
                for name in names:
                    with _attention(work, name), steps_timed(work.model, point.device) as found:
                        warm_up(point, _contestant(point, name), work)
                        found.clear()
                        turns[name] = decode(_contestant(point, name), work)
                    steps[name] = statistics.median(found)
                    bar.update()
                _check(point, turns)
                for _ in range(bench.repeats):
                    for name in names:
                        with _attention(work, name):
                            turn = partial(decode, _contestant(point, name), work)
                            seconds[name].append(timed(turn, point.device)[0])
                        bar.update()
                rows += [
                    _row(name, length, turns[name], statistics.median(seconds[name]), steps[name]) for name in names
                ]
    return results(SUITE, bench, prompt_lengths=list(prompt_lengths), rows=rows)


def _contestant(bench: DecodingBench, name: str) -> Contestant:
    steps = -(-bench.new_tokens // bench.schedule)
    settings = {"decoding_method": "llada", "steps": steps, "block_length": bench.block_length}
    return Contestant(False, settings | {"kv_cache": CACHES[name], "early_stop": False})


@contextmanager
def _attention(work: Work, name: str) -> Iterator[None]:
    """The model as it is, or with every position seeing all others."""
    if name == FULL:
        work.model.block_alignment = None
    try:
        yield
    finally:
        vars(work.model).pop("block_alignment", None)


def sdar_config(bench: Any, length: int) -> SDARConfig:
    """Of a random SDAR: heads 64 wide, the MLP three times as wide as the model, no stop token.

    Args:
        bench: has the sizes `vocab_size`, `d_model`, `layers` and `block_length`. Mask and pad are the last tokens.
        length: of the longest sequence, in tokens.
    """
    last, heads = bench.vocab_size - 1, max(1, bench.d_model // HEAD_WIDTH)
    return SDARConfig(
        vocab_size=bench.vocab_size,
        hidden_size=bench.d_model,
        num_hidden_layers=bench.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=bench.d_model // heads,
        intermediate_size=3 * bench.d_model,
        max_position_embeddings=length,
        block_size=bench.block_length,
        mask_token_id=last,
        pad_token_id=last - 1,
        bos_token_id=None,
        eos_token_id=None,
    )


@contextmanager
def _prepared(bench: DecodingBench) -> Iterator[Work]:
    """A random SDAR of the shape, with prompts."""
    with threads(bench.threads), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(bench.seed)
        model = SDARForCausalLM(sdar_config(bench, bench.prompt_length + bench.new_tokens))
        yield random_work(model, bench)


def _check(bench: DecodingBench, turns: dict[str, Turn]) -> None:
    if bench.dtype == "float32" and ANEW in turns and turns[KEPT].answers != turns[ANEW].answers:
        share = 100 * equal_tokens(turns[KEPT], turns[ANEW])
        raise ArithmeticError(
            f"Kept blocks must give the tokens of recomputed ones in float32 (got {share:.2f} % of them). Where two "
            "candidates are nearly equal that is chance: try another `--seed`. Else it is a bug: report it."
        )


def _row(name: str, prompt_length: int, turn: Turn, seconds: float, step: float) -> dict[str, Any]:
    return {
        "name": name,
        "prompt_length": prompt_length,
        "tokens": turn.tokens,
        "forwards": turn.forwards,
        "positions_per_token": round(turn.positions / max(1, turn.tokens), 2),
        "seconds": round(seconds, 4),
        "tokens_per_second": round(turn.tokens / seconds, 3),
        "ms_median_step": round(1000 * step, 3),
    }
