"""Decoding with EAGLE-3 beside plain decoding of the same target: token for token, and what it counts."""

from functools import cache

import pytest
import torch
from eagle3 import VOCABULARY, recorded_pair, tiny_head, tiny_target
from thin import covering

from d3llm_hf import eagle3_generate
from d3llm_hf.autoregressive.eagle3.verify import Choice
from d3llm_hf.models.scoring import Sampler


SMALL = {"total_tokens": 14, "depth": 2, "draft_top_k": 3}
PROMPT = torch.tensor([[3, 1, 4, 1, 5]])
FAMILIES = ("llama", "qwen2", "qwen3")
target, head = cache(tiny_target), cache(tiny_head)


def plain(model, prompt, max_new_tokens, eos_token_id=None):
    return model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=max_new_tokens, do_sample=False,
        eos_token_id=eos_token_id, pad_token_id=0,
    )  # fmt: skip


def sampled(model, prompt, max_new_tokens, choose):
    """The target alone, one forward over the whole text for each token."""
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logits = model(input_ids=prompt).logits[0, -1:]
        token = choose(logits, torch.tensor([prompt.shape[1]]))
        prompt = torch.cat([prompt, token[None]], dim=1)
    return prompt


@pytest.mark.every(12)
@pytest.mark.parametrize(
    ("family", "kernel", "size", "tree"),
    covering(
        FAMILIES,
        ["sdpa", "eager"],
        [1, 2, 20],
        [
            {"total_tokens": 2, "depth": 1, "draft_top_k": 1},
            SMALL,
            {"total_tokens": 43, "depth": 1, "draft_top_k": 6},
            {"total_tokens": 20, "depth": 6, "draft_top_k": 2},
        ],
        every=2,
    ),
)
def test_greedy_tokens_are_those_of_the_target(family, kernel, size, tree):
    model = target(family)
    model.set_attn_implementation(kernel)
    for length in (1, 5):
        output = eagle3_generate(model, head(), PROMPT[:, :length], max_new_tokens=size, **tree)
        assert torch.equal(output.sequences, plain(model, PROMPT[:, :length], size))


@pytest.mark.parametrize("parts", [{"own_embedding": True}, {"draft_vocab_size": VOCABULARY}])
def test_heads_of_other_parts_draft_too(parts):
    output = eagle3_generate(target(), head(**parts), PROMPT, max_new_tokens=12, **SMALL)
    assert torch.equal(output.sequences, plain(target(), PROMPT, 12))
    assert max(output.accept_lengths) > 0


def test_a_head_of_another_width_and_dtype_drafts_too():
    narrow = tiny_head(own_embedding=True, hidden_size=8, target_hidden_size=16).to(torch.bfloat16)
    output = eagle3_generate(target(), narrow, PROMPT, max_new_tokens=12, **SMALL)
    assert torch.equal(output.sequences, plain(target(), PROMPT, 12))


@pytest.mark.every(6)
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.6}, {"top_k": 4, "top_p": 0.9, "temperature": 1.5}])
def test_draws_are_those_of_the_target_alone(settings):
    for seed in range(4):
        choose = Choice(Sampler(seed), **settings)
        expected = sampled(target(), PROMPT, 10, choose)
        for tree in (SMALL, {"total_tokens": 43, "depth": 1, "draft_top_k": 6}):
            output = eagle3_generate(
                target(), head(), PROMPT, max_new_tokens=10, do_sample=True, seed=seed, **settings, **tree
            )
            assert torch.equal(output.sequences, expected)


def test_without_a_seed_torchs_generator_decides():
    def draw():
        return eagle3_generate(target(), head(), PROMPT, max_new_tokens=10, do_sample=True, **SMALL).sequences.tolist()

    torch.manual_seed(0)
    first, other = draw(), draw()
    torch.manual_seed(0)
    assert draw() == first != other


@pytest.mark.full
def test_whole_calls_have_the_distribution_of_the_target():
    model, small = target(vocab_size=4), head(vocab_size=4, draft_vocab_size=2)
    counts = torch.zeros(4, 4)
    for seed in range(500):
        output = eagle3_generate(
            model, small, PROMPT[:, 1:2], max_new_tokens=2, do_sample=True, temperature=4.0, seed=seed,
            total_tokens=5, depth=1, draft_top_k=2,
        )  # fmt: skip
        counts[tuple(output.sequences[0, 1:].tolist())] += 1
    with torch.no_grad():
        first = (model(input_ids=PROMPT[:, 1:2]).logits[0, -1] / 4).softmax(-1)
        behind = torch.stack([model(input_ids=torch.tensor([[1, token]])).logits[0, -1] for token in range(4)])
    expected = first[:, None] * (behind / 4).softmax(-1) * counts.sum()
    # 15 degrees of freedom: the statistic exceeds 52 in five of a million draws.
    assert float(((counts - expected) ** 2 / expected).sum()) < 52


