"""Autoregressive methods: plain greedy tokens from each, forwards counted by hand, and what is refused."""

import copy

import pytest
import torch
from causal import FILL, STOP, causal_model, chain_model, plain_greedy
from thin import covering
from tiny import tiny_model, tiny_prompt
from transformers.generation import StoppingCriteria

from d3llm_hf.autoregressive.causal import max_positions
from d3llm_hf.autoregressive.drafters import ASSISTANT
from d3llm_hf.autoregressive.generate import generate
from d3llm_hf.autoregressive.methods import AR_METHODS, complete_settings


RING = [1, 2, 3, 0, 5, 6, 7, 7]  # 0 1 2 3 0 1 ..., and 4 5 6 7 7 ...
SPECULATIVE = [
    ("ar_prompt_lookup", {}),
    ("ar_prompt_lookup", {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}),
    ("ar_assistant", {}),
    ("ar_assistant", {"num_assistant_tokens": 4, "assistant_confidence_threshold": 0}),
    ("ar_assistant", {"num_assistant_tokens": 3, "num_assistant_tokens_schedule": "heuristic_transient"}),
    ("ar_early_exit", {"assistant_early_exit": 1}),
    ("ar_early_exit", {"assistant_early_exit": 2, "assistant_confidence_threshold": 0.0, "num_assistant_tokens": 5}),
]


class EveryLayer(torch.nn.ModuleList):
    """Layers of which no less than all can be had."""

    def __getitem__(self, index):
        return self if isinstance(index, slice) else super().__getitem__(index)


class EndsWith(StoppingCriteria):
    """Ends a row whose last tokens are these."""

    def __init__(self, *tokens: int):
        self.tokens = torch.tensor(tokens)

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, -len(self.tokens) :] == self.tokens).all(1)


