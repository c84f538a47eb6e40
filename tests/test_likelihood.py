"""The Monte-Carlo likelihood is the bound it claims to be, in any batch; greedy agreement is that of decoding."""

import math
from itertools import combinations

import pytest
import torch
from tiny import MASK, PAD, ScriptedModel, tiny_model, tiny_prompt
from transformers import AutoModel, AutoTokenizer

from d3llm_hf import LogLikelihood, is_greedy, likelihood, log_likelihood
from d3llm_hf.evaluation.tasks.word_problems import generate_problems
from d3llm_hf.hub.sources import embedded_checkpoints


MODELS = {family: tiny_model(family) for family in ("llada", "dream")}
families = pytest.mark.parametrize("family", MODELS)

# Texts as (tokens, positions of the completion): a continuation, an infilling, a prefix, everything, one token, none.
TEXTS = [
    (tiny_prompt(1, 9), [6, 7, 8]),
    (tiny_prompt(2, 7), [1, 2, 4, 5]),
    (tiny_prompt(3, 5), [0, 1]),
    (tiny_prompt(4, 4), [0, 1, 2, 3]),
    (tiny_prompt(5, 6), [3]),
    (tiny_prompt(6, 3), []),
]


def batch(texts, side: str = "right", extra: int = 0) -> dict[str, torch.Tensor]:
    """The arguments that describe `texts`, padded on one side to the longest and `extra` columns more."""
    width = max(len(tokens) for tokens, _ in texts) + extra
    shape = (len(texts), width)
    ids, seen, completion = torch.full(shape, PAD), torch.zeros(shape, dtype=torch.long), torch.zeros(shape).bool()
    for row, (tokens, positions) in enumerate(texts):
        start = width - len(tokens) if side == "left" else 0
        ids[row, start : start + len(tokens)] = torch.tensor(tokens)
        seen[row, start : start + len(tokens)] = 1
        completion[row, [start + position for position in positions]] = True
    return {"input_ids": ids, "completion_mask": completion, "attention_mask": seen}


# ---- a slow oracle: one canvas a forward, random numbers in Python's integers --------------------------------------


def hidden_log_probability(model, tokens, positions, hidden, cfg_scale=0.0) -> float:
    """Summed log-probability of the tokens at `hidden`, masked, one text at a time without padding."""

    def logits(masked):
        ids = torch.tensor([[MASK if i in masked else token for i, token in enumerate(tokens)]])
        with torch.no_grad():
            return model(input_ids=ids).logits[0].double()

    found = logits(set(hidden))
    if cfg_scale:
        condition = set(range(len(tokens))) - set(positions)
        unconditional = logits(set(hidden) | condition)
        found = unconditional + (cfg_scale + 1) * (found - unconditional)
    table = found.log_softmax(-1)
    return sum(float(table[max(i - model.logit_shift, 0), tokens[i]]) for i in hidden)


def exact_bound(model, tokens, positions, cfg_scale=0.0) -> float:
    """The estimator's expectation: over all subsets, each size equally likely, each subset of a size too."""
    n = len(positions)
    total = 0.0
    for size in range(1, n + 1):
        subsets = list(combinations(positions, size))
        values = [hidden_log_probability(model, tokens, positions, hidden, cfg_scale) for hidden in subsets]
        total += (n / size) * sum(values) / len(subsets) / n
    return total


def uniform(seed: int, row: int, column: int, stream: int) -> float:
    """SplitMix64's finaliser over a counter, as `Sampler.uniform` documents it, at step 0."""
    wrap = (1 << 64) - 1
    counter = seed
    for part in (row, column, stream):
        counter = (counter + 0x9E3779B97F4A7C15 * (part + 1)) & wrap
        counter = ((counter ^ (counter >> 30)) * 0xBF58476D1CE4E5B9) & wrap
        counter = ((counter ^ (counter >> 27)) * 0x94D049BB133111EB) & wrap
        counter ^= counter >> 31
    return (counter >> 11) * 2.0**-53


def slow_log_likelihood(model, tokens, positions, *, num_samples, seed, cfg_scale=0.0) -> tuple[float, float]:
    n, draws = len(positions), []
    offset = uniform(seed, 0, 0, stream=0)
    for draw in range(num_samples):
        size = 1 + math.floor(n * (draw + offset) / num_samples)
        ranked = sorted(range(n), key=lambda index: uniform(seed, draw, index, stream=1))
        hidden = sorted(positions[index] for index in ranked[:size])
        draws.append(n / size * hidden_log_probability(model, tokens, positions, hidden, cfg_scale))
    mean = sum(draws) / num_samples
    variance = sum((value - mean) ** 2 for value in draws) / (num_samples - 1)
    return mean, math.sqrt(variance / num_samples)


