"""EAGLE-3's pairs of target and draft head: the recorded one, and tiny ones whose head drafts a part of the tokens."""

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from places import GOLDEN
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from d3llm_hf import Eagle3Head
from d3llm_hf.autoregressive.eagle3.checkpoint import HeadConfig


FOLDER = GOLDEN / "eagle3"
HEAD = FOLDER / "eagle-head-a"
VOCABULARY = 12


@dataclass(frozen=True)
class Recorded:
    """One recorded run: `tokens` are the new ones, `trees` pairs of tokens and parents, one for each verification."""

    id: str
    prompt: tuple[int, ...]
    eos_token_id: int
    max_new_tokens: int
    settings: dict[str, int]
    error: str | None
    tokens: tuple[int, ...] = ()
    accept_lengths: tuple[int, ...] = ()
    target_forwards: int = 0
    draft_forwards: int = 0
    draft_lengths: tuple[int, ...] = ()
    trees: tuple[tuple[list[int], list[int]], ...] = ()


@cache
def recorded_pair() -> tuple[Any, Eagle3Head]:
    """The small trained target with its head."""
    return AutoModelForCausalLM.from_pretrained(FOLDER / "eagle-target-a").eval(), Eagle3Head.from_pretrained(HEAD)


@cache
def recorded_tensors(name: str) -> dict[str, torch.Tensor]:
    return load_file(FOLDER / f"{name}.safetensors")


@cache
def recorded_cases() -> tuple[Recorded, ...]:
    """Every recorded run."""
    trees = recorded_tensors("trees")
    cases = []
    for case in json.loads((FOLDER / "cases.json").read_text())["cases"]:
        args, found, name = case["args"], case.get("expected"), case["id"]
        settings = {"total_tokens": args["total_token"], "depth": args["depth"], "draft_top_k": args["top_k"]}
        common = (name, tuple(case["prompt"]), case["eos_token_id"], args["max_new_tokens"], settings)
        if found is None:
            cases.append(Recorded(*common, error=case["message"]))
            continue
        cases.append(
            Recorded(
                *common,
                error=None,
                tokens=tuple(found["sequence"][len(case["prompt"]) :]),
                accept_lengths=tuple(found["accept_lengths"]),
                target_forwards=found["target_forwards"],
                draft_forwards=found["draft_forwards"],
                draft_lengths=tuple(found["draft_input_lens"]),
                trees=tuple(
                    (trees[f"{name}/tree{k}/tokens"].tolist(), trees[f"{name}/tree{k}/parents"].tolist())
                    for k in range(len(found["accept_lengths"]))
                ),
            )
        )
    return tuple(cases)


def tiny_target(family: str = "llama", *, seed: int = 0, layers: int = 7, **settings) -> Any:
    """A random target of few tokens, whose logits lie far apart."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 64,
        "initializer_range": 0.5, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes | settings))
    return model.float().eval()


def tiny_head(*, seed: int = 1, own_embedding: bool = False, **sizes) -> Eagle3Head:
    """A random head for [`tiny_target`] that drafts every second token of the vocabulary."""
    torch.manual_seed(seed)
    defaults = {
        "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": VOCABULARY, "draft_vocab_size": VOCABULARY // 2,
    }  # fmt: skip
    config = HeadConfig.from_dict(defaults | sizes)
    head = Eagle3Head(config, own_embedding=own_embedding).requires_grad_(False).eval()
    if head.d2t is not None:
        head.d2t.copy_(torch.arange(config.draft_vocab_size))
        head.t2d.copy_(torch.arange(config.vocab_size) % 2 == 0)
    return head