def ids(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


def run(model, *rows: list[int], count: int = 24, **kwargs):
    return generate(model, ids(*rows), max_new_tokens=count, **kwargs)


def shortened(model):
    """The first layer of a model with its head: a drafter that is right at times."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 1
    drafter = type(model)(config)
    drafter.load_state_dict(model.state_dict(), strict=False)
    return drafter.eval()


def drafter_of(model, method: str) -> dict:
    return {"assistant_model": shortened(model)} if AR_METHODS[method].needs is ASSISTANT else {}


@pytest.mark.every(3)
@pytest.mark.parametrize(
    ("kind", "method", "settings", "seed"), covering(["llama", "qwen2"], SPECULATIVE, range(3), strength=1)
)
def test_every_method_gives_the_tokens_of_a_slow_greedy_loop(kind, method, settings, seed):
    model, prompt = causal_model(kind, seed, layers=3), tiny_prompt(seed, 9)
    wanted = plain_greedy(model, prompt, 24, (STOP,))
    for name, chosen in (("ar", {}), (method, settings)):
        output = run(model, prompt, method=name, settings=chosen, eos_token_id=STOP, **drafter_of(model, name))
        assert output.sequences[0].tolist() == prompt + wanted
        tokens = len(wanted) - (wanted[-1] == STOP)
        assert output.tokens_per_forward.tolist() == [tokens / output.num_forwards.item()]
        assert output.num_forwards_reference is output.num_forwards
        assert output.num_forwards[0] == len(wanted) if name == "ar" else output.num_forwards[0] <= len(wanted)


def test_forwards_counted_by_hand():
    model = chain_model(RING)
    plain = run(model, [0, 1], count=20)
    assert plain.sequences[0].tolist() == [0, 1, 2, 3] * 5 + [0, 1]
    assert (plain.num_forwards.tolist(), plain.num_draft_forwards.tolist()) == ([20], [0])
    assert plain.draft_positions_computed.tolist() == [0]
    assert plain.positions_computed.tolist() == [2 + 19]
    assert plain.tokens_per_forward.tolist() == [1.0]
    # Four drafts, all of them right, and the target's own token: five a forward. The first has the prompt as well.
    drafts = {"num_assistant_tokens": 4, "assistant_confidence_threshold": 0}
    for method, more in (
        ("ar_early_exit", {"settings": drafts | {"assistant_early_exit": 1}}),
        ("ar_assistant", {"settings": drafts, "assistant_model": chain_model(RING, layers=1)}),
    ):
        output = run(model, [0, 1], count=20, method=method, **more)
        assert (output.num_forwards.tolist(), output.num_draft_forwards.tolist()) == ([4], [16])
        assert output.tokens_per_forward.tolist() == [5.0]
        assert output.positions_computed.tolist() == [6 + 5 + 5 + 5]
        # The drafter reads the prompt once, later the two tokens that it has not read yet, and else its last draft.
        assert output.draft_positions_computed.tolist() == [(2 + 3) + 3 * (2 + 3)]
        assert torch.equal(output.sequences, plain.sequences)
    # An assistant that says 0 whatever stands before is right once in four tokens.
    wrong = chain_model([0] * 8, layers=1)
    output = run(model, [0, 1], count=20, method="ar_assistant", settings=drafts, assistant_model=wrong)
    assert output.num_forwards.tolist() == [15] and torch.equal(output.sequences, plain.sequences)
    # What follows "0 1" in the prompt is right: three drafts and one token, then whatever stood there before.
    output = run(
        model, [0, 1, 2, 3, 0, 1], count=4, method="ar_prompt_lookup", settings={"prompt_lookup_num_tokens": 3}
    )
    assert (output.num_forwards.tolist(), output.num_draft_forwards.tolist()) == ([1], [0])


def test_a_stop_token_ends_the_answer_and_does_not_count():
    model = chain_model(RING)
    settings = {"num_assistant_tokens": 6, "assistant_confidence_threshold": 0, "assistant_early_exit": 1}
    for method, chosen, forwards in (("ar", {}, 3), ("ar_early_exit", settings, 1)):
        output = run(model, [4], method=method, settings=chosen, eos_token_id=[7, 3], pad_token_id=0)
        assert output.sequences.tolist() == [[4, 5, 6, 7]]
        assert output.num_forwards.tolist() == [forwards]
        assert output.tokens_per_forward.tolist() == [2 / forwards]


def test_rows_of_a_batch_count_until_each_is_finished_and_are_what_they_are_alone():
    model = chain_model(RING)
    rows, mask = ids([7, 4], [0, 1], [0, 6]), ids([0, 1], [1, 1], [1, 1])
    output = generate(model, rows, mask, max_new_tokens=6, eos_token_id=7, pad_token_id=0)
    assert output.sequences.tolist() == [[7, 4, 5, 6, 7, 0, 0, 0], [0, 1, 2, 3, 0, 1, 2, 3], [0, 6, 7, 0, 0, 0, 0, 0]]
    assert output.num_forwards.tolist() == [3, 6, 1]
    assert output.positions_computed.tolist() == [2 + 2, 2 + 5, 2]
    assert output.tokens_per_forward.tolist() == [2 / 3, 1.0, 0.0]
    early = {"assistant_early_exit": 1, "assistant_confidence_threshold": 0, "num_assistant_tokens": 2}
    apart = generate(
        model, rows, mask, max_new_tokens=6, method="ar_early_exit", settings=early, eos_token_id=7, pad_token_id=0
    )
    assert torch.equal(apart.sequences, output.sequences)
    assert apart.num_forwards.tolist() == [1, 2, 1]
    assert apart.positions_computed.tolist() == [1 + 2, 2 + 2 + 3, 2 + 1]  # no padding, no drafts behind a stop token


@pytest.mark.parametrize(("method", "settings"), [("ar", {}), *SPECULATIVE[::2]])
def test_a_stopping_criterion_ends_an_answer_where_plain_decoding_ends(method, settings):
    model = chain_model(RING, layers=3)
    output = run(
        model, [0, 1, 2, 3, 0], method=method, settings=settings, stopping_criteria=[EndsWith(1, 2)],
        **drafter_of(model, method),
    )  # fmt: skip
    assert output.sequences.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert (output.tokens_per_forward * output.num_forwards).tolist() == [2]


def test_sampling_repeats_by_seed_and_no_row_depends_on_another():
    model, prompts = causal_model(), [tiny_prompt(1, 6), tiny_prompt(2, 6)]
    settings = {"do_sample": True, "temperature": 1.5, "top_k": 20, "top_p": 0.9}
    both = run(model, *prompts, settings=settings, seed=[5, 6], count=8).sequences
    alone = run(model, prompts[1], settings=settings, seed=6, count=8).sequences
    assert both[1].tolist() == alone[0].tolist()
    assert not torch.equal(run(model, prompts[1], settings=settings, seed=7, count=8).sequences, alone)
    state = torch.random.get_rng_state()
    for method in ("ar", "ar_prompt_lookup"):
        again = [run(model, *prompts, settings=settings, method=method, seed=5, count=8).sequences for _ in range(2)]
        assert torch.equal(*again)
    assert torch.equal(torch.random.get_rng_state(), state)
    run(model, *prompts, settings=settings, count=2)  # with torch's own generator
    assert not torch.equal(torch.random.get_rng_state(), state)


def test_the_models_are_left_as_they_were():
    model = causal_model(layers=3)
    drafter = shortened(model)
    model.generation_config.prompt_lookup_num_tokens = 5
    own, drafts = model.generation_config, drafter.generation_config
    before = own.to_dict(), drafts.to_dict(), model.config.to_dict()
    plain = run(model, tiny_prompt(0, 9), count=6)
    assert plain.num_forwards.tolist() == [6]  # the checkpoint's own drafts are no part of "ar"
    for method, settings in [SPECULATIVE[0], SPECULATIVE[4], SPECULATIVE[6]]:
        more = {"assistant_model": drafter} if AR_METHODS[method].needs is ASSISTANT else {}
        run(model, tiny_prompt(0, 9), count=6, method=method, settings=settings, **more)
    assert (model.generation_config, drafter.generation_config) == (own, drafts)
    assert before == (own.to_dict(), drafts.to_dict(), model.config.to_dict())
    assert not model._forward_hooks and not model.model.layers[-1]._forward_hooks and not drafter._forward_hooks


def test_what_the_checkpoint_says_holds_where_nothing_else_is_asked_for():
    model = chain_model(RING)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 7, 3
    model.generation_config.temperature, model.generation_config.do_sample = 0.1, True
    output = run(model, [0, 4], [0, 6], count=4)
    assert output.sequences.tolist() == [[0, 4, 5, 6, 7], [0, 6, 7, 3, 3]]
    assert run(model, [0, 6], count=3, eos_token_id=[]).sequences.tolist() == [[0, 6, 7, 7, 7]]
    assert max_positions(model) == 512


def test_an_assistant_of_another_vocabulary_drafts_by_way_of_text():
    from official import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    model, drafter = causal_model(vocab_size=512), causal_model(seed=1, vocab_size=520)
    more = {"tokenizer": tokenizer, "assistant_tokenizer": tokenizer}
    prompt = tokenizer("one two one two", add_special_tokens=False)["input_ids"]
    output = run(model, prompt, count=12, method="ar_assistant", assistant_model=drafter, **more)
    assert output.sequences[0].tolist() == prompt + plain_greedy(model, prompt, 12)
    assert output.num_draft_forwards[0] > 0


@pytest.mark.parametrize(
    ("method", "settings", "expected"),
    [
        ("llada", {}, r"`method` must be one of \['ar', .* \(got 'llada'\)"),
        ("ar", {"prompt_lookup_num_tokens": 3}, "must be a setting of ar .got 3.: it belongs to ar_prompt_lookup"),
        ("ar_assistant", {"assistant_ensemble_weight": 0.5}, "mixture of both models"),
        ("ar_prompt_lookup", {"speculation_type": "dflash"}, "transformers ignores it"),
        ("ar", {"block_length": 8}, "no autoregressive method has it"),
        ("ar", {"temperature": 0.5}, "`temperature` needs sampling .got 0.5"),
        ("ar", {"do_sample": 1}, "`do_sample` must be a bool .got 1"),
        ("ar", {"do_sample": True, "temperature": 0}, "`temperature` must be a positive number .got 0"),
        ("ar", {"do_sample": True, "top_p": 1.5}, "`top_p` must be a number in"),
        ("ar_prompt_lookup", {"prompt_lookup_num_tokens": 0}, "must be a positive integer .got 0"),
        ("ar_prompt_lookup", {"max_matching_ngram_size": 2.0}, "must be a positive integer .got 2.0"),
        ("ar_assistant", {"num_assistant_tokens_schedule": "heuristic"}, "keeps what one prompt taught it"),
        ("ar_assistant", {"assistant_confidence_threshold": 1.0}, r"must be a probability in \[0, 1\) .got 1.0"),
        ("ar_early_exit", {}, "`assistant_early_exit` must be given for ar_early_exit"),
    ],
)
def test_settings_without_effect_or_outside_their_rule_are_refused(method, settings, expected):
    with pytest.raises(ValueError, match=expected):
        complete_settings(method, settings)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"input_ids": [[1]]}, r"`input_ids` must be a tensor of shape \(B, P\)"),
        ({"max_new_tokens": 0}, r"`max_new_tokens` must be a positive integer \(got 0\)"),
        ({"attention_mask": torch.ones(1, 3)}, "must have the shape of `input_ids`"),
        ({"attention_mask": torch.tensor([[1, 0]])}, "must have its padding on the left"),
        ({"attention_mask": torch.tensor([[0, 0]])}, "must have its padding on the left"),
        ({"seed": 1}, "`seed` needs sampling"),
        ({"seed": [1, 2], "settings": {"do_sample": True}}, "`seed` must be one for each of 1 rows .got 2"),
        ({"assistant_model": 1}, "`assistant_model` has no effect with 'ar'"),
        ({"assistant_tokenizer": 1}, "`assistant_tokenizer` has no effect with 'ar'"),
        ({"draft_head": 1}, "`draft_head` has no effect with 'ar' .got int.. Leave it out, or choose 'eagle3'"),
        ({"method": "ar_assistant"}, "`assistant_model` must be given for 'ar_assistant'"),
        ({"method": "ar_assistant", "assistant_model": "self"}, "must be another model than the target"),
        ({"method": "ar_assistant", "assistant_model": causal_model(vocab_size=40)}, "got 32 and 40 tokens"),
        (
            {"method": "ar_assistant", "assistant_model": causal_model(), "assistant_tokenizer": 1},
            "`assistant_tokenizer` has no effect where both vocabularies have 32 tokens",
        ),
        ({"method": "ar_early_exit", "settings": {"assistant_early_exit": 2}}, "must be below the 2 layers"),
        ({"method": "ar_mtp"}, "needs a checkpoint with `num_mtp_layers`"),
        (
            {"method": "ar_early_exit", "settings": {"assistant_early_exit": 1}, "stopping_criteria": [EndsWith(1)]}
            | {"attention_mask": torch.tensor([[0, 1]])},
            "`stopping_criteria` know rows and slots by their place",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_refused(arguments, expected):
    model = causal_model()
    if arguments.get("assistant_model") == "self":
        arguments = arguments | {"assistant_model": model}
    with pytest.raises(ValueError, match=expected):
        generate(model, **({"input_ids": ids([1, 2])} | arguments))


def test_a_generation_config_that_no_method_follows_is_refused():
    model = causal_model()
    model.generation_config.num_beams = 4
    with pytest.raises(ValueError, match=r"`num_beams` in the model's generation config must be unset \(got 4\)"):
        run(model, [1])


def test_models_that_are_not_causal_are_refused_by_name():
    from transformers import BertConfig, BertForMaskedLM

    with pytest.raises(TypeError, match=r"got LLaDAModelLM, which decodes by diffusion.*choose one of \['d3llm'"):
        run(tiny_model("llada"), [1])
    bert = BertForMaskedLM(BertConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    two_sided = causal_model()
    two_sided.config.is_causal = False
    for model in (bert, two_sided, torch.nn.Linear(1, 1)):
        with pytest.raises(TypeError, match="must be a causal language model of transformers for the method 'ar'"):
            run(model, [1])


def test_layers_that_do_not_exit_early_are_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 32, "n_embd": 8, "n_layer": 2, "n_head": 1, "n_positions": 64}
    gpt2 = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)).eval()
    settings = {"assistant_early_exit": 1}
    with pytest.raises(ValueError, match=r"needs a model whose decoder lists its `layers` \(got GPT2LMHeadModel"):
        run(gpt2, [1], method="ar_early_exit", settings=settings)
    model = causal_model(layers=3)
    model.model.layers = EveryLayer(model.model.layers)
    with pytest.raises(ValueError, match="must be followed by the model, which runs all of its layers"):
        run(model, [1], method="ar_early_exit", settings=settings)
    assert model.config.num_hidden_layers == 3


def test_a_filled_row_is_padded_with_a_stop_token_where_nothing_else_is_known():
    output = run(chain_model(RING), [6], [0], count=2, eos_token_id=7)
    assert output.sequences.tolist() == [[6, 7, 7], [0, 1, 2]]
    assert FILL < STOP
