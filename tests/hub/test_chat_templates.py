"""MMaDA's chat template, which its code puts in the place of the one that its tokenizer was published with."""

import json
import shutil

import pytest
from official import tiny_tokenizer
from places import GOLDEN
from transformers import AutoTokenizer

from d3llm_hf import encode_chat, export_checkpoint
from d3llm_hf.hub.chat_templates import MMADA, own_template
from d3llm_hf.hub.sources import load_tokenizer


LLADAS = (
    "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + "
    "message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
)
TURNS = [
    {"role": "user", "content": " What is 2 + 3? "},
    {"role": "assistant", "content": "5"},
    {"role": "user", "content": "And 4 + 4?"},
]


@pytest.fixture
def folder(tmp_path):
    """A checkpoint with a tokenizer that has LLaDA's template."""
    folder = shutil.copytree(GOLDEN / "mmada-tiny-a", tmp_path / "mmada")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = LLADAS
    tokenizer.save_pretrained(folder)
    return folder


def test_a_conversation_is_what_the_official_code_makes_of_it(folder):
    tokenizer = load_tokenizer(str(folder), str(folder))
    assert tokenizer.chat_template == MMADA
    text = tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|start|><|start_header_id|>user<|end_header_id|>\nWhat is 2 + 3?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n5<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\nAnd 4 + 4?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n"
    )
    assert tokenizer.apply_chat_template(TURNS, tokenize=False) == text.removesuffix(
        "<|start_header_id|>assistant<|end_header_id|>\n"
    )
    thinking = tokenizer.decode(encode_chat(tokenizer, TURNS, enable_thinking=True).input_ids[0])
    assert thinking.count("You should first think about the reasoning process in the mind") == 1
    assert "</think> answer here\nAnd 4 + 4?<|eot_id|>" in thinking


def test_an_export_has_it_and_a_template_of_the_owners_stays(folder, tmp_path):
    exported = export_checkpoint(folder, tmp_path / "exported")
    assert AutoTokenizer.from_pretrained(exported).chat_template == MMADA
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    exported = export_checkpoint(folder, tmp_path / "own")
    for place in (folder, exported):
        assert load_tokenizer(str(place), str(place)).chat_template == tokenizer.chat_template


def test_inside_a_tokenizers_config_it_is_replaced_too(folder, tmp_path):
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": LLADAS.replace("\n", "\\n")}))
    exported = export_checkpoint(folder, tmp_path / "exported")
    assert "chat_template" not in json.loads((exported / "tokenizer_config.json").read_text())
    assert AutoTokenizer.from_pretrained(exported).chat_template == MMADA


def test_other_families_keep_theirs(official):
    assert own_template("llada", None) is None and own_template(None, LLADAS) is None
    assert own_template("mmada", None) == MMADA
    source = str(official["llada"])
    assert load_tokenizer(source, source).chat_template == tiny_tokenizer().chat_template
