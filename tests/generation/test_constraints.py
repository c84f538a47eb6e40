"""What options of transformers promise of the text holds whatever the order in which its positions are decided."""

import itertools
import math

import pytest
import torch
from drawn import examples
from hypothesis import given
from hypothesis import strategies as st
from thin import covering, some_of
from tiny import EOS, MASK, PAD, ScriptedModel, answer, changing_script, left_padded, tables, tiny_prompt, trained_like
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process as lp

from d3llm_hf.models.constraints import UNKNOWN, Constraints, Sequences
from d3llm_hf.models.decoding import Rules, State


METHODS = {
    "d3llm": {"block_length": 5, "entropy_threshold": 1.5},
    "dparallel": {"block_length": 6, "entropy_threshold": math.inf},
    "llada": {"block_length": 8, "steps": 5},
    "dream": {"steps": 4},
}
METHOD_NAMES = list(METHODS)


# ---- The slow, obvious definition ---------------------------------------------------------------------------------


def violations(prompt, answer_tokens, words, size, stops) -> list[set[int]]:
    """Columns of each forbidden span that stands in a text; `None` is an undecided position."""
    end = next((i for i, token in enumerate(answer_tokens) if token in stops), len(answer_tokens) - 1)
    text = [*prompt, *answer_tokens[: end + 1]]
    found = []

    def span(start: int, length: int) -> set[int]:
        return {slot - len(prompt) for slot in range(start, start + length) if slot >= len(prompt)}

    for word in words:
        found += [span(i, len(word)) for i in range(len(text)) if text[i : i + len(word)] == list(word)]
    if size:
        starts = [i for i in range(len(text) - size + 1) if None not in text[i : i + size]]
        for a, b in itertools.combinations(starts, 2):
            if text[a : a + size] == text[b : b + size]:
                found.append(span(a, size) | span(b, size))
    return [columns for columns in found if columns]  # of the prompt alone nothing is promised


@st.composite
def canvases(draw):
    """A prompt, an answer with undecided positions and no forbidden span, and what is forbidden."""
    token = st.integers(0, 5)
    words = draw(st.lists(st.lists(token, min_size=1, max_size=4).map(tuple), max_size=6))
    size = draw(st.integers(0, 4) | st.integers(5, 20))
    stops = draw(st.sampled_from([(), (5,), (4, 5)]))
    prompt = draw(st.lists(token | st.just(None), max_size=6))
    answer_tokens = draw(st.lists(token | st.none(), min_size=1, max_size=9))
    while found := violations(prompt, answer_tokens, words, size, stops):
        answer_tokens[max(found[0])] = None
    return prompt, answer_tokens, words, size, stops


def constraints_of(prompt, words, size, stops) -> Constraints:
    stop_ids = torch.tensor(stops) if stops else None
    known = torch.tensor([[UNKNOWN if token is None else token for token in prompt]], dtype=torch.long)
    sequences = Sequences({word: -math.inf for word in words}, stop_ids, known.device)
    return Constraints(known, sequences, size, stop_ids)


def state_of(answer_tokens) -> State:
    tokens = torch.tensor([[6 if token is None else token for token in answer_tokens]])
    undecided = torch.tensor([[token is None for token in answer_tokens]])
    return State.start(tokens, undecided, Rules(4, "entropy", "threshold"))


@examples(150)
@given(canvases())
def test_a_token_is_banned_where_it_alone_would_complete_a_forbidden_span(case):
    prompt, answer_tokens, words, size, stops = case
    stop = next((i for i, token in enumerate(answer_tokens) if token in stops), len(answer_tokens))
    open_columns = [i for i, token in enumerate(answer_tokens) if token is None and i < stop]
    state, columns = state_of(answer_tokens), torch.tensor(open_columns, dtype=torch.long)
    banned = constraints_of(prompt, words, size, stops).banned(
        state.tokens, ~state.undecided, torch.zeros_like(columns), columns, 6
    )
    for column, row in zip(open_columns, banned.tolist(), strict=True):
        for token in range(6):
            filled = [*answer_tokens[:column], token, *answer_tokens[column + 1 :]]
            assert row[token] == bool(violations(prompt, filled, words, size, stops)), (column, token)


