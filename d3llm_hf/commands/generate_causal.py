"""`d3llm generate` with a causal model of transformers, which answers from left to right."""

import argparse
from collections.abc import Mapping
from typing import Any

from ..hub.loading import load_causal


def prepare(args: argparse.Namespace, settings: Mapping[str, Any]) -> tuple[Any, Any, str, dict[str, Any]]:
    """Model, tokenizer, one of `AR_METHODS` that needs no other model (`"ar"` where none is named), and its settings.

    Args:
        args: the command's options.
        settings: of decoding, as the options give them.

    Raises:
        ValueError: for a canvas to watch, and for a method or setting of diffusion.
    """
    from ..autoregressive.methods import AR_METHODS, complete_settings

    method = settings.get("decoding_method", "ar")
    alone = [name for name, row in AR_METHODS.items() if row.needs is None]
    if args.watch:
        raise ValueError(
            f"`--watch` shows a canvas, and a causal model has none (got it with {args.model!r}). Leave it out."
        )
    if method not in alone:
        raise ValueError(
            f"`--decoding-method` must be one of {alone} for a causal model (got {method!r} with {args.model!r}). "
            "Leave it out for plain decoding; what drafts by another model is for `d3llm sweep` and Python."
        )
    complete_settings(method, _own(settings))  # before anything is loaded
    model, tokenizer = load_causal(args.model, device=args.device, dtype=args.dtype, revision=args.revision)
    return model, tokenizer, method, dict(settings)


def answer(model: Any, inputs: Mapping[str, Any], method: str, settings: Mapping[str, Any], length: int) -> Any:
    """The output for a prompt of one row, of at most `length` new tokens."""
    from ..autoregressive.generate import generate

    return generate(
        model,
        inputs["input_ids"],
        inputs["attention_mask"],
        method=method,
        settings=_own(settings),
        max_new_tokens=length,
        seed=settings.get("seed"),
    )


def _own(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Without those that are arguments of `generate`."""
    return {name: value for name, value in settings.items() if name not in ("decoding_method", "seed")}
