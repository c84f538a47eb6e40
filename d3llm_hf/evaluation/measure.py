"""Accuracy, forwards, positions and time of decoding settings, written to one results file.

    python -m d3llm_hf.evaluation.measure d3llm-llada -o d3llm_hf/checkpoints/d3llm-llada/results.json
    python -m d3llm_hf.evaluation.measure d3llm-llada-teacher --suite caches -o d3llm_hf/evaluation/results/caches.json
    python -m d3llm_hf.evaluation.measure d3llm-causal -o d3llm_hf/checkpoints/d3llm-causal/results.json

The problems are generated from a seed, so the same command measures the same thing everywhere. A setting is a dict of
arguments of `generate` (see `suites.py`); a row of the results file is a setting with what it gave.
"""

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..autoregressive.generate import generate as generate_causal
from ..autoregressive.methods import is_autoregressive
from ..files import check_writable, without_folders
from ..hub.loading import decodes_by_diffusion
from ..hub.sources import embedded_checkpoints
from ..locks import InUseError, only_writer
from ..progress import progress_bar
from ..text import encode_chats
from .provenance import provenance, write_json
from .suites import FIGURES, SUITES, Settings, Suite
from .tasks.word_problems import WordProblem, exact_match, generate_problems


SCHEMA = 1
SEED = 4242
ROUNDS = 3
_CARDS = ("card", "causal")  # suite of a model that decodes by diffusion, and of a causal one


@dataclass
class Tally:
    """What a setting has given so far, summed over rows.

    Attributes:
        answers: every answer, in the order of the problems: its tokens, and how many precede the first stop token.
        correct: answers whose number after `####` is right.
        tokens, forwards, reference, positions: answer tokens before the stop token; forwards by our count and by the
            d3LLM code's; positions pushed through the model.
        seconds, cpu_seconds: wall clock in `generate`, and the processor's time of this process in it.
    """

    answers: list[tuple[list[int], int]] = field(default_factory=list)
    correct: int = 0
    tokens: int = 0
    forwards: int = 0
    reference: int = 0
    positions: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def generate(self, model: Any, inputs: Mapping[str, Any], settings: Settings, **more) -> torch.Tensor:
        """Decodes a batch, counts, and returns the answers `(B, N)`."""
        began, cpu_began = time.perf_counter(), time.process_time()
        if is_autoregressive(settings):
            own = {name: value for name, value in settings.items() if name != "decoding_method"}
            output = generate_causal(model, **inputs, method=settings["decoding_method"], settings=own, **more)
        else:
            arguments = more | settings  # a setting may be a length
            output = model.generate(**inputs, **arguments, do_sample=False, return_dict_in_generate=True)
        self.cpu_seconds += time.process_time() - cpu_began
        self.seconds += time.perf_counter() - began
        answers = output.sequences[:, inputs["input_ids"].shape[1] :]
        lengths = output.num_tokens.tolist()
        self.answers += zip(answers.tolist(), lengths, strict=True)
        self.tokens += sum(lengths)
        self.forwards += int(output.num_forwards.sum())
        self.reference += int(output.num_forwards_reference.sum())
        self.positions += int(output.positions_computed.sum())
        return answers

    def figures(self, base: "Tally") -> dict[str, Any]:
        """The figures of a row that is compared with `base`.

        Returns:
            `accuracy` in percent of exact matches of the number after `####`; `tpf`, answer tokens of all problems (up
            to and excluding the stop token) over all forwards of all rows; `tpf_reference`, the same over the d3LLM
            code's count of forwards; `positions_per_token`; `tokens`, `forwards`, `positions`; `seconds` of wall
            clock in `generate` and `cpu_seconds` of the processor; `equal_tokens`, percent of the positions before the
            later stop token that hold the same token in both; `differing_answers`; `forwards_saved` in percent;
            `relative_cpu`, the ratio of processor seconds.
        """
        pairs = list(zip(self.answers, base.answers, strict=True))
        longer = [max(length, other) for (_, length), (_, other) in pairs]
        equal = sum(
            one == other
            for ((ours, _), (theirs, _)), length in zip(pairs, longer, strict=True)
            for one, other in zip(ours[:length], theirs[:length], strict=False)  # a shorter canvas ends before
        )
        return {
            "accuracy": round(100 * self.correct / len(self.answers), 2),
            "tpf": round(self.tokens / self.forwards, 3),
            "tpf_reference": round(self.tokens / self.reference, 3),
            "positions_per_token": round(self.positions / max(1, self.tokens), 1),
            "tokens": self.tokens,
            "forwards": self.forwards,
            "positions": self.positions,
            "seconds": round(self.seconds, 1),
            "cpu_seconds": round(self.cpu_seconds, 1),
            "equal_tokens": round(100 * equal / max(1, sum(longer)), 2),
            "differing_answers": sum(ours != theirs for (ours, _), (theirs, _) in pairs),
            "forwards_saved": round(100 * (1 - self.forwards / base.forwards), 1),
            "relative_cpu": round(self.cpu_seconds / max(base.cpu_seconds, 1e-9), 3),
        }