@examples(150)
@given(canvases(), st.randoms(use_true_random=False))
def test_of_the_commits_that_complete_a_forbidden_span_together_the_dearest_is_undone(case, random):
    prompt, answer_tokens, words, size, stops = case
    constraints, state = constraints_of(prompt, words, size, stops), state_of(answer_tokens)
    length = len(answer_tokens)

    # Tokens that are allowed one by one, at some of the undecided positions.
    chosen = {}
    for column in [i for i, token in enumerate(answer_tokens) if token is None and random.random() < 0.8]:
        for token in random.sample(range(6), 6):
            if not violations(
                prompt, [*answer_tokens[:column], token, *answer_tokens[column + 1 :]], words, size, stops
            ):
                chosen[column] = token
                break
    cost = [float(random.randint(0, 3)) for _ in range(length)]
    commits = torch.tensor([[column in chosen for column in range(length)]])
    tokens = torch.tensor([[chosen.get(column, 0) for column in range(length)]])
    kept = constraints.compatible(commits, tokens, torch.tensor([cost]), state)[0].tolist()

    def text(columns) -> list:
        return [chosen[i] if i in columns else token for i, token in enumerate(answer_tokens)]

    expected = set(chosen)
    while found := violations(prompt, text(expected), words, size, stops):
        expected -= {max(columns & expected, key=lambda i: (cost[i], i)) for columns in found}
    assert {i for i, keep in enumerate(kept) if keep} == expected
    assert not violations(prompt, text(expected), words, size, stops)
    assert expected or not chosen


@examples(80)
@given(canvases(), st.integers(1, 60))
def test_a_text_is_compared_with_itself_a_part_at_a_time(case, at_once):
    prompt, answer_tokens, words, size, stops = case
    state, constraints = state_of(answer_tokens), constraints_of(prompt, words, size, stops)
    columns = torch.arange(len(answer_tokens))
    where = state.tokens, ~state.undecided, torch.zeros_like(columns), columns
    commits, cost = state.undecided, torch.zeros(1, len(answer_tokens))
    with pytest.MonkeyPatch.context() as patch:
        whole = constraints.banned(*where, 7), constraints.compatible(commits, state.tokens, cost, state)
        patch.setattr("d3llm_hf.models.constraints.AT_ONCE", at_once)
        patch.setattr("d3llm_hf.models.constraints.SHORT", 0)
        parts = constraints.banned(*where, 7), constraints.compatible(commits, state.tokens, cost, state)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


