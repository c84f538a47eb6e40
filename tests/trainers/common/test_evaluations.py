"""Evaluations of both trainers: what is reported under which name, what data is taken, what is checked first."""

import pytest
import torch
from both_trainers import KINDS, make
from datasets import Dataset, IterableDataset
from distillation import rows, trajectories
from thin import some_of

from trainers.distill.evaluation import check_decoding


pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
BOTH = pytest.mark.parametrize("kind", some_of(KINDS, every=2))  # what is tested here they share
SPEED = ("runtime", "per_second", "preparation_time")


def parts(metrics):
    """Metrics that do not depend on the clock."""
    return {
        name: value for name, value in metrics.items() if not name.endswith(SPEED) and name not in ("epoch", "step")
    }


# Prefixes


@BOTH
def test_each_of_several_held_out_sets_has_all_metrics_under_its_own_name_alone(tmp_path, kind):
    held_out = {"a": trajectories(4, seed=5), "b": trajectories(4, seed=6)}
    trainer = make(kind, tmp_path, held_out=held_out)
    together = trainer.evaluate()
    logged = [parts(entry) for entry in trainer.state.log_history]
    for name, entry in zip("ab", logged, strict=True):
        alone = make(kind, tmp_path, held_out=held_out[name]).evaluate(metric_key_prefix=f"eval_{name}")
        assert entry == parts(alone) == {k: v for k, v in parts(together).items() if k.startswith(f"eval_{name}_")}
        assert f"eval_{name}_masked_fraction" in entry and len(entry) > 2


@BOTH
def test_any_prefix_is_kept_and_no_metric_of_training_is_taken_for_one_of_the_evaluation(tmp_path, kind):
    trainer = make(kind, tmp_path, held_out=trajectories(4, seed=5))
    found = parts(trainer.evaluate(metric_key_prefix="held"))
    assert all(name.startswith("held_") for name in found) and "held_masked_fraction" in found
    assert parts(trainer.state.log_history[-1]) == found


@BOTH
@pytest.mark.full
def test_a_prediction_leaves_nothing_in_the_next_log(tmp_path, kind):
    def run(predicts):
        trainer = make(kind, tmp_path, held_out=trajectories(4, seed=5))
        if predicts:
            found = trainer.predict(trajectories(8, seed=7)).metrics
            assert "test_masked_fraction" in found and trainer.state.log_history == []
        first = parts(trainer.evaluate())
        trainer.train()
        return first, [parts(entry) for entry in trainer.state.log_history if "loss" in entry]

    assert run(predicts=True) == run(predicts=False)


@BOTH
@pytest.mark.full
def test_steps_that_no_log_told_of_are_not_told_of_by_the_next_run(tmp_path, kind):
    trainer = make(kind, tmp_path, max_steps=3, logging_steps=2, learning_rate=0.0)
    logs = []
    for _ in range(2):
        trainer.train()
        logs.append([parts(entry) for entry in trainer.state.log_history if "loss" in entry])
    assert logs[0] == logs[1]


# Data


def conversations(count):
    return [{"prompt": f"{index} + 1?", "completion": f"{index + 1}"} for index in range(count)]


def test_text_is_evaluated_and_predicted_as_it_is_trained_on(tmp_path):
    sizes = {"max_prompt_length": 48, "response_length": 16}
    text, other = Dataset.from_list(conversations(6)), Dataset.from_list(conversations(4))
    trainer = make("sft", tmp_path, train=text, held_out=other, **sizes)
    expected = trainer.evaluate()["eval_loss"]
    assert trainer.evaluate(other)["eval_loss"] == expected
    assert trainer.evaluate({"x": other})["eval_x_loss"] == expected
    assert trainer.evaluate(trainer.eval_dataset)["eval_loss"] == expected
    assert trainer.predict(other).metrics["test_loss"] == expected
    stream = IterableDataset.from_generator(lambda: iter(conversations(4)))
    assert trainer.evaluate(stream)["eval_loss"] == expected
    trainer.eval_dataset = {"y": other}
    assert trainer.evaluate()["eval_y_loss"] == expected
    trainer.train_dataset = other
    assert len(trainer.get_train_dataloader()) == 1


def test_samples_are_numbered_and_left_out_in_an_evaluation_as_in_training(tmp_path):
    held_out = trajectories(4, seed=5)
    expected = make("distillation", tmp_path, held_out=held_out).evaluate()["eval_loss"]
    trainer = make("distillation", tmp_path)
    assert trainer.evaluate(held_out)["eval_loss"] == expected
    with pytest.raises(ValueError, match=r"The data set must have the columns .*'step_map'"):
        trainer.evaluate(held_out.remove_columns("step_map"))
    with pytest.raises(ValueError, match=r"At least one example must fit"):
        make("distillation", tmp_path, response_length=1, given={"train_dataset": None}).evaluate(held_out)


