"""Digests of what a model or a tokenizer holds, wherever it came from: equal ones give equal answers."""

import json
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from hashlib import sha256
from typing import Any

import torch


def model_fingerprint(model: Any) -> str:
    """SHA-256 of a model: its class, its config, its settings of decoding, its weights by name, and its adapters.

    Of weights that are somewhere else (offloaded) or that torch gives no bytes of, no two digests are equal.
    """
    configs = [model.config.to_dict(), model.generation_config.to_dict()]
    # Of where a checkpoint comes from, not what it is; and a cache that the decoding does not have.
    passing = ("transformers_version", "dtype", "auto_map", "architectures", "use_cache")
    known = [
        {n: v for n, v in config.items() if v is not None and n[:1] != "_" and n not in passing} for config in configs
    ]
    return _digest([type(model).__name__, known, *_adapters(model)], model)


def head_fingerprint(head: Any) -> str:
    """SHA-256 of a draft head, an `Eagle3Head`: its class, its sizes and its weights."""
    return _digest([type(head).__name__, asdict(head.config)], head)


def _digest(about: list[Any], module: Any) -> str:
    hashed = sha256(json.dumps(about, sort_keys=True, default=_canonical).encode())
    for name, value in sorted(module.state_dict().items()):
        for part in _parts(name, value):
            hashed.update(part)
    return hashed.hexdigest()


def _adapters(model: Any) -> Iterator[Any]:
    """PEFT's adapters: how each acts, which do, and how strongly; of all this their weights say nothing."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):  # a dictionary also of a model that transformers gave adapters
        return
    passing = ("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version")
    for name, config in sorted(configs.items()):
        settings = config.to_dict() if hasattr(config, "to_dict") else config
        yield [name, {field: value for field, value in settings.items() if field not in passing}]
    yield [model.__dict__.get(name) for name in ("active_adapter", "_adapters_disabled")]
    for name, module in model.named_modules():
        layer = vars(module)
        if "_active_adapter" in layer or "_disable_adapters" in layer:
            fields = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")
            yield [name, [layer.get(field) for field in fields]]


def _canonical(value: Any) -> Any:
    """What JSON does not know of configs: enumerations, data types, sets, whose order means nothing."""
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def _parts(name: str, value: Any) -> Iterator[bytes | memoryview]:
    """The bytes of an entry of a state: of a tensor, or of what quantised layers keep in place of one."""
    if isinstance(value, (list, tuple)):
        for place, each in enumerate(value):
            yield from _parts(f"{name}.{place}", each)
    elif not isinstance(value, torch.Tensor):
        yield f"{name} {value}".encode()
    elif value.is_quantized:
        yield from _parts(f"{name} {value.dtype}", value.dequantize())
    elif hasattr(value, "__tensor_flatten__"):  # a tensor made of others, as torchao's
        names, context = value.__tensor_flatten__()
        yield f"{name} {type(value).__name__} {context}".encode()
        for inner in sorted(names):
            yield from _parts(f"{name}.{inner}", getattr(value, inner))
    else:
        yield f"{name} {value.dtype} {tuple(value.shape)}".encode()
        flat = value.detach().cpu().contiguous().flatten() if not value.is_meta else None
        if flat is None:
            yield uuid.uuid4().bytes
        elif flat.numel():
            yield flat.view(torch.uint8).numpy().data


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