class Operations(TorchDispatchMode):
    """Counts what torch is asked to do."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_the_work_does_not_grow_with_the_size_of_the_n_grams():
    answer_tokens = [1, 2] * 60 + [None] * 40
    state, work = state_of(answer_tokens), {}
    for size in (9, 30, 100):
        constraints = constraints_of([1, 2] * 20, [], size, (5,))
        row, columns = state.undecided.nonzero(as_tuple=True)
        with Operations() as operations:
            constraints.banned(state.tokens, ~state.undecided, row, columns, 6)
            constraints.compatible(state.undecided, state.tokens, torch.zeros_like(state.tokens).float(), state)
        work[size] = operations.count
    assert max(work.values()) - min(work.values()) < 10, work  # (only bounds of windows differ)


@pytest.mark.parametrize("decoding_method", METHOD_NAMES)
def test_n_grams_longer_than_the_text_cost_nothing_and_change_nothing(decoding_method, monkeypatch):
    model, prompt = trained_like("llada"), torch.tensor([tiny_prompt(1, 6)])
    chosen = {"decoding_method": decoding_method, "max_new_tokens": 12} | METHODS[decoding_method]
    expected = model.generate(prompt, **chosen)
    monkeypatch.setattr(Constraints, "banned", None)
    monkeypatch.setattr(Constraints, "compatible", None)
    for size in (prompt.shape[1] + 13, 5000, 2**31, 10**30):
        assert torch.equal(model.generate(prompt, **chosen, no_repeat_ngram_size=size), expected)


# ---- The guarantee, end to end ------------------------------------------------------------------------------------


@pytest.mark.every(6)
@pytest.mark.parametrize("decoding_method, shift, sampling", covering(METHOD_NAMES, [0, 1], [False, True]))
def test_no_forbidden_span_is_ever_returned_and_decoding_ends(decoding_method, shift, sampling):
    vocab_size, length, without = 12, 20, 0
    stops = [10, 4]
    for seed in range(12):
        random = torch.Generator().manual_seed(seed)
        # The model prefers few tokens, so that words and repeats would be plenty.
        table = tables(4, 40, vocab_size, seed=seed) + torch.tensor([4.0, 4.0, 4.0, 2.0, 1.5] + [0.0] * 7)
        prompts = [torch.randint(0, 4, (1 + row,), generator=random).tolist() for row in range(4)]
        words = [torch.randint(0, 5, (1 + i % 3,), generator=random).tolist() for i in (1, 2, 1, 2)] + [[7], [2, 4]]
        size = (0, 2, 3, 4)[seed % 4]
        model = ScriptedModel(changing_script(table, vocab_size - 1), vocab_size=vocab_size, shift=shift)
        inputs = left_padded(prompts, pad_token_id=words[0][0])  # padding must not be taken for text
        chosen = {"max_new_tokens": length, "eos_token_id": stops, "pad_token_id": 9, "seed": seed}
        chosen |= {"decoding_method": decoding_method, "do_sample": sampling} | METHODS[decoding_method]
        plain = model.generate(**inputs, **chosen)
        if size:
            chosen["no_repeat_ngram_size"] = size
        model.calls = 0
        output = model.generate(**inputs, bad_words_ids=words, **chosen)
        assert model.calls <= 2 * length
        for row, prompt in enumerate(prompts):
            assert not violations(prompt, output[row, 4:].tolist(), words, size, stops)
            without += bool(violations(prompt, plain[row, 4:].tolist(), words, size, stops))
    assert without > 12  # the constraints were needed


def test_a_bad_word_across_the_prompts_end_and_on_both_sides_is_not_completed():
    # The model is sure of 1 2 3 behind a prompt that ends in 1; the right neighbours come first.
    def script(ids):
        logits = torch.zeros(len(ids), ids.shape[1], 32)
        for column, token in enumerate([2, 3, 4]):
            logits[:, 2 + column, token] = 10.0 + 5 * column
            logits[:, 2 + column, 20 + column] = 5.0
        return logits

    chosen = {"decoding_method": "llada", "max_new_tokens": 3, "steps": 3}
    expected = {
        (1, 2): [20, 3, 4],
        (1, 2, 3): [20, 3, 4],
        (2, 3, 4): [20, 3, 4],
        (1, 2, 3, 4): [20, 3, 4],
        (3, 4): [2, 21, 4],
        (2, 5): [2, 3, 4],
    }
    for word, wanted in expected.items():
        output = answer(ScriptedModel(script), [7, 1], bad_words_ids=[list(word)], **chosen)
        assert output.sequences[0, 2:].tolist() == wanted
    together = answer(ScriptedModel(script), [7, 1], bad_words_ids=[[2, 3, 4]], decoding_method="dparallel",
                      entropy_threshold=math.inf, max_new_tokens=3)  # fmt: skip
    assert together.sequences[0, 2:].tolist() == [20, 3, 4]
    assert together.step_map[0].tolist() == [2, 1, 1]


def test_a_word_behind_the_stop_token_costs_nothing():
    table = torch.zeros(1, 8, 32)
    table[0, range(8), [0, 0, 5, EOS, 6, 7, 6, 7]] = 20.0
    model = ScriptedModel(lambda ids: table.expand(len(ids), -1, -1))
    chosen = {"decoding_method": "dparallel", "max_new_tokens": 6, "entropy_threshold": 0.1}
    for words in ([[6, 7]], [[EOS, 6]], [[EOS]]):
        output = answer(model, [1, 2], bad_words_ids=[*words, [20]], **chosen)
        assert output.sequences[0, 2:].tolist() == [5, EOS] + [PAD] * 4
        assert int(output.num_forwards) == 1
    assert answer(model, [1, 2], bad_words_ids=[[5, EOS]], **chosen).sequences[0, 2:4].tolist() != [5, EOS]


def test_a_prompt_of_embeddings_is_unknown_to_the_constraints():
    model = trained_like("llada")
    ids = torch.tensor([tiny_prompt(0, 5)])
    plain = answer(model, ids[0].tolist()).sequences[0, 5:].tolist()
    chosen = {"max_new_tokens": 16, "eos_token_id": EOS, "pad_token_id": PAD}
    embeds = model.get_input_embeddings()(ids)
    output = model.generate(inputs_embeds=embeds, bad_words_ids=[plain[:2]], repetition_penalty=1.5, **chosen)
    assert output.shape == (1, 16) and output[0, :2].tolist() != plain[:2]
    assert torch.equal(model.generate(inputs_embeds=embeds, bad_words_ids=[[int(ids[0, -1]), plain[0]]], **chosen)[0],
                       torch.tensor(plain))  # fmt: skip


# ---- Left to right it is what transformers does -----------------------------------------------------------------

OPTIONS = [
    {"bad_words_ids": [[3], [1, 2], [2, 4, 1], [5, 5]]},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 3, "bad_words_ids": [[2, 10]]},
    {"sequence_bias": {(3,): 2.5, (1, 2): -8.0, (4, 4): 6.0, (2, 0, 2): -math.inf}},
    {"repetition_penalty": 1.8},
    {"encoder_repetition_penalty": 1.8},
    {"encoder_no_repeat_ngram_size": 2},
    {"min_new_tokens": 9},
    {"min_length": 12, "suppress_tokens": [1, 2]},
    {"begin_suppress_tokens": [0, 1, 2, 3]},
    {"forced_eos_token_id": 10},
    {"exponential_decay_length_penalty": (4, 1.4)},
    {"repetition_penalty": 1.3, "bad_words_ids": [[1], [0, 2]], "min_new_tokens": 5, "renormalize_logits": True},
]


@pytest.mark.full
@pytest.mark.every(6)
@pytest.mark.parametrize("options", some_of(OPTIONS, every=2), ids=lambda options: "+".join(options))
def test_decoded_left_to_right_every_option_does_what_transformers_processors_do(options):
    differs = 0
    for seed in range(8):
        stop = 2.0 if seed < 6 else -9.0  # where it is not said, forcing it shows, whatever is drawn
        table = tables(3, 24, 12, seed=seed) + torch.tensor([4.0, 4.0, 4.0, 3.0, 2.0] + [0.0] * 5 + [stop, 0.0])
        script = changing_script(table, 11)
        prompts = [torch.randint(0, 5, (3,), generator=torch.Generator().manual_seed(seed)).tolist(), [2, 1, 0]]
        chosen = {"decoding_method": "dparallel", "block_length": 1, "max_new_tokens": 14, "seed": 0}
        chosen |= {"eos_token_id": 10, "pad_token_id": 9}
        model = ScriptedModel(script, vocab_size=12)
        processors = []
        prepare = model._get_logits_processor

        def remember(*args, _prepare=prepare, _made=processors, **kwargs):
            _made[:] = [_prepare(*args, **kwargs)]
            return _made[0]

        model._get_logits_processor = remember
        ids = torch.tensor(prompts)
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **chosen, **options)
        texts, ended = ids.clone(), torch.zeros(2, dtype=torch.bool)
        for left in range(14, 0, -1):
            logits = script(torch.cat([texts, torch.full((2, left), 11)], dim=1))[:, texts.shape[1]].clone()
            logits[:, 11] = -math.inf
            token = processors[0](texts, logits).argmax(-1)
            texts = torch.cat([texts, torch.where(ended, 9, token)[:, None]], dim=1)
            ended |= token == 10
        assert torch.equal(output, texts)
        differs += not torch.equal(output, model.generate(ids, attention_mask=torch.ones_like(ids), **chosen))
    assert differs > 0


# ---- Lengths, suppressed and forced tokens ------------------------------------------------------------------------


def hasty(ids: torch.Tensor) -> torch.Tensor:
    """A model that always prefers to end, and token 5 otherwise."""
    logits = tables(1, ids.shape[1], seed=3).expand(len(ids), -1, -1).clone()
    logits[..., EOS], logits[..., 3], logits[..., 5] = 20.0, 18.0, 15.0
    return logits


@pytest.mark.every(3)
@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("decoding_method", METHOD_NAMES)
def test_no_stop_token_comes_before_the_minimum_length(decoding_method, early_stop):
    prompts = left_padded([[1, 2], [1, 2, 3, 4]])
    chosen = {"decoding_method": decoding_method, "max_new_tokens": 12, "early_stop": early_stop}
    chosen |= {"eos_token_id": [EOS, 3], "pad_token_id": PAD} | METHODS[decoding_method]
    for options in ({"min_new_tokens": 7}, {"min_length": 11}):
        output = ScriptedModel(hasty).generate(**prompts, **chosen, **options)
        assert output[:, 4:].tolist() == [[5] * 7 + [EOS] + [PAD] * 4] * 2


@pytest.mark.parametrize("decoding_method", METHOD_NAMES)
def test_suppressed_and_forced_tokens_hold_at_their_positions(decoding_method):
    chosen = {"decoding_method": decoding_method, "max_new_tokens": 8} | METHODS[decoding_method]
    chosen |= {"eos_token_id": EOS}
    model = ScriptedModel(hasty)
    ids = answer(model, [1, 2], suppress_tokens=[EOS, 3], **chosen).sequences[0, 2:].tolist()
    assert ids == [5] * 8
    ids = answer(model, [1, 2], begin_suppress_tokens=[EOS, 3], **chosen).sequences[0, 2:].tolist()
    assert ids == [5, EOS] + [PAD] * 6
    ids = answer(model, [1, 2], suppress_tokens=[3], min_new_tokens=7, forced_eos_token_id=EOS, **chosen)
    assert ids.sequences[0, 2:].tolist() == [5] * 7 + [EOS]
    ids = answer(model, [1], suppress_tokens=[EOS, 3], forced_bos_token_id=9, **chosen).sequences[0, 1:].tolist()
    assert ids == [9] + [5] * 7
    ids = answer(model, [1, 2], suppress_tokens=[EOS, 3], forced_bos_token_id=9, **chosen).sequences[0, 2:].tolist()
    assert ids == [5] * 8  # as in transformers it is the second token of the text


def test_the_length_penalty_raises_the_stop_token_with_the_position():
    def script(ids):
        logits = torch.zeros(len(ids), ids.shape[1], 32)
        logits[..., EOS], logits[..., 5] = 1.0, 4.0
        return logits

    chosen = {"decoding_method": "dparallel", "entropy_threshold": math.inf, "max_new_tokens": 12}
    output = answer(ScriptedModel(script), [1, 2], exponential_decay_length_penalty=(3, 1.5), **chosen)
    # 1.5 ** 4 > 4: four places behind the third.
    assert output.sequences[0, 2:].tolist() == [5] * 7 + [EOS] + [PAD] * 4


# ---- Soft options ---------------------------------------------------------------------------------------------------


def ordered(wanted: list[dict[int, float]], order: list[int]):
    """Logits by column, decided in the order of `order` (columns, the first is the surest)."""

    def script(ids: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(ids), ids.shape[1], 32)
        for column, entries in enumerate(wanted):
            for token, logit in entries.items():
                logits[:, ids.shape[1] - len(wanted) + column, token] = logit * (2 if column == order[0] else 1)
        return logits

    return script


def test_the_repetition_penalty_sees_the_prompt_and_both_sides_once_each_but_no_padding():
    script = ordered([{8: 4.0, 9: 3.0}, {8: 5.0, 9: 3.0}, {8: 4.0, 9: 3.0}], [1])
    chosen = {"decoding_method": "llada", "steps": 3, "max_new_tokens": 3, "repetition_penalty": 1.5}
    chosen |= {"eos_token_id": EOS, "pad_token_id": PAD}
    assert answer(ScriptedModel(script), [1, 2], **chosen).sequences[0, 2:].tolist() == [9, 8, 8]
    # 4 / 1.5 < 3: the first falls for 9, which then is as penalised as 8 at the third.
    together = chosen | {"decoding_method": "dparallel", "entropy_threshold": math.inf}
    del together["steps"]
    assert answer(ScriptedModel(script), [1, 2], **together).sequences[0, 2:].tolist() == [8, 8, 8]
    padded = left_padded([[1, 2], [1, 2, 8]], pad_token_id=8)
    output = ScriptedModel(script).generate(**padded, **together)
    assert output[:, 3:].tolist() == [[8, 8, 8], [9, 8, 9]]
    ignoring = LogitsProcessorList([lp.RepetitionPenaltyLogitsProcessor(1.5, prompt_ignore_length=3)])
    del together["repetition_penalty"]
    output = ScriptedModel(script).generate(**padded, **together, logits_processor=ignoring)
    assert output[:, 3:].tolist() == [[8, 8, 8]] * 2


def test_the_answers_own_stop_token_is_no_repetition():
    script = ordered([{5: 4.0}, {EOS: 4.0, 6: 3.5}, {EOS: 9.0, 6: 3.5}], [2])
    chosen = {"decoding_method": "llada", "steps": 3, "max_new_tokens": 3, "repetition_penalty": 1.5}
    assert answer(ScriptedModel(script), [1, 2], **chosen).sequences[0, 2:].tolist() == [5, EOS, PAD]


def test_a_sequence_bias_works_from_both_sides():
    script = ordered([{8: 4.0, 9: 3.0}, {7: 5.0}, {8: 4.0, 9: 3.0}], [1])
    chosen = {"decoding_method": "llada", "steps": 3, "max_new_tokens": 3}
    for bias, wanted in (({(9, 7): 2.0}, [9, 7, 8]), ({(7, 9): 2.0}, [8, 7, 9]), ({(9, 7, 8): 2.0}, [8, 7, 8])):
        output = answer(ScriptedModel(script), [1, 2], sequence_bias=bias, **chosen)
        assert output.sequences[0, 2:].tolist() == wanted
    output = answer(ScriptedModel(script), [1, 9], sequence_bias={(9, 9): 2.0, (5, 5): 1.0}, **chosen)
    assert output.sequences[0, 2:].tolist() == [9, 7, 8]


@pytest.mark.parametrize("decoding_method", METHOD_NAMES)
def test_invalid_values_are_removed_on_request_and_bans_survive_it(decoding_method):
    def script(ids):
        logits = tables(1, ids.shape[1]).expand(len(ids), -1, -1).clone()
        logits[:, 4, 6], logits[:, 5, 7], logits[:, 6] = math.inf, math.nan, -math.inf
        return logits

    chosen = {"decoding_method": decoding_method, "max_new_tokens": 8} | METHODS[decoding_method]
    with pytest.raises(ValueError, match="must be finite"):
        answer(ScriptedModel(script), [1, 2], suppress_tokens=[8], **chosen)
    output = answer(ScriptedModel(script), [1, 2], remove_invalid_values=True, suppress_tokens=[EOS, 0], **chosen)
    assert output.sequences[0, 4] == 6
    assert not torch.isin(output.sequences[0, 2:], torch.tensor([EOS, 0, MASK])).any()


# ---- Users' processors --------------------------------------------------------------------------------------------


class Recording(LogitsProcessor):
    """Prefers token 7, bans nothing, and remembers what it was shown."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids.clone())
        assert scores.shape == (len(input_ids), 32)
        scores = scores.clone()
        scores[:, 7] = 1e3
        return scores