@pytest.mark.full
def test_nothing_follows_a_stop_token():
    answer = plain(target(), PROMPT, 20)[0, PROMPT.shape[1] :].tolist()
    for stop in set(answer):
        for given in (stop, [stop, VOCABULARY - 1], torch.tensor(stop)):
            output = eagle3_generate(target(), head(), PROMPT, max_new_tokens=20, eos_token_id=given, **SMALL)
            stops = [stop, VOCABULARY - 1] if isinstance(given, list) else stop
            expected = plain(target(), PROMPT, 20, stops)
            assert torch.equal(output.sequences, expected)


def test_stop_tokens_are_those_of_the_generation_config_unless_given():
    model = tiny_target()
    answer = plain(model, PROMPT, 20)[0, PROMPT.shape[1] :].tolist()
    model.generation_config.eos_token_id = answer[0]
    assert eagle3_generate(model, head(), PROMPT, max_new_tokens=20, **SMALL).sequences.shape[1] == 6
    assert eagle3_generate(model, head(), PROMPT, max_new_tokens=20, eos_token_id=[], **SMALL).sequences.shape[1] == 25


@pytest.mark.parametrize("size", range(1, 9))
def test_forwards_are_counted(size):
    model, drafter = recorded_pair()
    calls = {"target": 0, "head": 0}

    def count(name):
        return lambda *_: calls.__setitem__(name, calls[name] + 1)

    hooks = [model.register_forward_hook(count("target")), drafter.register_forward_hook(count("head"))]
    prompt = torch.tensor([[11, 23, 17, 6, 8, 1]])
    output = eagle3_generate(model, drafter, prompt, max_new_tokens=size, **SMALL)
    for hook in hooks:
        hook.remove()
    assert output.sequences.shape == (1, 6 + size)
    assert output.num_forwards.tolist() == [calls["target"]] == [1 + len(output.accept_lengths)]
    assert output.num_draft_forwards.tolist() == [calls["head"]] == [3 * len(output.accept_lengths)]
    assert output.tokens_per_forward.tolist() == pytest.approx([size / calls["target"]])
    decided = 1 + sum(output.accept_lengths) + len(output.accept_lengths)
    assert decided >= size > decided - 1 - (output.accept_lengths or [0])[-1]


def test_padding_on_the_left_changes_nothing():
    padded = torch.nn.functional.pad(PROMPT, (3, 0))
    mask = (torch.arange(8) >= 3).long()[None]
    output = eagle3_generate(target(), head(), padded, mask, max_new_tokens=9, **SMALL)
    expected = eagle3_generate(target(), head(), PROMPT, torch.ones_like(PROMPT), max_new_tokens=9, **SMALL)
    assert torch.equal(output.sequences[:, 3:], expected.sequences) and not output.sequences[:, :3].any()
    assert output.accept_lengths == expected.accept_lengths


def test_dropout_is_off_and_modes_stay():
    model = tiny_target(attention_dropout=0.9).train()
    output = eagle3_generate(model, head(), PROMPT, max_new_tokens=9, **SMALL)
    assert all(module.training for module in model.modules()) and not output.sequences.requires_grad
    assert torch.equal(output.sequences, plain(model.eval(), PROMPT, 9))


def test_logits_that_are_not_finite_are_refused():
    broken = tiny_target()
    broken.lm_head.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match="The target's logits must be finite"):
        eagle3_generate(broken, head(), PROMPT, max_new_tokens=4, **SMALL)
    empty = tiny_head()
    empty.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="The draft head's logits must be finite"):
        eagle3_generate(target(), empty, PROMPT, max_new_tokens=4, **SMALL)


# ---- bad input -----------------------------------------------------------------------------------------------------


