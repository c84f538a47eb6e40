"""Whatever is decided first, a hole can be filled to the end: tried against all texts that it might hold."""

from itertools import product

import pytest
import torch
from drawn import examples
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation import LogitsProcessorList

from d3llm_hf.models.lattices import Hole, HoleLanguages, TokenAutomaton


WIDTH, TOKENS = 4, 3


@st.composite
def automata(draw):
    """Random automata of some states over three tokens, each a class of its own behind the dead one."""
    states = draw(st.integers(1, 4))
    following = [[draw(st.integers(0, states)) for _ in range(TOKENS)] for _ in range(states)] + [[states] * TOKENS]
    accepting = [draw(st.booleans()) for _ in range(states)] + [False]
    table = torch.tensor([[states, *row] for row in following])
    return TokenAutomaton(table, torch.tensor(accepting), torch.arange(1, TOKENS + 1))


def texts_of(automaton) -> list[tuple[int, ...]]:
    """All fillings of a hole, one by one."""
    found = []
    for tokens in product(range(TOKENS), repeat=WIDTH):
        state = 0
        for token in tokens:
            state = int(automaton.following[state, token + 1])
        if automaton.accepting[state]:
            found.append(tokens)
    return found


def hole_of(automaton) -> Hole:
    return Hole((0,), 1 + WIDTH, WIDTH, automaton, torch.tensor([False, False, True]), 2)


TABLES = st.lists(st.sampled_from([None, 0, 1, 2]), min_size=WIDTH, max_size=WIDTH)


@examples(100)
@given(automata(), TABLES)
def test_a_token_is_allowed_where_some_filling_has_it_beside_what_is_decided(automaton, known):
    fitting = [t for t in texts_of(automaton) if all(k in (None, x) for k, x in zip(known, t, strict=True))]
    text = torch.tensor([[9, *(9 if k is None else k for k in known), 9]])
    decided = torch.tensor([[True, *(k is not None for k in known), True]])
    languages = HoleLanguages([hole_of(automaton)])
    languages.look(text, decided, torch.tensor([0]))
    slots = torch.arange(1, 1 + WIDTH)
    banned = languages.banned(torch.zeros(WIDTH, dtype=torch.long), slots, TOKENS + 2)
    for column, token in product(range(WIDTH), range(TOKENS)):
        if known[column] is None:
            wanted = any(t[column] == token for t in fitting) or not fitting  # a draft that cannot be: anything
            assert bool(banned[column, token]) != wanted
    if fitting:
        assert banned[:, TOKENS:].all()


@examples(100)
@given(automata(), st.permutations(range(WIDTH)), TABLES)
def test_of_commits_that_do_not_go_together_the_surest_stay(automaton, order, wanted):
    fillings = texts_of(automaton)
    commits = torch.tensor([[False, *(token is not None for token in wanted), False]])
    text = torch.tensor([[9, *(9 if token is None else token for token in wanted), 9]])
    cost = torch.tensor([[9.0, *map(float, order), 9.0]])
    kept = HoleLanguages([hole_of(automaton)]).compatible(
        commits, text, torch.zeros_like(commits), cost, torch.tensor([0])
    )
    chosen: set[int] = set()
    for column in sorted(range(WIDTH), key=lambda column: order[column]):
        more = chosen | {column}
        if wanted[column] is not None and any(all(t[c] == wanted[c] for c in more) for t in fillings):
            chosen = more
    assert kept[0].nonzero()[:, 0].tolist() == sorted(column + 1 for column in chosen)


def test_the_end_token_has_the_probability_of_all_that_may_stand_behind_the_hole():
    everything = TokenAutomaton(torch.tensor([[1, 0, 0, 0], [1] * 4]), torch.tensor([True, False]), torch.arange(1, 4))
    closing = torch.tensor([True, False, True])
    languages = HoleLanguages([Hole((0, 1), 3, 2, everything, closing, 2)])
    languages.look(torch.full((1, 3), 9), torch.zeros(1, 3, dtype=torch.bool), torch.tensor([1]))
    scores = torch.tensor([[1.0, 5.0, 2.0, 0.0]] * 2)
    found = languages.ended(scores, torch.zeros(2, dtype=torch.long), torch.tensor([1, 2]))
    assert found[0].tolist() == pytest.approx([1.0, 5.0, float(torch.tensor([1.0, 2.0]).logsumexp(0)), 0.0])
    assert found[1].tolist() == scores[1].tolist()  # no slot of the hole


def test_languages_are_refused_where_there_are_no_holes_and_by_models_that_write_from_the_left():
    from tiny import tiny_model

    automaton = TokenAutomaton(torch.tensor([[1, 0], [1, 1]]), torch.tensor([True, False]), torch.ones(4).long())
    languages = HoleLanguages([Hole((0,), 1, 1, automaton, torch.ones(4).bool(), 2)])
    with pytest.raises(ValueError, match=r"must fit the call \(got HoleLanguages without `infill_mask`"):
        tiny_model("llada").generate(
            torch.tensor([[1, 2]]), max_new_tokens=2, logits_processor=LogitsProcessorList([languages])
        )
    with pytest.raises(ValueError, match=r"`logits_processor` must fit the decoding .* decodes from left to right"):
        languages(torch.tensor([[1]]), torch.zeros(1, 4))
