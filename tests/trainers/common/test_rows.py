"""Rows are checked before a model is trained on them: errors name data set, row, column and the way out."""

import json

import pytest
import torch
from data_trainers import GOOD, MAKERS, TOKENIZER, distilled, stream, tuned
from datasets import Dataset, DatasetDict, load_dataset
from distillation import student, trajectories

from trainers.common.rows import RowError, position_limit


READY = {"prompt_ids": [5, 6], "response_ids": [7]}


# The data set itself


@MAKERS
@pytest.mark.parametrize("nothing", [Dataset.from_list([]), Dataset.from_dict({"prompt": []}), stream([])])
def test_a_data_set_without_rows_is_refused(tmp_path, make, nothing):
    with pytest.raises(ValueError, match=r"`train_dataset` must hold at least one row .got none"):
        make(tmp_path, nothing)


@pytest.mark.parametrize("make", [tuned, distilled])
def test_held_out_sets_are_named_in_errors(tmp_path, make):
    good = Dataset.from_list([GOOD]) if make is tuned else trajectories(4)
    with pytest.raises(ValueError, match=r"`eval_dataset` must hold at least one row"):
        make(tmp_path, good, Dataset.from_list([]))
    with pytest.raises(ValueError, match=r"`eval_dataset\['easy'\]` must hold at least one row"):
        make(tmp_path, good, {"hard": good, "easy": stream([])})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (((GOOD,)), r"`train_dataset` must be a `datasets.Dataset` or `IterableDataset` .got tuple.. Make one with"),
        (DatasetDict(train=Dataset.from_list([GOOD])), r"got DatasetDict with the splits \['train'\].. Choose one"),
    ],
)
def test_what_is_no_data_set_is_refused(tmp_path, wrong, message):
    with pytest.raises(TypeError, match=message):
        tuned(tmp_path, wrong)


@MAKERS
def test_a_stream_of_which_nothing_fits_is_refused_before_training(tmp_path, make):
    rows = [{"prompt": "1" * 99, "completion": "2"}] * 3
    if make is distilled:
        rows = [{"prompt_ids": [5] * 30, "response_ids": [6], "step_map": [1]}] * 3
    with pytest.raises(ValueError, match=r"At least one example must fit .* and none of the stream does"):
        make(tmp_path, stream(rows))


# Text


@pytest.mark.parametrize("kind", [Dataset.from_list, stream])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (GOOD | {"completion": None}, "`completion` must be text"),
        ({"prompt": None, "completion": "x"}, "`prompt` must be text"),
    ],
)
def test_a_bad_row_is_named_with_its_column(tmp_path, kind, bad, message):
    with pytest.raises(RowError, match=f"^`train_dataset`: Row 0: {message}"):
        tuned(tmp_path, kind([bad, GOOD]))
    with pytest.raises(RowError, match=f"^`eval_dataset`: Row 0: {message}"):
        tuned(tmp_path, [GOOD], kind([bad, GOOD]))


def test_a_bad_row_further_on_is_found_before_training_or_when_a_stream_comes_to_it(tmp_path):
    rows = [GOOD] * 1000 + [GOOD | {"completion": None}]
    with pytest.raises(RowError, match=r"^`train_dataset`: Row 1000: `completion` must be text"):
        tuned(tmp_path, rows)
    trainer = tuned(tmp_path, stream(rows))
    with pytest.raises(RowError, match=r"^Row 1000: `completion` must be text"):
        list(trainer.train_dataset)


@pytest.mark.parametrize("streaming", [False, True])
def test_bytes_that_are_no_text_are_named_with_their_place(tmp_path, streaming):
    file = tmp_path / "bad.jsonl"
    good = json.dumps(GOOD).encode() + b"\n"
    bad = b'{"prompt": "\xff", "completion": "x"}\n'
    file.write_bytes(bad + good if streaming else good + bad)
    data = load_dataset(
        "json", data_files=str(file), split="train", streaming=streaming, cache_dir=str(tmp_path / "c")
    )
    place = "" if streaming else "Row 1, `prompt`: "
    with pytest.raises(RowError, match=f"^`train_dataset`: {place}text must be UTF-8 .*Convert or correct its source"):
        tuned(tmp_path / "out", data)


