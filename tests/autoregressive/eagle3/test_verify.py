"""What of a tree is accepted: the target's own choices, greedy or drawn."""

import random

import pytest
import torch

from d3llm_hf.autoregressive.eagle3.verify import Choice, accepted_path
from d3llm_hf.models.scoring import Sampler


def leaves(parents):
    return [node for node in range(len(parents)) if node not in parents]


def way_to(node, parents):
    way = [node]
    while parents[way[-1]] >= 0:
        way.append(parents[way[-1]])
    return way[::-1]


def longest_way(tokens, parents, choices):
    """EAGLE's words: of all ways to a leaf the one with the longest matching beginning, the first among equals."""
    longest = [0]
    for leaf in leaves(parents):
        way = way_to(leaf, parents)
        matching = 1
        while matching < len(way) and tokens[way[matching]] == choices[way[matching - 1]]:
            matching += 1
        if matching > len(longest):
            longest = way[:matching]
    return longest


def random_tree(draw: random.Random, nodes: int, vocabulary: int):
    """Nodes whose siblings have different tokens."""
    tokens, parents, taken = [draw.randrange(vocabulary)], [-1], set()
    while len(tokens) < nodes:
        parent, token = draw.randrange(len(tokens)), draw.randrange(vocabulary)
        if (parent, token) not in taken:
            taken.add((parent, token))
            tokens.append(token)
            parents.append(parent)
    return tokens, parents


@pytest.mark.parametrize("seed", range(50))
def test_the_accepted_path_is_the_longest_that_agrees(seed):
    draw = random.Random(seed)
    tokens, parents = random_tree(draw, draw.randrange(1, 20), 3)
    choices = [draw.randrange(3) for _ in tokens]
    assert accepted_path(tokens, parents, choices) == longest_way(tokens, parents, choices)


def test_greedy_choices_are_the_argmax():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 4.0, -9.0]])
    assert Choice()(logits, torch.tensor([7, 8])).tolist() == [1, 0]


@pytest.mark.parametrize("choice", [Choice(), Choice(Sampler(0))])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(choice, value):
    with pytest.raises(ValueError, match="The target's logits must be finite"):
        choice(torch.tensor([[0.0, value]]), torch.tensor([0]))


def test_a_draw_depends_on_its_position_alone():
    logits = torch.tensor([[0.0, 1.0, 2.0, 1.0, 0.0]]).expand(40, -1)
    positions = torch.arange(40)
    drawn = Choice(Sampler(3))(logits, positions)
    assert len(drawn.unique()) > 1
    assert torch.equal(Choice(Sampler(3))(logits.flip(0), positions.flip(0)), drawn.flip(0))
    assert Choice(Sampler(3))(logits[:1], positions[7:8]).item() == drawn[7]
    assert not torch.equal(Choice(Sampler(4))(logits, positions), drawn)


@pytest.mark.parametrize(
    ("settings", "possible"),
    [
        ({"top_k": 2}, {3, 4}),
        ({"top_k": 0, "top_p": 1.0}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.5}, {4}),
        ({"temperature": 0.01}, {4}),
        ({"temperature": 100.0, "top_p": 0.5}, {2, 3, 4}),
    ],
)
def test_samplers_of_transformers_shape_the_draws(settings, possible):
    logits = torch.tensor([[0.0, 0.5, 1.0, 1.5, 3.0]]).expand(500, -1)
    assert set(Choice(Sampler(0), **settings)(logits, torch.arange(500)).tolist()) == possible


def chi_squared(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_accepted_texts_have_the_distribution_of_the_target(temperature):
    """A target that looks at the last token alone; of its 4 tokens each tree holds some, wrong ones and deep ones."""
    size, length, runs = 4, 3, 3000
    logits = torch.tensor([[0.0, 1.0, 2.0, 1.0], [1.0, 0.0, 0.5, 0.0], [2.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    draw, counts, deepest = random.Random(0), [0] * size**length, 0
    # Each text has positions of its own, so that one source of random numbers draws all of them.
    places = torch.arange(runs * 2 * length).repeat_interleave(size)
    table = Choice(Sampler(0), temperature)(logits.repeat(runs * 2 * length, 1), places).view(runs, -1, size).tolist()
    for run in range(runs):
        text = [0]
        while len(text) <= length:
            tokens, parents = random_tree(draw, 6, size)
            tokens[0] = text[-1]
            at = [min(len(text) + len(way_to(node, parents)) - 2, 2 * length - 1) for node in range(len(tokens))]
            choices = [table[run][place][token] for place, token in zip(at, tokens, strict=True)]
            path = accepted_path(tokens, parents, choices)
            deepest = max(deepest, len(path))
            text += [choices[node] for node in path]
        first, second, third = text[1 : length + 1]
        counts[(first * size + second) * size + third] += 1
    chance = (logits / temperature).softmax(-1).double()
    joint = chance[0][:, None, None] * chance[:, :, None] * chance[None, :, :]
    # 63 degrees of freedom: the statistic exceeds 130 in two of a million draws.
    assert chi_squared(torch.tensor(counts), joint.flatten()) < 130
    assert deepest >= 3
