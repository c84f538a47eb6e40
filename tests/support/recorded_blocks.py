"""The recorded runs of block-causal models (`tests/golden`), as settings of the library."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from places import GOLDEN
from transformers import AutoModelForCausalLM

import d3llm_hf  # noqa: F401  # the Auto classes learn of its families


OF_BLOCKS = {"sdar", "llada2", "fast_dllm_v2", "d2f", "refusion"}
"""Methods that were made for models that see nothing of later blocks, or decide slots."""


@dataclass(frozen=True)
class Recorded:
    """One run.

    Attributes:
        model: folder of the model, or of its adapter.
        settings: under this library's names.
        answer: new tokens up to the first stop token, of those that were asked for.
        unmask_step: forward that decided each of them; `None` where it is not comparable.
        forwards: by the reference's count; `None` where it is not comparable.
    """

    id: str
    model: str
    prompt: tuple[int, ...]
    settings: dict
    answer: list[int]
    unmask_step: list[int] | None
    forwards: int | None
    flags: dict


@cache
def checkpoint(name: str):
    """The small trained model that the runs were recorded on, whose own generation settings are forgotten.

    Of the folder of an adapter the model with it.
    """
    adapter = GOLDEN / name / "adapter_config.json"
    base = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.exists() else name
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / base)
    if base != name:
        model.load_adapter(str(GOLDEN / name))
    model.eval()
    model.generation_config = type(model.generation_config)()
    return model


def recorded_cases(suite: str, recorded: Callable[[dict], Recorded | list[Recorded] | None]) -> list[Recorded]:
    """The robust runs of a suite that are no error and drew nothing; rows of a batch are runs of their own."""
    cases = json.loads((GOLDEN / suite / "cases.json").read_text())["cases"]
    found = [recorded(case) for case in cases if case.get("robust") and "error" not in case]
    return [row for case in found for row in (case if isinstance(case, list) else [case]) if row is not None]


def up_to_stop(tokens: list[int], stop_ids: list[int]) -> list[int]:
    """The tokens until the first stop token, which is one of them."""
    end = next((index + 1 for index, token in enumerate(tokens) if token in stop_ids), len(tokens))
    return tokens[:end]


def of_sdar(case: dict) -> Recorded | None:
    """A run of SDAR, TraDo, SDAR's evaluation or JetEngine; `None` of those that a defect or torch's order decides.

    Where tokens were drawn, of one: the surest. Its confidence is then that of the tempered distribution, as the
    evaluation has it; the others take it of what top-k and top-p left.
    """
    args, flags, expected = case["args"], case["flags"], case["expected"]
    evaluated = case["method"].startswith("sdar_eval")
    drawn = case["seed"] is not None and args.get("top_k") != 1
    filtered = not evaluated and (args.get("top_k") or args.get("top_p", 1.0) != 1.0)
    if drawn or filtered or flags.get("topk_ties") or (flags.get("topk_selected_nonmask") and not evaluated):
        return None
    stop_ids = args.get("stopping_criteria_idx", args.get("stop_words")) or []
    settings = {
        "max_new_tokens": args.get("gen_length", args.get("max_tokens")),
        "block_length": args["block_length"],
        "steps": args["denoising_steps"],
        "eos_token_id": stop_ids,
    }
    if args["temperature"] != 1.0 if "temperature" in args else False:
        settings |= {"do_sample": True, "temperature": args["temperature"], "top_k": 1}
    threshold = args.get("confidence_threshold", args.get("threshold", args.get("dynamic_threshold", 0.9)))
    strategy = args.get("remasking_strategy", "low_confidence_dynamic" if threshold < 1 else "low_confidence_static")
    if strategy == "low_confidence_dynamic":
        settings["confidence_threshold"] = threshold or 1e-30  # of 0, which every probability exceeds
    elif strategy == "sequential":
        settings["remasking"] = "sequential"
    elif strategy == "entropy_bounded":
        settings["entropy_bound"] = args["eb_threshold"] or 0.35
    start = len(case["prompt"])
    tokens = expected["sequence"][start:] if "sequence" in expected else expected["completion"]
    steps = expected["unmask_step"][start:] if "unmask_step" in expected else expected["first_unmask_steps"]
    answer = up_to_stop(tokens[: settings["max_new_tokens"]], stop_ids)
    return Recorded(
        id=case["id"],
        model=case["model"],
        prompt=tuple(case["prompt"]),
        settings=settings,
        answer=answer,
        unmask_step=steps[: len(answer)],
        forwards=expected["n_forwards"],
        flags=flags,
    )


def of_d2f(case: dict) -> Recorded | None:
    """A run of D2F's evaluation loop or demo; `None` where tokens were drawn, or less than a block was asked for."""
    args, expected = case["args"], case["expected"]
    length = args["max_new_tokens"] // args["block_size"] * args["block_size"]  # rounded down there, up here
    if case["flags"]["uses_rng"] or not length:
        return None
    strategies = {"margin_confidence": "topk_margin", "neg_entropy": "entropy"}
    start = len(case["prompt"])
    answer = up_to_stop(expected["sequence"][start:], [case["eos_token_id"]])
    return Recorded(
        id=case["id"],
        model=case["adapter"],
        prompt=tuple(case["prompt"]),
        settings={
            "decoding_method": "d2f",
            "max_new_tokens": length,
            "block_length": args["block_size"],
            "remasking": strategies.get(args.get("sampling_strategy"), "low_confidence"),
            "confidence_threshold": args["skip_threshold"],
            "block_add_threshold": args["block_add_threshold"],
            "block_activation_threshold": args["decoded_token_threshold"],
            "early_stop": False,
            "eos_token_id": [case["eos_token_id"]],
        },
        answer=answer,
        unmask_step=expected["unmask_step"][start:],  # of what follows the stop token as well
        forwards=expected["n_forwards"],
        flags=case["flags"],
    )


