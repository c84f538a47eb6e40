"""Tokenizers as they are published: Dream's, which names a class of its own, and those without a token for padding."""

import json
import shutil

import pytest
from official import tiny_tokenizer
from transformers import AutoTokenizer, Qwen2Tokenizer

from d3llm_hf import Chat, cli, encode_chat, encode_infill, encode_text, export_checkpoint
from d3llm_hf.commands import generate
from d3llm_hf.evaluation.harness.loading import load_checkpoint
from d3llm_hf.hub.sources import load_tokenizer
from d3llm_hf.text import encode_chats
from trainers import run_sft
from trainers.common.loading import load_named


MESSAGES = [{"role": "user", "content": "ab"}]
SPECIAL = {506: "<|header|>", 507: "<|/header|>", 509: "<|turn|>", 510: "<|end|>", 511: "<|mask|>"}


@pytest.fixture(params=["with a gap", "in a row"])
def dream(official, request, tmp_path):
    """Dream's folder as it is published: vocab.json, merges.txt, and a class whose code must not run."""
    folder = tmp_path / "dream"
    shutil.copytree(official["Dream"], folder)
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    last = 256 if request.param == "with a gap" else 506
    kept = {piece: index for piece, index in vocabulary.items() if index < last}
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(kept))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = SPECIAL | {508: "<|beginoftext|>"}
    settings = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": {
            str(index): {"content": special[index], "special": True} for index in sorted(special)
        },
        "eos_token": "<|end|>",
        "pad_token": "<|end|>",
        "mask_token": "<|mask|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenization_dream.py").write_text("raise RuntimeError('remote code ran')\n")
    return folder


def test_dreams_tokenizer_is_qwen2s_under_another_name_with_the_ids_that_it_declares(dream, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(dream)
    assert type(tokenizer) is Qwen2Tokenizer
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL.values()))
    assert ids == list(SPECIAL) and (tokenizer.mask_token_id, tokenizer.eos_token_id) == (511, 510)
    text = "a b<|turn|><|mask|>"
    expected = [*tiny_tokenizer()("a b").input_ids, 509, 511]
    assert tokenizer(text).input_ids == expected and tokenizer.decode(expected) == text
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "Qwen2Tokenizer" and "auto_map" not in saved
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")(text).input_ids == expected
    exported = export_checkpoint(dream, tmp_path / "exported")
    assert AutoTokenizer.from_pretrained(exported, trust_remote_code=True)(text).input_ids == expected


@pytest.mark.every(2)
def test_commands_evaluation_and_trainers_read_dreams_tokenizer(dream, tmp_path, capsys):
    name = str(dream)
    tokenizers = [generate.load(name)[1], load_checkpoint(name)[1], load_named(name, None, torch_dtype="float32")[1]]
    assert {type(tokenizer) for tokenizer in tokenizers} == {Qwen2Tokenizer}
    assert cli.main(["generate", name, "a b", "--max-new-tokens", "4"]) == 0
    assert "forwards" in capsys.readouterr().err
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    named = {"model_name_or_path": name, "dataset_name": tmp_path / "rows.jsonl", "output_dir": tmp_path / "out"}
    named |= {"max_steps": 1, "max_prompt_length": 40, "response_length": 8, "report_to": "none", "use_cpu": True}
    named |= {"per_device_train_batch_size": 1, "use_peft": True, "lora_r": 2, "disable_tqdm": True}
    run_sft.main([part for key, value in named.items() for part in (f"--{key}", str(value))])
    assert type(AutoTokenizer.from_pretrained(tmp_path / "out")) is Qwen2Tokenizer


def test_another_tokenizer_with_code_of_its_own_is_neither_run_nor_asked_about(dream):
    file = dream / "tokenizer_config.json"
    file.write_text(file.read_text().replace("DreamTokenizer", "OtherTokenizer"))
    with pytest.raises(ValueError, match=r"`model` must have a tokenizer .*custom code.*"):
        load_tokenizer(str(dream), "mine")


# ---- without a token for padding -----------------------------------------------------------------------------------


@pytest.fixture
def unpadded():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    return tokenizer


def test_one_prompt_needs_no_token_for_padding(unpadded):
    padded = tiny_tokenizer()
    for encode in (
        lambda tokenizer: encode_text(tokenizer, "ab"),
        lambda tokenizer: encode_chat(tokenizer, MESSAGES),
        lambda tokenizer: encode_infill(tokenizer, ["a", 2, "b"]),
    ):
        ours, theirs = encode(unpadded), encode(padded)
        assert {name: table.tolist() for name, table in ours.items()} == {
            name: table.tolist() for name, table in theirs.items()
        }
        assert type(ours) is type(theirs) and ours.to("cpu")["input_ids"].shape[0] == 1


def test_conversations_of_unequal_lengths_are_padded_under_a_mask(unpadded):
    chats = [MESSAGES, [{"role": "user", "content": "abcd"}]]
    for tokenizer in (unpadded, tiny_tokenizer()):
        batch = encode_chats(tokenizer, chats)
        for row, chat in enumerate(chats):
            seen = batch["attention_mask"][row].bool()
            assert batch["input_ids"][row][seen].tolist() == encode_chat(tokenizer, chat)["input_ids"][0].tolist()
            assert seen.long().diff().min() >= 0  # zeros on the left
    unpadded.eos_token = None
    assert encode_chats(unpadded, chats)["input_ids"][0, 0] == 0


def test_commands_need_no_token_for_padding(official, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(official["llada"], folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    model, tokenizer = generate.load(str(folder))
    assert tokenizer.pad_token_id is None
    for more in ([], ["--chat"]):
        assert cli.main(["generate", str(folder), "ab", "--max-new-tokens", "4", *more]) == 0
    assert cli.main(["trace", str(folder), "ab", "--max-new-tokens", "4", "-o", str(tmp_path / "t.html")]) == 0
    turn = Chat(model, tokenizer, max_new_tokens=4).ask("ab")
    assert list(turn) and turn.output.sequences.shape[0] == 1
    capsys.readouterr()
