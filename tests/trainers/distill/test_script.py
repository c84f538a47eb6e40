"""The distillation script: from trajectories on disk to a checkpoint that loads and decodes, and its recipes."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from distillation import ARGUMENTS, rows, student, trajectories
from official import tiny_tokenizer
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from d3llm_hf import encode_text
from trainers import run_distill
from trainers.bench.estimate import OBJECTIVES
from trainers.common.script_utils import parse_args_with_config
from trainers.distill.config import PseudoTrajectoryDistillConfig
from trainers.trajectories.store import read_trajectories


RECIPES = sorted(Path("trainers/recipes").glob("d3llm_*.yaml"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A folder with a tiny checkpoint and trajectories in each form."""
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = tiny_tokenizer()
    student(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "trajectories").mkdir()
    for shard in range(2):
        trajectories(8, seed=shard).to_parquet(folder / "trajectories" / f"{shard}.parquet")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(6)), encoding="utf-8")
    return folder


def distil(teacher, output, *extra, data="trajectories"):
    values = ARGUMENTS | {"model_name_or_path": teacher / "model", "dataset_name": teacher / data, "max_steps": 5}
    values |= {"output_dir": output, "window_sizes": [4, 6]}
    arguments = []
    for name, value in values.items():
        arguments += [f"--{name}", *(str(part) for part in (value if isinstance(value, list) else [value]))]
    run_distill.main([*arguments, *extra])


def test_the_script_distils_and_its_output_loads_and_decodes(teacher, tmp_path):
    evaluation = ["--num_eval_samples", "4", "--eval_strategy", "steps", "--eval_steps", "5"]
    generation = ["--eval_generate_samples", "2", "--eval_generate_kwargs", '{"decoding_method": "dparallel"}']
    distil(teacher, tmp_path / "out", *evaluation, *generation, "--save_dtype", "bfloat16")
    tokenizer, model = (auto.from_pretrained(tmp_path / "out") for auto in (AutoTokenizer, AutoModel))
    assert model.dtype == torch.bfloat16
    prompt = encode_text(tokenizer, "abab")
    output = model.generate(**prompt, max_new_tokens=8, early_stop=False)
    assert output.shape == (1, prompt["input_ids"].shape[1] + 8) and (output != tokenizer.mask_token_id).all()
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "After 5 of 5 optimizer steps" in card and "| Tokens per forward |" in card
    assert str(teacher) not in card


@pytest.mark.full
def test_an_adapter_is_merged_or_kept_and_a_run_goes_on(teacher, tmp_path):
    adapter = ["--use_peft", "--lora_r", "2", "--lora_alpha", "2"]
    distil(teacher, tmp_path / "merged", *adapter, "--save_strategy", "steps", "--save_steps", "3", data="rows.jsonl")
    before, after = (load_file(folder / "model.safetensors") for folder in (teacher / "model", tmp_path / "merged"))
    assert set(before) == set(after)
    changed = {name.split(".")[-2] for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {"q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"}
    card = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    assert "LORA adapter | r=2" in card and "PeftModel" not in card

    first = {name: tensor.clone() for name, tensor in after.items()}
    resume = ["--resume_from_checkpoint", "last"]
    distil(teacher, tmp_path / "merged", *adapter, *resume, data="rows.jsonl")
    again = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())

    distil(teacher, tmp_path / "kept", *adapter, "--merge_adapter", "false", data="rows.jsonl")
    assert (tmp_path / "kept" / "adapter_config.json").is_file()
    assert "PeftModel" in (tmp_path / "kept" / "README.md").read_text(encoding="utf-8")


def test_a_push_is_asked_for_once(teacher, tmp_path, monkeypatch):
    from trainers.distill.trainer import PseudoTrajectoryDistillTrainer

    pushed = []
    monkeypatch.setattr(PseudoTrajectoryDistillTrainer, "init_hf_repo", lambda self, **kwargs: None)
    monkeypatch.setattr(PseudoTrajectoryDistillTrainer, "push_to_hub", lambda self, **kwargs: pushed.append(kwargs))
    distil(teacher, tmp_path / "out", "--push_to_hub", data="rows.jsonl")
    assert pushed == [{"finetuned_from": None, "dataset": None}]


def arguments_of(teacher, **changed):
    given = {"model_name_or_path": str(teacher / "model"), "dataset_name": str(teacher / "trajectories")}
    return run_distill.DistillScriptArguments(**(given | changed))


