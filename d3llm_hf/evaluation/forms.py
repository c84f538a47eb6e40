"""Forms against free text, on word problems: how often the answer is right, and what it costs.

    python -m d3llm_hf.evaluation.forms -o forms.json

Both embedded checkpoints answer the same held-out problems freely, in forms of their own words, and as JSON that they
were never trained on. The ways take turns batch by batch, so that whatever else the machine does disturbs all alike.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..files import without_folders
from ..forms.filling import fill_batch
from ..forms.form import Form
from ..forms.holes import integer, text
from ..forms.schema import form_of_schema
from ..hub.sources import embedded_checkpoints
from ..progress import progress_bar
from ..text import encode_chats
from .provenance import provenance, write_json
from .tasks.word_problems import WordProblem, exact_match, generate_problems


MODELS = ("d3llm-llada-teacher", "d3llm-llada")  # those that see the text behind a hole
SETTINGS: dict[str, Any] = {"decoding_method": "d3llm", "block_length": 16, "entropy_threshold": 0.3}
NEW_TOKENS = 64
SCHEMA = {
    "type": "object",
    "properties": {
        "steps": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 5},
        "answer": {"type": "integer", "minimum": 0, "maximum": 999},
    },
}
WORKED = Form([text(52, lines=True), "#### ", integer(0, 999)])
ANSWER = Form(["#### ", integer(0, 999)])
JSON = form_of_schema(SCHEMA, string_slots=14)


@dataclass
class Count:
    """What a way of answering has given so far, summed over problems."""

    correct: int = 0
    valid: int = 0
    forwards: int = 0
    positions: int = 0
    seconds: float = 0.0


def _free(model, tokenizer, problems: Sequence[WordProblem], count: Count) -> None:
    inputs = encode_chats(tokenizer, [[{"role": "user", "content": each.question}] for each in problems])
    output = model.generate(
        **inputs, **SETTINGS, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True
    )
    answers = tokenizer.batch_decode(output.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    count.correct += sum(exact_match(each, problem.answer) for each, problem in zip(answers, problems, strict=True))
    count.valid += sum(exact_match(each, each) for each in answers)  # it holds a number behind ####
    count.forwards += int(output.num_forwards.sum())
    count.positions += int(output.positions_computed.sum())


def _filling(form: Form) -> Callable[..., None]:
    def way(model, tokenizer, problems: Sequence[WordProblem], count: Count) -> None:
        chats = [[{"role": "user", "content": each.question}] for each in problems]
        found = fill_batch(model, tokenizer, [form] * len(chats), prompts=chats, **SETTINGS, do_sample=False)
        for each, problem in zip(found, problems, strict=True):
            answer = json.loads(each.text)["answer"] if form is JSON else int(each.holes[-1])
            count.correct += answer == problem.result
            count.valid += 1  # or reading it would have failed
            count.forwards += each.num_forwards
            count.positions += each.positions_computed

    return way


WAYS: dict[str, Callable[..., None]] = {
    "free text": _free,
    '`[text(52, lines=True), "#### ", integer(0, 999)]`': _filling(WORKED),
    '`["#### ", integer(0, 999)]`': _filling(ANSWER),
    '`{"steps": [...], "answer": ...}`': _filling(JSON),
}


def measure(model, tokenizer, problems: Sequence[WordProblem], batch_size: int = 25) -> list[dict[str, Any]]:
    """Answers every problem in every way; `(name, accuracy and valid in percent, forwards, positions, seconds)`."""
    counts = {name: Count() for name in WAYS}
    with progress_bar(len(problems) * len(WAYS), "answer", "measuring") as bar:
        for way in WAYS.values():
            way(model, tokenizer, problems[:1], Count())  # what is built once is not counted
        for start in range(0, len(problems), batch_size):
            batch = problems[start : start + batch_size]
            for name, way in WAYS.items():
                began = time.perf_counter()
                way(model, tokenizer, batch, counts[name])
                counts[name].seconds += time.perf_counter() - began
                bar.update(len(batch))
    return [
        {
            "name": name,
            "accuracy": round(100 * count.correct / len(problems), 2),
            "valid": round(100 * count.valid / len(problems), 2),
            "forwards": round(count.forwards / len(problems), 2),
            "positions": round(count.positions / len(problems), 1),
            "seconds": round(count.seconds, 1),
        }
        for name, count in counts.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measures the embedded models that see a whole canvas; see the module's docstring for the command."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="results file (JSON)")
    parser.add_argument("--num-problems", type=int, default=200, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=5, help="of the held-out problems")
    args = parser.parse_args(argv)
    if args.num_problems < 1:
        parser.error(f"--num-problems must be at least 1 (got {args.num_problems}).")
    torch.set_num_threads(1)  # tensors this small are slower on several
    problems = generate_problems(args.num_problems, split="test", seed=args.seed)
    rows, made = [], {}
    for name in MODELS:
        folder = embedded_checkpoints()[name]
        tokenizer = AutoTokenizer.from_pretrained(folder)
        # float32: the batch that a row is in must not change its tokens
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        rows += [{"model": name} | row for row in measure(model, tokenizer, problems)]
        made[name] = provenance(folder)
    words = ["python -m d3llm_hf.evaluation.forms"]
    words += [f"--num-problems {args.num_problems}"] * (args.num_problems != 200)
    words += [f"--seed {args.seed}"] * (args.seed != 5)
    results = {
        "schema": 1,
        "suite": "forms",
        "problems": len(problems),
        "settings": SETTINGS,
        "command": " ".join([*words, f"-o {without_folders(args.output)}"]),
        "provenance": made,
        "rows": rows,
    }
    write_json(args.output, results)


if __name__ == "__main__":
    main()
