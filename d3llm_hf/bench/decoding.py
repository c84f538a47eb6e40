"""Speed of decoding against a plain implementation of the same method in the same run: `d3llm bench decode`.

The contestants share a model, prompts and settings and take turns; see `shapes.py` for what is decoded,
`plain_decoding.py` for the baseline and `split.py` for where the time goes.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ..evaluation.provenance import on_device
from ..evaluation.tasks.word_problems import exact_match
from ..progress import progress_bar
from .memory import in_fresh_process, peak_memory
from .plain_decoding import plain_generate
from .shapes import DecodingBench, Work, prepared
from .split import OVERHEAD, PARTS, backbone_flops, matmul_rate, taken_apart, widths_seen


SCHEMA = 1
SUITE = "bench_decode"
BASELINE = "plain"
OURS = "generate"


@dataclass(frozen=True)
class Contestant:
    """One way to decode.

    Attributes:
        plain: by the plain loop, else by `generate`.
        settings: as `generate` takes them.
        against: the contestant that must give the same tokens in float32, the plain one with the same cache.
    """

    plain: bool
    settings: dict[str, Any]
    against: str | None = None


def contestants(bench: DecodingBench) -> dict[str, Contestant]:
    """The plain loop and `generate`; where a cache is asked for also both with it, as far as the reference has it.

    Of a checkpoint that is asked for several tokens a forward also the loop that decides one, whose accuracy counts.
    """
    found = {BASELINE: Contestant(True, bench.uncached)}
    if bench.model and bench.decoding["decoding_method"] != "llada":
        found[f"{BASELINE}, one token a forward"] = Contestant(True, bench.one_token)
    if bench.cache == "none":
        return found | {OURS: Contestant(False, bench.decoding, BASELINE)}
    label, cached = f", {bench.cache} cache", bench.decoding
    if bench.reference_has_cache:
        found[BASELINE + label] = Contestant(True, cached)
    found[OURS] = Contestant(False, bench.uncached, BASELINE)
    found[OURS + label] = Contestant(False, cached, BASELINE + label if bench.reference_has_cache else None)
    return found


@dataclass
class Turn:
    """What a contestant gave for all prompts of a turn.

    Attributes:
        answers: of every row, up to the first stop token.
        forwards, positions: summed over rows.
        steps: forwards of whole batches, as far as their last row.
    """

    answers: list[list[int]]
    forwards: int = 0
    positions: int = 0
    steps: int = 0

    @property
    def tokens(self) -> int:
        """Answer tokens before the stop tokens."""
        return sum(map(len, self.answers))


def warm_up(bench: DecodingBench, contestant: Contestant, work: Work) -> None:
    """Decodes one block, for what only a first call does; a whole turn of a large model takes minutes."""
    short = min(bench.block_length, bench.new_tokens)
    decode(contestant, replace(work, limits=work.limits | {"max_new_tokens": short}), slice(1))


def decode(contestant: Contestant, work: Work, batches: slice = slice(None)) -> Turn:
    """Decodes the prompts of a turn."""
    outputs = []
    for batch in work.batches[batches]:
        arguments = batch | work.limits | contestant.settings
        if contestant.plain:
            outputs.append(plain_generate(work.model, **arguments))
        else:
            outputs.append(work.model.generate(**arguments, do_sample=False, return_dict_in_generate=True))
    turn = Turn([])
    for batch, output in zip(work.batches[batches], outputs, strict=True):
        forwards = output.num_forwards.tolist()
        turn.forwards += sum(forwards)
        alone = contestant.plain and contestant.settings["kv_cache"] != "none"  # the rows one after the other
        turn.steps += sum(forwards) if alone else max(forwards)
        turn.positions += sum(output.positions_computed.tolist())
        for row in output.sequences[:, batch["input_ids"].shape[1] :].tolist():
            end = next((place for place, token in enumerate(row) if token in work.stops), None)
            turn.answers.append(row[:end])
    return turn


def equal_tokens(one: Turn, other: Turn) -> float:
    """Share of positions, up to the end of the longer answer, that hold the same token in both."""
    pairs = list(zip(one.answers, other.answers, strict=True))
    equal = sum(a == b for left, right in pairs for a, b in zip(left, right, strict=False))
    return equal / max(1, sum(max(len(left), len(right)) for left, right in pairs))


def check(bench: DecodingBench, turns: dict[str, Turn], chosen: dict[str, Contestant]) -> None:
    """Refuses to compare contestants that do not do the same work; in lower precision their tokens may differ.

    Raises:
        ArithmeticError: If tokens in float32 differ.
    """
    for name, contestant in chosen.items():
        if bench.dtype == "float32" and contestant.against is not None:
            share = equal_tokens(turns[name], turns[contestant.against])
            if turns[name].answers != turns[contestant.against].answers:
                raise ArithmeticError(
                    f"`{name}` must give the tokens of `{contestant.against}` in float32 (got {100 * share:.2f} % of "
                    "them). Where two candidates are nearly equal that is chance: try another `--seed`. Else it is a "
                    "bug: report it with the arguments of the bench."
                )


def memory(bench: DecodingBench, name: str, scale: float) -> tuple[int, int]:
    """Memory before a contestant decodes its first batch and at most in it, in bytes; for a fresh process."""
    with prepared(bench, scale) as (work, _):
        contestant = contestants(bench)[name]
        return peak_memory(lambda: decode(contestant, work, slice(1)), torch.device(bench.device))


def timed(work: Callable[[], Any], device: str) -> tuple[float, float]:
    """Seconds and processor seconds of a piece of work."""
    began, cpu_began = time.perf_counter(), time.process_time()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, time.process_time() - cpu_began


def times(
    bench: DecodingBench, work: Work, chosen: dict[str, Contestant], advance: Callable[[], Any]
) -> dict[str, list[tuple[float, float]]]:
    """Seconds and processor seconds of each contestant and turn; they take turns, and `advance` is told of each."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in chosen}
    for _ in range(bench.repeats):
        for name, contestant in chosen.items():
            found[name].append(timed(partial(decode, contestant, work), bench.device))
            advance()
    return found


