"""lm-eval's `--use_cache`: an answer is given back only to what would give it again.

lm-eval looks an answer up by the text and the arguments of its request alone, whatever model the file was filled by.
Here the name of an answer also holds what decides it besides the request: weights, configs and tokenizer, data type
and device, settings of decoding and of the likelihood. So one file may serve several models.
"""

import json
import uuid
from collections.abc import Collection, Mapping
from dataclasses import asdict
from hashlib import sha256
from typing import Any

from ... import __version__
from ...fingerprints import model_fingerprint, tokenizer_fingerprint


def identity(model: Any, tokenizer: Any, settings: Mapping[str, Any]) -> str:
    """A digest of what decides the answer to a request.

    Args:
        model, tokenizer: as they are now; of a model the contents count, not where they come from.
        settings: everything else by name. What has no canonical form is never found again.
    """
    about = {
        "version": __version__,
        "model": model_fingerprint(model),
        "traits": asdict(model.traits) if hasattr(model, "traits") else None,
        "attention": getattr(model.config, "_attn_implementation", None),
        "device": model.device.type,
        "training": model.training,
        "tokenizer": [type(tokenizer).__name__, tokenizer_fingerprint(tokenizer)],
        "spaces": getattr(tokenizer, "clean_up_tokenization_spaces", None),
        "settings": settings,
    }
    return sha256(json.dumps(about, sort_keys=True, default=_canonical).encode()).hexdigest()


def _canonical(value: Any) -> Any:
    return value.to_dict() if hasattr(value, "to_dict") else uuid.uuid4().hex


def keep_apart(answers: Any, owner: str, drawn: Collection[str]) -> None:
    """Makes the table of a cache find and keep the answers of one owner, beside those of others.

    Args:
        answers: lm-eval's `SqliteDict`; only the names of its rows change.
        owner: from [`identity`].
        drawn: lm-eval's names of requests whose answers are drawn at random, filled as these are met; such an answer
            is not found again, or all repeats of a request would be one answer.

    Raises:
        ImportError: where sqlitedict is too old to have its names changed.
    """
    if not hasattr(answers, "encode_key"):
        raise ImportError("`use_cache` needs sqlitedict 2.1 (got an older one). `pip install -U sqlitedict`.")

    def name_of(key: str) -> str:
        return f"{owner}:{uuid.uuid4().hex if key in drawn else key}"

    answers.encode_key = name_of
    answers.decode_key = lambda name: name.rpartition(":")[2]