def measure(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[WordProblem],
    suite: Suite,
    *,
    max_new_tokens: int = 64,
    batch_size: int = 25,
) -> list[dict[str, Any]]:
    """Decodes every problem's chat prompt with every setting of a suite.

    The settings take turns batch by batch, so that whatever else the machine does disturbs all alike. One forward of
    each is made beforehand and not counted.

    Returns:
        the rows of the results file: name, settings, figures (see `Tally.figures`).
    """
    tallies = {name: Tally() for name in suite.rows}
    with progress_bar(len(problems) * len(suite.rows), "answer", "measuring") as bar:
        for number, batch in enumerate(_batches(problems, batch_size)):
            chats = [[{"role": "user", "content": problem.question}] for problem in batch]
            inputs = encode_chats(tokenizer, chats).to(model.device)
            for settings in suite.rows.values() if number == 0 else ():
                other = {name: value for name, value in settings.items() if name != "max_new_tokens"}
                Tally().generate(model, inputs, other, max_new_tokens=settings.get("initial_length", 1))
            for name, settings in suite.rows.items():
                answers = tallies[name].generate(model, inputs, settings, max_new_tokens=max_new_tokens)
                texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
                right = sum(exact_match(text, each.answer) for text, each in zip(texts, batch, strict=True))
                tallies[name].correct += right
                bar.update(len(batch))
    return [_row(suite, name, settings, tallies) for name, settings in suite.rows.items()]


