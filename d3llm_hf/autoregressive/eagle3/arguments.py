"""What a call of `eagle3_generate` may say: prompts, lengths, stop tokens, sampling and the size of the tree."""

from typing import Any

import torch

from ...models.input_shapes import check_shapes
from ...models.plain_values import plain
from ...models.prompt_checks import check_tokens
from ...models.scoring import Sampler
from ...models.stock_settings import SAMPLING
from ...models.text_config import text_config
from ...models.token_ids import check_inside, check_kind
from .head import Eagle3Head
from .verify import Choice


def checked_prompt(model: Any, input_ids: Any, attention_mask: Any, max_new_tokens: int) -> torch.Tensor:
    """The tokens `(n,)` of a batch of one, without the padding on its left, where the model is.

    Raises:
        TypeError, ValueError: for other shapes or types, several rows, padding elsewhere, an empty prompt, and a text
            that is longer than the model has positions.
    """
    # 1. One row of tokens
    check_shapes("input_ids", input_ids, {"attention_mask": attention_mask}, None)
    config = text_config(model.config)
    check_tokens(input_ids, config.vocab_size)
    if input_ids.shape[0] != 1:
        raise ValueError(
            f"`input_ids` must be a batch of one, since a tree is drafted for one text (got {input_ids.shape[0]} "
            "rows). Call once for each row."
        )

    # 2. Without padding
    tokens = input_ids[0].long()
    if attention_mask is not None:
        seen = attention_mask[0].bool().to(tokens.device)
        if (seen.long().diff() < 0).any():
            raise ValueError(
                "`attention_mask` must have its zeros on the left (got one behind a token). Pad on the left, or not "
                "at all."
            )
        tokens = tokens[seen]
    if not len(tokens):
        raise ValueError("`input_ids` must hold a token to go on from (got an empty prompt). Begin with one.")

    # 3. Within the model's positions
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and len(tokens) + max_new_tokens > longest:
        raise ValueError(
            f"`input_ids` and `max_new_tokens` must fit into the model's {longest} positions (got {len(tokens)} and "
            f"{max_new_tokens}). Shorten one of them."
        )
    return tokens.to(model.device)


def checked_count(name: str, value: Any, least: int = 1) -> int:
    """An integer of at least `least`."""
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer of at least {least} (got {value!r}). Pass for example {least}.")
    if value < least:
        raise ValueError(f"`{name}` must be an integer of at least {least} (got {value}). Pass for example {least}.")
    return value


def checked_stops(model: Any, eos_token_id: Any) -> frozenset[int]:
    """The stop tokens of a call: those of the model's generation config where none are given.

    Raises:
        TypeError, ValueError: for what is no token of the model.
    """
    given = plain(eos_token_id)
    if given is None:
        given = getattr(model.generation_config, "eos_token_id", None)
    if given is None:
        return frozenset()
    check_kind("eos_token_id", given)
    check_inside(
        "`eos_token_id`", given, text_config(model.config).vocab_size, "Pass the tokenizer's, or [] for none."
    )
    return frozenset(given if isinstance(given, list | tuple) else [given])


def checked_choice(do_sample: Any, temperature: Any, top_p: Any, top_k: Any, seed: Any) -> Choice:
    """How the target chooses.

    Raises:
        TypeError, ValueError: for numbers that transformers' samplers could not follow, and for settings of sampling
            beside `do_sample=False`.
    """
    given = {"temperature": plain(temperature), "top_k": plain(top_k), "top_p": plain(top_p), "seed": plain(seed)}
    do_sample = plain(do_sample)
    if not isinstance(do_sample, bool):
        raise TypeError(f"`do_sample` must be True or False (got {do_sample!r}). Pass one of them.")
    if not do_sample:
        neutral = {"temperature": 1}
        for name, value in given.items():
            if value is not None and value != neutral.get(name):
                raise ValueError(
                    f"`{name}` has no effect on greedy decoding (got {value!r} with `do_sample=False`). Leave it out, "
                    "or pass `do_sample=True`."
                )
        return Choice()
    for name in ("temperature", "top_k", "top_p"):
        types, rule, holds = SAMPLING[name]
        value = given[name]
        if value is None and name != "temperature":
            continue
        if isinstance(value, bool) or not isinstance(value, types):
            raise TypeError(f"`{name}` must be {rule} (got {value!r}). Leave it out for its default.")
        if not holds(value):
            hint = " `do_sample=False` is greedy decoding." if name == "temperature" and value == 0 else ""
            raise ValueError(f"`{name}` must be {rule} (got {value!r}). Leave it out for its default.{hint}")
    seed = given["seed"]
    sampler = Sampler(None if seed is None else checked_count("seed", seed, least=0))
    return Choice(sampler, given["temperature"], given["top_k"], given["top_p"])


def check_tree(head: Eagle3Head, total_tokens: int, depth: int, draft_top_k: int) -> None:
    """Raises a ValueError for a tree that the head cannot fill."""
    vocabulary = head.config.draft_vocab_size
    if draft_top_k > vocabulary:
        raise ValueError(
            f"`draft_top_k` must be at most the head's vocabulary of {vocabulary} tokens (got {draft_top_k}). Lower "
            "it."
        )
    candidates = draft_top_k + depth * draft_top_k**2
    if total_tokens - 1 > candidates:
        raise ValueError(
            f"`total_tokens` must be at most {candidates + 1}, the root and the {candidates} candidates that "
            f"`depth={depth}` and `draft_top_k={draft_top_k}` give (got {total_tokens}). Lower it, or raise "
            "one of them."
        )


__all__ = ["check_tree", "checked_choice", "checked_count", "checked_prompt", "checked_stops"]
