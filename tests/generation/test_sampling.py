"""Sampling at many positions at once draws from the distributions that the options describe; where criteria stop."""

import math

import pytest
import torch
from tiny import EOS, MASK, PAD, ScriptedModel, answer, constant_script, left_padded, tables, tiny_prompt, trained_like
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LogitsProcessorList, PreTrainedTokenizerFast, StoppingCriteria, StoppingCriteriaList
from transformers.generation import logits_process as lp
from transformers.generation import stopping_criteria as sc


# Logits of one position; the mask token is the likeliest of all and must take no part.
LOGITS = torch.tensor([2.0, 1.5, 1.2, 1.0, 0.3, 0.0, -0.5, -1.0, -2.0, 3.0])
VOCABULARY, MASK_HERE = 10, 9
ALL_AT_ONCE = {
    "d3llm": {"block_length": 64, "entropy_threshold": math.inf},
    "dparallel": {"block_length": 64, "entropy_threshold": math.inf},
    "llada": {"block_length": 64, "steps": 1},
    "dream": {"steps": 1},
}
FORCED = {"decoding_method": "dparallel", "block_length": 1, "entropy_threshold": 0.0}


def kept(count: int) -> torch.Tensor:
    return torch.arange(VOCABULARY) < count


def by_entropy(probabilities: torch.Tensor, fraction: float) -> torch.Tensor:
    """Top-H: the likeliest tokens while their terms of the entropy stay under its fraction, at least one."""
    terms = -(probabilities * probabilities.log()).nan_to_num()
    return (terms.cumsum(0) <= fraction * terms.sum()) | (torch.arange(VOCABULARY) == 0)


def truncated(temperature=1.0, top_k=None, top_p=None, min_p=None, top_h=None, epsilon_cutoff=None) -> torch.Tensor:
    """The exact distribution, of logits that are sorted."""
    scaled = LOGITS / temperature
    scaled[MASK_HERE] = -math.inf
    p = scaled.softmax(-1)
    if top_h:
        p = p * by_entropy(p, top_h)
    if top_k:
        p = p * kept(top_k)
    p = p / p.sum()
    if top_p:
        p = p * (p.cumsum(0) - p < top_p)  # the token that passes the mass is kept
    if min_p:
        p = p * (p >= min_p * p.max())
    if epsilon_cutoff:
        p = p * (p >= epsilon_cutoff)
    return p / p.sum()


@pytest.mark.every(3)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.7},
        {"top_k": 3},
        {"top_p": 0.7},
        {"min_p": 0.3},
        {"top_h": 0.6},
        {"epsilon_cutoff": 0.1},
        {"temperature": 0.8, "top_k": 6, "top_p": 0.8, "min_p": 0.2},
    ],
    ids=str,
)
@pytest.mark.parametrize("decoding_method", [*ALL_AT_ONCE, "forced"])
def test_committed_tokens_are_distributed_as_the_options_say(decoding_method, options):
    model = ScriptedModel(lambda ids: LOGITS.expand(*ids.shape, -1).clone(), vocab_size=VOCABULARY)
    chosen = {"decoding_method": decoding_method} | ALL_AT_ONCE.get(decoding_method, FORCED)
    if decoding_method == "forced":  # a Dream model's forced positions are sampled, one a forward
        chosen, model.logit_shift = FORCED, 1
    rows, length = 32, 64 if decoding_method != "forced" else 32
    ids = torch.ones(rows, 2, dtype=torch.long)
    output = model.generate(
        ids, max_new_tokens=length, do_sample=True, seed=5, early_stop=False, eos_token_id=None, **chosen, **options
    )
    assert model.calls == (1 if decoding_method != "forced" else length)
    # eos_token_id=None leaves the model's own, so only what stands before it is compared.
    counts = torch.zeros(VOCABULARY)
    for row in output[:, 2:].tolist():
        end = row.index(8) + 1 if 8 in row else length
        counts += torch.bincount(torch.tensor(row[:end]), minlength=VOCABULARY)
    expected = truncated(**options) * counts.sum()
    assert (counts[expected == 0] == 0).all()
    possible = expected > 0
    chi_square = float(((counts - expected)[possible] ** 2 / expected[possible]).sum())
    freedom = int(possible.sum()) - 1
    assert chi_square < freedom + 5 * math.sqrt(2 * max(freedom, 1)) + 5


