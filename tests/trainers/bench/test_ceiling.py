"""What a decoder that knows which predictions are right would decide in a forward."""

import json
from types import SimpleNamespace

import pytest
import torch

from d3llm_hf.evaluation.tables import fill as tables
from d3llm_hf.evaluation.tasks.word_problems import generate_problems
from trainers.bench import ceiling as bench
from trainers.bench.ceiling import CeilingBench, Text, ceiling


MASK, END = 9, 1


class Counting(torch.nn.Module):
    """Predicts at each hidden position one more than the token before it; after a mask, token 0."""

    traits = SimpleNamespace(topology=None, logit_shift=0)
    generation_config = SimpleNamespace(mask_token_id=MASK)

    def accepted(self, inputs):
        return {"input_ids": inputs["input_ids"]}

    def forward(self, input_ids):
        before = input_ids.roll(1, dims=1)
        predicted = torch.where(before == MASK, 0, (before + 1) % 10)
        return SimpleNamespace(logits=4.0 * torch.nn.functional.one_hot(predicted, 10))


def text(*answers, lengths):
    labels = torch.tensor(answers)
    prompts = torch.full((len(answers), 2), 4)
    return Text(prompts, torch.ones_like(prompts), labels, torch.tensor(lengths))


@pytest.mark.parametrize(
    ("answer", "length", "forwards"),
    [
        # 5, 6, 7, 8 after a 4: each is right once the one before it is there, and the end is wrong at first
        ([5, 6, 7, 8, END, END], 4, 5),
        # every second token is 0, which is what is predicted behind a mask: the zeros come first, then what is left
        ([5, 0, 5, 0, 5, END], 5, 4),
    ],
)
def test_forwards_are_those_worked_out_by_hand(answer, length, forwards):
    found = ceiling(Counting(), [text(answer, lengths=[length])], CeilingBench(block_length=6), END)
    assert found == {"tokens": length, "forwards": forwards, "tpf": round(length / forwards, 3)}


def test_rows_do_not_depend_on_each_other():
    answers = {(5, 6, 7, 8, END, END): 4, (5, 0, 5, 0, 5, END): 5}
    alone = [
        ceiling(Counting(), [text(each, lengths=[n])], CeilingBench(block_length=3), END)
        for each, n in answers.items()
    ]
    together = ceiling(Counting(), [text(*answers, lengths=list(answers.values()))], CeilingBench(block_length=3), END)
    assert together["forwards"] == sum(each["forwards"] for each in alone)


def test_a_model_that_does_not_see_its_canvas_is_refused():
    model = Counting()
    model.traits = SimpleNamespace(topology="blocks", logit_shift=0)
    with pytest.raises(ValueError, match=r"`models` must see their whole canvas \(got a block-causal one\)"):
        ceiling(model, [], CeilingBench(), END)


def test_the_command_measures_each_checkpoint_over_its_own_right_answers(capsys, tmp_path):
    path = tmp_path / "results.json"
    options = ["d3llm-llada", "--num-problems", "2", "--batch-size", "2"]
    bench.main([*options, "-o", str(path)])
    results = json.loads(path.read_text())
    assert capsys.readouterr().out == tables.table(results)
    (row,) = results["rows"]
    assert row["name"] == "d3llm-llada" and 1 <= row["answers"] <= 2
    # At least one token a forward, the stop token among them
    assert row["answers"] <= row["forwards"] <= row["tokens"] + row["answers"]
    assert results["command"] == " ".join(["python -m trainers.bench.ceiling", *options, "-o results.json"])


def test_a_model_that_is_never_right_is_refused(monkeypatch):
    wrong = [type(each)(**vars(each) | {"answer": "#### x"}) for each in generate_problems(1, split="test", seed=1)]
    monkeypatch.setattr(bench, "generate_problems", lambda *args, **kwargs: wrong)
    with pytest.raises(ValueError, match=r"`models` must answer some of the problems right \(got none of 1\)"):
        bench.measure_ceiling(["d3llm-llada"], CeilingBench(num_problems=1, max_new_tokens=2))


def test_a_number_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match=r"`num_problems` must be at least 1 \(got 0\)"):
        CeilingBench(num_problems=0)