@BOTH
def test_workers_that_stay_do_not_evaluate_another_set_again(tmp_path, kind):
    one, other = trajectories(4, seed=5), trajectories(4, seed=6)
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer = make(kind, tmp_path, held_out=one, **workers)
    found = [trainer.evaluate(each)["eval_loss"] for each in (None, other, one, None, other)]
    assert found[0] == found[2] == found[3] != found[1] == found[4]


# What is checked before a run


@pytest.mark.every(18)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decoding_method": "nope"}, r"`eval_generate_kwargs` must hold settings of `generate`: `decoding_method`"),
        ({"stepz": 3}, r"`eval_generate_kwargs` .*: `stepz` is not a generation setting"),
        ({"num_beams": 4}, r"`eval_generate_kwargs` .*`num_beams` .*there are no beams"),
        ({"block_length": "16"}, r"`eval_generate_kwargs` .*`block_length` must be"),
        (
            {"return_dict_in_generate": True},
            r"`eval_generate_kwargs` .*`return_dict_in_generate` is given by the eval",
        ),
        ({"max_new_tokens": 1.5}, r"`eval_generate_kwargs` .*`max_new_tokens` must be a positive integer .got 1.5"),
        ({"max_new_tokens": 63}, r"must fit into the model's 64 positions .got \d \+ 63 .*`eval_generate_kwargs`"),
    ],
)
def test_an_evaluation_that_cannot_decode_is_refused_before_the_run(tmp_path, arguments, message):
    def attempt(held_out):
        with pytest.raises(ValueError, match=message):
            make("distillation", tmp_path, held_out=held_out, eval_generate_samples=2, eval_generate_kwargs=arguments)

    attempt(trajectories(4))
    attempt({"a": trajectories(4)})


def test_a_canvas_longer_than_the_positions_is_refused_also_without_held_out_data(tmp_path):
    with pytest.raises(ValueError, match=r"must fit into the model's 64 positions .got 0 \+ 65"):
        make("distillation", tmp_path, eval_generate_samples=1, eval_generate_kwargs={"max_new_tokens": 65})


def test_answers_to_compare_with_are_there_and_text(tmp_path):
    def attempt(**more):
        column = more.pop("column", "answer")
        held_out = Dataset.from_list(rows(4, **more))
        make("distillation", tmp_path, held_out=held_out, eval_generate_samples=3, eval_answer_column=column)

    attempt(answer=str)
    with pytest.raises(ValueError, match=r"`eval_answer_column` must be a column .* .got 'reply', .*'answer'"):
        attempt(answer=str, column="reply")
    with pytest.raises(ValueError, match=r"`answer` must be text in each sample to decode .got 0 in row 0"):
        attempt(answer=int)
    with pytest.raises(ValueError, match=r"`reply` must be text in each sample to decode .got None in row 1"):
        attempt(reply=lambda index: None if index == 1 else "7", column="reply")


def test_a_student_that_generates_in_another_way_is_refused_as_an_evaluation(tmp_path):
    trainer = make("distillation", tmp_path, eval_generate_samples=1)
    check_decoding(trainer.model, None, trainer.args)
    with pytest.raises(ValueError, match=r"`eval_generate_samples` must be 0 for a model .* .got 1 and Linear"):
        check_decoding(torch.nn.Linear(1, 1), None, trainer.args)


@pytest.mark.full
@BOTH
def test_a_metric_that_no_evaluation_reports_is_refused_before_the_run(tmp_path, kind):
    def attempt(held_out, **arguments):
        steps = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
        return make(kind, tmp_path, held_out=held_out, **(steps | arguments))

    one, several = trajectories(4, seed=5), {"a": trajectories(4, seed=5), "b": trajectories(4, seed=6)}
    best = {"load_best_model_at_end": True}
    with pytest.raises(
        ValueError, match=r"`metric_for_best_model` must be a metric .* .got 'accuracies'.*'eval_loss'"
    ):
        attempt(one, metric_for_best_model="accuracies", **best)
    with pytest.raises(ValueError, match=r"`metric_for_best_model` .* .got 'loss'.*'eval_a_loss'"):
        attempt(several, **best)
    with pytest.raises(ValueError, match=r"`metric_for_best_model` must"):
        attempt(several, lr_scheduler_type="reduce_lr_on_plateau")
    attempt(several, metric_for_best_model="eval_a_loss", **best)
    attempt(one, metric_for_best_model="masked_fraction", **best).train()
    attempt(one, metric_for_best_model="accuracies")


def test_the_best_model_is_not_chosen_by_what_only_some_evaluations_decode(tmp_path):
    def attempt(**arguments):
        best = {"load_best_model_at_end": True, "metric_for_best_model": "tpf"}
        steps = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
        return make("distillation", tmp_path, held_out=trajectories(4, seed=5), **(best | steps | arguments))

    attempt(eval_generate_samples=2)
    with pytest.raises(ValueError, match=r"`metric_for_best_model` must be a metric .* .got 'tpf'"):
        attempt()
    with pytest.raises(ValueError, match=r"`eval_generate_steps` must be unset .* .got 4 and 'tpf'"):
        attempt(eval_generate_samples=2, eval_generate_steps=4)