@pytest.mark.every(3)
@pytest.mark.parametrize("shift", [0, 1], ids=["llada", "dream"])
@pytest.mark.parametrize(
    "options", [{"top_k": 1}, {"temperature": 1e-4}, {"top_p": 1e-6}, {"min_p": 1.0}], ids=lambda options: str(options)
)
@pytest.mark.parametrize("decoding_method", ALL_AT_ONCE)
def test_the_limits_of_all_options_are_greedy_decoding(decoding_method, options, shift):
    table = tables(1, 20, seed=2)[0]
    table[::3, MASK] = 30.0  # often the likeliest token, never a candidate
    chosen = {"decoding_method": decoding_method, "max_new_tokens": 16, "early_stop": False} | (
        ALL_AT_ONCE[decoding_method]
    )
    greedy, sampled = (
        answer(ScriptedModel(lambda ids: table[None, : ids.shape[1]].clone(), shift=shift), [1, 2], **chosen, **more)
        for more in ({}, {"do_sample": True, "seed": 1, **options})
    )
    assert torch.equal(greedy.sequences, sampled.sequences)


def test_draws_at_positions_committed_together_are_independent():
    model = ScriptedModel(lambda ids: LOGITS.expand(*ids.shape, -1).clone(), vocab_size=VOCABULARY)
    chosen = {"decoding_method": "dparallel"} | ALL_AT_ONCE["dparallel"]
    ids = torch.ones(2000, 1, dtype=torch.long)
    output = model.generate(ids, max_new_tokens=2, do_sample=True, top_k=3, seed=1, **chosen)[:, 1:]
    pairs = torch.bincount(output[:, 0] * 3 + output[:, 1], minlength=9).float()
    expected = (truncated(top_k=3)[:3, None] * truncated(top_k=3)[None, :3]).flatten() * 2000
    assert float(((pairs - expected) ** 2 / expected).sum()) < 8 + 5 * 4 + 5


# ---- What ranks the positions ---------------------------------------------------------------------------------------


def test_llada_ranks_by_the_models_own_logits_and_dream_by_the_processed_ones():
    # Position 0 is the surest for the model; once its best token is banned position 1 is.
    table = torch.zeros(1, 4, 32)
    table[0, 1, 4], table[0, 1, 5], table[0, 2, 6] = 20.0, 2.0, 12.0

    def first(decoding_method: str, **chosen) -> int:
        model = ScriptedModel(lambda ids: table.expand(len(ids), -1, -1).clone())
        chosen |= {"decoding_method": decoding_method, "suppress_tokens": [4], "max_new_tokens": 3}
        return int(answer(model, [1], **chosen).step_map[0].argmin())

    assert first("dparallel", entropy_threshold=0.0) == 0
    assert first("d3llm", entropy_threshold=0.0) == 0
    assert first("dream", steps=2) == 1
    assert first("llada", steps=2) == 1  # its cost is the chosen token's probability, by the model's own logits


# ---- Stopping criteria ----------------------------------------------------------------------------------------------

STOPPING = {"max_new_tokens": 12, "eos_token_id": EOS, "pad_token_id": PAD, "return_dict_in_generate": True}


def words() -> PreTrainedTokenizerFast:
    """A tokenizer of the letters and "st", "op", "opera", which only a model writes as one token."""
    vocabulary = [chr(ord("a") + i) for i in range(26)] + ["st", "op", "opera", "?"]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="?"))
    tokenizer.pre_tokenizer, tokenizer.decoder = Split(Regex("."), "isolated"), Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")


def by_row(answers: list[list[int]], prompt_length: int):
    """The last prompt token names the answer."""

    def script(ids: torch.Tensor) -> torch.Tensor:
        named = ids[:, prompt_length - 1].tolist()
        return torch.cat([constant_script(answers[row], prompt_length)(ids[:1]) for row in named])

    return script


@pytest.mark.parametrize("decoding_method", ALL_AT_ONCE)
def test_a_stop_string_across_tokens_ends_each_row_at_its_own_place(decoding_method):
    # 26 27 spell "st" "op", 26 28 "st" "opera"; 18 19 14 15 "s" "t" "o" "p".
    a, stop, stopera, spelled = [0] * 12, [26, 27], [26, 28], [18, 19, 14, 15]
    answers = [a, [1, *stop, *a][:12], [*stopera, *a][:12], [2] * 5 + spelled + a[:3], [3, EOS] + [4] * 10]
    model = ScriptedModel(by_row(answers, 2))
    prompts = torch.tensor([[5, row] for row in range(5)])
    chosen = STOPPING | {"decoding_method": decoding_method} | ALL_AT_ONCE[decoding_method]
    output = model.generate(prompts, stop_strings=["stop"], tokenizer=words(), **chosen)
    ends = [12, 3, 2, 9, 2]
    for row, end in enumerate(ends):
        assert output.sequences[row, 2:].tolist() == answers[row][:end] + [PAD] * (12 - end)
    counted = torch.tensor([12, 3, 2, 9, 1]) / output.num_forwards
    torch.testing.assert_close(output.tokens_per_forward, counted)


def test_stop_strings_need_a_tokenizer():
    with pytest.raises(ValueError, match="tokenizer"):
        answer(trained_like("llada"), [1, 2], stop_strings=["stop"])


