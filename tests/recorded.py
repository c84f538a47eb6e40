"""The recorded runs of the reference implementations (`tests/golden`), as settings of the library and the oracle."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from oracle import Rules

from d3llm_hf import DreamModel, LLaDAModelLM


GOLDEN = Path(__file__).parent / "golden"
SUITES = ("llada_d3llm", "quirks_llada", "fastdllm_llada", "dream_d3llm", "quirks_dream", "fastdllm_dream")

# Dream's own sampler was recorded with transformers' default `top_k=50` in force, which changes its confidences.
DREAM_TOP_K = 50


@dataclass(frozen=True)
class Recorded:
    """One run: `prompt` without its padding, and the settings under this library's names."""

    id: str
    model: str
    prompt: tuple[int, ...]
    padding: int
    settings: dict
    sequence: list[int]  # without the padding
    unmask_step: list[int]  # of the new tokens
    forwards: int
    reference_forwards: int | None
    mask_token_id: int
    eos_token_id: int
    top_k: int | None
    torch_seed: int | None

    def rules(self) -> Rules:
        """The same settings for the oracle."""
        known = dict(self.settings)
        if known.get("cache_refresh_interval", 0) is None:
            known["cache_refresh_interval"] = 10_000
        return Rules(
            **known,
            mask_token_id=self.mask_token_id,
            eos_token_ids=(self.eos_token_id,),
            pad_token_id=self.eos_token_id,
            top_k=self.top_k,
        )


@cache
def checkpoint(name: str):
    """The small trained model that the runs were recorded on."""
    return (LLaDAModelLM if name.startswith("llada") else DreamModel).from_pretrained(GOLDEN / name).eval()


@cache
def limited(name: str, top_k: int):
    """The same with all but its highest logits at minus infinity."""

    class Limited(type(checkpoint(name))):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            floor = output.logits.topk(top_k).values[..., -1:]
            output.logits = output.logits.masked_fill(output.logits < floor, float("-inf"))
            return output

    return Limited.from_pretrained(GOLDEN / name).eval()


def corrected_cases() -> dict[str, str]:
    """Case -> the defect of the reference on which its tokens depend."""
    entries = json.loads((GOLDEN / "quirks.json").read_text())
    return {
        case: defect
        for defect, entry in entries.items()
        if entry["effect"].startswith("tokens")
        for case in entry["cases"]
    }


def recorded_cases() -> list[Recorded]:
    """Every robust run of a method that this library has."""
    cases = []
    for suite in SUITES:
        for case in json.loads((GOLDEN / suite / "cases.json").read_text())["cases"]:
            settings = _settings(suite, case)
            if settings is not None and case["robust"]:
                cases.append(_recorded(suite, case, settings))
    return cases


def _recorded(suite: str, case: dict, settings: dict) -> Recorded:
    args, expected = case["args"], case["expected"]
    padding = args.get("attention_mask", []).count(0)
    return Recorded(
        id=case["id"],
        model=case["model"],
        prompt=tuple(case["prompt"][padding:]),
        padding=padding,
        settings=settings,
        sequence=expected["sequence"][padding:],
        unmask_step=expected["unmask_step"][len(case["prompt"]) :],
        forwards=expected["n_forwards"],
        reference_forwards=expected["nfe"],
        mask_token_id=case["mask_id"],
        eos_token_id=case["eos_token_id"],
        top_k=DREAM_TOP_K if suite == "fastdllm_dream" else None,
        torch_seed=args.get("torch_seed"),
    )


def _settings(suite: str, case: dict) -> dict | None:
    """What to pass to `generate` for a recorded call; `None` for a method that is not one of this library's."""
    args, method = case["args"], case["method"]
    settings = {"max_new_tokens": args.get("max_new_tokens", args.get("gen_length")), "early_stop": False}
    if args.get("remasking"):
        settings["remasking"] = args["remasking"]
    if "multi_block" in method:
        threshold = args["threshold"]
        settings |= {
            "decoding_method": "d3llm",
            "block_length": args["block_size"],
            "entropy_threshold": float("inf") if threshold is None else threshold,
            "block_add_threshold": args["block_add_threshold"],
            "block_activation_threshold": args["decoded_token_threshold"],
            # Without an EOS id the reference never stops early.
            "early_stop": args["early_stop"] and args.get("eos_token_id", 0) is not None,
        }
        if "kv_cache" in method:
            never = args["refresh_interval"] >= 10_000
            settings |= {
                "kv_cache": "delayed",
                "cache_delay": args["cache_delay_iter"],
                "cache_refresh_interval": None if never else args["refresh_interval"],
            }
        return settings
    if method == "diffusion_generate" or (method == "generate" and args["threshold"] is not None):
        return settings | {
            "decoding_method": "dparallel",
            "block_length": args["block_length"],
            "entropy_threshold": float(args["threshold"]),
        }
    if suite == "fastdllm_dream" and method == "vanilla":
        settings |= {"decoding_method": "dream", "steps": args["steps"]}
        if args["alg"] == "confidence_threshold":
            return settings | {"confidence_threshold": args["threshold"]}
        return settings | {"remasking": args["alg"]}
    if method in ("generate", "llada_original", "vanilla") and args.get("threshold") is None and "error" not in case:
        settings |= {"decoding_method": "llada", "steps": args["steps"], "block_length": args["block_length"]}
        return settings | ({"cfg_scale": args["cfg_scale"]} if "cfg_scale" in args else {})
    return None


def as_returned(sequence: list[int], prompt_length: int, eos_token_id: int, pad_token_id: int) -> list[int]:
    """A decoded canvas as `generate` returns it: pad behind the first EOS."""
    if eos_token_id not in sequence[prompt_length:]:
        return list(sequence)
    end = sequence.index(eos_token_id, prompt_length) + 1
    return [*sequence[:end], *[pad_token_id] * (len(sequence) - end)]


def left_pad(case: Recorded) -> dict[str, torch.Tensor]:
    """The prompt as it was recorded, padding included."""
    ids = [case.eos_token_id] * case.padding + list(case.prompt)
    inputs = {"input_ids": torch.tensor([ids])}
    if case.padding:
        inputs["attention_mask"] = torch.tensor([[0] * case.padding + [1] * len(case.prompt)])
    return inputs
