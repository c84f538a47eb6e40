"""The embedded block-causal student beside the one that sees the whole canvas, in one run.

    python -m d3llm_hf.evaluation.students -o d3llm_hf/evaluation/results/students.json

Both decode the same held-out problems, one at a time and eight together, over a few thresholds; the one that sees the
whole canvas also with the cache that costs it least, the other one also block by block. The settings take turns batch
by batch, so that whatever else the machine does disturbs all alike. See `measure.Tally.figures` for what is counted.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..files import check_writable, without_folders
from ..hub.sources import embedded_checkpoints
from ..locks import InUseError, only_writer
from ..progress import progress_bar
from ..text import encode_chats
from .measure import SEED, Tally
from .provenance import on_device, write_json
from .suites import MULTI_BLOCK, ONE_BLOCK, Settings
from .tasks.word_problems import exact_match, generate_problems


SUITE = "students"
PROBLEMS = 500
BATCHES = (1, 8)
THRESHOLDS = (0.2, 0.3, 0.4)
WHOLE, BLOCKS = "d3llm-llada", "d3llm-block"
WAYS: dict[str, dict[str, Settings]] = {
    WHOLE: {"no cache": MULTI_BLOCK, "delayed cache": MULTI_BLOCK | {"kv_cache": "delayed", "cache_delay": 1}},
    BLOCKS: {"several blocks": MULTI_BLOCK, "block by block": ONE_BLOCK},
}


def contestants() -> list[tuple[str, str, Settings]]:
    """`(model, way, arguments of generate)` of every row."""
    return [
        (model, name, settings | {"entropy_threshold": threshold})
        for model, ways in WAYS.items()
        for name, settings in ways.items()
        for threshold in THRESHOLDS
    ]


def measure_students(
    models: dict[str, tuple[Any, Any]], num_problems: int, batch_sizes: Sequence[int], seed: int = SEED
) -> list[dict[str, Any]]:
    """Decodes held-out word problems with every contestant at every batch size.

    Args:
        models: model and tokenizer of each name.
        num_problems, seed (`int`): of the problems.
        batch_sizes: rows that are decoded together.

    Returns:
        a row for each batch size and contestant: `model`, `way`, `settings`, `batch`; `accuracy` in percent, `tpf`,
        `positions_per_token`, `tokens_per_second` of wall clock in `generate`.
    """
    problems = generate_problems(num_problems, split="test", seed=seed)
    rivals, rows = contestants(), []
    with progress_bar(len(problems) * len(rivals) * len(batch_sizes), "answer", "measuring") as bar:
        for size in batch_sizes:
            tallies = [Tally() for _ in rivals]
            for start in range(0, len(problems), size):
                batch = problems[start : start + size]
                chats = [[{"role": "user", "content": problem.question}] for problem in batch]
                for tally, (name, _, settings) in zip(tallies, rivals, strict=True):
                    model, tokenizer = models[name]
                    inputs = encode_chats(tokenizer, chats).to(model.device)
                    if start == 0:
                        Tally().generate(model, inputs, settings, max_new_tokens=64)  # warms up, and does not count
                    answers = tally.generate(model, inputs, settings, max_new_tokens=64)
                    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
                    tally.correct += sum(
                        exact_match(text, each.answer) for text, each in zip(texts, batch, strict=True)
                    )
                    bar.update(len(batch))
            rows += [_row(size, rival, tally, len(problems)) for rival, tally in zip(rivals, tallies, strict=True)]
    return rows


def _row(size: int, rival: tuple[str, str, Settings], tally: Tally, problems: int) -> dict[str, Any]:
    model, way, settings = rival
    return {
        "model": model,
        "way": way,
        "settings": settings,
        "batch": size,
        "accuracy": round(100 * tally.correct / problems, 2),
        "tpf": round(tally.tokens / tally.forwards, 3),
        "positions_per_token": round(tally.positions / max(1, tally.tokens), 2),
        "tokens_per_second": round(tally.tokens / tally.seconds, 1),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measures both students; see the module's docstring for the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="results file (JSON)")
    parser.add_argument("--num-problems", type=int, default=PROBLEMS, metavar="N", help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.num_problems < 1:
        parser.error(f"--num-problems must be at least 1 (got {args.num_problems}).")
    try:
        check_writable(args.output, "--output")
    except ValueError as error:
        parser.error(str(error))
    try:
        with only_writer(args.output, "--output"):
            write_json(args.output, results(args))
    except InUseError as error:
        raise SystemExit(f"error: {error}") from error


def results(args: argparse.Namespace) -> dict[str, Any]:
    """The content of the results file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)  # tensors this small are slower on several
    folders = {name: embedded_checkpoints()[name] for name in WAYS}
    models = {
        name: (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
            AutoTokenizer.from_pretrained(folder),
        )
        for name, folder in folders.items()
    }
    counted = f" --num-problems {args.num_problems}" if args.num_problems != PROBLEMS else ""
    return {
        "suite": SUITE,
        "task": "held-out word problems, 2-5 steps, exact match",
        "problems": args.num_problems,
        "seed": SEED,
        "command": f"python -m d3llm_hf.evaluation.students{counted} -o {without_folders(args.output)}",
        "provenance": on_device("cpu", torch.get_num_threads()),
        "rows": measure_students(models, args.num_problems, BATCHES),
    }


if __name__ == "__main__":
    main()
