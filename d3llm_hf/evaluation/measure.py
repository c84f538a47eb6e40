"""Accuracy and tokens per forward of decoding settings on held-out word problems, written to one results file.

    python -m d3llm_hf.evaluation.measure d3llm-llada -o d3llm_hf/checkpoints/d3llm-llada/results.json

The problems are generated from a seed, so the same command measures the same thing everywhere. A setting is a dict of
arguments of `generate`; a row of the results file is a setting with what it gave.
"""

import argparse
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import __version__
from ..hub import embedded_checkpoints
from .word_problems import WordProblem, exact_match, generate_problems


SCHEMA = 1

# What the model card of the embedded checkpoint compares: a name, and the arguments of `generate`.
SETTINGS: dict[str, dict[str, Any]] = {
    "one token a forward": {"decoding_method": "llada", "block_length": 16},
    "block by block": {"decoding_method": "dparallel", "block_length": 16, "entropy_threshold": 0.3},
    "multi-block": {"decoding_method": "d3llm", "block_length": 16, "entropy_threshold": 0.3},
    "multi-block, bolder": {"decoding_method": "d3llm", "block_length": 16, "entropy_threshold": 0.6},
    "multi-block, cached": {
        "decoding_method": "d3llm",
        "block_length": 16,
        "entropy_threshold": 0.3,
        "kv_cache": "delayed",
        "cache_delay": 1,
    },
}


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[WordProblem],
    settings: dict[str, Any],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 25,
) -> dict[str, float | int]:
    """Decodes every problem's chat prompt with `settings` and counts.

    Returns:
        `accuracy` in percent of exact matches of the number after `####`; `tpf`, answer tokens of all problems (up to
        and excluding the stop token) over all forwards of all rows; `tpf_reference`, the same over the d3LLM code's
        count of forwards; `positions_per_token`; `tokens`, `forwards`; `seconds` of wall clock in `generate`.
    """
    totals = {"correct": 0, "tokens": 0, "forwards": 0, "reference": 0, "positions": 0}
    seconds = 0.0
    for batch in _batches(problems, batch_size):
        chats = [[{"role": "user", "content": problem.question}] for problem in batch]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
        ).to(model.device)
        began = time.perf_counter()
        output = model.generate(
            **inputs, **settings, max_new_tokens=max_new_tokens, do_sample=False, return_dict_in_generate=True
        )
        seconds += time.perf_counter() - began
        answers = output.sequences[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        totals["correct"] += sum(exact_match(text, p.answer) for text, p in zip(texts, batch, strict=True))
        totals["tokens"] += round((output.tokens_per_forward * output.num_forwards).sum().item())
        totals["forwards"] += int(output.num_forwards.sum())
        totals["reference"] += int(output.num_forwards_reference.sum())
        totals["positions"] += int(output.positions_computed.sum())
    return {
        "accuracy": round(100 * totals["correct"] / len(problems), 2),
        "tpf": round(totals["tokens"] / totals["forwards"], 3),
        "tpf_reference": round(totals["tokens"] / totals["reference"], 3),
        "positions_per_token": round(totals["positions"] / max(1, totals["tokens"]), 1),
        "tokens": totals["tokens"],
        "forwards": totals["forwards"],
        "seconds": round(seconds, 1),
    }


def _batches(items: Sequence, size: int) -> Iterator[Sequence]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def provenance(folder: Path) -> dict[str, Any]:
    """What is needed to repeat a measurement: versions, machine, and which weights."""
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    return {
        "d3llm_hf": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "weights_sha256": weights,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a results file that is complete or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures all of `SETTINGS`; see the module's docstring for the command."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a checkpoint, or the name of an embedded one")
    parser.add_argument("-o", "--output", type=Path, required=True, help="results file (JSON)")
    parser.add_argument("--num-problems", type=int, default=500)
    parser.add_argument("--seed", type=int, default=4242, help="of the held-out problems")
    args = parser.parse_args(argv)
    folder = embedded_checkpoints().get(args.model, Path(args.model))
    if not (folder / "model.safetensors").is_file():
        parser.error(
            f"MODEL must be a folder with model.safetensors, or one of {sorted(embedded_checkpoints())} (got "
            f"{args.model!r}). Correct the path."
        )

    torch.set_num_threads(1)  # tensors this small are slower on several, many times so on a busy machine
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # float32: the batch that a row is in must not change its tokens
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    problems = generate_problems(args.num_problems, split="test", seed=args.seed)
    rows = [{"name": n, "settings": s, **measure(model, tokenizer, problems, s)} for n, s in SETTINGS.items()]
    write_json(
        args.output,
        {
            "schema": SCHEMA,
            "task": "held-out word problems, 2-5 steps, exact match",
            "problems": len(problems),
            "seed": args.seed,
            "command": f"python -m d3llm_hf.evaluation.measure {folder.name} -o {args.output.as_posix()}",
            "parameters": sum(p.numel() for p in model.parameters()),
            "provenance": provenance(folder),
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