def test_a_stop_string_at_the_prompts_end_stops_nothing_but_may_begin_there():
    # The last position is decided first, so that the first forwards move no prefix.
    def script(ids):
        logits = constant_script([27, 4, 5], 2, 3.0)(ids).clone()
        logits[:, 4] *= 9
        return logits

    chosen = STOPPING | {"max_new_tokens": 3, "decoding_method": "llada", "steps": 3}
    for prompt, wanted in (([1, 27], [27, 4, 5]), ([26, 27], [27, 4, 5]), ([1, 26], [27, PAD, PAD])):
        ids = torch.tensor([prompt])
        output = ScriptedModel(script).generate(ids, stop_strings=["stop"], tokenizer=words(), **chosen)
        assert output.sequences[0, 2:].tolist() == wanted


class PerRow(StoppingCriteria):
    """Ends each row at a length of its own."""

    def __init__(self, lengths: list[int], kind=torch.tensor):
        self.lengths, self.kind = lengths, kind

    def __call__(self, input_ids, scores, **kwargs):
        return self.kind([input_ids.shape[1] >= length for length in self.lengths])


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("decoding_method", ALL_AT_ONCE)
def test_a_criterion_that_answers_for_each_row_ends_each_at_its_own_length(decoding_method, early_stop):
    prompts = left_padded([tiny_prompt(seed, 2 + seed) for seed in range(3)])
    chosen = STOPPING | {"decoding_method": decoding_method, "eos_token_id": [EOS, 3], "early_stop": early_stop}
    chosen |= ALL_AT_ONCE[decoding_method] | {"suppress_tokens": [EOS, 3]}
    plain = trained_like("llada").generate(**prompts, **chosen).sequences[:, 4:]
    criteria = StoppingCriteriaList([PerRow([5, 4 + 7, 99]), sc.MaxLengthCriteria(3)])
    output = trained_like("llada").generate(**prompts, **chosen, stopping_criteria=criteria)
    for row, end in enumerate((1, 7, 12)):
        assert output.sequences[row, 4:].tolist() == plain[row, :end].tolist() + [PAD] * (12 - end)
    torch.testing.assert_close(output.tokens_per_forward, torch.tensor([1.0, 7.0, 12.0]) / output.num_forwards)


@pytest.mark.parametrize("decoding_method", ["d3llm", "dparallel", "llada", "dream"])
def test_max_time_ends_all_rows_with_what_is_decided(decoding_method, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(sc.time, "time", lambda: now[0])

    def script(ids):
        now[0] += 1.0
        return constant_script(list(range(1, 13)), 2)(ids)

    model = ScriptedModel(script)
    chosen = STOPPING | {"decoding_method": decoding_method}
    chosen |= {"dream": {"remasking": "maskgit_plus"}, "llada": {}}.get(decoding_method, {"block_length": 1})
    output = model.generate(torch.tensor([[1, 2], [3, 4]]), max_time=3.5, **chosen)
    decided = int((output.step_map[0] > 0).sum())
    assert model.calls == output.num_forwards[0] == 4 and decided >= 3
    assert output.sequences[:, 2:].tolist() == [list(range(1, decided + 1)) + [PAD] * (12 - decided)] * 2


def test_max_time_and_a_cancelling_criterion_hold_while_the_first_position_is_undecided(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(sc.time, "time", lambda: now[0])

    def script(ids):
        now[0] += 1.0
        logits = torch.zeros(len(ids), ids.shape[1], 32)
        logits[:, range(ids.shape[1]), range(ids.shape[1])] = 2.0 + torch.arange(ids.shape[1])  # from the right
        return logits

    class Cancelled(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return now[0] > 3.5

    chosen = STOPPING | {"decoding_method": "llada", "block_length": 12}
    for more in ({"max_time": 3.5}, {"stopping_criteria": StoppingCriteriaList([Cancelled()])}):
        now[0], model = 0.0, ScriptedModel(script)
        output = model.generate(torch.tensor([[1, 2]]), **chosen, **more)
        assert model.calls == 4 and output.sequences[0, 2:].tolist() == [PAD] * 12
        assert float(output.tokens_per_forward) == 0.0


def test_max_length_counts_the_prompt_and_its_padding():
    inputs = left_padded([[1, 2], [1, 2, 3]])
    assert trained_like("llada").generate(**inputs, max_length=9).shape == (2, 9)


def test_a_users_warper_is_applied_beside_the_options():
    model = ScriptedModel(lambda ids: LOGITS.expand(*ids.shape, -1).clone(), vocab_size=VOCABULARY)
    warpers = LogitsProcessorList([lp.TopKLogitsWarper(2)])
    chosen = {"decoding_method": "dparallel"} | ALL_AT_ONCE["dparallel"]
    output = answer(model, [1, 2], do_sample=True, logits_processor=warpers, eos_token_id=8, pad_token_id=7, **chosen)
    assert set(output.sequences[0, 2:].tolist()) == {0, 1}
