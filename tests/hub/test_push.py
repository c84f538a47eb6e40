"""Pushed repositories are whole, carry code and metadata, and load again; what fails leaves nothing half done.

The Hub is a double of its HTTP API on this machine (`hub_double.py`); `huggingface_hub` is the real one.
"""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from hub_double import TOKEN, HubDouble
from huggingface_hub import ModelCard, constants
from places import REPOSITORY

from d3llm_hf import push_folder
from d3llm_hf.cli import main
from d3llm_hf.hub.push import checked_files, left_out


ENTRIES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM")
PROMPT = torch.tensor([[5, 6, 7, 8]])
SETTINGS = {"max_new_tokens": 12, "block_length": 4}

# A process that has neither this package nor a login, and gets everything from the Hub.
LOAD_BACK = """
import json, sys
import torch
from transformers import AutoModel, AutoTokenizer
name, prompt, settings = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
model = AutoModel.from_pretrained(name, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
ids = torch.tensor(prompt)
out = model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
code = type(model).__module__.split(".")[0]
print(json.dumps([code, out.tolist(), tokenizer.mask_token_id, "d3llm_hf" in sys.modules]))
"""


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A double of the Hub that `huggingface_hub` talks to, logged in."""
    with HubDouble() as double:
        monkeypatch.setattr(constants, "ENDPOINT", double.url)
        template = f"{double.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between retries
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        huggingface_hub.close_session()
        yield double
        huggingface_hub.close_session()


@pytest.fixture
def folder(exported, tmp_path) -> Path:
    """An exported folder of its own, which a test may change."""
    return shutil.copytree(exported["llada"], tmp_path / "tiny-llada")


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in checked_files(folder)}


def metadata_of(card: bytes) -> dict:
    return yaml.safe_load(card.decode().split("---")[1])


def decoded(folder) -> list[list[int]]:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder)
    return model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **SETTINGS).tolist()


# What arrives


@pytest.mark.full  # loads it in a process of its own, as the default tests do of an exported one
def test_a_pushed_folder_arrives_whole_in_one_commit_and_generates_the_same_tokens_where_it_is_loaded(
    hub, folder, tmp_path, capsys
):
    (folder / "optimizer.pt").write_bytes(b"state")
    (folder / "checkpoint-5").mkdir()
    assert main(["push", str(folder), "me/tiny", "--private", "--message", "First"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{hub.url}/me/tiny/commit/{hub.repositories['me/tiny'].name_of(1)}\n"
    assert "not sent: checkpoint-5\n" in err and "not sent: optimizer.pt\n" in err
    assert hub.files("me/tiny") == contents(folder)
    assert hub.repositories["me/tiny"].messages == ["First"]
    assert hub.repositories["me/tiny"].private
    assert sum(request.startswith("POST /api/models/me/tiny/commit/") for request in hub.requests) == 1

    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_TOKEN")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    found = subprocess.run(
        [sys.executable, "-I", "-c", LOAD_BACK, "me/tiny", json.dumps(PROMPT.tolist()), json.dumps(SETTINGS)],
        cwd=tmp_path,
        env=environment | {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert json.loads(found.stdout.splitlines()[-1]) == ["transformers_modules", decoded(folder), 511, False]


@pytest.mark.full
def test_a_branch_a_pull_request_and_a_second_push_change_what_they_should_and_no_more(hub, folder):
    push_folder(folder, "tiny", revision="draft")  # a bare name: in one's own namespace
    repository = hub.repositories["me/tiny"]
    assert hub.files("me/tiny") == {}
    assert hub.files("me/tiny", "draft") == contents(folder)
    request = push_folder(folder, "me/tiny", create_pr=True)
    assert request.pr_url.endswith("/discussions/1")
    assert hub.files("me/tiny") == {}
    assert hub.files("me/tiny", "refs/pr/1") == contents(folder)
    # Weights that are not replaced by name would be loaded instead of the new ones; all else stays.
    repository.commits[0] |= {"model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"{}"}
    repository.commits[0] |= {"notes.md": b"mine"}
    push_folder(folder, "me/tiny")
    assert hub.files("me/tiny") == contents(folder) | {"notes.md": b"mine"}
    assert repository.messages[-1] == "Upload a checkpoint with its code"


def test_a_dry_run_checks_and_lists_but_sends_nothing(hub, folder, capsys):
    assert main(["push", str(folder), "me/tiny", "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert [line.split()[1] for line in out.splitlines()] == [file.name for file in checked_files(folder)]
    assert err.endswith("nothing was sent\n")
    assert hub.requests == []


# What fails


@pytest.mark.full
def test_an_interrupted_upload_leaves_no_half_commit_and_a_second_push_succeeds(hub, folder, capsys):
    hub.drops = 100
    assert main(["push", str(folder), "me/tiny"]) == 2
    assert "Nothing was committed to 'me/tiny'; push again" in capsys.readouterr().err
    assert hub.files("me/tiny") == {}
    assert hub.repositories["me/tiny"].messages == []
    hub.drops = 1  # one lost connection is retried by itself
    push_folder(folder, "me/tiny")
    assert hub.files("me/tiny") == contents(folder)
    assert len(hub.repositories["me/tiny"].messages) == 1


def test_a_push_beside_another_commit_is_refused_whole(hub, folder):
    hub.conflicts = 1
    with pytest.raises(ConnectionError, match=r"changed by another commit meanwhile \(status 409\)"):
        push_folder(folder, "me/tiny")
    assert hub.files("me/tiny") == {}
    push_folder(folder, "me/tiny")
    assert hub.files("me/tiny") == contents(folder)


def test_without_a_token_or_with_a_wrong_one_nothing_is_sent_and_no_token_is_shown(hub, folder, monkeypatch, capsys):
    wrong = "hf_" + "wrong" * 8
    monkeypatch.setenv("HF_TOKEN", wrong)
    assert main(["push", str(folder), "me/tiny"]) == 2
    monkeypatch.delenv("HF_TOKEN")
    assert main(["push", str(folder), "me/tiny"]) == 2
    out, err = capsys.readouterr()
    assert "does not let this token write to 'me/tiny' (status 401)" in err
    assert "needs a token that may write (got none). Log in with `hf auth login`" in err
    assert out == "" and wrong not in err
    assert hub.repositories == {}


def test_a_token_is_in_no_log_and_no_file_that_is_sent(hub, folder, caplog, capsys):
    caplog.set_level(logging.DEBUG)
    push_folder(folder, "me/tiny")
    hub.drops = 100
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    out, err = capsys.readouterr()
    assert caplog.text
    assert TOKEN not in caplog.text + out + err
    assert not any(TOKEN.encode() in content for content in hub.files("me/tiny").values())
    (folder / "results.json").write_text(json.dumps({"command": f"HF_TOKEN={TOKEN} run"}))
    with pytest.raises(ValueError, match=r"results\.json without what looks like a token of the Hub in it") as refused:
        push_folder(folder, "me/tiny")
    assert TOKEN not in str(refused.value)


def test_an_offline_environment_and_other_errors_are_told_apart(hub, folder, monkeypatch):
    from d3llm_hf.hub import push

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.close_session()
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE=1"):
        push_folder(folder, "me/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    with pytest.raises(KeyError):
        push._reported(lambda: {}["a bug"], "me/tiny")
    with pytest.raises(huggingface_hub.errors.RevisionNotFoundError):
        push_folder(folder, "me/tiny", revision="refs/pr/7")


@pytest.mark.parametrize("name", ["a/b/c", "me/-tiny", "me/ti ny", ""])
def test_a_malformed_repository_id_is_refused(folder, name):
    with pytest.raises(ValueError, match="`repo_id` must be 'owner/name'"):
        push_folder(folder, name)


def test_an_incomplete_or_damaged_folder_is_refused_with_what_writes_the_missing_part(folder, monkeypatch, tmp_path):
    def refused(match: str, **changes: bytes | None) -> None:
        broken = shutil.copytree(folder, tmp_path / "broken")
        for name, content in changes.items():
            (broken / name).unlink(missing_ok=True)
            if content is not None:
                (broken / name).write_bytes(content)
        with pytest.raises(ValueError, match=match):
            push_folder(broken, "me/tiny")
        shutil.rmtree(broken)

    config = json.loads((folder / "config.json").read_text())
    bare = {name: value for name, value in config.items() if name != "auto_map"}
    weights, card = (folder / "model.safetensors").read_bytes(), (folder / "README.md").read_text()
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    refused(
        r"the weights model\.safetensors as safetensors; pickles are never sent \(`model",
        **{"model.safetensors": None},
    )
    refused(r"model\.safetensors whole, not damaged", **{"model.safetensors": weights[:-1]})
    refused(r"model\.safetensors whole, not damaged", **{"model.safetensors": b"{}"})
    refused(r"the weights model-00001", **{"model.safetensors.index.json": json.dumps(index).encode()})
    refused(r"model\.safetensors\.index\.json, readable", **{"model.safetensors.index.json": b"{"})
    refused(r"config\.json, readable \(`d3llm export", **{"config.json": b"["})
    refused(
        r"`auto_map` in config\.json with \['AutoConfig', 'AutoModel'\]", **{"config.json": json.dumps(bare).encode()}
    )
    refused(r"modeling_llada\.py, which config\.json or its code names", **{"modeling_llada.py": None})
    refused(r"cache\.py, which", **{"cache.py": None})
    refused(r"a tokenizer \(`tokenizer\.save_pretrained\(FOLDER\)`\)", **{"tokenizer.json": None})
    refused(r"a tokenizer", **{"tokenizer_config.json": b'{"auto_map": {}}'})
    refused(r"generation_config\.json, readable", **{"generation_config.json": None})
    refused(r"README\.md with metadata \(`d3llm export", **{"README.md": None})
    refused(r"README\.md with readable metadata", **{"README.md": b"---\n[\n---\n"})
    refused(r"with `library_name` in its metadata.* `pipeline_tag`", **{"README.md": b"# A card"})
    local = card.replace("library_name:", "base_model: /home/me/model\nlibrary_name:")
    refused(r"a Hub id as `base_model` \(it says '/home/me/model'\)", **{"README.md": local.encode()})
    monkeypatch.setattr("d3llm_hf.hub.push.LARGEST_FILE", 1000)
    refused(r"model\.safetensors in files of at most 1e-06 GB")
    with pytest.raises(FileNotFoundError, match="`folder` must be a checkpoint folder"):
        checked_files(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="`message` must not be empty"):
        push_folder(folder, "me/tiny", message=" ")


def test_pickles_and_other_code_are_left_where_they_are(folder):
    for name in ("pytorch_model.bin", "training_args.bin", "rng_state.pth", "other.py", ".env"):
        (folder / name).write_bytes(b"x")
    assert set(left_out(folder)) == {"pytorch_model.bin", "training_args.bin", "rng_state.pth", "other.py", ".env"}


# Models and trainers


def test_a_model_pushes_weights_code_generation_config_and_a_card_with_metadata(hub, exported, folder):
    from transformers import AutoModel, AutoTokenizer

    from d3llm_hf.hub.model_card import results_metadata

    model = AutoModel.from_pretrained(exported["llada"])
    model.add_model_tags("mine")
    measured = REPOSITORY / "d3llm_hf" / "checkpoints" / "d3llm-llada" / "results.json"
    results = results_metadata(measured, "tiny")
    model.config._name_or_path = "GSAI-ML/LLaDA-8B-Instruct"
    more = {"license": "mit", "datasets": ["a/b"], **results}
    info = model.push_to_hub("me/tiny", tags=["extra"], metadata=more)
    assert info.commit_url.startswith(hub.url)
    files = hub.files("me/tiny")
    code = {file.name for file in exported["llada"].glob("*.py")}
    assert set(files) == {"README.md", "config.json", "generation_config.json", "model.safetensors", *code}
    assert set(json.loads(files["config.json"])["auto_map"]) == set(ENTRIES)
    data = metadata_of(files["README.md"])
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "text-generation")
    assert (data["base_model"], data["license"], data["datasets"]) == ("GSAI-ML/LLaDA-8B-Instruct", "mit", ["a/b"])
    assert {"diffusion-language-model", "llada", "mine", "extra"} <= set(data["tags"])
    accuracy = json.loads(measured.read_text())["rows"][0]["accuracy"]
    assert data["model-index"][0]["results"][0]["metrics"][0]["value"] == accuracy
    assert 'from_pretrained("me/tiny", trust_remote_code=True)' in files["README.md"].decode()

    # A card that is there stays, and weights under other names go.
    hub.repositories["me/tiny"].commits[1]["README.md"] = (
        b"---\nlicense: apache-2.0\ntags: [kept]\n---\n# My own words\n"
    )
    model.config._name_or_path = str(exported["llada"])
    model.push_to_hub("me/tiny", max_shard_size="20KB", revision="small")
    AutoTokenizer.from_pretrained(exported["llada"]).push_to_hub("me/tiny", revision="small")
    again = hub.files("me/tiny", "small")
    assert "model.safetensors" not in again and "model-00001-of-" in " ".join(again) and "tokenizer.json" in again
    card = again["README.md"].decode()
    assert "# My own words" in card and "- kept" in card and "license: apache-2.0" in card and "base_model" not in card
    copy = AutoModel.from_pretrained("me/tiny", revision="small", trust_remote_code=False)
    same = copy.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **SETTINGS).tolist()
    assert same == decoded(folder)


@pytest.mark.full
def test_trainers_push_model_code_tokenizer_generation_config_and_card(hub, tmp_path):
    from distillation import make_trainer
    from official import tiny_tokenizer

    trainer = make_trainer(
        tmp_path / "student",
        tiny_tokenizer(),
        max_steps=1,
        save_strategy="steps",
        save_steps=1,
        push_to_hub=True,
        hub_model_id="me/student",
        hub_token=TOKEN,
    )
    trainer.train()  # pushes its checkpoint in the background
    trainer._finish_current_push()
    early = hub.files("me/student")
    assert {"model.safetensors", "modeling_llada.py", "config.json", "training_args.bin"} <= set(early)
    assert TOKEN.encode() not in early["training_args.bin"]
    assert not (tmp_path / "student" / "checkpoint-1" / "training_args.bin").read_bytes().count(TOKEN.encode())
    del hub.repositories["me/student"].commits[-1]["training_args.bin"]
    trainer.push_to_hub(dataset="me/trajectories", finetuned_from="me/teacher", license="mit")
    files = hub.files("me/student")
    assert {"model.safetensors", "modeling_llada.py", "tokenizer.json", "generation_config.json"} <= set(files)
    assert not [name for name in files if "checkpoint" in name or name.endswith((".bin", ".pt", ".pth"))]
    data = metadata_of(files["README.md"])
    wanted = {"base_model": "me/teacher", "datasets": "me/trajectories", "license": "mit"}
    assert wanted | {"library_name": "transformers", "pipeline_tag": "text-generation"} == {
        name: data[name] for name in (*wanted, "library_name", "pipeline_tag")
    }
    assert "d3llm" in data["tags"]


def test_the_card_of_fine_tuning_says_what_the_hub_shows(tmp_path):
    from datasets import Dataset
    from distillation import ARGUMENTS, student
    from official import tiny_tokenizer

    from trainers.sft.config import MaskedDiffusionSFTConfig
    from trainers.sft.trainer import MaskedDiffusionSFTTrainer

    tokenizer = tiny_tokenizer()
    shared = ("save_strategy", "report_to", "use_cpu", "dataloader_pin_memory", "disable_tqdm")
    trainer = MaskedDiffusionSFTTrainer(
        model=student(tokenizer, max_sequence_length=256),
        args=MaskedDiffusionSFTConfig(
            str(tmp_path / "tuned"),
            max_prompt_length=64,
            response_length=64,
            max_steps=1,
            **{name: ARGUMENTS[name] for name in shared},
        ),
        train_dataset=Dataset.from_list([{"prompt": "a b", "completion": "c"}] * 4),
        processing_class=tokenizer,
    )
    trainer.create_model_card(finetuned_from="me/base", license="mit", tags="mine")
    data = metadata_of((tmp_path / "tuned" / "README.md").read_bytes())
    assert (data["base_model"], data["license"], data["library_name"]) == ("me/base", "mit", "transformers")
    assert data["pipeline_tag"] == "text-generation"
    assert {"mine", "diffusion-language-model", "d3llm"} <= set(data["tags"])


# Cards


def test_results_become_a_model_index_that_the_hub_takes(tmp_path):
    from d3llm_hf.hub.model_card import complete_card, results_metadata

    point = {"task": "word problems", "settings": {"entropy_threshold": 0.3}, "accuracy": 98.0, "tpf": 5.214}
    lines = tmp_path / "sweep.jsonl"
    lines.write_text(json.dumps(point | {"num_samples": 300, "seed": 4}) + "\n")
    text = complete_card("---\ntags: [mine]\nlicense: mit\n---\n# Words\n", "tiny", results=lines, base_model="a/b")
    card = ModelCard(text)
    assert card.text.strip() == "# Words"
    assert card.data.tags == ["mine", "diffusion-language-model", "masked-diffusion", "d3llm"]
    assert (card.data.license, card.data.base_model, card.data.pipeline_tag) == ("mit", "a/b", "text-generation")
    first, second = card.data.eval_results
    assert (first.metric_type, first.metric_value, first.metric_name) == (
        "accuracy",
        98.0,
        "accuracy (%), entropy_threshold=0.3",
    )
    assert (second.metric_type, second.metric_value) == ("tokens_per_forward", 5.21)
    assert first.dataset_args == {"samples": 300, "seed": 4}
    assert complete_card(text, "tiny", results=lines) == complete_card(text, "tiny")  # not twice
    with pytest.raises(FileNotFoundError, match="`results` must be a results file"):
        results_metadata(tmp_path / "none.json", "tiny")
    lines.write_text("{}\n")
    with pytest.raises(ValueError, match="`results` must be what"):
        results_metadata(lines, "tiny")
    with pytest.raises(ValueError, match="must begin with YAML metadata"):
        complete_card("---\n[\n---\n", "tiny")


def test_an_embedded_checkpoint_is_written_with_its_figures_and_may_be_pushed_at_once(tmp_path):
    from d3llm_hf import init_checkpoint
    from d3llm_hf.hub.sources import embedded_checkpoints

    for name in embedded_checkpoints():
        folder = init_checkpoint(name, tmp_path / name)
        if name != "d3llm-causal":  # which has no code to send
            assert checked_files(folder)
        data = metadata_of((folder / "README.md").read_bytes())
        assert data["model-index"][0]["results"][0]["metrics"], name
        text = (embedded_checkpoints()[name] / "README.md").read_text()
        assert (folder / "README.md").read_text().split("---\n", 2)[2].strip() == text.split("---\n", 2)[2].strip()


def test_an_export_takes_figures_from_a_results_file(official, tmp_path):
    results = REPOSITORY / "d3llm_hf" / "checkpoints" / "d3llm-llada" / "results.json"
    target = tmp_path / "out"
    assert main(["export", str(official["llada"]), str(target), "--results", str(results)]) == 0
    data = metadata_of((target / "README.md").read_bytes())
    assert data["model-index"][0]["name"] == "out"
    assert re.match(
        r"accuracy \(%\), decoding_method='llada'", data["model-index"][0]["results"][0]["metrics"][0]["name"]
    )
