"""Which candidates a step commits: one pure function for each rule of the field.

Every rule takes the costs `(B, N)` of the candidates (lower is surer), the candidates, the state and the rules, and
returns the commits `(B, N)`. Negative log-probabilities are the costs of rules that speak of a confidence.
"""

import math
from collections.abc import Callable

import torch

from .decoding import Rules, State, decided_share, first_true


def marked_first(cost: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """The costs with every marked position below all others, whatever it costs: a row always advances."""
    most = torch.finfo(cost.dtype).max
    return cost.nan_to_num(nan=most, posinf=most, neginf=-most).masked_fill(~among, float("inf"))


def best(cost: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """One-hot `(B, N)` of the cheapest marked position of each row; rows without a mark stay empty."""
    column = marked_first(cost, among).argmin(1, keepdim=True)
    return torch.zeros_like(among).scatter_(1, column, True) & among


def ranks(cost: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """Place `(B, N)` of each marked position in its row, 0 the cheapest; the leftmost first among equals."""
    return marked_first(cost, among).argsort(dim=1, stable=True).argsort(dim=1)


def cheapest(cost: torch.Tensor, among: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The `count` `(B,)` cheapest marked positions of each row."""
    return among & (ranks(cost, among) < count[:, None])


def best_of_each(cost: torch.Tensor, among: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
    """The cheapest marked position `(B, N)` of each group of a row, the leftmost among equals.

    Args:
        group (`(B, N)` long): numbers below N.
    """
    shown = cost.masked_fill(~among, float("inf"))
    lowest = torch.full_like(cost, float("inf")).scatter_reduce(1, group, shown, "amin")
    equals = among & (cost == lowest.gather(1, group))
    column = torch.arange(cost.shape[1], device=cost.device).expand_as(group)
    places = column.masked_fill(~equals, cost.shape[1])
    leftmost = torch.full_like(group, cost.shape[1]).scatter_reduce(1, group, places, "amin")
    return equals & (column == leftmost.gather(1, group))


def slack(state: State, rules: Rules) -> float | torch.Tensor:
    """By what fraction the threshold is relaxed where so much is decided (Streaming-dLLM, arXiv:2601.17917, 3.2).

    `(B, N)` or `(B, 1)`; the number 0 where nothing is relaxed.
    """
    return rules.threshold_relaxation * decided_share(state, rules) if rules.threshold_relaxation else 0.0


def relaxed(state: State, rules: Rules) -> float | torch.Tensor:
    """The threshold as a cost: of a probability `(1 - slack)` times it, of an entropy `(1 + slack)` times."""
    loose = slack(state, rules)
    if isinstance(loose, float):
        return rules.threshold
    by_probability = rules.score == "confidence"
    return (rules.threshold - torch.log1p(-loose) if by_probability else rules.threshold * (1 + loose)).float()


def by_threshold(cost: torch.Tensor, among: torch.Tensor, state: State, rules: Rules) -> torch.Tensor:
    """Every candidate whose cost is under the threshold; with `force_best` the cheapest of the row in any case."""
    threshold = relaxed(state, rules)
    under = cost <= threshold if rules.inclusive else cost < threshold
    commits = among & under
    return commits | best(cost, among) if rules.force_best else commits


def by_near_best(cost: torch.Tensor, among: torch.Tensor, state: State, rules: Rules) -> torch.Tensor:
    """dInfer's threshold: lowered to just under the best candidate's probability, whose equals then pass as well."""
    probability = torch.exp(-cost.double()).masked_fill(~among, -1.0)
    threshold = math.exp(-rules.threshold) * (1 - slack(state, rules))
    level = (probability.amax(1, keepdim=True) - 1e-5).clamp_max(threshold)
    return among & (probability >= level) | best(cost, among)


def by_factor(cost: torch.Tensor, among: torch.Tensor, state: State, rules: Rules) -> torch.Tensor:
    """Fast-dLLM's factor: the n surest while the n-th is certain to `1 - factor / (n + 1)`; the surest always."""
    rank = ranks(cost, among)
    fails = among & (torch.exp(-cost.double()) < 1 - rules.factor / (rank + 2).float())
    first = rank.masked_fill(~fails, among.shape[1]).amin(1)
    return cheapest(cost, among, first.clamp_min(1))


def by_entropy_bound(cost: torch.Tensor, among: torch.Tensor, state: State, rules: Rules) -> torch.Tensor:
    """The n of lowest entropy while all but the n-th sum to at most the bound (EB-Sampler, DiffusionGemma)."""
    order = marked_first(cost, among).argsort(dim=1, stable=True)
    ascending = cost.masked_fill(~among, 0.0).gather(1, order).double()
    before = ascending.cumsum(1) - ascending
    within = torch.zeros_like(among).scatter_(1, order, before <= rules.threshold)
    return among & within | best(cost, among)


def by_hierarchy(cost: torch.Tensor, among: torch.Tensor, state: State, rules: Rules) -> torch.Tensor:
    """dInfer's hierarchy: the surest of each run of neighbours, so that commits spread, and whatever is very sure.

    Below `relaxed_threshold` only the surest of all is committed.
    """
    follows = torch.nn.functional.pad(among[:, :-1] & (state.slots.diff(dim=1) == 1), (1, 0))  # no text in between
    starts = among & ~follows
    run = (starts.long().cumsum(1) - 1).clamp_min(0)  # (B, N): which run of neighbours a candidate belongs to
    of_run = best_of_each(cost, among, run) & (cost < rules.relaxed_threshold)
    surest = cost.masked_fill(~among, float("inf")).amin(1, keepdim=True)
    spread = (of_run | (cost < relaxed(state, rules))) & (surest <= rules.relaxed_threshold)
    return among & spread | best(cost, among)


def by_neighbourhood(cost: torch.Tensor, among: torch.Tensor, state: State, rules: Rules) -> torch.Tensor:
    """LocalLeap (arXiv:2510.07081): sure candidates are anchors, around which less certainty suffices."""
    anchors = among & (cost <= relaxed(state, rules))
    # Distances in the text, whose given parts count as well: to the last anchor before, and to the next one behind.
    far = rules.radius + 1
    before = state.slots.masked_fill(~anchors, -far).cummax(1).values
    behind = (-state.slots).masked_fill(~anchors, torch.iinfo(torch.long).min // 2).flip(1).cummax(1).values.flip(1)
    near = torch.minimum(state.slots - before, -behind - state.slots) <= rules.radius
    return among & (anchors | (near & (cost <= rules.relaxed_threshold))) | best(cost, among)


def pace(among: torch.Tensor, state: State, rules: Rules) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the first block of each row that has a marked position, `(B,)` each.

    Returns:
        its steps: its share of `steps`, the earlier blocks one more, or as many as it has positions where there are
        none; its positions; and its steps so far.
    """
    marked = state.per_block(among, rules) > 0
    block = first_true(marked).clamp_max(marked.shape[1] - 1)
    size, opened = (table.gather(1, block[:, None])[:, 0] for table in (state.opened_size, state.opened_step))
    steps = size
    if rules.steps:
        blocks = state.blocks(rules).clamp_min(1)
        steps = rules.steps // blocks + (block < rules.steps % blocks)
    return steps.clamp_min(1), size, state.step - opened


def by_quota(cost: torch.Tensor, among: torch.Tensor, state: State, rules: Rules) -> torch.Tensor:
    """LLaDA's fixed quota: each block's positions spread evenly over its share of the steps, more in earlier ones."""
    steps, size, done = pace(among, state, rules)
    quota = size // steps + (done < size % steps)
    return cheapest(cost, among, quota.clamp_min(1))  # what a constraint put off is decided after the last step


def decided_fraction(among: torch.Tensor, state: State, rules: Rules, eps: float = 1e-3) -> torch.Tensor:
    """Dream's schedule: the fraction `1 - s / t` `(B,)` of a block's masks that this step decides, all in the last.

    Times fall linearly from 1 to `eps` over the steps of the block, in float32 as the reference counts them.
    """
    steps, _, done = pace(among, state, rules)

    def time(index: torch.Tensor) -> torch.Tensor:
        slope = torch.tensor(eps - 1, dtype=torch.float32, device=steps.device) / steps
        return torch.where(index < (steps + 1) // 2, 1 + slope * index, eps - slope * (steps - index))

    return torch.where(done < steps - 1, 1 - time(done + 1) / time(done), 1.0)


def by_schedule(cost: torch.Tensor, among: torch.Tensor, state: State, rules: Rules) -> torch.Tensor:
    """Dream's schedule: the cheapest `1 - s / t` of what is still masked, everything in the last step."""
    count = among.sum(1).float() * decided_fraction(among, state, rules)
    return cheapest(cost, among, count.long())


def by_coin(cost: torch.Tensor, among: torch.Tensor, state: State, rules: Rules) -> torch.Tensor:
    """Dream's `origin`: each masked position with probability `1 - s / t`; `cost` is a uniform number."""
    fraction = decided_fraction(among, state, rules)[:, None]
    return among & ((cost < fraction) | (fraction >= 1))  # rounding can take a uniform number to 1


def by_quota_and_threshold(cost: torch.Tensor, among: torch.Tensor, state: State, rules: Rules) -> torch.Tensor:
    """Dream's confidence threshold: of a quota that carries over, those under the threshold, and the cheapest."""
    steps, size, done = pace(among, state, rules)
    due = size * (done + 1) // steps - (size - among.sum(1))
    quota = cheapest(cost, among, due.clamp_min(1))
    return (quota & (cost <= rules.threshold)) | best(cost, among)


def block_quota(among: torch.Tensor, state: State, rules: Rules) -> torch.Tensor:
    """SDAR's quota `(B,)` of a step: a full block spread evenly over the steps of a block, more in earlier ones.

    It does not depend on how much of the block was given. Without steps it is the least that the rules commit.
    """
    if not rules.steps:
        return torch.full_like(state.step, rules.min_commits)
    _, _, done = pace(among, state, rules)
    return (rules.block_length // rules.steps + (done < rules.block_length % rules.steps)).clamp_min(1)


def by_quota_or_threshold(cost: torch.Tensor, among: torch.Tensor, state: State, rules: Rules) -> torch.Tensor:
    """SDAR's dynamic rule: all that are surer than the threshold, if they are as many as the quota; else the quota."""
    quota, sure = block_quota(among, state, rules), among & (cost < rules.threshold)
    enough = sure.sum(1) >= quota
    return torch.where(enough[:, None], sure, cheapest(cost, among, quota))


def by_leftmost(cost: torch.Tensor, among: torch.Tensor, state: State, rules: Rules) -> torch.Tensor:
    """SDAR's sequential rule: the quota from left to right, whatever it costs."""
    return among & (among.long().cumsum(1) <= block_quota(among, state, rules)[:, None])


def by_entropy_sum(cost: torch.Tensor, among: torch.Tensor, state: State, rules: Rules) -> torch.Tensor:
    """JetEngine's bound: the n of lowest entropy that sum to less than it, or the first."""
    order = marked_first(cost, among).argsort(dim=1, stable=True)
    total = cost.masked_fill(~among, 0.0).gather(1, order).double().cumsum(1)
    return among & torch.zeros_like(among).scatter_(1, order, total < rules.threshold) | best(cost, among)


def by_stability(cost: torch.Tensor, among: torch.Tensor, state: State, rules: Rules) -> torch.Tensor:
    """KLASS (arXiv:2511.05664): sure candidates that have been calm for some forwards; where none is, the surest.

    In the first `kl_history - 1` forwards of a block nothing counts as calm.
    """
    _, _, done = pace(among, state, rules)
    under = cost <= rules.threshold if rules.inclusive else cost < rules.threshold
    calm = (state.calm >= rules.kl_history) & (done >= rules.kl_history - 1)[:, None]
    ready = among & under & calm
    return ready | best(cost, among & ~ready.any(1, keepdim=True))


def by_wide_in(cost: torch.Tensor, among: torch.Tensor, state: State, rules: Rules) -> torch.Tensor:
    """WINO's wide-in (arXiv:2507.18578): what is surer than a threshold, the surest 7 of 10, but 5 to 20; or the best.

    A boldness that `narrow_out` makes good.
    """
    most = (0.7 * among.sum(1).double()).long().clamp(5, 20)
    return cheapest(cost, among & (cost < rules.threshold), most) | best(cost, among)


SELECTORS: dict[str, Callable[[torch.Tensor, torch.Tensor, State, Rules], torch.Tensor]] = {
    "threshold": by_threshold,
    "near_best": by_near_best,
    "factor": by_factor,
    "entropy_bound": by_entropy_bound,
    "hierarchy": by_hierarchy,
    "neighbourhood": by_neighbourhood,
    "quota": by_quota,
    "schedule": by_schedule,
    "coin": by_coin,
    "quota_and_threshold": by_quota_and_threshold,
    "quota_or_threshold": by_quota_or_threshold,
    "leftmost": by_leftmost,
    "entropy_sum": by_entropy_sum,
    "stability": by_stability,
    "wide_in": by_wide_in,
}


def narrow_out(
    doubt: torch.Tensor, watched: torch.Tensor, commits: torch.Tensor, state: State, rules: Rules
) -> torch.Tensor:
    """WINO's narrow-out: where more than one is committed, those that the model would not write again.

    It ends: fewer are taken back than the forward before committed, so after n forwards of a block at least n of its
    positions are decided.
    """
    # What the last forward committed; it is all still there
    gained = (state.step_map == state.forward[:, None]).sum(1)
    doubtful = watched & (doubt > rules.revoke_threshold) & (commits.sum(1, keepdim=True) > 1)
    return cheapest(-doubt, doubtful, gained - 1)


# Decided positions `(B, N)` that a step takes back: of the doubt about each present token (lower is surer), which may
# be taken back at all, the commits of the same step, the state before it and the rules. Each says why decoding ends.
REVOKERS: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor, State, Rules], torch.Tensor]] = {
    "narrow_out": narrow_out,
}


def take_back(doubt: torch.Tensor, commits: torch.Tensor, state: State, rules: Rules) -> torch.Tensor | None:
    """Which decided positions this step takes back.

    Args:
        doubt (`(B, N)` float): cost of the present token at each unsettled position.
        commits (`(B, N)` bool): of the same step.
        state: before the step.

    Returns:
        `(B, N)` bool, `None` where the rules take nothing back.
    """
    if rules.revoke is None:
        return None
    return REVOKERS[rules.revoke](doubt, state.unsettled, commits, state, rules)


def choose(
    cost: torch.Tensor, force_cost: torch.Tensor, among: torch.Tensor, state: State, rules: Rules
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which candidates this step commits.

    Args:
        cost, force_cost (`(B, N)` float): rank for the selection, and for the position that is forced.
        among (`(B, N)` bool): the candidates.

    Returns:
        `(B, N)` bool of the commits, and of those among them that were forced: the cheapest position of the first
        active block, or with `force_each` of every one, that would otherwise stand still.
    """
    commits = SELECTORS[rules.select](cost, among, state, rules)
    forced = torch.zeros_like(commits)
    if rules.select == "threshold":
        active = state.active & (state.per_block(among, rules) > 0)
        block = state.block_of(rules)
        if rules.force_each:
            still = active & (state.per_block(commits, rules) == 0)
            forced = best_of_each(force_cost, among & still.gather(1, block), block)
        else:
            first = first_true(active)  # (B,): K where no active block has work
            inside = among & (block == first[:, None])
            forced = best(force_cost, inside) & ~(commits & inside).any(1, keepdim=True)
        # Whatever the thresholds, a row advances: every forward decides at least one token.
        stuck = ~(commits | forced).any(1, keepdim=True)
        commits = commits | forced | (best(force_cost, among) & stuck)
    return commits, forced