def test_a_users_processor_is_called_for_each_column_with_the_canvas_before_it():
    processor = Recording()
    script = ordered([{8: 4.0}, {8: 5.0}, {8: 4.0}], [1])
    chosen = {"decoding_method": "llada", "steps": 3, "max_new_tokens": 3}
    output = answer(ScriptedModel(script), [1, 2], logits_processor=LogitsProcessorList([processor]), **chosen)
    assert output.sequences[0, 2:].tolist() == [7, 7, 7]
    assert [seen[0, 2:].tolist() for seen in processor.seen] == [
        [], [MASK], [MASK, MASK], [7], [7, MASK], [7]
    ]  # fmt: skip


def test_no_processor_of_a_user_brings_a_bad_word_back():
    chosen = {"decoding_method": "dparallel", "entropy_threshold": math.inf, "max_new_tokens": 6}
    output = answer(
        trained_like("llada"),
        [1, 2],
        bad_words_ids=[[7, 7]],
        logits_processor=LogitsProcessorList([Recording()]),
        **chosen,
    )
    text = output.sequences[0, 2:].tolist()
    assert 7 in text and not any(pair == (7, 7) for pair in itertools.pairwise(text))


class Doubling(lp.NoBadWordsLogitsProcessor):
    """A subclass is a processor of the user's own, whatever it is derived from."""

    def __call__(self, input_ids, scores):
        return scores * 2


