"""Probabilities of options are those of the canvas: the likelihood itself for one token, the chain rule for more."""

import math

import forms
import pytest
import torch
from tiny import ScriptedModel, tables

from d3llm_hf import log_likelihood
from d3llm_hf.forms.choosing import choose


def bits(text: str) -> list[int]:
    return forms.tokenizer()(text)["input_ids"]


def likelihood(model, before: str, option: str, after: str, **more):
    ids = torch.tensor([bits(before + option + after)])
    completion = torch.zeros_like(ids, dtype=torch.bool)
    completion[0, len(bits(before)) : len(bits(before + option))] = True
    return log_likelihood(model, ids, completion, **more)


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_an_option_of_one_token_has_its_likelihood(family):
    model, options = forms.model(family), ["1", "2", "3", "4", "5"]
    found = choose(model, forms.tokenizer(), options, prompt="Rate: ", before="I say ", after=" of 5.")
    logs = [float(likelihood(model, "Rate: I say ", option, " of 5.").mean) for option in options]
    assert list(found.log_probabilities.values()) == pytest.approx(logs, abs=1e-4)
    shares = torch.tensor(logs).softmax(0).tolist()
    assert list(found.probabilities.values()) == pytest.approx(shares, abs=1e-4)
    assert found.best == options[shares.index(max(shares))]
    assert found.expected == pytest.approx(sum(share * n for n, share in enumerate(shares, 1)), abs=1e-3)


def test_options_of_several_tokens_have_the_likelihood_of_a_model_that_agrees_with_itself():
    """Where a token's probability depends on nothing but its place, every order of decisions gives the same."""
    table = tables(1, 16, 512)[0]
    model = ScriptedModel(lambda ids: table[: ids.shape[1]].expand(len(ids), -1, -1), 512)
    options = ["yes", "maybe", "no"]
    found = choose(model, forms.tokenizer(), options, prompt="So ", after="!", mask_token_id=511, batch_size=2)
    for option in options:
        places = table.double().log_softmax(-1)[3:].unbind(0)
        wanted = sum(float(place[token]) for place, token in zip(places, bits(option), strict=False))
        assert found.log_probabilities[option] == pytest.approx(wanted, rel=1e-5)
        bound = likelihood(model, "So ", option, "!", num_samples=256, mask_token_id=511)
        assert abs(float(bound.mean) - wanted) <= 5 * float(bound.standard_error)


def test_the_chain_rule_goes_over_canvases_of_the_option_s_own_length():
    model, tokenizer = forms.model(), forms.tokenizer()
    mask, total = tokenizer.mask_token_id, 0.0
    before, option, after = bits("a"), bits("xyz"), bits("b")
    for place, token in enumerate(option):
        canvas = [*before, *option[:place], *[mask] * (3 - place), *after]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([canvas])).logits[0, 1 + place]
        total += float(logits.double().log_softmax(-1)[token])
    found = choose(model, tokenizer, ["xyz", "xy", "q"], before="a", after="b")
    assert found.log_probabilities["xyz"] == pytest.approx(total, abs=1e-4)
    assert math.fsum(found.probabilities.values()) == pytest.approx(1.0)


def test_options_are_checked_and_a_mean_needs_numbers():
    model, tokenizer = forms.model(), forms.tokenizer()
    with pytest.raises(TypeError, match=r"`options` must be a list of texts \(got str\)"):
        choose(model, tokenizer, "yes")
    found = choose(model, tokenizer, ["yes", "no"], prompt="So ")
    with pytest.raises(ValueError, match=r"`options` must be numbers to have a mean \(got \['yes', 'no'\]\)"):
        _ = found.expected