# ---- the estimate --------------------------------------------------------------------------------------------------


@pytest.mark.every(2)
@families
@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
def test_estimates_are_those_of_a_slow_oracle_with_the_same_draws(family, cfg_scale):
    model = MODELS[family]
    found = log_likelihood(model, **batch(TEXTS, "left"), num_samples=12, batch_size=7, seed=3, cfg_scale=cfg_scale)
    for row, (tokens, positions) in enumerate(TEXTS[:5]):
        mean, error = slow_log_likelihood(model, tokens, positions, num_samples=12, seed=3, cfg_scale=cfg_scale)
        assert float(found.mean[row]) == pytest.approx(mean, abs=1e-4)
        assert float(found.standard_error[row]) == pytest.approx(error, abs=1e-4)
    assert found.num_tokens.tolist() == [3, 4, 2, 4, 1, 0]


@pytest.mark.every(3)
@families
@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
@pytest.mark.parametrize("text", TEXTS[:4], ids=["continuation", "infilling", "prefix", "everything"])
def test_estimates_lie_around_the_bound_of_all_subsets(family, cfg_scale, text):
    found = log_likelihood(MODELS[family], **batch([text]), num_samples=1200, seed=1, cfg_scale=cfg_scale)
    exact = exact_bound(MODELS[family], *text, cfg_scale)
    assert 0 < float(found.standard_error) < 0.1 * abs(exact)
    assert abs(float(found.mean) - exact) < 5 * float(found.standard_error)


@pytest.mark.full
def test_the_mean_over_seeds_converges_to_the_bound_faster_than_the_standard_error_says():
    text, seeds = TEXTS[0], range(150)
    found = [log_likelihood(MODELS["llada"], **batch([text]), num_samples=6, seed=seed) for seed in seeds]
    means = torch.cat([each.mean for each in found])
    claimed = torch.cat([each.standard_error for each in found]).square().mean().sqrt()
    assert abs(float(means.mean()) - exact_bound(MODELS["llada"], *text)) < 4 * float(means.std()) / len(means) ** 0.5
    assert float(means.std()) < float(claimed)


@pytest.mark.parametrize(("size", "num_samples"), [(3, 12), (3, 7), (5, 3), (7, 1), (1, 4), (4, 128)])
def test_each_subset_size_is_equally_likely_and_comes_up_equally_often(size, num_samples):
    steps = 60 * size  # offsets on a grid that hits every stratum of every draw equally often
    counts = torch.zeros(size + 1)
    for step in range(steps):
        sizes = likelihood._subset_sizes(size, num_samples, (step + 0.5) / steps)
        of_this = torch.bincount(sizes, minlength=size + 1)
        assert of_this[0] == 0 and (of_this[1:] - num_samples / size).abs().max() < 1 + 1e-6
        counts += of_this
    assert (counts[1:] == steps * num_samples / size).all()


def test_an_offset_at_the_end_of_its_range_masks_no_more_than_everything():
    assert likelihood._subset_sizes(5, 1000, math.nextafter(1.0, 0.0)).max() == 5


def test_each_subset_of_a_size_is_equally_likely():
    numbers, _ = likelihood._uniform_numbers(seed=0, num_samples=6000, longest=4)
    for size in (1, 2, 3):
        drawn = likelihood._draw_subsets(numbers, torch.full((6000,), size))
        assert (drawn.sum(1) == size).all()
        counts = drawn.unique(dim=0, return_counts=True)[1].double()
        share = 1 / math.comb(4, size)
        assert len(counts) == math.comb(4, size)
        assert (counts - 6000 * share).abs().max() < 4 * math.sqrt(6000 * share * (1 - share))


def test_constant_probabilities_give_the_value_by_hand():
    model = ScriptedModel(lambda ids: torch.zeros(*ids.shape, 32))  # every token has probability 1 / 32
    found = log_likelihood(model, **batch([(tiny_prompt(0, 8), [2, 3, 6, 7])]), num_samples=50)
    assert float(found.mean) == pytest.approx(-4 * math.log(32), abs=1e-5)
    assert float(found.standard_error) == pytest.approx(0, abs=1e-6)
    assert float(found.per_token) == pytest.approx(-math.log(32), abs=1e-6)
    assert float(found.perplexity) == pytest.approx(32, abs=1e-4)