def test_a_trainer_takes_control_tokens_in_text_where_they_are_asked_for(tmp_path):
    row = {"prompt": "what is <|mask|>?", "completion": "<|mask|>"}
    for asked in (False, True):
        trainer = tuned(tmp_path, [row], max_prompt_length=64, response_length=24, control_tokens_in_text=asked)
        (example,) = trainer.train_dataset
        assert (TOKENIZER.mask_token_id in example["response_ids"]) is asked
        assert (TOKENIZER.mask_token_id in example["prompt_ids"]) is asked
        labels = trainer.data_collator([example])["labels"]
        assert labels.eq(TOKENIZER.mask_token_id).any().item() is asked


# Ready ids


@pytest.mark.parametrize("kind", [Dataset.from_list, stream])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt_ids": [5, 99999]}, r"`prompt_ids` must hold ids of the model's vocabulary of 512 .got 99999"),
        ({"response_ids": [-100, 3]}, r"`response_ids` must hold ids of the model's vocabulary of 512 .got -100"),
        ({"response_ids": None}, r"`response_ids` must be a list of integers .got None"),
        ({"response_ids": [3, None]}, r"`response_ids` must be a list of integers .got \[3, None\]"),
        ({"response_ids": []}, r"`response_ids` must hold at least one token"),
    ],
)
def test_ids_that_are_none_of_the_models_are_refused(tmp_path, kind, bad, message):
    with pytest.raises(RowError, match=f"^`train_dataset`: Row 0: {message}"):
        tuned(tmp_path, kind([READY | bad, READY]))


@pytest.mark.parametrize("wrong", [3, "abc", [1.5], [True], [[1]]])
def test_ids_that_are_no_list_of_integers_are_refused(tmp_path, wrong):
    with pytest.raises(RowError, match="Row 0: `prompt_ids` must be a list of integers"):
        tuned(tmp_path, stream([READY | {"prompt_ids": wrong}]))


def test_ids_of_a_tokenizer_with_more_tokens_than_the_model_are_refused(tmp_path):
    small = student(TOKENIZER, vocab_size=100, mask_token_id=TOKENIZER.mask_token_id)
    with pytest.raises(ValueError, match="`mask_token_id` must lie inside the vocabulary of 100 tokens"):
        tuned(tmp_path, [GOOD], model=small)


@pytest.mark.every(2)
@pytest.mark.parametrize("form", ["torch", "numpy"])
def test_arrays_and_tensors_are_ids_too(tmp_path, form):
    trainer = tuned(tmp_path, Dataset.from_list([READY] * 4).with_format(form))
    trainer.train()
    assert trainer.state.global_step == 1


# Positions


@MAKERS
def test_a_canvas_beyond_the_positions_is_refused_with_both_numbers(tmp_path, make):
    long = [READY | {"step_map": [1]}, {"prompt_ids": [5] * 10, "response_ids": [7], "step_map": [1]}]
    with pytest.raises(
        RowError,
        match=r"^`train_dataset`: Row 1: The prompt and `response_length` must fit into the model's 64 positions "
        r".got 10 \+ 60 = 70.. Lower `response_length`, or `max_prompt_length`",
    ):
        make(tmp_path, Dataset.from_list(long), response_length=60, max_prompt_length=10)


@MAKERS
def test_the_lengths_of_a_stream_are_bounded_by_the_arguments(tmp_path, make):
    with pytest.raises(
        ValueError,
        match=r"^`max_prompt_length` and `response_length` must fit into .* 64 positions .got 50 \+ 15 = 65",
    ):
        make(tmp_path, stream([READY | {"step_map": [1]}]), response_length=15, max_prompt_length=50)


