"""The recorded runs of EAGLE's own code: trees, accepted lengths and counts, without its overshoot."""

import pytest
import torch
from eagle3 import recorded_cases, recorded_pair, recorded_tensors

from d3llm_hf import eagle3_generate
from d3llm_hf.autoregressive.eagle3.draft import Drafter
from d3llm_hf.autoregressive.eagle3.head import Eagle3Head, HeadCache
from d3llm_hf.autoregressive.eagle3.target import Target


CASES = [case for case in recorded_cases() if case.error is None]


def close(found: torch.Tensor, recorded: torch.Tensor) -> bool:
    return bool((found - recorded).abs().max() <= 1e-5 * recorded.abs().max())


@pytest.fixture
def watched(monkeypatch) -> dict[str, list]:
    """The trees that are drafted, and the entries that each forward of the head is fed."""
    seen = {"trees": [], "fed": []}
    draft, forward = Drafter.draft, Eagle3Head.forward

    def watched_draft(self, features, tokens):
        tree = draft(self, features, tokens)
        seen["trees"].append((tree.tokens.tolist(), tree.parents))
        return tree

    def watched_forward(self, hidden, *rest):
        seen["fed"].append(len(hidden))
        return forward(self, hidden, *rest)

    monkeypatch.setattr(Drafter, "draft", watched_draft)
    monkeypatch.setattr(Eagle3Head, "forward", watched_forward)
    return seen


def run(case, max_new_tokens):
    return eagle3_generate(
        *recorded_pair(), torch.tensor([case.prompt]), max_new_tokens=max_new_tokens,
        eos_token_id=case.eos_token_id, **case.settings,
    )  # fmt: skip


@pytest.mark.every(3)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_run_as_long_as_the_recorded_one_is_the_recorded_one(case, watched):
    output = run(case, len(case.tokens))
    new = tuple(output.sequences[0, len(case.prompt) :].tolist())
    after_stop = case.tokens.index(case.eos_token_id) + 1 if case.eos_token_id in case.tokens else None
    assert new == case.tokens[:after_stop]
    assert tuple(output.accept_lengths) == case.accept_lengths
    assert output.num_forwards.tolist() == [case.target_forwards]
    assert tuple(watched["trees"]) == case.trees
    # Upstream drafts once more behind the last verification.
    wasted = case.settings["depth"] + 1
    assert output.num_draft_forwards.tolist() == [case.draft_forwards - wasted]
    assert tuple(watched["fed"]) == case.draft_lengths[:-wasted]
    tokens = len(new) - (case.eos_token_id in new)
    assert output.tokens_per_forward.tolist() == pytest.approx([tokens / case.target_forwards])


@pytest.mark.every(3)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_run_ends_where_it_is_told_to(case):
    output = run(case, case.max_new_tokens)
    new = tuple(output.sequences[0, len(case.prompt) :].tolist())
    assert len(new) <= case.max_new_tokens
    assert new == case.tokens[: len(new)]
    assert len(new) == case.max_new_tokens or new.index(case.eos_token_id) == len(new) - 1
    accepted = tuple(output.accept_lengths)
    assert accepted == case.accept_lengths[: len(accepted)]
    assert output.num_forwards.item() == 1 + len(accepted) <= case.target_forwards


def test_a_tree_that_upstream_fails_on_is_refused():
    (case,) = (case for case in recorded_cases() if case.error is not None)
    with pytest.raises(ValueError, match=r"`total_tokens` must be at most 7, .*got 40"):
        run(case, case.max_new_tokens)


@torch.no_grad()
def test_logits_of_target_and_head_are_the_recorded_ones():
    (model, head), recorded = recorded_pair(), recorded_tensors("logits")
    logits, features = Target(model)._forward(recorded["target/input_ids"][0])
    assert close(logits, recorded["target/logits"][0]) and close(features, recorded["target/features"][0])

    embed, cache = model.get_input_embeddings(), HeadCache()
    tokens = recorded["head/step0_input_ids"][0]
    size = len(tokens)
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    hidden = head(head.fuse(features), embed(tokens), torch.arange(size), causal, cache)
    assert close(hidden, recorded["head/step0_hidden"][0])
    assert close(head.draft_logits(hidden), recorded["head/step0_logits"][0])
    assert close(cache.keys, recorded["head/step0_k"])

    tokens, visible = recorded["head/step1_input_ids"][0], torch.ones(1, size + 1, dtype=torch.bool)
    hidden = head(hidden[-1:], embed(tokens), torch.tensor([size]), visible, cache)
    assert close(hidden, recorded["head/step1_hidden"][0])
    assert close(head.draft_logits(hidden), recorded["head/step1_logits"][0])
