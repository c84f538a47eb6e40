"""Names of checkpoints that cannot be loaded: the error names the argument, what is there, and the way out."""

import shutil

import pytest

from d3llm_hf.commands import generate
from d3llm_hf.hub.sources import load_tokenizer, loading


EMBEDDED = (
    r"`model` must be a checkpoint folder, an id on the Hub or one of "
    r"\['d3llm-block', 'd3llm-causal', 'd3llm-llada', 'd3llm-llada-teacher'\] "
)


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("file", r"which is a file\). Pass its folder"),
        ("folder", r"a folder without config.json\). `d3llm init`"),
        ("./nothing", r"got './nothing', which is none\). Correct the path"),
        ("no/thing/here", "which is none"),
        ("", r"got '', which is none"),
        ("./d3llm-lada", r"which is none\). Did you mean 'd3llm-llada'\? Correct"),
        ("someone/nothing", r"no folder here, and the Hub does not give it: no connection\). Correct the name"),
        ("d3llm-lada", r"no connection\). Did you mean 'd3llm-llada'\? Correct"),
    ],
)
def test_a_name_of_no_checkpoint_is_explained(name, pattern, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=EMBEDDED + ".*" + pattern), loading(name):
        raise OSError("no\nconnection.")


def test_a_checkpoint_that_cannot_be_read_is_named(official, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(official["llada"], folder)
    with loading(str(folder)):
        pass
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        OSError, match=r"`model` must be a whole checkpoint .got '.*model': .*model.safetensors.*again"
    ):
        generate.load(str(folder))
    with pytest.raises(OSError, match="`student` must be a whole checkpoint"), loading("d3llm-llada", "student"):
        raise OSError("damaged")


def test_a_checkpoint_without_a_tokenizer_says_where_one_is_missing(official, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(official["llada"], folder, ignore=shutil.ignore_patterns("*token*", "chat_template*"))
    with pytest.raises(ValueError, match=r"`model` must have a tokenizer beside its weights .got .*save_pretrained"):
        generate.load(str(folder))
    with pytest.raises(OSError, match=r"(?i)huggingface"):
        load_tokenizer("someone/nothing", "someone/nothing", local_files_only=True)
