"""Writes tiny checkpoint folders in the form in which LLaDA and Dream are published: config, weights, tokenizer."""

import json
import shutil
from pathlib import Path

from places import GOLDEN


VOCABULARY = 512
SPECIAL_TOKENS = (
    "<|start|>",
    "<|header|>",
    "<|/header|>",
    "<|turn|>",
    "<|end|>",
    "<|mask|>",
)  # the last ids: 506...511
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|header|>{{ message['role'] }}<|/header|>\n\n{{ message['content'] | trim }}<|turn|>"
    "{% endfor %}{% if add_generation_prompt %}<|header|>assistant<|/header|>\n\n{% endif %}"
)


def write_official(model_type: str, folder: Path) -> Path:
    """The golden checkpoint of the family where the repository has it, a random one otherwise; with a tokenizer."""
    golden = GOLDEN / f"{model_type.lower()}-tiny-a"
    if golden.is_dir():
        shutil.copytree(golden, folder)
    else:
        _write_random(model_type, folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_tokenizer():
    """A byte-level tokenizer of 512 tokens with a chat template; id 511 is the mask, 510 ends a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(f"<unused{i}>" for i in range(VOCABULARY - len(alphabet) - len(SPECIAL_TOKENS)))]
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|start|>",
        eos_token="<|end|>",
        pad_token="<|end|>",
        mask_token="<|mask|>",
        additional_special_tokens=["<|header|>", "<|/header|>", "<|turn|>"],
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def _write_random(model_type: str, folder: Path) -> None:
    from tiny import tiny_model

    model = tiny_model(model_type.lower(), vocab_size=VOCABULARY, width=32)
    model.save_pretrained(folder)
    for code in folder.glob("*.py"):
        code.unlink()
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").unlink()
