"""Terms of the distillation loss, at the positions that carry it and in float32 a few rows at a time."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class TokenTerms:
    """What the loss is made of, one entry per position with a loss, float32 of shape `(N,)`.

    Args:
        cross_entropy: Negative log probability of the token to predict, in nats.
        entropy: Entropy of the distribution at the loss' temperature, in nats.
        correct: 1 where the most probable token is the one to predict, else 0. Has no gradient.
        certainty: Probability of the most probable token at temperature 1. Has no gradient.
    """

    cross_entropy: torch.Tensor
    entropy: torch.Tensor
    correct: torch.Tensor
    certainty: torch.Tensor


def token_terms(logits: torch.Tensor, targets: torch.Tensor, temperature: float, chunk_size: int) -> TokenTerms:
    """Compute all terms of N rows of logits.

    Float32 probabilities live for `chunk_size` rows at a time; they are computed again in the backward pass, so that
    besides the logits, in the model's own dtype, nothing of the size of the vocabulary is kept.

    Args:
        logits (`torch.Tensor` of shape `(N, V)`): Rows that predict `targets`.
        targets (`torch.LongTensor` of shape `(N,)`): Tokens to predict.
        temperature (`float`): Temperature of the entropy.
        chunk_size (`int`): Rows that are computed together.
    """
    chunks = [
        checkpoint(_chunk_terms, *chunk, temperature, use_reentrant=False, preserve_rng_state=False)
        for chunk in zip(logits.split(chunk_size), targets.split(chunk_size), strict=True)
    ]
    return TokenTerms(*(torch.cat(term) for term in zip(*chunks, strict=True)))


def _chunk_terms(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> tuple[torch.Tensor, ...]:
    logits = logits.float()
    cross_entropy = F.cross_entropy(logits, targets, reduction="none")
    probabilities = (logits / temperature).softmax(-1)
    entropy = -(probabilities * (probabilities + 1e-12).log()).sum(-1)
    with torch.no_grad():
        best, token = logits.max(-1)
        certainty = (best - logits.logsumexp(-1)).exp()
        correct = token.eq(targets).to(cross_entropy)
    return cross_entropy, entropy, correct, certainty


def divergences(logits: torch.Tensor, targets: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """KL(target || prediction) of N rows of logits, in nats and float32, `(N,)`, a few rows at a time.

    Args:
        logits (`torch.Tensor` of shape `(N, V)`): The predictions.
        targets (`torch.Tensor` of shape `(N, V)`): Logits of the targets. They get no gradient.
        chunk_size (`int`): Rows that are computed together.
    """
    chunks = [
        checkpoint(_chunk_divergences, *chunk, use_reentrant=False, preserve_rng_state=False)
        for chunk in zip(logits.split(chunk_size), targets.detach().split(chunk_size), strict=True)
    ]
    return torch.cat(chunks)


def _chunk_divergences(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    predicted, wanted = logits.float().log_softmax(-1), targets.float().softmax(-1)
    return F.kl_div(predicted, wanted, reduction="none").sum(-1)


def order_hinge(
    entropy: torch.Tensor, steps: torch.Tensor, group: torch.Tensor, margin: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """By how much entropies are out of the order in which a teacher decided, for each pair of a group.

    Args:
        entropy (`torch.FloatTensor` of shape `(N,)`): In nats.
        steps (`torch.LongTensor` of shape `(N,)`): Step that decided each position, -1 where none did: after all.
        group (`torch.LongTensor` of shape `(N,)`): Positions of one group are compared; -1 takes no part.
        margin (`float`): By how much the later one should be the more uncertain one.

    Returns:
        `relu(earlier - later + margin)` of all P pairs with different steps `(P,)`, and the group of each `(P,)`.
    """
    steps = steps.masked_fill(steps < 0, torch.iinfo(steps.dtype).max)
    found, groups = [entropy[:0]], [group[:0]]
    for each in group[group >= 0].unique():
        own = group == each
        earlier, later = (steps[own][:, None] < steps[own]).nonzero().unbind(1)
        found.append((entropy[own][earlier] - entropy[own][later] + margin).relu())
        groups.append(each.expand(len(earlier)))
    return torch.cat(found), torch.cat(groups)


def mean_over(values: torch.Tensor, chosen: torch.Tensor, rows: torch.Tensor, num_rows: int, by: str) -> torch.Tensor:
    """Mean of the chosen values; exactly 0, with a gradient of 0, where nothing is chosen.

    Args:
        values (`torch.FloatTensor` of shape `(N,)`): What to average.
        chosen (`torch.FloatTensor` of shape `(N,)`): 1 for values that count, else 0.
        rows (`torch.LongTensor` of shape `(N,)`): Sample of each value, below `num_rows`.
        by (`str`): `"token"`: over all chosen values at once. `"sample"`: first over those of each sample, then over
            all samples, those without any counting as 0.
    """
    if by == "token":
        return (values * chosen).sum() / chosen.sum().clamp_min(1)
    counts = chosen.new_zeros(num_rows).index_add(0, rows, chosen).clamp_min(1)
    return (values * chosen / counts[rows]).sum() / num_rows
