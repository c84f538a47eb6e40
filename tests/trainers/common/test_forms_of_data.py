"""Data in every form that `datasets` gives it, of the trainers and of their scripts."""

import json

import distillation
import pytest
from data_trainers import GOOD, MAKERS, TOKENIZER, distilled, stream, tuned
from datasets import Dataset, IterableDataset, load_dataset
from thin import covering

from trainers import run_distill, run_sft
from trainers.common.rows import RowError
from trainers.trajectories.prompts import Prompts


TURNS = {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]}
READY = {"prompt_ids": [5, 6], "response_ids": [7], "more": "text"}


def data_of(make):
    return Dataset.from_list([GOOD] * 4) if make is tuned else distillation.trajectories(4)


# Formats


ROWS = {"text": GOOD, "turns": TURNS, "ids": READY}


@pytest.mark.every(2)
@pytest.mark.parametrize(
    "form, name, streaming", covering(["pandas", "arrow", "numpy", "torch"], ROWS, [False, True], strength=1, every=2)
)
def test_a_data_set_is_taken_in_any_format(tmp_path, form, name, streaming):
    row = ROWS[name]
    plain = Dataset.from_list([row] * 4)
    formatted = (plain.to_iterable_dataset() if streaming else plain).with_format(form)
    trainer = tuned(tmp_path, formatted, plain)
    trainer.train()
    assert trainer.evaluate(formatted)["eval_loss"] == trainer.evaluate()["eval_loss"]


@pytest.mark.every(2)
@MAKERS
def test_columns_that_a_format_hides_are_there(tmp_path, make):
    data = data_of(make)
    trainer = make(tmp_path, data.with_format("numpy", columns=data.column_names[:1]), max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_transform_is_kept(tmp_path):
    spelt = Dataset.from_list([{"question": "1+1?", "reply": "2"}] * 4)
    spelt.set_transform(lambda batch: {"prompt": batch["question"], "completion": batch["reply"]})
    with pytest.raises(RowError, match=r"Row 0: A dataset must have the columns"):
        tuned(tmp_path, Dataset.from_list([{"question": "1+1?", "reply": "2"}]))
    assert len(tuned(tmp_path, spelt).train_dataset) == 4


# Dictionaries and names


@pytest.mark.every(3)
@MAKERS
@pytest.mark.parametrize("wrong", [{}, {"a": None}])
def test_names_without_data_are_refused(tmp_path, make, wrong):
    message = r"`eval_dataset` must map names to data sets .got (no names|None as 'a')"
    with pytest.raises(ValueError, match=message):
        make(tmp_path, data_of(make), wrong)
    with pytest.raises(ValueError, match=message):
        make(tmp_path, data_of(make), data_of(make)).evaluate(wrong)


@MAKERS
def test_a_name_that_the_trainer_has_no_data_of_is_refused(tmp_path, make):
    with pytest.raises(ValueError, match=r"held-out data, \['a'\] .got 'b'"):
        make(tmp_path, data_of(make), {"a": data_of(make)}).evaluate("b")
    with pytest.raises(ValueError, match=r"held-out data, which has none .got 'b'"):
        make(tmp_path, data_of(make), data_of(make)).evaluate("b")


@MAKERS
def test_a_prediction_is_of_one_data_set(tmp_path, make):
    with pytest.raises(TypeError, match=r"`test_dataset` must be .* with the splits \['a'\]"):
        make(tmp_path, data_of(make)).predict({"a": data_of(make)})


# What a template would be given elsewhere


@pytest.mark.parametrize(
    "more",
    [
        {"tools": [{"type": "function", "function": {"name": "add"}}]},
        {"tools": '[{"name": "add"}]'},
        {"chat_template_kwargs": {"enable_thinking": False}},
    ],
)
def test_tools_that_the_template_is_not_given_are_refused(tmp_path, more):
    name = next(iter(more))
    with pytest.raises(RowError, match=rf"Row 0: `{name}` must be unset .got .*remove the column"):
        tuned(tmp_path, [TURNS | more])
    with pytest.raises(RowError, match=rf"Row 0: `{name}` must be unset"):
        list(Prompts([TURNS | more], TOKENIZER).samples([0]))


@pytest.mark.every(3)
@pytest.mark.parametrize("nothing", [None, [], "", "[]", {"enable_thinking": None}])
def test_no_tools_are_nothing(tmp_path, nothing):
    assert len(tuned(tmp_path, [TURNS | {"tools": nothing}]).train_dataset) == 1
    array = Dataset.from_list([TURNS | {"tools": []}] * 2).with_format("numpy")
    assert len(tuned(tmp_path, array).train_dataset) == 2


def test_text_may_stand_beside_a_column_of_that_name(tmp_path):
    assert len(tuned(tmp_path, [GOOD | {"tools": "hammer"}]).train_dataset) == 1


# Files of the scripts


def loaded(path, **more):
    return run_sft.load_datasets(run_sft.SFTScriptArguments(dataset_name=str(path), **more), evaluate=False)[0]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "rows.JSONL"])