def test_held_out_samples_are_named_or_split_off_and_keep_their_numbers(teacher):
    train, held_out = run_distill.load_trajectories(arguments_of(teacher, num_eval_samples=4), 0, evaluate=True)
    assert sorted([*train["sample_id"], *held_out["sample_id"]]) == list(range(16)) and len(held_out) == 4
    named = arguments_of(teacher, eval_dataset_name=str(teacher / "rows.jsonl"))
    train, held_out = run_distill.load_trajectories(named, 0, evaluate=True)
    assert (len(train), len(held_out)) == (16, 6)


@pytest.mark.parametrize("count", [0, 16])
def test_a_split_that_leaves_one_side_empty_is_refused(teacher, count):
    with pytest.raises(ValueError, match=rf"`num_eval_samples` must leave samples on both sides .got {count} of 16"):
        run_distill.load_trajectories(arguments_of(teacher, num_eval_samples=count), 0, evaluate=True)


def test_a_folder_without_trajectories_is_refused(teacher, tmp_path):
    with pytest.raises(ValueError, match=r"A folder of trajectories must hold .parquet files"):
        run_distill.load_trajectories(arguments_of(teacher, dataset_name=str(tmp_path)), 0, evaluate=False)


def test_an_embedded_checkpoint_may_be_named(teacher):
    model, tokenizer = run_distill.load_student(arguments_of(teacher, model_name_or_path="d3llm-llada"))
    assert model.config.mask_token_id == tokenizer.mask_token_id and model.dtype == torch.float32


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_committed_recipes_parse_and_say_what_they_need(path, tmp_path):
    changes = ["--output_dir", str(tmp_path), "--bf16", "false", "--use_cpu"]
    script_args, args = parse_args_with_config(
        (run_distill.DistillScriptArguments, PseudoTrajectoryDistillConfig), ["--config", str(path), *changes]
    )
    assert args.window_sizes == yaml.safe_load(path.read_text(encoding="utf-8"))["window_sizes"]
    assert args.objective == "trajectory" and script_args.dataset_name.startswith("trajectories/")
    comments = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any(f"--config {path}" in line for line in comments)
    assert any("GPU" in line or "CPU" in line for line in comments)


def other_objectives(path):
    """What a recipe has behind a `#`, a mapping for each objective."""
    _, _, behind = path.read_text(encoding="utf-8").partition("# Other objectives")
    found = []
    for line in behind.splitlines():
        if match := re.fullmatch(r"# ([a-z_]+): (\S+)", line):
            found[-1] |= yaml.safe_load(f"{match[1]}: {match[2]}")
        else:
            found.append({})
    return [mapping for mapping in found if mapping]


@pytest.mark.parametrize("path", [path for path in RECIPES if "tiny" not in path.stem], ids=lambda path: path.stem)
def test_the_other_objectives_of_a_recipe_can_be_taken_and_are_those_that_are_estimated(path, tmp_path):
    found = other_objectives(path)
    named = [{name: value for name, value in each.items() if "path" not in name} for each in found]
    assert named == [changes for changes in OBJECTIVES.values() if changes]
    own = yaml.safe_load(path.read_text(encoding="utf-8")) | {"output_dir": str(tmp_path), "bf16": False}
    for changes in found:
        args = parsed(tmp_path, **(own | changes))[1]
        assert all(getattr(args, name) == value for name, value in changes.items())


def test_the_published_recipes_take_64_samples_a_step_on_their_four_gpus(tmp_path):
    for path in RECIPES:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not path.stem.endswith("_tiny"):
            assert recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] * 4 == 64
    assert len(RECIPES) == 5


@pytest.mark.full
def test_one_command_extracts_trajectories_and_trains_on_them(teacher, tmp_path):
    section = {
        "dataset_name": "word_problems",
        "num_problems": 6,
        "max_new_tokens": 12,
        "block_length": 4,
        "scorer": "number",
        "temperatures": [0.0],
    }
    arguments = [
        *("--model_name_or_path", "d3llm-llada", "--dataset_name", str(tmp_path / "trajectories")),
        *("--extract", json.dumps(section), "--output_dir", str(tmp_path / "student"), "--use_cpu", "true"),
        *("--response_length", "12", "--max_steps", "1", "--per_device_train_batch_size", "2"),
        *("--report_to", "none", "--save_strategy", "no"),
    ]
    run_distill.main(arguments)
    store = read_trajectories(tmp_path / "trajectories")
    assert len(store) == 6 and (tmp_path / "student" / "model.safetensors").exists()

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "trajectories").iterdir()}
    run_distill.main(arguments)  # what is there is not decoded again
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "trajectories").iterdir()} == before