def figures(
    bench: DecodingBench,
    work: Work,
    turns: dict[str, Turn],
    chosen: dict[str, Contestant],
    advance: Callable[[], Any] = lambda: None,
) -> list[dict]:
    """Times the contestants, and what each did: a row for each.

    Returns:
        rows of `name`, `settings`; `tokens` and `forwards` of all prompts, `tpf` their ratio, `steps` as forwards of
        whole batches; `positions_per_token` and `positions_ratio`, the baseline's over these; `seconds` and
        `cpu_seconds` of a turn (medians), `tokens_per_second`, `speedup` and `cpu_speedup`: medians over the turns of
        the ratio of tokens a second to the baseline's in the same turn; `equal_tokens` with the baseline, and
        `same_as` the plain loop that the tokens were found equal to; with word problems `accuracy` in percent.
    """
    taken = times(bench, work, chosen, advance)
    base, rows = turns[BASELINE], []
    for name, contestant in chosen.items():
        turn, per_token = turns[name], max(1, turns[name].tokens)
        seconds = [statistics.median(each[which] for each in taken[name]) for which in (0, 1)]
        pairs = list(zip(taken[BASELINE], taken[name], strict=True))
        share = turn.tokens / max(1, base.tokens)
        ratios = [statistics.median(b[which] / max(t[which], 1e-9) for b, t in pairs) * share for which in (0, 1)]
        row = {
            "name": name,
            "settings": contestant.settings,
            "tokens": turn.tokens,
            "forwards": turn.forwards,
            "steps": turn.steps,
            "tpf": round(turn.tokens / turn.forwards, 3),
            "positions_per_token": round(turn.positions / per_token, 1),
            "positions_ratio": round(base.positions / max(1, base.tokens) / (turn.positions / per_token), 3),
            "seconds": round(seconds[0], 4),
            "cpu_seconds": round(seconds[1], 4),
            "tokens_per_second": round(turn.tokens / seconds[0], 3),
            "speedup": round(ratios[0], 3),
            "cpu_speedup": round(ratios[1], 3),
            "equal_tokens": round(100 * equal_tokens(turn, base), 2),
            "same_as": contestant.against if _same(turns, name, contestant) else None,
        }
        if work.problems:
            row["accuracy"] = round(_accuracy(work, turn), 2)
        rows.append(row)
    return rows


