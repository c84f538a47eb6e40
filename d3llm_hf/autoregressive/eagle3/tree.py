"""The draft tree, from scores alone: functions of tensors, without a model.

A candidate is a token behind another one; its score is the sum of the log-probabilities on the way to it. Candidates
have numbers in the order of their levels, so that a parent's number is below its children's.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Tree:
    """What one forward of the target verifies. Node 0 is the root, a token that is decided already.

    Attributes:
        tokens (`(T,)` long): of each node, parents before their children.
        parents (list of T `int`): node of each node's parent, -1 for the root.
    """

    tokens: torch.Tensor
    parents: list[int]

    def depths(self) -> list[int]:
        """Steps from the root to each node."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return depths

    def visible(self) -> torch.Tensor:
        """`(T, T)` bool on the CPU: the nodes on the way to each node, itself among them."""
        seen = torch.eye(len(self.parents), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            if parent >= 0:
                seen[node] |= seen[parent]
        return seen


def children(log_probabilities: torch.Tensor, scores: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest tokens behind each of F nodes.

    Args:
        log_probabilities (`(F, Vd)`): of the next token.
        scores (`(F,)`): of the nodes.
        width: children of a node.

    Returns:
        draft tokens and scores, `(F, width)` each, the likeliest first.
    """
    best = log_probabilities.topk(width, dim=1)
    return best.indices, scores[:, None] + best.values


def best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices `(count,)` of the highest of `(C,)` scores, the highest first, the first of equals before the others."""
    return scores.sort(descending=True, stable=True).indices[:count]


def prune(root: torch.Tensor, tokens: torch.Tensor, scores: torch.Tensor, parents: torch.Tensor, count: int) -> Tree:
    """The tree of the `count` best candidates below a root.

    A child scores no higher than its parent and has a higher number, so that it is never kept without it.

    Args:
        root (`(1,)` long): token of the root.
        tokens (`(C,)` long), scores (`(C,)`): of all candidates.
        parents (`(C,)` long): number of each one's parent, -1 for the root.
        count: at most C.

    Raises:
        ValueError: for scores that are not numbers.
    """
    if scores.isnan().any():  # a host sync
        raise ValueError("The draft head's logits must be finite (got NaN or inf). Check its weights and its dtype.")
    kept = best(scores, count).sort().values  # parents before their children again
    above = parents[kept]
    nodes = torch.where(above < 0, 0, torch.searchsorted(kept, above) + 1)
    return Tree(torch.cat([root, tokens[kept]]), [-1, *nodes.tolist()])


__all__ = ["Tree", "best", "children", "prune"]