def parsed(folder, **recipe):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(folder / "out")} | recipe), encoding="utf-8")
    kinds = (run_distill.DistillScriptArguments, PseudoTrajectoryDistillConfig)
    return parse_args_with_config(kinds, ["--config", str(path), "--report_to", "none", "--use_cpu", "true"])


def test_null_in_a_recipe_leaves_an_argument_unset(tmp_path, capsys):
    named = {"model_name_or_path": "a", "dataset_name": "b"}
    script_args, args = parsed(tmp_path, **named, extract=None, save_dtype=None, learning_rate=None, window_sizes=[4])
    assert script_args.extract is None and script_args.save_dtype is None
    assert args.learning_rate == PseudoTrajectoryDistillConfig(str(tmp_path), report_to="none").learning_rate
    with pytest.raises(SystemExit):
        parsed(tmp_path, model_name_or_path="a", dataset_name=None)
    said = capsys.readouterr().err
    assert "arguments are required: --dataset_name" in said and said.count("\n") == 1  # no page of usage


def test_a_recipe_or_an_argument_that_cannot_be_read_is_named(tmp_path, capsys):
    kinds = (run_distill.DistillScriptArguments,)
    for path in (tmp_path / "nothing.yaml", tmp_path / "broken.yaml"):
        (tmp_path / "broken.yaml").write_text("a: [1")
        with pytest.raises(ValueError, match=r"`--config` must name a YAML file that can be read .got .*yaml"):
            parse_args_with_config(kinds, ["--config", str(path)])
    with pytest.raises(SystemExit):
        parse_args_with_config(kinds, ["--model_name_or_path", "a", "--dataset_name", "b", "--use_pefd", "true"])
    assert "unrecognized arguments: --use_pefd true Did you mean `--use_peft`?" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"`window_sizes` must hold positive window lengths .got 3"):
        PseudoTrajectoryDistillConfig(str(tmp_path), window_sizes=3, report_to="none")


@pytest.mark.every(3)
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dataset_name": "nothing.jsonl"}, r"`dataset_name` must name a file that exists.*nothing.jsonl"),
        ({"dataset_name": "empty.jsonl"}, r"`dataset_name` must name data that `datasets` reads.*empty.jsonl"),
        ({"dataset_name": "broken.jsonl"}, r"`dataset_name` must name data that .*broken.jsonl.*Correct the name"),
        ({"eval_dataset_name": "nothing.jsonl"}, "`eval_dataset_name` must name a file that exists"),
        ({"save_dtype": "int8"}, r"`save_dtype` must be a floating-point type of torch .got 'int8'"),
        ({"extract": "{x"}, r"`extract` must be JSON .got '{x'"),
        ({"extract": '{"foo": 1}'}, r"`extract` must map arguments of run_trajectories.py, `dataset_name` among them"),
        ({"model_name_or_path": "no/such/model"}, r"`model_name_or_path` must be a checkpoint folder.*no/such/model"),
        ({"tokenizer_name_or_path": "empty"}, r"`tokenizer_name_or_path` must have a tokenizer .*got 'empty'"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_before_the_training(changed, message, teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "broken.jsonl").write_text("{x\n")
    (tmp_path / "empty").mkdir()
    values = {"model_name_or_path": str(teacher / "model"), "dataset_name": str(teacher / "rows.jsonl")} | changed
    arguments = [word for name, value in values.items() for word in (f"--{name}", value)]
    more = ["--output_dir", "out", "--use_cpu", "true", "--report_to", "none", "--eval_strategy", "epoch"]
    with pytest.raises((ValueError, OSError), match=message):
        run_distill.main([*arguments, *more])


@pytest.mark.parametrize("section", ['["word_problems"]', '{"output_dir": "elsewhere"}', '{"use_cpu": true}'])
def test_what_else_gives_an_argument_of_the_extraction_is_refused(teacher, tmp_path, section):
    with pytest.raises(ValueError, match=r"`extract` must map arguments of run_trajectories\.py other than"):
        run_distill.main(
            [
                *("--model_name_or_path", "d3llm-llada", "--dataset_name", str(tmp_path), "--extract", section),
                *("--output_dir", str(tmp_path / "student"), "--use_cpu", "true"),
            ]
        )
