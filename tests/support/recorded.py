"""The recorded runs of the reference implementations (`tests/golden`), as settings of the library and the oracle."""

import json
from dataclasses import dataclass
from functools import cache

import torch
from oracle import Rules
from places import GOLDEN

from d3llm_hf import DreamModel, LLaDAModelLM


SUITES = ("llada_d3llm", "quirks_llada", "fastdllm_llada", "dream_d3llm", "quirks_dream", "fastdllm_dream")

# "count only": after a block that its first forward finished, these make another for it.
WASTED = "wasted_forward_of_finished_block"

# Dream's own sampler was recorded with transformers' default `top_k=50` in force, which changes its confidences. The
# entropies that d3LLM added to it are those of all logits.
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
        return Rules(
            **self.settings,
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


def quirks() -> dict[str, dict]:
    """Defect of the reference -> its effect and the cases that it changes."""
    return json.loads((GOLDEN / "quirks.json").read_text())


def corrected_cases() -> dict[str, str]:
    """Case -> the defect of the reference on which its tokens depend."""
    return {
        case: defect
        for defect, entry in quirks().items()
        if entry["effect"].startswith("tokens")
        for case in entry["cases"]
    }


def recorded_cases() -> list[Recorded]:
    """Every robust run of a method that this library has; runs that end in an error are not robust."""
    return _cases(_settings)


def blind_block_cases() -> list[Recorded]:
    """Runs of Fast-dLLM's Dream, which commits the first position of a block blindly; only the oracle can."""
    return _cases(_blind_block_settings)


def _cases(settings_of) -> list[Recorded]:
    cases = []
    for suite in SUITES:
        for case in json.loads((GOLDEN / suite / "cases.json").read_text())["cases"]:
            settings = settings_of(suite, case) if case.get("robust") else None
            if settings is not None:
                cases.append(_recorded(suite, case, settings))
    return cases


def _recorded(suite: str, case: dict, settings: dict) -> Recorded:
    args, expected = case["args"], case["expected"]
    padding = args.get("attention_mask", []).count(0)
    steps, wasteful = expected["unmask_step"][len(case["prompt"]) :], case["id"] in quirks()[WASTED]["cases"]
    if wasteful:  # forwards that decided nothing are not made
        useful = sorted(set(steps))
        steps = [useful.index(step) + 1 for step in steps]
    return Recorded(
        id=case["id"],
        model=case["model"],
        prompt=tuple(case["prompt"][padding:]),
        padding=padding,
        settings=settings,
        sequence=expected["sequence"][padding:],
        unmask_step=steps,
        forwards=len(useful) if wasteful else expected["n_forwards"],
        reference_forwards=None if wasteful else expected["nfe"],
        mask_token_id=case["mask_id"],
        eos_token_id=case["eos_token_id"],
        top_k=DREAM_TOP_K if suite == "fastdllm_dream" and args["alg"] != "entropy_threshold" else None,
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
    if suite == "fastdllm_llada" or method == "generate":
        return settings | _fast_dllm_settings(method, args)
    return None


def _fast_dllm_settings(method: str, args: dict) -> dict:
    """LLaDA with Fast-dLLM's thresholds and caches, or with its own quota."""
    settings = {"block_length": args["block_length"], "early_stop": args.get("early_stop", False)}
    if "cache" in method:
        settings["kv_cache"] = method.split("_")[0]
    if args.get("factor") is not None:
        return settings | {"decoding_method": "fast_dllm", "factor": args["factor"]}
    if args.get("threshold") is not None:
        return settings | {"decoding_method": "fast_dllm", "confidence_threshold": args["threshold"]}
    settings |= {"decoding_method": "llada", "steps": args["steps"]}
    return settings | ({"cfg_scale": args["cfg_scale"]} if "cfg_scale" in args else {})


def _blind_block_settings(suite: str, case: dict) -> dict | None:
    """What to pass to the oracle for a run with Dream's block cache."""
    args = case["args"]
    if case["method"] != "fast_block":
        return None
    settings = {
        "max_new_tokens": args["max_new_tokens"],
        "block_length": args["block_length"],
        "kv_cache": "dual" if args["dual_cache"] else "prefix",
        "blind_block_start": True,
    }
    if args["alg"] == "confidence_threshold":
        return settings | {"decoding_method": "fast_dllm", "confidence_threshold": args["threshold"]}
    if args["alg"] == "entropy_threshold":
        return settings | {"decoding_method": "dparallel", "entropy_threshold": args["threshold"]}
    steps = args["steps"] * (args["max_new_tokens"] // args["block_length"])  # the recorded ones are those of a block
    return settings | {"decoding_method": "dream", "remasking": args["alg"], "steps": steps}


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
