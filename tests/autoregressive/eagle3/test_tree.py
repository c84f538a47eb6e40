"""The draft tree as a function of scores."""

import pytest
import torch

from d3llm_hf.autoregressive.eagle3.tree import Tree, best, children, prune


ROOT = torch.tensor([99])


def random_candidates(seed: int, width: int, depth: int, steps: int):
    """Levels as drafting makes them: tokens, scores in so many steps (few of them give ties), and parents."""
    draw = torch.Generator().manual_seed(seed)
    scores = [-torch.randint(0, steps, (width,), generator=draw).float()]
    parents = [torch.full((width,), -1)]
    numbers, first = torch.arange(width), 0
    for _ in range(depth):
        drops = torch.randint(0, steps, (width, width), generator=draw).float()
        level = (torch.cat(scores)[numbers][:, None] - drops).flatten()
        parents.append(numbers.repeat_interleave(width))
        first += len(scores[-1])
        scores.append(level)
        numbers = first + best(level, width)
    tokens = torch.randint(0, 50, (sum(map(len, scores)),), generator=draw)
    return tokens, torch.cat(scores), torch.cat(parents)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("steps", [1, 2, 1000])
def test_the_best_candidates_are_kept_with_their_parents(seed, steps):
    tokens, scores, parents = random_candidates(seed, 3, 4, steps)
    for count in (1, 5, len(tokens)):
        tree = prune(ROOT, tokens, scores, parents, count)
        ranked = sorted(range(len(tokens)), key=lambda number: (-scores[number], number))
        kept = sorted(ranked[:count])
        assert tree.tokens.tolist() == [99, *tokens[kept].tolist()]
        node_of = {-1: 0} | {number: node + 1 for node, number in enumerate(kept)}
        assert tree.parents == [-1, *(node_of[parents[number].item()] for number in kept)]


def test_scores_that_are_no_numbers_are_refused():
    tokens, scores, parents = random_candidates(0, 2, 1, 9)
    scores[1] = float("nan")
    with pytest.raises(ValueError, match="The draft head's logits must be finite"):
        prune(ROOT, tokens, scores, parents, 3)


def test_nodes_see_the_way_to_them():
    tree = Tree(torch.arange(6), [-1, 0, 0, 1, 3, 2])
    assert tree.depths() == [0, 1, 1, 2, 3, 2]
    rows = [row.nonzero().flatten().tolist() for row in tree.visible()]
    assert rows == [[0], [0, 1], [0, 2], [0, 1, 3], [0, 1, 3, 4], [0, 2, 5]]


def test_children_carry_the_score_of_the_way():
    tokens, scores = children(torch.tensor([[-3.0, -1.0, -2.0], [-1.0, -4.0, -5.0]]), torch.tensor([-10.0, 0.0]), 2)
    assert tokens.tolist() == [[1, 2], [0, 1]]
    assert scores.tolist() == [[-11.0, -12.0], [-1.0, -4.0]]


def test_the_first_of_equals_is_the_best():
    assert best(torch.tensor([0.0, 2.0, 1.0, 2.0, 1.0]), 4).tolist() == [1, 3, 2, 4]