def test_the_mask_tokens_probability_is_part_of_the_whole():
    logits = torch.full((32,), -math.inf)
    logits[[5, MASK]] = torch.tensor([0.25, 0.75]).log()
    model = ScriptedModel(lambda ids: logits.expand(*ids.shape, -1))
    assert float(log_likelihood(model, **batch([([1, 5], [1])])).mean) == pytest.approx(math.log(0.25), abs=1e-6)


def test_a_token_without_probability_makes_the_completion_impossible():
    logits = torch.zeros(32)
    logits[7] = -math.inf
    model = ScriptedModel(lambda ids: logits.expand(*ids.shape, -1))
    found = log_likelihood(model, **batch([([1, 7, 2], [1, 2]), ([1, 2, 2], [1, 2])]))
    assert found.mean[0] == -math.inf and found.perplexity[0] == math.inf and found.standard_error[0].isnan()
    assert found.mean[1].isfinite()


@families
def test_one_token_is_exact_and_takes_one_forward(family):
    tokens, positions = TEXTS[4]
    found = log_likelihood(MODELS[family], **batch([TEXTS[4]]), num_samples=100)
    expected = hidden_log_probability(MODELS[family], tokens, positions, positions)
    assert float(found.mean) == pytest.approx(expected, rel=1e-5)
    assert float(found.standard_error) == 0
    model = ScriptedModel(lambda ids: torch.zeros(*ids.shape, 32))
    log_likelihood(model, **batch([TEXTS[4]] * 5), num_samples=100, batch_size=4)
    assert model.calls == 2


def test_nothing_asked_is_certain_and_takes_no_forward():
    model = ScriptedModel(lambda ids: torch.zeros(*ids.shape, 32))
    empty = batch([([1, 2], []), ([], [])])
    found = log_likelihood(model, **empty)
    assert found.mean.tolist() == found.standard_error.tolist() == found.per_token.tolist() == [0, 0]
    assert found.perplexity.tolist() == [1, 1] and found.mean.dtype == torch.float64
    assert is_greedy(model, **empty).tolist() == [True, True]
    none = {name: table[:0] for name, table in empty.items()}
    assert log_likelihood(model, **none).mean.shape == is_greedy(model, **none).shape == (0,)
    assert model.calls == 0


def test_a_single_draw_of_several_tokens_has_no_known_error():
    found = log_likelihood(MODELS["llada"], **batch([TEXTS[0], TEXTS[4]]), num_samples=1)
    assert found.mean.isfinite().all()
    assert found.standard_error[0].isnan() and found.standard_error[1] == 0


# ---- what a value depends on ---------------------------------------------------------------------------------------


@pytest.mark.every(2)
@families
@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
def test_a_row_has_the_same_value_alone_and_in_any_batch(family, cfg_scale):
    def means(texts, batch_size=7, **layout):
        return log_likelihood(
            MODELS[family], **batch(texts, **layout), num_samples=16, batch_size=batch_size, cfg_scale=cfg_scale
        ).mean

    alone = torch.cat([means([text]) for text in TEXTS])
    for found in (
        means(TEXTS, side="left"),
        means(TEXTS, side="right"),
        means(TEXTS, side="left", extra=4),
        means(TEXTS, batch_size=1),
        means(TEXTS[::-1], batch_size=1000).flip(0),
    ):
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-4)


def test_forwards_go_from_the_longest_text_to_the_shortest_without_common_padding():
    widths = []

    def script(ids):
        widths.append(tuple(ids.shape))
        return torch.zeros(*ids.shape, 32)

    texts = [(tiny_prompt(length, length), [length - 1]) for length in (3, 8, 5, 7)]
    for side in ("left", "right"):
        log_likelihood(ScriptedModel(script), **batch(texts, side, extra=4), batch_size=2)
    assert widths == [(2, 8), (2, 5)] * 2


def test_texts_without_an_attention_mask_are_unpadded():
    inputs = batch([TEXTS[0], (tiny_prompt(9, 9), [2, 3])])
    expected = log_likelihood(MODELS["dream"], **inputs).mean
    del inputs["attention_mask"]
    assert torch.equal(log_likelihood(MODELS["dream"], **inputs).mean, expected)


@families
def test_a_model_without_a_position_mask_and_small_chunks_give_the_same(family, monkeypatch):
    model = tiny_model(family)
    inputs = batch(TEXTS, "left")
    expected, agrees = log_likelihood(model, **inputs).mean, is_greedy(model, **inputs)
    monkeypatch.setattr(model, "supports_position_mask", False, raising=False)
    monkeypatch.setattr(likelihood, "CHUNK_ELEMENTS", 70)
    torch.testing.assert_close(log_likelihood(model, **inputs).mean, expected, rtol=0, atol=1e-4)
    assert torch.equal(is_greedy(model, **inputs), agrees)