def _same(turns: dict[str, Turn], name: str, contestant: Contestant) -> bool:
    return contestant.against is not None and turns[name].answers == turns[contestant.against].answers


def _accuracy(work: Work, turn: Turn) -> float:
    texts = work.tokenizer.batch_decode(turn.answers, skip_special_tokens=True)
    right = sum(exact_match(text, each.answer) for text, each in zip(texts, work.problems, strict=True))
    return 100 * right / len(work.problems)


def split(bench: DecodingBench, work: Work, contestant: Contestant) -> tuple[Turn, dict[str, Any]]:
    """Where the time of a turn goes, measured in a turn of its own.

    Returns:
        the turn; and `split`, seconds of each of `PARTS`; `overhead`, those of the head, scoring and deciding over
        the backbone's; `decide_ms`, milliseconds of deciding in each forward of a batch; `backbone_rate` and
        `matmul_rate` in operations a second, and `matmul_fraction`, their ratio.
    """
    with widths_seen(work.model) as forwards, taken_apart(work.model, bench.device) as watch:
        turn = decode(contestant, work)
    seconds = watch.seconds
    rate = backbone_flops(work.model, forwards) / max(seconds["backbone"], 1e-9)
    positions = round(statistics.mean(each.positions for each in forwards))
    possible = matmul_rate(work.model, positions)
    return turn, {
        "split": {part: round(seconds[part], 4) for part in PARTS},
        "overhead": round(sum(seconds[part] for part in OVERHEAD) / max(seconds["backbone"], 1e-9), 4),
        "decide_ms": round(1000 * seconds["decide"] / len(forwards), 3),
        "backbone_rate": round(rate),
        "matmul_rate": round(possible),
        "matmul_fraction": round(rate / possible, 3),
    }


def measure_decoding(bench: DecodingBench) -> dict[str, Any]:
    """Checks that the contestants give the same tokens, and measures them.

    Returns:
        the results: shape, versions and machine, and for each contestant what [`figures`] and [`split`] give,
        `peak_bytes` of its process and `work_bytes` of it that came with the decoding of a batch.

    Raises:
        ArithmeticError: If tokens in float32 differ.
    """
    chosen = contestants(bench)
    with progress_bar(len(chosen) * (bench.repeats + 2), "turn", "bench") as bar:
        with prepared(bench) as (work, scale):
            turns, parts = {}, {}
            for name, contestant in chosen.items():
                warm_up(bench, contestant, work)
                turns[name], parts[name] = split(bench, work, contestant)
                bar.update()
            check(bench, turns, chosen)
            rows = [row | parts[row["name"]] for row in figures(bench, work, turns, chosen, bar.update)]
            parameters = work.model.num_parameters()
        for row in rows:
            before, peak = in_fresh_process(memory, bench, row["name"], scale)
            row |= {"peak_bytes": peak, "work_bytes": peak - before}
            bar.update()
    return results(SUITE, bench, rows=rows, parameters=parameters, head_scale=round(scale, 4))


def results(suite: str, bench: Any, **more: Any) -> dict[str, Any]:
    """A results file: what was measured, a dataclass with a device and threads, and with what."""
    return {
        "schema": SCHEMA,
        "suite": suite,
        "shape": dataclasses.asdict(bench),
        "provenance": on_device(bench.device, bench.threads),
        **more,
    }