def test_fine_tuning_reads_each_kind_of_file_and_a_slice_of_it(tmp_path, name):
    path, rows = tmp_path / name, Dataset.from_list([{"prompt": f"{i}?", "completion": f"n{i}"} for i in range(4)])
    writers = {".csv": rows.to_csv, ".parquet": rows.to_parquet}
    writers.get(path.suffix, rows.to_json)(path)
    assert loaded(path).to_list() == rows.to_list()
    assert loaded(path, dataset_split="train[1:3]").to_list() == rows.to_list()[1:3]


def test_a_slice_of_a_data_set_with_splits_is_read(tmp_path):
    for split, count in (("train", 4), ("test", 2)):
        Dataset.from_list([GOOD] * count).to_parquet(tmp_path / f"{split}.parquet")
    arguments = run_sft.SFTScriptArguments(dataset_name=str(tmp_path), dataset_split="train[:3]")
    assert [len(each) for each in run_sft.load_datasets(arguments, evaluate=True)] == [3, 2]


def test_distillation_reads_a_slice_of_a_file_and_of_a_folder(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text("\n".join(map(json.dumps, distillation.rows(4))), encoding="utf-8")
    (tmp_path / "shards").mkdir()
    load_dataset("json", data_files=str(path), split="train").to_parquet(tmp_path / "shards" / "0.parquet")
    for name in (path, tmp_path / "shards"):
        arguments = run_distill.DistillScriptArguments("model", str(name), dataset_split="train[:3]")
        assert len(run_distill.load_trajectories(arguments, seed=0, evaluate=False)[0]) == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_problems": 0}, "`num_problems` must be at least 1 .got 0"),
        ({"num_problems": -1}, "`num_problems` must be at least 1 .got -1"),
        ({"num_problems": 1, "num_eval_problems": 0}, "`num_eval_problems` must be at least 1 .got 0"),
        ({"dataset_split": "test"}, "`dataset_split` must be train for generated problems .got 'test'"),
    ],
)
def test_generated_problems_are_some_to_train_on(given, message):
    with pytest.raises(ValueError, match=message):
        run_sft.load_datasets(run_sft.SFTScriptArguments(**given), evaluate=True)


def test_problems_that_are_not_evaluated_need_not_be_there():
    arguments = run_sft.SFTScriptArguments(num_problems=2, num_eval_problems=0)
    train, held_out = run_sft.load_datasets(arguments, evaluate=False)
    assert len(train) == 2 and held_out is None


def test_a_stream_that_is_evaluated_again_gives_the_same(tmp_path):
    trainer = tuned(tmp_path, [GOOD] * 4, stream([GOOD] * 4))
    assert isinstance(trainer.eval_dataset, IterableDataset)
    assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]


def test_samples_of_a_table_are_trajectories(tmp_path):
    trainer = distilled(tmp_path, distillation.trajectories(4).with_format("pandas"), max_steps=1)
    trainer.train()
    assert trainer.state.global_step == 1
