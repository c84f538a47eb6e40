"""Drafting: the head grows a tree behind the text, one forward a level."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .head import Eagle3Head, HeadCache
from .tree import Tree, best, children, prune


@dataclass
class Drafter:
    """Drafts trees for one text (EAGLE-2's dynamic tree, arXiv:2406.16858, section 4, which EAGLE-3 keeps).

    Attributes:
        head ([`Eagle3Head`]): what drafts.
        embed: embeddings `(n, D)` of `(n,)` tokens of the target.
        total_tokens: nodes of a tree, the root among them.
        depth: levels below the first one.
        width: children of a node, and nodes that a level goes on from.
        cache: of the text so far; what was fed for a tree is dropped again.
        num_forwards: of the head so far.
    """

    head: Eagle3Head
    embed: Callable[[torch.Tensor], torch.Tensor]
    total_tokens: int
    depth: int
    width: int
    cache: HeadCache = field(default_factory=HeadCache)
    num_forwards: int = 0

    def draft(self, features: torch.Tensor, tokens: torch.Tensor) -> Tree:
        """The tree behind the last of some new tokens, which is its root.

        1. Feed the text's new positions; the last one's output gives the first level.
        2. Level by level, feed the best of the last level's candidates; each gets children.
        3. Keep the best candidates of all levels.

        Args:
            features (`(n, 3 * target_hidden_size)`): the target's hidden states of the new positions.
            tokens (`(n,)` long): the token behind each of them.

        Raises:
            ValueError: for logits that are not finite.
        """
        device, width = features.device, self.width
        own = torch.eye(width, dtype=torch.bool, device=device)

        # 1. Feed the text's new positions
        before, new = self.cache.length, len(tokens)
        text = before + new
        positions = torch.arange(before, text, device=device)
        visible = torch.ones(new, text, dtype=torch.bool, device=device).tril(before)
        hidden = self._feed(self.head.fuse(features), tokens, positions, visible)[-1:]
        drafted, scores = children(self._log_probabilities(hidden), hidden.new_zeros(1, dtype=torch.float32), width)
        ids = self.head.to_target(drafted.flatten())
        scores = scores.flatten()
        levels = [(ids, scores, torch.full_like(ids, -1))]
        numbers, first = torch.arange(width, device=device), 0  # of the frontier, and of its level's first candidate
        hidden, on_the_way = hidden.expand(width, -1), own
        prefix = torch.ones(width, text, dtype=torch.bool, device=device)

        # 2. Level by level
        for level in range(self.depth):
            places = torch.full_like(numbers, text + level)
            hidden = self._feed(hidden, ids, places, torch.cat([prefix, on_the_way], dim=1))
            drafted, scores = children(self._log_probabilities(hidden), scores, width)
            all_ids, all_scores = self.head.to_target(drafted.flatten()), scores.flatten()
            first += len(levels[-1][0])
            levels.append((all_ids, all_scores, numbers.repeat_interleave(width)))
            frontier = best(all_scores, width)
            parent = frontier // width
            ids, scores, numbers = all_ids[frontier], all_scores[frontier], first + frontier
            hidden, on_the_way = hidden[parent], torch.cat([on_the_way[parent], own], dim=1)

        # 3. Keep the best of all levels
        self.cache.keep(text)
        candidates = [torch.cat(column) for column in zip(*levels, strict=True)]
        return prune(tokens[-1:], candidates[0], candidates[1], candidates[2], self.total_tokens - 1)

    def _feed(self, hidden, tokens, positions, visible) -> torch.Tensor:
        self.num_forwards += 1
        return self.head(hidden, self.embed(tokens), positions, visible, self.cache)

    def _log_probabilities(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head.draft_logits(hidden).float().log_softmax(-1)


__all__ = ["Drafter"]
