"""What decoding costs: lengths are checked first, memory and waiting are bounded, an error leaves nothing behind."""

import time
import weakref

import pytest
import torch
from tiny import (
    EOS,
    PAD,
    ScriptedModel,
    answer,
    attributes,
    constant_script,
    left_padded,
    same_attributes,
    tables,
    tiny_model,
    tiny_prompt,
    trained_like,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers.generation import CompileConfig, LogitsProcessorList, TemperatureLogitsWarper

from d3llm_hf.models.canvas import Canvas
from d3llm_hf.models.decoding import Rules, State, candidates, commit, open_blocks
from d3llm_hf.models.processors import Processors
from d3llm_hf.models.scoring import Sampler, Scorer
from d3llm_hf.models.selection import choose


class Meter(TorchDispatchMode):
    """Counts the bytes of tensors that are alive at once, and the operations that would wait for a device."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = self.syncs = 0
        self.seen: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.nonzero, torch.ops.aten._local_scalar_dense):
            self.syncs += 1
        if function.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
            self.syncs += sum(index is not None and index.dtype == torch.bool for index in args[1])
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.track(tensor.untyped_storage())
        return result

    def track(self, storage) -> None:
        key = storage._cdata
        if key in self.seen:
            return
        self.seen[key] = storage.nbytes()
        self.live += self.seen[key]
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.forget, key)

    def forget(self, key: int) -> None:
        self.live -= self.seen.pop(key)


# ---- D-12: lengths -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_new_tokens", [0, -1])
def test_a_length_that_is_not_positive_is_refused_before_any_forward(max_new_tokens):
    model = ScriptedModel(constant_script([1] * 16, 2))
    with pytest.raises(ValueError, match="max_new_tokens"):
        answer(model, [1, 2], max_new_tokens=max_new_tokens)
    assert model.calls == 0


def test_more_positions_than_the_model_has_are_refused_with_both_numbers():
    model = ScriptedModel(constant_script([1] * 16, 2), max_sequence_length=64)
    with pytest.raises(ValueError, match=r"64 positions .*got 3 \+ 62 = 65"):
        answer(model, [1, 2, 3], max_new_tokens=62)
    assert model.calls == 0
    assert answer(model, [1, 2], max_new_tokens=14).sequences.shape == (1, 16)


def test_an_absurd_length_is_refused_at_once_and_without_memory():
    model = trained_like("llada")
    answer(model, [1, 2, 3])  # warm up
    with Meter() as meter, pytest.raises(ValueError, match="1000000000"):
        answer(model, [1, 2, 3], max_new_tokens=10**9)
    assert meter.peak < 50 * 2**20


# ---- D-13: memory --------------------------------------------------------------------------------------------------


def blank_state(rows: int, columns: int, rules: Rules, mask_token_id: int) -> State:
    """Nothing is decided yet."""
    tokens = torch.full((rows, columns), mask_token_id)
    return State.start(tokens, torch.ones_like(tokens, dtype=torch.bool), rules)


def blank_canvas(state: State, mask_token_id: int) -> Canvas:
    """The state behind a prompt of one token."""
    base = torch.nn.functional.pad(state.tokens, (1, 0))
    place = torch.arange(base.shape[1])
    slots = place[1:].expand_as(state.tokens)
    first = torch.zeros_like(state.rows)
    return Canvas(base, slots, 1, None, place.expand_as(base), first, mask_token_id, None)


def processors_of(processors: LogitsProcessorList, rules: Rules, state: State, vocab_size: int) -> Processors:
    """Processors over a prompt of one token."""
    return Processors(
        processors,
        rules,
        prompt=torch.zeros_like(state.tokens[:, :1]),
        canvas=blank_canvas(state, vocab_size - 1),
        tokens=state.tokens,
        stop_ids=None,
        vocab_size=vocab_size,
    )


def scored(logits: torch.Tensor, sampling: bool = False) -> Meter:
    """Scores `(n, V)` logits, all of them candidates of one row, and returns what that took."""
    count = logits.shape[0]
    rules = Rules(block_length=count, score="entropy", select="threshold", threshold=0.5)
    state = blank_state(1, count, rules, logits.shape[1] - 1)
    processors = LogitsProcessorList([TemperatureLogitsWarper(0.7)] if sampling else [])
    scorer = Scorer(
        rules,
        logits.shape[1] - 1,
        sampler=Sampler(0),
        sampling=sampling,
        processors=processors_of(processors, rules, state, logits.shape[1]),
    )
    where = (torch.zeros(count, dtype=torch.long), torch.arange(count))
    with Meter() as meter:
        scorer(logits, state, blank_canvas(state, logits.shape[1] - 1), where)
    return meter


@pytest.mark.full
@pytest.mark.parametrize("sampling", [False, True], ids=["greedy", "sampling"])
def test_scoring_640_positions_of_a_published_vocabulary_takes_less_than_700_mb(sampling):
    positions, vocabulary = 640, 126_464
    meter = scored(torch.zeros(positions, vocabulary, dtype=torch.bfloat16), sampling)
    assert meter.peak < 700e6
    assert meter.peak < 2 * positions * vocabulary * 4


def test_only_the_candidates_pass_through_the_head():
    rows = []
    model = trained_like("llada")
    hook = model.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape[:-1].numel()))
    chosen = {"block_length": 4, "block_add_threshold": 1.0, "entropy_threshold": 0.0, "early_stop": False}
    output = answer(model, tiny_prompt(0, 30), max_new_tokens=16, **chosen)
    hook.remove()
    assert len(rows) == int(output.num_forwards) and max(rows) <= 4


# ---- D-14: errors in the middle -------------------------------------------------------------------------------------


@pytest.mark.every(3)
@pytest.mark.parametrize("at", [1, 2, 4])
@pytest.mark.parametrize("kv_cache", ["none", "delayed"])
def test_running_out_of_memory_passes_through_and_the_next_call_works(kv_cache, at):
    model = trained_like("llada")
    chosen = {"kv_cache": kv_cache, "block_length": 4, "entropy_threshold": 0.0, "early_stop": False}
    expected = answer(model, [1, 2, 3], **chosen)
    before, calls = attributes(model), []

    def run_out(module, args):
        calls.append(1)
        if len(calls) == at:
            raise torch.OutOfMemoryError("no memory left")

    hook = model.lm_head.register_forward_pre_hook(run_out)
    with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
        answer(model, [1, 2, 3], **chosen)
    hook.remove()
    assert len(calls) == at
    assert same_attributes(before, attributes(model))
    assert torch.equal(answer(model, [1, 2, 3], **chosen).sequences, expected.sequences)


# ---- D-19: time and synchronisation --------------------------------------------------------------------------------


def uncounted(function, **chosen):
    """In place of `torch.compile`: the function, unseen by a [`Meter`]."""

    def run(*args):
        with _disable_current_modes():
            return function(*args)

    return run


@pytest.mark.every(6)
@pytest.mark.parametrize(
    "chosen, allowed",
    [
        ({"decoding_method": "d3llm"}, 3),
        ({"decoding_method": "d3llm", "early_stop": True, "do_sample": True, "temperature": 0.8, "top_p": 0.9}, 3),
        ({"decoding_method": "dparallel"}, 3),
        ({"decoding_method": "llada"}, 3),
        ({"decoding_method": "dream"}, 3),
        ({"decoding_method": "d3llm", "kv_cache": "delayed"}, 4),  # one more for the width of the window
        ({"decoding_method": "llada", "compile_config": CompileConfig()}, 2),  # one shape, and nothing to ask
        ({"decoding_method": "d3llm", "kv_cache": "delayed", "compile_config": CompileConfig()}, 3),
    ],
    ids=lambda value: " ".join(str(v) for v in value.values()).partition("(")[0] if isinstance(value, dict) else "",
)
def test_a_step_waits_for_the_device_a_fixed_number_of_times_whatever_the_batch(chosen, allowed, monkeypatch):
    lists = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: (lists.append(1), tolist(self))[1])
    monkeypatch.setattr(torch, "compile", uncounted)  # a graph without a break waits for nothing
    model = tiny_model("dream", layers=1, spread=4.0)
    # Every row takes as many forwards as the others, so that a call of many rows makes no more of them.
    chosen = {"early_stop": False, "max_new_tokens": 24, "eos_token_id": EOS, "pad_token_id": PAD, "seed": 0} | chosen

    def syncs(rows: int) -> tuple[float, int]:
        lists.clear()
        prompts = [tiny_prompt(0, 5)] * rows
        with Meter() as meter:
            output = model.generate(**left_padded(prompts), return_dict_in_generate=True, **chosen)
        return meter.syncs + len(lists), int(output.num_forwards.max())

    short = chosen | {"max_new_tokens": 1}
    for rows in (1, 3, 12):
        chosen, long = short, chosen
        once, one = syncs(rows)
        chosen = long
        many, forwards = syncs(rows)
        assert forwards > one
        assert (many - once) / (forwards - one) <= allowed


@pytest.mark.slow  # a ratio of times, which another process on the same cores can spoil
def test_deciding_takes_at_most_half_again_the_time_of_a_bare_entropy_and_argmax():
    rows, columns, vocabulary = 8, 256, 1024
    logits = tables(rows, columns, vocabulary).view(-1, vocabulary)
    rules = Rules(block_length=32, score="entropy", select="threshold", threshold=0.5, force_best=True)

    def bare() -> None:
        logp = logits.log_softmax(-1)
        -(logp.exp() * logp).sum(-1)
        logits.argmax(-1)

    def step() -> None:
        state = blank_state(rows, columns, rules, vocabulary - 1)
        state.open_count.fill_(columns // 32)
        scorer = Scorer(
            rules,
            vocabulary - 1,
            sampler=Sampler(0),
            sampling=False,
            processors=processors_of(LogitsProcessorList(), rules, state, logits.shape[1]),
        )
        open_blocks(state, rules, torch.full((rows,), columns))
        among = candidates(state, rules)
        scores = scorer(logits, state, blank_canvas(state, vocabulary - 1), among.nonzero(as_tuple=True))
        commits, forced = choose(scores.cost, scores.force_cost, among, state, rules)
        commit(state, commits, torch.where(forced, scores.best_tokens, scores.tokens))

    def fastest(function) -> float:
        times = []
        for _ in range(7):
            start = time.process_time()
            function()
            times.append(time.process_time() - start)
        return min(times)

    assert fastest(step) <= 1.5 * fastest(bare)