def test_prompts_that_are_padded_to_a_length_have_that_length(tmp_path):
    with pytest.raises(ValueError, match=r"`max_prompt_length` and `response_length` must fit .*got 50 \+ 16 = 66"):
        tuned(tmp_path, [GOOD], max_prompt_length=50, pad_prompt_to_max=True)


def test_longer_arguments_do_not_matter_to_short_prompts(tmp_path):
    assert len(tuned(tmp_path, [GOOD] * 2, max_prompt_length=512).train_dataset) == 2


@pytest.mark.parametrize(("own", "limit"), [(64, 64), (None, None), (-1, None), (0, None)])
def test_a_model_without_a_limit_has_room_for_everything(own, limit):
    model = student(TOKENIZER)
    model.config.max_position_embeddings = own
    assert position_limit(model) == limit


def test_the_limit_may_be_that_of_the_text_part_and_begin_behind_the_padding_row():
    class Text:
        max_position_embeddings = 66

    class Config:
        def get_text_config(self):
            return Text()

    model = torch.nn.Module()
    model.config, model.position_offset = Config(), 2
    assert position_limit(model) == 64


# Trajectories


@pytest.mark.parametrize("kind", [Dataset.from_list, stream])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"step_map": None}, r"`step_map` must be a list of integers .got None"),
        ({"step_map": [1, None]}, r"`step_map` must be a list of integers .got \[1, None\]"),
        ({"step_map": [1]}, r"`step_map` must have one entry per token of `response_ids` .got 1 and 2"),
        ({"step_map": [1, 2, 3]}, r"`step_map` must have one entry per token .* .got 3 and 2"),
        ({"step_map": [1, -2]}, r"`step_map` must hold steps from 1, 0 .* and -1 .* .got -2"),
        ({"prompt_ids": []}, r"`prompt_ids` must hold at least one token"),
        ({"response_ids": [], "step_map": []}, r"`response_ids` must hold at least one token"),
        ({"response_ids": [1, 600]}, r"`response_ids` must hold ids of the model's vocabulary of 512 .got 600"),
        ({"sample_id": None}, r"`sample_id` must be an integer .got None"),
    ],
)
def test_a_trajectory_that_is_none_is_refused_before_training(tmp_path, kind, bad, message):
    good = {"prompt_ids": [5], "response_ids": [6, 7], "step_map": [2, 1], "sample_id": 3}
    with pytest.raises(RowError, match=f"^`train_dataset`: Row 0: {message}"):
        distilled(tmp_path, kind([good | bad, good]))


@pytest.mark.parametrize("wrong", [7, "12", [0.5, 1.0]])
def test_a_step_map_that_is_no_list_of_integers_is_refused(tmp_path, wrong):
    rows = [{"prompt_ids": [5], "response_ids": [6, 7], "step_map": wrong}] * 2
    with pytest.raises(RowError, match="Row 0: `step_map` must be a list of integers"):
        distilled(tmp_path, Dataset.from_list(rows))


def test_a_verdict_must_be_a_truth_value_where_it_is_used(tmp_path):
    data = trajectories(4, correct=lambda index: 1)
    with pytest.raises(RowError, match=r"Row 0: `correct` must be true, false or null .got 1.. Convert the column"):
        distilled(tmp_path, data, only_correct=True)
    assert len(distilled(tmp_path, data).train_dataset) == 4
    mixed = trajectories(3, correct=[True, None, False].__getitem__)
    for data in (mixed, mixed.with_format("numpy")):
        assert len(distilled(tmp_path, data, only_correct=True).train_dataset) == 1


def test_targets_that_are_missing_are_refused_where_they_are_used(tmp_path):
    data = trajectories(4, target_ids=lambda index: None if index == 2 else [5, 6])
    with pytest.raises(RowError, match=r"Row 2: `target_ids` must be a list of integers .got None"):
        distilled(tmp_path, data, use_target_ids=True)
    assert len(distilled(tmp_path, data).train_dataset) == 4