def test_the_seed_decides_and_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    first, again, other = (log_likelihood(MODELS["llada"], **batch(TEXTS), num_samples=8, seed=s) for s in (4, 4, 5))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.mean, again.mean) and torch.equal(first.standard_error, again.standard_error)
    assert (first.mean[:4] != other.mean[:4]).all()


def test_the_inputs_are_left_alone_and_no_gradient_is_kept():
    inputs = batch(TEXTS)
    before = {name: table.clone() for name, table in inputs.items()}
    assert not log_likelihood(MODELS["llada"], **inputs, num_samples=4).mean.requires_grad
    is_greedy(MODELS["llada"], **inputs)
    assert all(torch.equal(table, before[name]) for name, table in inputs.items())


# ---- greedy agreement ----------------------------------------------------------------------------------------------


@pytest.mark.every(2)
@families
@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
def test_greedy_agreement_is_what_decoding_one_position_a_forward_gives(family, cfg_scale):
    texts, expected = [], []
    for seed in range(6):
        prompt, size = tiny_prompt(seed, 3 + seed), 2 + seed % 4
        output = MODELS[family].generate(
            torch.tensor([prompt]), decoding_method="llada", block_length=size, steps=size, max_new_tokens=size,
            cfg_scale=cfg_scale, early_stop=False, eos_token_id=[], pad_token_id=PAD,
        )[0].tolist()  # fmt: skip
        positions = list(range(len(prompt), len(output)))
        texts.append((output, positions))
        expected.append(True)
        for position in positions:
            changed = output.copy()
            changed[position] = (changed[position] + 1) % PAD
            texts.append((changed, positions))
            expected.append(False)
    for side, batch_size in (("left", 32), ("right", 3)):
        found = is_greedy(MODELS[family], **batch(texts, side), batch_size=batch_size, cfg_scale=cfg_scale)
        assert found.tolist() == expected


def test_a_row_leaves_at_its_first_mismatch():
    wanted = torch.tensor([3, 4, 5, 6])
    sureness = torch.tensor([9.0, 8.0, 7.0, 6.0])

    def script(ids):
        logits = torch.nn.functional.one_hot(wanted, 32) * sureness[:, None]
        return logits.expand(len(ids), -1, -1).clone()

    for tokens, agrees, calls in (([3, 4, 5, 6], True, 4), ([3, 9, 5, 6], False, 2), ([9, 4, 5, 6], False, 1)):
        model = ScriptedModel(script)
        assert is_greedy(model, **batch([(tokens, [0, 1, 2, 3])])).tolist() == [agrees]
        assert model.calls == calls


def test_the_mask_token_is_never_decided():
    logits = torch.zeros(32)
    logits[MASK], logits[4] = 9.0, 5.0
    model = ScriptedModel(lambda ids: logits.expand(*ids.shape, -1))
    assert is_greedy(model, **batch([([1, 4, 4], [1, 2]), ([1, 4, 5], [1, 2])])).tolist() == [True, False]


# ---- bad input -----------------------------------------------------------------------------------------------------


