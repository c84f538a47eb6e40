"""Requests that come and go at any time get the tokens, forwards and step maps that `generate` gives each alone."""

import random

import numpy as np
import pytest
import torch
from tiny import EOS, PAD, tiny_prompt, trained_like

from d3llm_hf import D3LLMGenerationConfig
from d3llm_hf.engines.requests import Decoding, Served, decoding_of
from d3llm_hf.engines.rows import Rows
from d3llm_hf.models.decoding import Rules


CANVAS = 64
EVERY_METHOD = [
    {"decoding_method": "d3llm", "entropy_threshold": 1.0, "block_length": 8},
    {"decoding_method": "dparallel", "block_length": 4},
    {"decoding_method": "dinfer", "decoder": "credit", "block_length": 8},
    {"decoding_method": "dream", "alg_temp": 0.5, "seed": 5},
    {"decoding_method": "llada", "steps": 7, "block_length": 8},
    {"decoding_method": "fast_dllm", "block_length": 8},
    {"decoding_method": "d3llm", "window": "slide", "block_length": 8},
    {"decoding_method": "d3llm", "early_stop": False, "block_length": 8},
    {"decoding_method": "dinfer", "decoder": "hierarchy", "block_length": 8},
    {"decoding_method": "dinfer", "block_length": 8},
    {"decoding_method": "entropy_bound", "block_length": 8},
    {"decoding_method": "local_leap", "block_length": 8},
    {"decoding_method": "fast_dllm", "factor": 1.0, "block_length": 8},
    {"decoding_method": "llada", "remasking": "random", "seed": 3, "block_length": 8},
    {"decoding_method": "llada"},
    {"decoding_method": "dream", "steps": 5},
    {"decoding_method": "d3llm", "threshold_relaxation": 0.5, "block_length": 8},
]


def some_pairs() -> list:
    """Where in the list of methods a test begins, and how many requests each method gets: a few by default."""
    more = [pytest.param(first, 2, marks=pytest.mark.full) for first in range(0, len(EVERY_METHOD), 4)]
    return [pytest.param(0, 1), *more]


def model_of(family: str):
    model = trained_like(family)
    model.generation_config = D3LLMGenerationConfig(eos_token_id=EOS, pad_token_id=PAD)
    return model


def served(model) -> Served:
    return Served.of(model.config, model.generation_config, model.logit_shift, CANVAS)


def as_generate(model, prompt, length, settings) -> tuple[list[int], int, list[int]]:
    output = model.generate(torch.tensor([prompt]), max_new_tokens=length, return_dict_in_generate=True, **settings)
    answer = output.sequences[0, len(prompt) :].tolist()
    answer = answer[: answer.index(EOS) + 1] if EOS in answer else answer
    return answer, int(output.num_forwards[0]), output.step_map[0].tolist()