def test_a_subclass_of_a_known_processor_is_called_itself():
    model, doubling = trained_like("llada"), LogitsProcessorList([Doubling([[1]])])
    chosen = {"decoding_method": "dparallel", "block_length": 4}
    plain = answer(model, [1, 2], **chosen)
    assert torch.equal(answer(model, [1, 2], logits_processor=doubling, **chosen).sequences, plain.sequences)


def test_prefix_allowed_tokens_work_left_to_right():
    def successor(row: int, ids: torch.Tensor) -> list[int]:
        assert MASK not in ids.tolist()
        return [(int(ids[-1]) + 1) % 20, 25]

    model = ScriptedModel(lambda ids: torch.zeros(*ids.shape, 32).index_fill(2, torch.tensor([25]), -5.0))
    for method in ("d3llm", "dparallel", "llada"):
        chosen = {"decoding_method": method, "block_length": 1, "max_new_tokens": 5}
        output = answer(model, [1, 2], prefix_allowed_tokens_fn=successor, **chosen)
        assert output.sequences[0, 2:].tolist() == [3, 4, 5, 6, 7]


# ---- Refusals -----------------------------------------------------------------------------------------------------

NEEDS_THE_LEFT = [
    ({"prefix_allowed_tokens_fn": lambda row, ids: [1]}, "prefix_allowed_tokens_fn"),
    ({"encoder_no_repeat_ngram_size": 2}, "encoder_no_repeat_ngram_size"),
    ({"logits_processor": LogitsProcessorList([lp.WatermarkLogitsProcessor(32, "cpu")])}, "WatermarkLogitsProcessor"),
]