GREEDY = [
    ({"temperature": 0.5}, "`temperature` has no effect on greedy decoding .got 0.5"),
    ({"top_p": 0.9}, "`top_p` has no effect"),
    ({"top_k": 5}, "`top_k` has no effect"),
    ({"seed": 0}, "`seed` has no effect on greedy decoding .got 0"),
]
BAD = [
    *((given, ValueError, message) for given, message in GREEDY),
    ({"do_sample": 1}, TypeError, "`do_sample` must be True or False .got 1"),
    ({"do_sample": True, "temperature": 0}, ValueError, "`temperature` must be .*got 0.*is greedy decoding"),
    ({"do_sample": True, "temperature": None}, TypeError, "`temperature` must be a number .*got None"),
    ({"do_sample": True, "top_p": 1.5}, ValueError, "`top_p` must be a probability .*got 1.5"),
    ({"do_sample": True, "top_k": 1.5}, TypeError, "`top_k` must be .*got 1.5"),
    ({"do_sample": True, "seed": -1}, ValueError, "`seed` must be an integer of at least 0 .got -1"),
    ({"max_new_tokens": 0}, ValueError, "`max_new_tokens` must be an integer of at least 1 .got 0"),
    ({"max_new_tokens": True}, TypeError, "`max_new_tokens` must be an integer .*got True"),
    ({"max_new_tokens": 60}, ValueError, "must fit into the model's 64 positions .got 5 and 60"),
    ({"total_tokens": 1}, ValueError, "`total_tokens` must be an integer of at least 2 .got 1"),
    ({"total_tokens": 23}, ValueError, "`total_tokens` must be at most 22, .*got 23"),
    ({"depth": 0}, ValueError, "`depth` must be an integer of at least 1"),
    ({"draft_top_k": 7}, ValueError, "`draft_top_k` must be at most the head's vocabulary of 6 tokens .got 7"),
    ({"eos_token_id": 1.0}, TypeError, "`eos_token_id` must be a token id or a list"),
    ({"eos_token_id": VOCABULARY}, ValueError, "`eos_token_id` must lie inside the vocabulary of 12"),
    ({"input_ids": [[1]]}, TypeError, "`input_ids` must be a tensor"),
    ({"input_ids": PROMPT[0]}, ValueError, r"`input_ids` must have the shape \(B, P\)"),
    ({"input_ids": PROMPT.float()}, TypeError, "`input_ids` must hold integers"),
    ({"input_ids": PROMPT + 9}, ValueError, "`input_ids` must lie inside the vocabulary"),
    ({"input_ids": PROMPT.repeat(2, 1)}, ValueError, "`input_ids` must be a batch of one, .*got 2 rows"),
    ({"input_ids": PROMPT[:, :0]}, ValueError, "`input_ids` must hold a token to go on from"),
    ({"attention_mask": torch.zeros_like(PROMPT)}, ValueError, "`input_ids` must hold a token to go on from"),
    ({"attention_mask": torch.ones(1, 4)}, ValueError, r"`attention_mask` must have the shape \(B, P\)"),
    ({"attention_mask": torch.tensor([[1, 1, 1, 1, 0]])}, ValueError, "`attention_mask` must have its zeros on the l"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "kind", "message"), BAD, ids=[message[:40] for _, _, message in BAD])
def test_bad_input_is_refused_before_the_first_forward(given, kind, message):
    calls = []
    hook = target().register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(kind, match=message):
        eagle3_generate(target(), head(), **({"input_ids": PROMPT, "max_new_tokens": 4} | SMALL | given))
    hook.remove()
    assert calls == []


def with_config(**settings):
    model = tiny_target()
    for name, value in settings.items():
        setattr(model.config, name, value)
    return model


PAIRS = {
    "no model": (lambda: torch.nn.Linear(1, 1), head, TypeError, "`model` must be a model of tr.*got Linear"),
    "family": (lambda: tiny_target("olmo"), head, ValueError, "`model` must be a causal .*got OlmoForC"),
    "backbone": (lambda: tiny_target().model, head, ValueError, "`model` must be a causal .*got LlamaModel"),
    "window": (
        lambda: tiny_target("qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=0), head,
        ValueError, "`model` must attend to all earlier tokens .*got layer_types",
    ),
    "both sides": (lambda: with_config(is_causal=False), head, ValueError, "`model` must attend .*got is_causal=F"),
    "rotation": (
        lambda: with_config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1.0, "factor": 2.0}), head,
        ValueError, "`rope_type` of `model` must be one of .*got 'dynamic'",
    ),
    "kernel": (
        lambda: with_config(_attn_implementation_internal="flash_attention_2"), head,
        ValueError, "`attn_implementation` of `model` must be one of .*got 'flash_attention_2'",
    ),
    "layers": (lambda: tiny_target(layers=6), head, ValueError, "`model` must have at least 7 layers, .*got 6"),
    "no head": (target, lambda: target(), TypeError, "`head` must be an Eagle3Head .got LlamaForCausalLM"),
    "hidden size": (
        target, lambda: tiny_head(target_hidden_size=8), ValueError, "`head` must be made for the hidden .*16 .got 8"
    ),
    "vocabulary": (
        target, lambda: tiny_head(vocab_size=10), ValueError, "`head` must be made for the vocabulary .* 12 .got 10"
    ),
    "embedding": (
        target, lambda: tiny_head(hidden_size=8, target_hidden_size=16), ValueError,
        "`head` must have an embedding of its own .* 16 .got 8",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("model", "drafter", "kind", "message"), PAIRS.values(), ids=PAIRS)
def test_pairs_that_do_not_fit_are_refused(model, drafter, kind, message):
    with pytest.raises(kind, match=message):
        eagle3_generate(model(), drafter(), PROMPT, max_new_tokens=4, **SMALL)


def test_a_diffusion_model_is_refused_by_name():
    from tiny import tiny_model

    with pytest.raises(ValueError, match=r"A diffusion model decodes with `model\.generate`"):
        eagle3_generate(tiny_model("llada"), head(), PROMPT, max_new_tokens=4)