# Runs that a defect of the reference decides, as quirks.json has them, and what is done in its place.
LLADA2_DEFECTS = {
    "dllm20_abandoned_masks": "the sampler goes on to the next block and leaves masks behind; here a row ends",
    "eos_in_prompt": "a stop token of the prompt is taken for one of the answer; here only new tokens stop",
    "zero_steps": "masks are returned; here `steps` must be positive",
    "not_robust": "rounding decides the run",
    "uses_rng": "torch's generator decides the run",
}


def of_llada2(case: dict) -> Recorded | None:
    """A run of LLaDA2.0's or 2.1's own `generate` or of dllm's samplers; `None` of those in `LLADA2_DEFECTS`.

    A run of a sampler, which goes on behind a stop token, counts up to it.
    """
    quirks = json.loads((GOLDEN / "llada2" / "quirks.json").read_text())
    left_out = {id for title, ids in quirks.items() if title.split(" ")[0] in LLADA2_DEFECTS for id in ids}
    args, expected = case["args"], case["expected"]
    if case["id"] in left_out or len(case["prompts"]) > 1:
        return None
    stop_ids, prompt = [case["eos_token_id"]], case["prompts"][0]
    length = args.get("gen_length", args.get("max_new_tokens"))
    settings = {
        "max_new_tokens": length,
        "block_length": args.get("block_length", args.get("block_size")),
        "confidence_threshold": args["threshold"] or 1e-30,  # of 0, which every probability exceeds
        "early_stop": args["eos_early_stop"],
        "eos_token_id": stop_ids,
        "mask_token_id": case["mask_id"],
    }
    if "editing_threshold" in args:
        settings |= {
            "edit_threshold": args["editing_threshold"],
            "max_post_steps": args["max_post_steps"],
            "min_commits": args["num_to_transfer"],
        }
    else:
        steps = args.get("steps", args.get("steps_per_block"))
        settings["steps"] = min(steps, length // args.get("minimal_topk", 1))
    if args["temperature"]:
        settings |= {"do_sample": True, "temperature": args["temperature"], "top_k": args["top_k"]}
    own = case["method"].startswith("hf")
    tokens = expected["returned"] if own else expected["returned"][len(prompt) :]
    answer = up_to_stop(tokens[:length], stop_ids)
    windows = expected["forward_lengths"]
    if case["method"] == "dllm20.sample" and set(answer) & set(stop_ids):
        windows = [window for window in windows if window < len(prompt) + len(answer) + settings["block_length"]]
    return Recorded(
        id=case["id"],
        model=case["model"],
        prompt=tuple(prompt),
        settings=settings,
        answer=answer,
        unmask_step=expected["unmask_step"][len(prompt) : len(prompt) + len(answer)],
        forwards=len(windows),
        flags=case["flags"],
    )


# Defects of Fast-dLLM v2's code that decide tokens of a whole run, and of a row whose prompt fills its blocks.
DEFECTS_OF_FAST_DLLM_V2 = {"prompt_equal_to_block_dropped", "in_block_mask_uses_32", "prefill_mask_uses_32"}
DEFECT_OF_A_FULL_ROW = "aligned_row_in_mixed_batch"


def of_fast_dllm_v2(case: dict) -> list[Recorded]:
    """The rows of a run of Fast-dLLM v2's three functions; none of those that a defect or torch's numbers decide.

    Asked for are the tokens of the blocks that were decided: the reference rounds its budget down, and appends one
    more token behind the last block. In a batch each row waits for the others, and where a stop token does not end a
    row at once it is decoded on: forwards are compared where a row was alone, and went on or stopped at once.
    """
    args, flags, expected = case["args"], case["flags"], case["expected"]
    if flags["uses_rng"] or DEFECTS_OF_FAST_DLLM_V2.intersection(case["quirks"]):
        return []
    length, stops_at_once = args["block_size"], case["method"] != "batch_sample"
    prompts, sequences, steps = case["prompt"], expected["sequence"], expected["unmask_step"]
    if not isinstance(prompts[0], list):
        prompts, sequences, steps = [prompts], [sequences], [steps]
    settings = {
        "block_length": length,
        "sub_block_length": args["small_block_size"],
        "confidence_threshold": args["threshold"],
        "eos_token_id": case["stop_token"],
        "mask_token_id": case["mask_id"],
    }
    if args.get("use_block_cache"):
        settings["kv_cache"] = "exact_dual"
    found = []
    for index, (prompt, sequence, unmasked) in enumerate(zip(prompts, sequences, steps, strict=True)):
        start, stop = len(prompt), case["stop_token"]
        stopped = stop in sequence[start:]
        asked = len(sequence) // length * length - start
        if stopped and stops_at_once:
            asked = args["max_new_tokens"] // length * length - start % length
        if asked <= 0 or (DEFECT_OF_A_FULL_ROW in case["quirks"] and start % length == 0):
            continue
        answer = up_to_stop(sequence[start : start + asked], [stop])
        alone = len(prompts) == 1
        apart = expected["n_forwards_prefill"] if start % length else 0  # a forward that decides nothing
        found.append(
            Recorded(
                id=case["id"] if alone else f"{case['id']}-{index}",
                model=case["model"],
                prompt=tuple(prompt),
                settings=settings | {"max_new_tokens": asked},
                answer=answer,
                unmask_step=[step - apart for step in unmasked[start : start + len(answer)]] if alone else None,
                forwards=expected["n_forwards"] if alone and (stops_at_once or not stopped) else None,
                flags=flags,
            )
        )
    return found
