"""Digests of what a model or a tokenizer holds, wherever it came from: equal ones give equal answers."""

import json
from hashlib import sha256
from typing import Any

import torch


def model_fingerprint(model: Any) -> str:
    """SHA-256 of a model: its class, its config, its settings of decoding and its weights by name."""
    configs = [model.config.to_dict(), model.generation_config.to_dict()]
    # Of where a checkpoint comes from, not what it is; and a cache that the decoding does not have.
    passing = ("transformers_version", "dtype", "auto_map", "architectures", "use_cache")
    known = [
        {n: v for n, v in config.items() if v is not None and n[:1] != "_" and n not in passing} for config in configs
    ]
    hashed = sha256(json.dumps([type(model).__name__, known], sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        hashed.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return hashed.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 of what decides the ids of a prompt: vocabulary, rules, special tokens and chat template."""
    rules = {}
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        for name in ("padding", "truncation"):  # set by calls
            rules.pop(name, None)
    parts = {
        "vocabulary": tokenizer.get_vocab(),
        "special_tokens": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template,
        "rules": rules,
    }
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
