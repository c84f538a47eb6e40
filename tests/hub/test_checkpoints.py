"""Exported folders are whole, carry their code, and run where this package is not installed."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import REPOSITORY, SUPPORT
from thin import some_of

import d3llm_hf
from d3llm_hf import export_checkpoint, init_checkpoint
from d3llm_hf.hub import checkpoints, sources
from d3llm_hf.registration import families


FAMILIES = ("llada", "Dream")
ALL_ENTRIES = {"AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM"}


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def code_of(folder: Path) -> set[str]:
    return {file.name for file in folder.glob("*.py")}


@pytest.fixture(scope="module", params=some_of(FAMILIES, every=2))
def facts(request, exported, tmp_path_factory) -> dict:
    """What a process finds out of a family that has neither this package nor optional dependencies."""
    work, source = tmp_path_factory.mktemp("fresh"), exported[request.param]
    shutil.copytree(source, work / "folder")
    shutil.copytree(source, work / "canary")
    for code in (work / "canary").glob("*.py"):
        code.write_text(f"from pathlib import Path\nPath({str(work / 'ran')!r}).touch()\n{code.read_text()}")
    script = shutil.copy(SUPPORT / "fresh_process.py", work)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(
        [sys.executable, "-I", script, "folder", "canary", "resaved", "ran"],
        cwd=work,
        env=environment | {"HF_HOME": str(work / "home"), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    model = {"llada": "LLaDAModelLM", "Dream": "DreamModel"}[request.param]
    return json.loads(process.stdout.splitlines()[-1]) | {"model": model, "resaved": work / "resaved"}


def test_every_auto_class_loads_an_exported_folder_in_a_fresh_process(facts):
    assert facts["imported"] == []
    for auto in ("AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM"):
        assert facts[auto] == f"transformers_modules:{facts['model']}"
    assert facts["config"] in ("LLaDAConfig", "DreamConfig")
    assert facts["answers agree"]


def test_generate_and_the_pipeline_work_in_a_fresh_process(facts):
    name, shape, per_forward_is_float = facts["output"]
    assert name == "D3LLMGenerationOutput"
    assert shape[0] == 1
    assert per_forward_is_float
    assert facts["prompt kept"]
    assert facts["pipeline"] == ["str", True]  # the same twice: the folder says that it is not sampled


def test_saving_again_without_the_package_keeps_code_and_auto_map(facts, exported):
    family = "llada" if facts["model"] == "LLaDAModelLM" else "Dream"
    assert facts["resaved answers agree"]
    assert code_of(facts["resaved"]) == code_of(exported[family])
    assert set(config_of(facts["resaved"])["auto_map"]) == ALL_ENTRIES


def test_no_code_of_a_checkpoint_runs_without_the_flag(facts):
    assert facts["canary lives"]
    assert set(facts["without the flag"].values()) == {"ValueError"}, facts["without the flag"]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_keeps_weights_and_tokenizer_and_adds_the_code(family, official, exported):
    source, folder = official[family], exported[family]
    for name in ("model.safetensors", "tokenizer.json"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    assert config_of(folder) == checkpoints.with_auto_map(config_of(source))
    assert set(config_of(folder)["auto_map"]) == ALL_ENTRIES
    for file in checkpoints.code_files(family):
        assert (folder / file.name).read_text() == file.read_text()
    settings = json.loads((folder / "generation_config.json").read_text())
    assert settings["do_sample"] is False
    assert "_from_model_config" not in settings
    assert (settings["eos_token_id"], settings["mask_token_id"]) == (510, 511)
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n")
    assert f'from_pretrained("{folder.name}", trust_remote_code=True)' in card
    assert sorted(file.name for file in folder.parent.iterdir() if file.name.startswith(".")) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_the_code_that_is_copied_is_what_transformers_would_copy(family):
    from transformers.dynamic_module_utils import get_relative_import_files

    files = checkpoints.code_files(family)
    model = next(file for file in files if file.stem == families.FAMILIES[family].model_file)
    assert {str(file) for file in files} == {str(model), *get_relative_import_files(str(model))}
    for file in files:
        imported = re.findall(r"^\s*(?:from|import)\s+([\w.]+)", file.read_text(), re.MULTILINE)
        assert not [name for name in imported if name.split(".")[0] in ("d3llm_hf", "trainers")], file


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_loaded_and_saved_by_the_package_carries_code_and_auto_map(family, official, exported, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(official[family], trust_remote_code=False)
    assert type(model).__module__.startswith("d3llm_hf.models.")
    model.save_pretrained(tmp_path / "saved")
    assert code_of(tmp_path / "saved") == code_of(exported[family])
    assert set(config_of(tmp_path / "saved")["auto_map"]) == ALL_ENTRIES


def test_the_package_is_used_instead_of_a_checkpoints_code_even_with_the_flag(exported, tmp_path):
    from transformers import AutoModel

    folder = shutil.copytree(exported["llada"], tmp_path / "canary")
    for code in folder.glob("*.py"):
        code.write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n{code.read_text()}")
    assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)) is d3llm_hf.LLaDAModelLM
    export_checkpoint(folder, tmp_path / "copy")
    assert not (tmp_path / "ran").exists()
    assert "touch" not in (tmp_path / "copy" / "modeling_llada.py").read_text()


def test_a_trainer_checkpoint_carries_code_and_auto_map(official, exported, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModel, Trainer, TrainingArguments

    model = AutoModel.from_pretrained(official["llada"])
    row = {"input_ids": torch.arange(8), "labels": torch.arange(8)}
    arguments = TrainingArguments(
        tmp_path, max_steps=1, save_steps=1, per_device_train_batch_size=1, report_to="none", use_cpu=True
    )
    Trainer(model, arguments, train_dataset=[row, row]).train()
    assert code_of(tmp_path / "checkpoint-1") == code_of(exported["llada"])
    assert set(config_of(tmp_path / "checkpoint-1")["auto_map"]) == ALL_ENTRIES


def test_an_existing_folder_is_left_alone_unless_overwrite_is_asked_for(official, tmp_path):
    folder = export_checkpoint(official["llada"], tmp_path / "folder")
    (folder / "mine.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match=r"`destination` must not exist or be empty .*overwrite=True"):
        export_checkpoint(official["llada"], folder)
    assert (folder / "mine.txt").read_text() == "keep me"
    export_checkpoint(official["llada"], folder, overwrite=True, decoding_method="llada")
    assert not (folder / "mine.txt").exists()
    assert json.loads((folder / "generation_config.json").read_text())["decoding_method"] == "llada"


@pytest.mark.parametrize("content", ["notes.txt", ".git/HEAD"])
def test_overwrite_never_replaces_what_is_no_checkpoint(content, official, tmp_path):
    file = tmp_path / "home" / content
    file.parent.mkdir(parents=True)
    file.write_text("keep me")
    if content == ".git/HEAD":
        (tmp_path / "home" / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="`overwrite` replaces checkpoint folders only"):
        export_checkpoint(official["llada"], tmp_path / "home", overwrite=True)
    assert file.read_text() == "keep me"


def test_a_source_is_never_replaced_by_its_own_export(official, tmp_path):
    folder = shutil.copytree(official["llada"], tmp_path / "outer" / "inner")
    shutil.copy(folder / "config.json", tmp_path / "outer")
    for destination in (folder, tmp_path / "outer"):
        with pytest.raises(ValueError, match="`destination` must not be `source`, nor hold it"):
            export_checkpoint(folder, destination, overwrite=True)
    assert (folder / "model.safetensors").is_file()


def test_an_interrupted_export_leaves_nothing_and_keeps_what_was_there(official, tmp_path, monkeypatch):
    folder = export_checkpoint(official["llada"], tmp_path / "folder")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "render_card", interrupted)
    for destination in (folder, tmp_path / "other"):
        with pytest.raises(KeyboardInterrupt):
            export_checkpoint(official["llada"], destination, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_failed_rename_puts_the_old_folder_back(official, tmp_path, monkeypatch):
    folder = export_checkpoint(official["llada"], tmp_path / "folder")
    rename = os.rename

    def failing(source, target):
        if Path(source).name == "new":
            raise OSError("disk")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="disk"):
        export_checkpoint(official["llada"], folder, overwrite=True)
    assert (folder / "model.safetensors").is_file()


def test_sharded_weights_are_copied_whole_and_a_missing_shard_is_named(official, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(official["llada"], source)
    os.rename(source / "model.safetensors", source / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    (source / "LICENSE").write_text("terms")
    folder = export_checkpoint(source, tmp_path / "folder")
    assert (folder / "model-00001-of-00001.safetensors").is_file()
    assert (folder / "model.safetensors.index.json").is_file()
    assert (folder / "LICENSE").read_text() == "terms"
    for name in ("model-00002-of-00002.safetensors", "../llada/model.safetensors"):
        index["weight_map"]["b"] = name
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(FileNotFoundError, match="`source` must hold every shard"):
            export_checkpoint(source, tmp_path / "other")


def test_a_dream_tokenizer_with_its_own_code_becomes_the_qwen2_one_that_it_is(official, tmp_path):
    from transformers import AutoTokenizer

    source = shutil.copytree(official["Dream"], tmp_path / "source")
    (source / "chat_template.jinja").unlink()
    vocabulary = json.loads((source / "tokenizer.json").read_text())["model"]["vocab"]
    (source / "tokenizer.json").unlink()
    (source / "vocab.json").write_text(json.dumps(vocabulary))
    (source / "merges.txt").write_text("#version: 0.2\n")
    reference = ["tokenization_dream.DreamTokenizer", None]
    settings = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": reference},
        "mask_token": "<|mask|>",
    }
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "tokenization_dream.py").write_text("raise RuntimeError('must not run')")
    folder = export_checkpoint(source, tmp_path / "folder")
    assert not (folder / "tokenization_dream.py").exists()
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    assert tokenizer.decode(tokenizer("a b").input_ids) == "a b"

    settings["tokenizer_class"] = "Other"
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="custom class 'Other'"):
        export_checkpoint(source, tmp_path / "other")
    shutil.copy(official["Dream"] / "tokenizer.json", source)
    again = export_checkpoint(source, tmp_path / "again")
    assert json.loads((again / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_what_cannot_be_exported_is_refused_with_a_way_out(official, tmp_path):
    def source(name: str, **changes) -> Path:
        folder = shutil.copytree(official["llada"], tmp_path / name)
        (folder / "config.json").write_text(json.dumps(config_of(folder) | changes))
        return folder

    def refused(error, match, folder, **options):
        with pytest.raises(error, match=match):
            export_checkpoint(folder, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    refused(
        ValueError,
        r"model_type \['llada', 'mmada', 'Dream', 'llada2_moe', 'sdar', 'sdar_moe', 'Fast_dLLM_Qwen', 'refusion'\] "
        r"\(got 'gpt2'",
        source("gpt2", model_type="gpt2"),
    )
    refused(ValueError, "`alibi` must be False", source("alibi", alibi=True))
    refused(ValueError, "`revision` applies to a `source` on the Hub", official["llada"], revision="main")
    refused(ValueError, "`decoding_method` must be one of", official["llada"], decoding_method="d3lm")
    refused(FileNotFoundError, "a checkpoint folder or a Hub id", tmp_path / "nowhere" / "at" / "all")

    pickled = source("pickled")
    os.rename(pickled / "model.safetensors", pickled / "pytorch_model.bin")
    refused(ValueError, "only pytorch_model.bin, which is a pickle", pickled)
    (pickled / "pytorch_model.bin").unlink()
    refused(ValueError, "with no weights", pickled)
    (pickled / "config.json").write_text("{")
    refused(ValueError, "`config.json` must be JSON", pickled)
    (pickled / "config.json").write_text("[]")
    refused(ValueError, "`config.json` must hold a JSON object", pickled)
    (pickled / "config.json").unlink()
    (pickled / "adapter_config.json").touch()
    refused(FileNotFoundError, "config.json .* adapter: merge it first", pickled)


def test_a_hub_id_is_fetched_without_code_and_named_in_the_card(official, tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}
    source = shutil.copytree(official["Dream"], tmp_path / "snapshot")
    (source / "README.md").write_text("---\nlicense: mit\nlanguage: en\ndatasets:\n- a/b\n---\ntext")

    def snapshot_download(repo_id, revision, allow_patterns):
        asked.update(repo_id=repo_id, revision=revision, patterns=allow_patterns)
        return str(source)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    folder = export_checkpoint("Dream-org/Dream-v0-Instruct-7B", tmp_path / "folder", revision="abc")
    assert asked["repo_id"] == "Dream-org/Dream-v0-Instruct-7B"
    assert asked["revision"] == "abc"
    assert not [pattern for pattern in asked["patterns"] if pattern.endswith((".py", ".bin", "*"))][2:]  # documents
    card = (folder / "README.md").read_text()
    assert "base_model: Dream-org/Dream-v0-Instruct-7B" in card
    assert "license: mit" in card
    (source / "README.md").write_text("---\n[\n---\n")  # unreadable metadata is no reason to fail
    assert "license" not in (export_checkpoint(source, tmp_path / "other") / "README.md").read_text().split("---")[1]


def test_init_writes_an_embedded_checkpoint_and_suggests_a_near_name(official, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "embedded_checkpoints", lambda: {"d3llm-llada": official["llada"]})
    monkeypatch.chdir(tmp_path)
    folder = init_checkpoint("d3llm-llada")
    assert folder == tmp_path / "d3llm-llada"
    assert set(config_of(folder)["auto_map"]) == ALL_ENTRIES
    assert "license: apache-2.0" in (folder / "README.md").read_text()
    with pytest.raises(ValueError, match=r"one of .*got 'd3llm-lada'.*Did you mean 'd3llm-llada'"):
        init_checkpoint("d3llm-lada")


def test_every_embedded_checkpoint_is_small_complete_and_brings_no_code():
    for name, folder in sources.embedded_checkpoints().items():
        assert name == folder.name
        assert (folder / "model.safetensors").stat().st_size <= 4 * 2**20
        assert (folder / "tokenizer.json").is_file()
        assert (folder / "generation_config.json").is_file()
        assert code_of(folder) == set()
        if name == "d3llm-causal":
            continue
        checkpoints._validated(config_of(folder), checkpoints._generation_config(folder, config_of(folder), None))


def test_the_embedded_causal_checkpoint_is_a_class_of_transformers_written_as_it_is(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    from d3llm_hf import encode_chat

    source = sources.embedded_checkpoints()["d3llm-causal"]
    folder = init_checkpoint("d3llm-causal", tmp_path / "twin")
    assert code_of(folder) == set() and "auto_map" not in config_of(folder)
    for file in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json"):
        assert (folder / file).read_bytes() == (source / file).read_bytes()
    assert "diffusion" not in (folder / "README.md").read_text().split("---")[1]
    with pytest.raises(FileExistsError):
        init_checkpoint("d3llm-causal", folder)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder),
    )
    assert type(model) is LlamaForCausalLM and model.num_parameters() == 899_328
    problem = "Tom has 8 apples. He buys 7 more. He gives 4 to a friend. How many apples does Tom have now?"
    inputs = encode_chat(tokenizer, [{"role": "user", "content": problem}])
    written = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(written, skip_special_tokens=True).strip().endswith("#### 11")
    assert written[-1] in model.generation_config.eos_token_id
    with pytest.raises(ValueError, match=r"`source` must be a checkpoint of model_type .*got 'llama'"):
        export_checkpoint(source, tmp_path / "out")


def test_no_source_file_reads_pickles():
    forbidden = re.compile(
        r"^\s*(?:import|from)\s+(?:pickle|dill|cloudpickle|joblib|shelve)\b|allow_pickle\s*=\s*True"
        r"|torch\.load\((?![^)]*weights_only=True)|weights_only\s*=\s*False",
        re.MULTILINE,
    )
    files = [file for folder in ("d3llm_hf", "trainers") for file in (REPOSITORY / folder).rglob("*.py")]
    assert files
    assert [str(file) for file in files if forbidden.search(file.read_text())] == []


def test_a_name_is_an_existing_path_then_an_embedded_checkpoint_then_an_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sources.checkpoint_source("d3llm-llada") == str(sources.embedded_checkpoints()["d3llm-llada"])
    assert sources.checkpoint_source("someone/a-model") == "someone/a-model"
    (tmp_path / "d3llm-llada").mkdir()
    assert sources.checkpoint_source("d3llm-llada") == "d3llm-llada"


def test_settings_of_the_sources_method_are_not_exported_for_another_one(tmp_path):
    import torch
    from transformers import AutoModel

    source = sources.embedded_checkpoints()["d3llm-llada"]
    assert "entropy_threshold" in json.loads((source / "generation_config.json").read_text())
    folder = export_checkpoint(source, tmp_path / "other", decoding_method="fast_dllm")
    settings = json.loads((folder / "generation_config.json").read_text())
    assert settings["decoding_method"] == "fast_dllm" and not {"entropy_threshold", "block_length"} & set(settings)
    assert AutoModel.from_pretrained(folder).generate(torch.tensor([[5, 6]]), max_new_tokens=4).shape == (1, 6)
    kept = export_checkpoint(source, tmp_path / "same", decoding_method="d3llm")
    assert "entropy_threshold" in json.loads((kept / "generation_config.json").read_text())
