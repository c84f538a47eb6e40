"""EAGLE-3 as a method beside the other autoregressive ones: their tokens, their counts, their defaults."""

import pytest
import torch
from causal import plain_greedy
from eagle3 import recorded_cases, recorded_pair, tiny_head, tiny_target
from transformers.generation import StoppingCriteria

from d3llm_hf import eagle3_generate
from d3llm_hf.autoregressive.generate import check_model, generate


PROMPT = [11, 23, 17, 6, 8, 1]
TREE = {"total_tokens": 14, "depth": 2, "draft_top_k": 3}
TINY = [3, 1, 4, 1, 5]


class EndsWith(StoppingCriteria):
    """Ends a row whose last token is this one."""

    def __init__(self, token: int):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


def run(model, head, prompt, count=24, **kwargs):
    own = {"method": "eagle3", "settings": TREE, "draft_head": head, "max_new_tokens": count}
    return generate(model, torch.tensor([prompt]), **(own | kwargs))


def test_tokens_are_plain_greedy_ones_and_counts_are_of_target_and_head_apart():
    model, head = recorded_pair()
    found = run(model, head, PROMPT)
    assert found.sequences[0].tolist() == PROMPT + plain_greedy(model, PROMPT, 24)
    same = eagle3_generate(model, head, torch.tensor([PROMPT]), max_new_tokens=24, **TREE)
    trees = len(same.accept_lengths)
    assert torch.equal(found.num_forwards, same.num_forwards) and found.num_forwards.tolist() == [1 + trees]
    assert torch.equal(found.num_draft_forwards, same.num_draft_forwards)
    assert found.positions_computed.tolist() == [len(PROMPT) + 14 * trees]
    # The head reads the prompt, later what was accepted and one more; two levels of three nodes follow.
    read = len(PROMPT) + sum(length + 1 for length in same.accept_lengths[:-1])
    assert found.draft_positions_computed.tolist() == [read + 2 * 3 * trees]
    assert found.tokens_per_forward.tolist() == pytest.approx(same.tokens_per_forward.tolist())
    assert not model._forward_hooks and not head._forward_hooks


@pytest.mark.full
def test_rows_are_decoded_one_by_one_without_their_padding():
    model, head = tiny_target(), tiny_head()
    rows, mask = torch.tensor([[0, 0, *TINY[:3]], TINY]), torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    found = generate(model, rows, mask, method="eagle3", settings=TREE, draft_head=head, max_new_tokens=8)
    for row, prompt in enumerate((TINY[:3], TINY)):
        assert found.sequences[row, 5:].tolist() == plain_greedy(model, prompt, 8)


def test_a_stop_token_does_not_count_and_a_criterion_ends_the_answer_inside_a_tree():
    case = recorded_cases()[0]
    model, head = recorded_pair()
    answer = plain_greedy(model, list(case.prompt), 12)
    stop = answer[7]
    end = answer.index(stop) + 1
    given = {"settings": case.settings, "eos_token_id": []}
    by_token = run(model, head, list(case.prompt), 12, **given | {"eos_token_id": stop})
    by_criterion = run(model, head, list(case.prompt), 12, **given, stopping_criteria=[EndsWith(stop)])
    for found, tokens in ((by_token, end - 1), (by_criterion, end)):
        assert found.sequences[0, len(case.prompt) :].tolist() == answer[:end]
        assert found.tokens_per_forward.tolist() == [tokens / found.num_forwards.item()]


@pytest.mark.full
def test_what_a_call_leaves_open_is_the_checkpoints_and_then_transformers_own():
    model, head = tiny_target(), tiny_head()
    sampled = {"settings": TREE | {"do_sample": True}, "seed": 3}
    prompt = torch.tensor([TINY])

    def expected(**settings):
        torch.manual_seed(3)
        own = {"temperature": 1.0, "top_k": 50, "top_p": 1.0} | settings
        return eagle3_generate(model, head, prompt, max_new_tokens=12, do_sample=True, **own, **TREE).sequences

    assert torch.equal(run(model, head, TINY, 12, **sampled).sequences, expected())
    model.generation_config.top_k = 1  # as good as greedy
    assert torch.equal(run(model, head, TINY, 12, **sampled).sequences, expected(top_k=1))
    warm = {"settings": sampled["settings"] | {"top_k": 5, "temperature": 2.0}, "seed": 3}
    assert torch.equal(run(model, head, TINY, 12, **warm).sequences, expected(top_k=5, temperature=2.0))


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"draft_head": None}, ValueError, "`draft_head` must be given for 'eagle3' .got None.. Pass an `Eagle3Head`"),
        ({"draft_head": 1}, TypeError, "`head` must be an Eagle3Head .got int"),
        ({"draft_head": tiny_head(vocab_size=10)}, ValueError, "must be made for the vocabulary of `model`"),
        ({"assistant_model": 1}, ValueError, "`assistant_model` has no effect with 'eagle3'.*choose 'ar_assistant'"),
        ({"settings": TREE | {"total_tokens": 1}}, ValueError, "`total_tokens` must be an integer of at least 2"),
        ({"settings": TREE | {"depth": 0}}, ValueError, "`depth` must be a positive integer"),
        ({"settings": TREE | {"total_tokens": 23}}, ValueError, "`total_tokens` must be at most 22"),
        ({"settings": {"draft_head": "x"}}, ValueError, "it is an argument of its own .`--draft-head`"),
    ],
)
def test_bad_input_is_refused(arguments, kind, message):
    with pytest.raises(kind, match=message):
        run(tiny_target(), **({"head": tiny_head(), "prompt": TINY} | arguments))


def test_a_model_or_generation_config_that_no_tree_follows_is_refused():
    with pytest.raises(ValueError, match="must have at least 7 layers"):
        check_model(tiny_target(layers=6), "eagle3")
    for name, value, settings in (
        ("repetition_penalty", 1.1, {}),
        ("suppress_tokens", [3], {}),
        ("min_p", 0.1, {"do_sample": True}),
    ):
        model = tiny_target()
        check_model(model, "eagle3", settings)
        setattr(model.generation_config, name, value)
        with pytest.raises(ValueError, match=f"`{name}` in the model's generation config must be unset for 'eagle3'"):
            check_model(model, "eagle3", settings)
    check_model(model, "eagle3")  # greedy decoding asks nothing of samplers