GOOD = batch([([1, 2, 3, 4], [2, 3]), ([1, 2, 3], [1, 2])])
HOLE = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0]])
BAD = {
    "ids no tensor": ({"input_ids": [[1, 2]]}, TypeError, "`input_ids` must be a tensor of dtype .* .got list"),
    "ids int32": ({"input_ids": GOOD["input_ids"].int()}, TypeError, "`input_ids` must be .* dtype torch.int32"),
    "ids 1-D": ({"input_ids": torch.tensor([1])}, ValueError, r"`input_ids` must have the shape \(B, L\)"),
    "completion long": ({"completion_mask": GOOD["attention_mask"]}, TypeError, "`completion_mask` must be a tensor"),
    "completion list": ({"completion_mask": [[True]], "attention_mask": None}, TypeError, "`completion_mask` must"),
    "completion shape": ({"completion_mask": torch.ones(2, 3).bool()}, ValueError, "`completion_mask` .*got .2, 3."),
    "attention list": ({"attention_mask": [[1]]}, TypeError, "`attention_mask` must be a tensor .got list"),
    "attention shape": ({"attention_mask": torch.ones(2, 3)}, ValueError, r"`attention_mask` must have the shape"),
    "on padding": (
        {"completion_mask": torch.ones(2, 4).bool()}, ValueError, "`completion_mask` must be False on padding .*row 1"
    ),
    "hole": (
        {"attention_mask": HOLE, "completion_mask": HOLE.bool()}, ValueError, "`attention_mask` must have its zeros"
    ),
    "mask token": (
        {"input_ids": torch.full((2, 4), MASK)}, ValueError, "`input_ids` must not hold the mask token .*row 0",
    ),
    "batch size": ({"batch_size": 0}, ValueError, "`batch_size` must be a positive integer .got 0"),
    "batch size float": ({"batch_size": 2.0}, TypeError, "`batch_size` must be a positive integer .got 2.0"),
    "guidance": ({"cfg_scale": -1.0}, ValueError, "`cfg_scale` must be a finite number of at least 0 .got -1.0"),
    "guidance nan": ({"cfg_scale": math.nan}, ValueError, "`cfg_scale` must be a finite number"),
}  # fmt: skip
BAD_DRAWS = {
    "no draw": ({"num_samples": 0}, ValueError, "`num_samples` must be a positive integer .got 0"),
    "draws bool": ({"num_samples": True}, TypeError, "`num_samples` must be a positive integer .got True"),
    "no seed": ({"seed": None}, TypeError, "`seed` must be an integer .got None"),
}


@pytest.mark.parametrize("function", [log_likelihood, is_greedy])
@pytest.mark.parametrize(("given", "kind", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_before_the_first_forward(function, given, kind, message):
    model = ScriptedModel(lambda ids: torch.zeros(*ids.shape, 32))
    with pytest.raises(kind, match=message):
        function(model, **(GOOD | given))
    assert model.calls == 0


@pytest.mark.parametrize(("given", "kind", "message"), BAD_DRAWS.values(), ids=BAD_DRAWS)
def test_bad_draws_are_refused(given, kind, message):
    with pytest.raises(kind, match=message):
        log_likelihood(MODELS["llada"], **(GOOD | given))


def test_models_that_cannot_be_asked_are_refused():
    with pytest.raises(TypeError, match=r"`model` must be a masked diffusion language model .got Linear"):
        log_likelihood(torch.nn.Linear(1, 1), **GOOD)
    model = ScriptedModel(lambda ids: torch.zeros(*ids.shape, 32), mask_token_id=None)
    with pytest.raises(ValueError, match="`mask_token_id` must name the token of a masked"):
        is_greedy(model, **GOOD)
    assert is_greedy(model, **GOOD, mask_token_id=MASK).shape == (2,)


def test_only_what_is_no_padding_must_fit_into_the_models_positions():
    model = ScriptedModel(lambda ids: torch.zeros(*ids.shape, 32), max_sequence_length=4)
    assert log_likelihood(model, **batch([TEXTS[3]], extra=9)).mean.isfinite().all()
    with pytest.raises(ValueError, match=r"`input_ids` must fit into the model's 4 positions .*row 1"):
        log_likelihood(model, **batch([TEXTS[3], TEXTS[2]]))


@pytest.mark.parametrize("function", [log_likelihood, is_greedy])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_name_their_row(function, value):
    def script(ids):
        logits = torch.zeros(*ids.shape, 32)
        logits[(ids == 11).any(1)] = value
        return logits

    texts = [([1, 2, 3], [1, 2]), ([1, 2, 3, 4], [3]), ([11, 2, 3], [1, 2])]
    with pytest.raises(ValueError, match=r"logits must be finite .got NaN or inf for row 2"):
        function(ScriptedModel(script), **batch(texts))


# ---- a trained model -----------------------------------------------------------------------------------------------


def test_the_embedded_checkpoint_prefers_right_answers():
    folder = embedded_checkpoints()["d3llm-llada"]
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    problem = generate_problems(1, split="test", seed=0)[0]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": problem.question}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    wrong = problem.answer.replace(f"#### {problem.result}", f"#### {problem.result + 1}")
    right = tokenizer(problem.answer, add_special_tokens=False)["input_ids"]
    wrong = tokenizer(wrong, add_special_tokens=False)["input_ids"]
    texts = [(prompt + answer, range(len(prompt), len(prompt + answer))) for answer in (right, wrong, sorted(right))]
    found = log_likelihood(model, **batch(texts, "left"), num_samples=16)
    assert isinstance(found, LogLikelihood)
    best, second, last = found.mean.tolist()
    assert best > second + 2 > last + 2
    assert 1 <= float(found.perplexity[0]) < 2