class Engine:
    """A toy of one: a few slots, requests that arrive when they like, and rows in another order in each step."""

    def __init__(self, model, capacity: int = 3):
        self.model, self.draw = model, random.Random(0)
        self.rows = Rows(capacity, CANVAS, model.config.mask_token_id, model.logit_shift, "cpu")
        self.lengths: dict[int, int] = {}

    def add(self, slot: int, prompt: list[int], length: int, settings: dict) -> None:
        decoding = decoding_of(served(self.model), settings, length)
        self.rows.add(slot, prompt, length, decoding, settings.get("seed", 0))
        self.lengths[slot] = len(prompt) + length

    @torch.no_grad()
    def step(self, slots: list[int]) -> list[list[int]]:
        """The answers that are complete, by the order of the slots."""
        widths = [self.lengths[slot] for slot in slots]
        plan = self.rows.plan(np.array(slots), torch.tensor([0, *np.cumsum(widths)[:-1]]))
        canvases = self.rows.canvases(torch.tensor(slots))
        logits = [self.model(canvas[None, :width]).logits[0] for canvas, width in zip(canvases, widths, strict=True)]
        decided = self.rows.decide(plan, torch.cat(logits)[plan.wanted], len(slots))
        return [row[:count].tolist() for row, count in zip(decided.tokens, decided.counts.tolist(), strict=True)]

    def run(self, jobs: list[tuple[list[int], int, dict]]) -> list[tuple[list[int], int, list[int]]]:
        """Answers, forwards and step maps of `(prompt, length, settings)`."""
        waiting, found, there = [*enumerate(jobs)][::-1], {}, {}
        while waiting or there:
            free = [slot for slot in range(len(self.rows.prompts)) if slot not in there]
            while waiting and free and (not there or self.draw.random() < 0.6):
                number, job = waiting.pop()
                slot = free.pop(self.draw.randrange(len(free)))
                self.add(slot, *job)
                there[slot] = number
            slots = self.draw.sample(sorted(there), len(there))
            for slot, answer in zip(slots, self.step(slots), strict=True):
                if answer:
                    number = there.pop(slot)
                    steps = self.rows.states.step_map[slot, : jobs[number][1]].tolist()
                    found[number] = answer, self.rows.forwards(slot), steps
                    self.rows.remove(slot)
        return [found[number] for number in range(len(jobs))]


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize(("first", "times"), some_pairs())
def test_requests_get_what_generate_gives_them(family, first, times):
    draw, model = random.Random(first), model_of(family)
    jobs = [
        (tiny_prompt(number, draw.randint(1, 20)), draw.choice([5, 9] if times == 1 else [5, 16, 33]), kind)
        for number, kind in enumerate(EVERY_METHOD[first : first + 4] * times if times > 1 else EVERY_METHOD[:3])
    ]
    engine = Engine(model)
    for job, found in zip(jobs, engine.run(jobs), strict=True):
        assert found == as_generate(model, *job), job
    assert engine.rows.groups == {}


def test_what_has_ended_is_asked_nothing_more_and_handed_out_once():
    engine = Engine(model_of("llada"))
    job = (tiny_prompt(1, 4), 8, {"decoding_method": "llada", "steps": 1})
    engine.add(0, *job)
    assert engine.step([0])[0] == as_generate(engine.model, *job)[0]
    assert engine.step([0]) == [[]] and engine.rows.forwards(0) == 1


def test_rows_without_a_request_are_passed_over():
    engine = Engine(model_of("llada"))
    engine.add(1, tiny_prompt(1, 4), 8, {"decoding_method": "llada"})
    plan = engine.rows.plan(np.array([2, -1, 1]), torch.tensor([0, 5, 9]))
    assert [part.places.tolist() for part in plan.parts] == [[2]]
    assert plan.wanted.tolist() == [9 + 4 + column for column in range(8)]
    assert engine.rows.plan(np.array([-1]), torch.tensor([0])).parts == []


def test_stop_tokens_are_those_of_the_request():
    model = model_of("llada")
    engine = Engine(model, capacity=2)
    prompt, plain = tiny_prompt(2, 6), {"decoding_method": "llada", "steps": 4}
    answer = as_generate(model, prompt, 12, plain)[0]
    rules = decoding_of(served(model), plain, 12).rules
    engine.add(0, prompt, 12, plain)
    engine.rows.add(0, prompt, 12, Decoding(rules, (answer[3],), None))
    for _ in range(12):
        if found := engine.step([0])[0]:
            break
    assert found == answer[: answer.index(answer[3]) + 1]


@pytest.mark.parametrize(("prompt", "length"), [([], 4), ([1], 0), ([1] * 60, 5)])
def test_what_fits_no_canvas_is_refused(prompt, length):
    rows = Rows(1, CANVAS, 31, 0, "cpu")
    rules = Rules(block_length=4, score="entropy", select="threshold")
    with pytest.raises(ValueError, match=rf"fit a canvas of {CANVAS} positions \(got {len(prompt)} \+ {length}\)"):
        rows.add(0, prompt, length, Decoding(rules, (), None))


def test_logits_that_are_no_numbers_are_refused():
    engine = Engine(model_of("llada"))
    engine.add(0, tiny_prompt(1, 4), 8, {"decoding_method": "llada"})
    plan = engine.rows.plan(np.array([0]), torch.tensor([0]))
    with pytest.raises(ValueError, match="must be finite"):
        engine.rows.decide(plan, torch.full((8, 32), float("nan")), 1)