@pytest.mark.parametrize("options, named", NEEDS_THE_LEFT, ids=[named for _, named in NEEDS_THE_LEFT])
@pytest.mark.parametrize(
    "chosen",
    [{}, {"decoding_method": "dream"}, {"block_length": 2}, {"block_length": 1, "block_add_threshold": 0.0}],
    ids=str,
)
def test_what_needs_the_text_to_the_left_is_refused_unless_decoding_is_left_to_right(chosen, options, named):
    model = ScriptedModel(hasty)
    with pytest.raises(ValueError, match=rf"{named}.*`block_length=1`"):
        answer(model, [1, 2], **options, **chosen)
    assert model.calls == 0


@pytest.mark.parametrize("options", [{"bad_words_ids": [[3, 40]]}, {"sequence_bias": {(40, 32): 1.0}}], ids=str)
def test_words_of_another_vocabulary_are_refused(options):
    with pytest.raises(ValueError, match=rf"`{next(iter(options))}` must hold .* 32 \(got \[.*40\]\)"):
        answer(ScriptedModel(hasty), [1, 2], **options)


@pytest.mark.parametrize(
    "options",
    [
        {"suppress_tokens": list(range(31))},
        {"bad_words_ids": [[token] for token in range(32)], "min_new_tokens": 8},
        {"forced_eos_token_id": EOS, "bad_words_ids": [[token, EOS] for token in range(32)]},
        {"min_new_tokens": 8, "forced_eos_token_id": EOS},
        {"suppress_tokens": list(range(31)), "renormalize_logits": True, "do_sample": True},
    ],
    ids=["suppressed", "bad words", "forced and bad", "forced and too short", "normalised"],
)
@pytest.mark.parametrize("decoding_method", METHOD_NAMES)
def test_constraints_that_leave_no_token_are_an_error_that_says_so(decoding_method, options):
    chosen = {"decoding_method": decoding_method, "max_new_tokens": 8} | METHODS[decoding_method]
    model = ScriptedModel(lambda ids: tables(1, ids.shape[1], seed=5)[0].expand(len(ids), -1, -1).clone())
    with pytest.raises(ValueError, match=r"leave a token for every position .*row 0 .*forward"):
        answer(model, [1, 2], early_stop=False, **(chosen | options))
