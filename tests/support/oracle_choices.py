"""Which candidates a forward of the oracle commits, for the methods that decide by what one forward shows.

Each takes `{position: Look}` of the candidates and the rules, and returns a set of positions.
"""

import math

import torch
from oracle_network import Look


Looks = dict[int, Look]


def surest(looks: Looks) -> int:
    """The position with the highest probability, the leftmost of equals."""
    return min(looks, key=lambda position: (-looks[position].probability, position))


def ranked(cost: dict[int, float]) -> list[int]:
    """Positions, the lowest cost first, from the left where costs are equal."""
    return sorted(cost, key=lambda position: (cost[position], position))


def costs(looks: Looks, remasking: str, noise: dict[int, float]) -> dict[int, float]:
    """What ranks the positions; the lowest cost is committed first."""
    by_name = {
        "low_confidence": lambda position: -looks[position].probability,
        "maskgit_plus": lambda position: -looks[position].probability,
        "topk_margin": lambda position: -looks[position].margin,
        "entropy": lambda position: looks[position].entropy,
        "random": lambda position: noise[position],
    }[remasking]
    return {position: by_name(position) for position in looks}


def fast_dllm(looks: Looks, rules) -> set[int]:
    """Probabilities over a threshold; or the longest run of ranks n whose probability is over 1 - factor / (n + 1)."""
    chosen = {surest(looks)}
    if rules.factor is None:
        return chosen | {position for position in looks if looks[position].probability >= rules.confidence_threshold}
    order = ranked({position: -looks[position].probability for position in looks})
    for n, position in enumerate(order, start=1):
        if looks[position].probability < 1 - rules.factor / (n + 1):
            break
        chosen.add(position)
    return chosen


def dinfer_threshold(looks: Looks, rules) -> set[int]:
    """Probabilities over a threshold that never lies above the highest of them."""
    best = surest(looks)
    bar = min(rules.confidence_threshold, looks[best].probability - 1e-5)
    return {best} | {position for position in looks if looks[position].probability >= bar}


def dinfer_hierarchy(looks: Looks, rules) -> set[int]:
    """Also the best of each run of neighbours, where it is over a lower threshold."""
    best = surest(looks)
    chosen = {best}
    if looks[best].probability < rules.low_threshold:
        return chosen
    runs: list[list[int]] = []
    for position in sorted(looks):
        if runs and runs[-1][-1] == position - 1:
            runs[-1].append(position)
        else:
            runs.append([position])
    for run in runs:
        best_of_run = surest({position: looks[position] for position in run})
        if looks[best_of_run].probability > rules.low_threshold:
            chosen.add(best_of_run)
    return chosen | {position for position in looks if looks[position].probability > rules.confidence_threshold}


def entropy_bound(looks: Looks, rules) -> set[int]:
    """From the lowest entropy on, while the entropies of those before add up to no more than a bound."""
    chosen, before = set(), 0.0
    for position in ranked({position: looks[position].entropy for position in looks}):
        if chosen and before > rules.entropy_bound:
            break
        chosen.add(position)
        before += looks[position].entropy
    return chosen


def local_leap(looks: Looks, rules) -> set[int]:
    """Sure positions, and those near one of them that are fairly sure."""
    anchors = {position for position in looks if looks[position].probability >= rules.confidence_threshold}
    chosen = {surest(looks)} | anchors
    for position in looks:
        near = any(abs(position - anchor) <= rules.leap_radius for anchor in anchors)
        if near and looks[position].probability >= rules.relaxed_threshold:
            chosen.add(position)
    return chosen


def divergence(now: torch.Tensor, before: torch.Tensor) -> float:
    """Of two distributions, in nats, token by token."""
    pairs = zip(now.tolist(), before.tolist(), strict=True)
    return sum(p * (math.log(p + 1e-12) - math.log(q + 1e-12)) for p, q in pairs)


def klass(looks: Looks, rules, calm: dict[int, int], forwards: int) -> set[int]:
    """Sure positions that were calm in enough forwards in a row, none in the first of a block; or the surest."""
    ready = {
        position
        for position in looks
        if calm[position] >= rules.kl_history
        and forwards >= rules.kl_history
        and looks[position].probability > rules.confidence_threshold
    }
    return ready or {surest(looks)}


def dparallel(looks: Looks, rules) -> set[int]:
    """Low entropies, and the lowest."""
    lowest = ranked({position: looks[position].entropy for position in looks})[0]
    return {lowest} | {position for position in looks if is_low(looks[position].entropy, rules)}


def is_low(entropy: float, rules) -> bool:
    """Dream accepts H < threshold, LLaDA H <= threshold."""
    return entropy < rules.entropy_threshold if rules.strict else entropy <= rules.entropy_threshold