def measure_larger(
    suite: Suite,
    *,
    rounds: int = ROUNDS,
    batch_sizes: Sequence[int] = (1, 8),
    prompt_tokens: int = 192,
    new_tokens: int = 64,
    width: int = 256,
    layers: int = 6,
) -> dict[str, Any]:
    """Times the settings of a suite on a random model and random prompts, all rows decoded to the end.

    The settings take turns round by round; the first round is shorter, to warm up, and not counted.

    Returns:
        sizes of the model and the texts, and rows as [`measure`]'s, each with its `batch`; seconds are the least of
        the rounds.
    """
    from ..models.configuration_llada import LLaDAConfig
    from ..models.modeling_llada import LLaDAModelLM

    config = LLaDAConfig(
        vocab_size=1000,
        d_model=width,
        n_layers=layers,
        n_heads=max(1, width // 64),
        mlp_hidden_size=3 * width,
        max_sequence_length=prompt_tokens + new_tokens,
        mask_token_id=999,
        pad_token_id=998,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LLaDAModelLM(config).eval()
        prompts = torch.randint(998, (max(batch_sizes), prompt_tokens))
    rows: list[dict[str, Any]] = []
    with progress_bar(len(batch_sizes) * (1 + rounds) * len(suite.rows), "turn", "larger model") as bar:
        for batch in batch_sizes:
            inputs = {"input_ids": prompts[:batch], "attention_mask": torch.ones_like(prompts[:batch])}
            for settings in suite.rows.values():
                Tally().generate(model, inputs, settings, max_new_tokens=max(1, new_tokens // 8))
                bar.update()
            best: dict[str, Tally] = {}
            for name, settings in [*suite.rows.items()] * rounds:
                tally = Tally()
                tally.generate(model, inputs, settings, max_new_tokens=new_tokens)
                bar.update()
                if name in best:
                    tally.seconds = min(tally.seconds, best[name].seconds)
                    tally.cpu_seconds = min(tally.cpu_seconds, best[name].cpu_seconds)
                best[name] = tally
            for name, settings in suite.rows.items():
                row = _row(suite, name, settings, best) | {"batch": batch, "seconds": round(best[name].seconds, 2)}
                rows.append(row | {"cpu_seconds": round(best[name].cpu_seconds, 2)})
                del rows[-1]["accuracy"]
    return {
        "width": width,
        "layers": layers,
        "vocabulary": config.vocab_size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "rounds": rounds,
        "rows": rows,
    }


def _row(suite: Suite, name: str, settings: Settings, tallies: dict[str, Tally]) -> dict[str, Any]:
    base = suite.against.get(name, name)
    figures = tallies[name].figures(tallies[base])
    row: dict[str, Any] = {"name": name, "settings": settings}
    if name in suite.against:
        row["against"] = base
    return row | {key: value for key, value in figures.items() if key in FIGURES or key in suite.columns}


def _batches(items: Sequence, size: int) -> Iterator[Sequence]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def command(args: argparse.Namespace, model: str) -> str:
    """The command that repeats a measurement, without folders of this machine."""
    suite = SUITES[args.suite]
    words = ["python -m d3llm_hf.evaluation.measure", model]
    words += [f"--suite {args.suite}"] * (args.suite not in _CARDS)
    words += [f"--num-problems {args.num_problems}"] * (args.num_problems != suite.problems)
    words += [f"--seed {args.seed}"] * (args.seed != SEED)
    words += [f"--rounds {args.rounds}"] * (args.rounds != ROUNDS)
    return " ".join([*words, f"-o {without_folders(args.output)}"])


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Path]:
    """The arguments, and the folder of the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a checkpoint, or the name of an embedded one")
    parser.add_argument("-o", "--output", type=Path, required=True, help="results file (JSON)")
    parser.add_argument("--suite", choices=SUITES, help="what is measured (default: what the model's card compares)")
    parser.add_argument("--num-problems", type=int, metavar="N", help="default: the suite's own number")
    parser.add_argument("--seed", type=int, default=SEED, help="of the held-out problems")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timings of each setting on the larger model")
    args = parser.parse_args(argv)
    for name in ("num_problems", "rounds"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1 (got {getattr(args, name)}).")
    folder = embedded_checkpoints().get(args.model, Path(args.model))
    if not (folder / "model.safetensors").is_file():
        parser.error(
            f"MODEL must be a folder with model.safetensors, or one of {sorted(embedded_checkpoints())} (got "
            f"{args.model!r}). Correct the path."
        )
    causal = not decodes_by_diffusion(str(folder))
    if args.suite is None:
        args.suite = _CARDS[causal]
    if (args.suite == _CARDS[True]) != causal:
        parser.error(
            f"--suite must be {_CARDS[True]} for a causal model, and another one for the others (got {args.suite} for "
            f"{args.model}). Leave it out."
        )
    if args.num_problems is None:
        args.num_problems = SUITES[args.suite].problems
    try:
        check_writable(args.output, "--output")
    except ValueError as error:
        parser.error(str(error))
    return args, folder


def main(argv: Sequence[str] | None = None) -> None:
    """Measures a suite; see the module's docstring for the command."""
    args, folder = _parse(argv)
    try:
        with only_writer(args.output, "--output"):
            _measure_suite(args, folder)
    except InUseError as error:
        raise SystemExit(f"error: {error}") from error


def _measure_suite(args: argparse.Namespace, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    suite = SUITES[args.suite]
    torch.set_num_threads(1)  # tensors this small are slower on several, many times so on a busy machine
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # float32: the batch that a row is in must not change its tokens
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    problems = generate_problems(args.num_problems, split="test", seed=args.seed)
    results: dict[str, Any] = {
        "schema": SCHEMA,
        **({} if args.suite == "card" else {"suite": args.suite}),
        "task": "held-out word problems, 2-5 steps, exact match",
        "problems": len(problems),
        "seed": args.seed,
        "command": command(args, folder.name),
        "parameters": sum(p.numel() for p in model.parameters()),
        "provenance": provenance(folder),
        "rows": measure(model, tokenizer, problems, suite),
    }
    if suite.larger is not None:
        results["larger"] = measure_larger(suite.larger, rounds=args.rounds)
    write_json(args.output, results)


if __name__ == "__main__":
    main()
