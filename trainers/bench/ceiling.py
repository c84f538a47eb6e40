"""How many tokens a forward could be decided by a decoder that knows which predictions are right.

    python -m trainers.bench.ceiling d3llm-llada-teacher d3llm-llada -o d3llm_hf/evaluation/results/ceiling.json

A checkpoint answers held-out word problems one token a forward, and its right answers are the text. It then decodes
that text in open blocks: a forward decides every hidden position whose most probable token is the text's, and at least
one, whose token is written there. No threshold decides more of this text without a wrong token: what one decides in a
forward, over this, is the share that it dares of what the predictions allow.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from d3llm_hf.bench.memory import threads
from d3llm_hf.bench.shapes import check_numbers
from d3llm_hf.evaluation.measure import SEED
from d3llm_hf.evaluation.provenance import on_device
from d3llm_hf.evaluation.tasks.word_problems import exact_match, generate_problems
from d3llm_hf.models.probes import evaluating, logits_of
from d3llm_hf.text import encode_chats

from ..common.loading import load_named
from ..distill.rollout import roll_out
from .report import add_output, report


SUITE = "bench_ceiling"
_CERTAIN = 0.5  # between the entropies that a right and a wrong prediction are given


@dataclass(frozen=True)
class CeilingBench:
    """What is decoded.

    Args:
        block_length (`int`): Of the blocks, several of which are open.
        num_problems (`int`): Held-out word problems, of which those count that a model answers right.
        max_new_tokens (`int`): Of an answer.
        batch_size (`int`): Problems that are decoded together.
        seed (`int`): Of the problems.

    Raises:
        ValueError: If a value is outside its range.
    """

    block_length: int = 16
    num_problems: int = 500
    max_new_tokens: int = 64
    batch_size: int = 25
    seed: int = SEED

    def __post_init__(self):
        check_numbers(self, {"seed": 0})


@dataclass(frozen=True)
class Text:
    """Right answers of B rows.

    Args:
        prompts (`torch.LongTensor` of shape `(B, P)`), attention_mask (`(B, P)`): Prompts, padded on the left.
        labels (`torch.LongTensor` of shape `(B, R)`): The answers.
        lengths (`torch.LongTensor` of shape `(B,)`): Their tokens before the first stop token.
    """

    prompts: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    lengths: torch.Tensor


def right_answers(model: Any, tokenizer: Any, bench: CeilingBench) -> list[Text]:
    """A model's right answers, one token a forward, in batches.

    Raises:
        ValueError: If there is none.
    """
    problems = generate_problems(bench.num_problems, split="test", seed=bench.seed)
    found = []
    for start in range(0, len(problems), bench.batch_size):
        batch = problems[start : start + bench.batch_size]
        inputs = encode_chats(tokenizer, [[{"role": "user", "content": each.question}] for each in batch])
        output = model.generate(
            **inputs,
            max_new_tokens=bench.max_new_tokens,
            decoding_method="llada",
            block_length=bench.block_length,
            do_sample=False,
            return_dict_in_generate=True,
        )
        answers = output.sequences[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        right = torch.tensor([exact_match(text, each.answer) for text, each in zip(texts, batch, strict=True)])
        if right.any():
            tables = (inputs["input_ids"], inputs["attention_mask"], answers, output.num_tokens)
            found.append(Text(*(table[right] for table in tables)))
    if not found:
        raise ValueError(
            f"`models` must answer some of the problems right (got none of {len(problems)}). Name others, or ask for "
            "more problems with `--num-problems`."
        )
    return found


def ceiling(model: Any, texts: Sequence[Text], bench: CeilingBench, stop_token_id: int) -> dict[str, float]:
    """What a decoder that knows what is right makes of a model's predictions.

    Returns:
        `tokens` before the stop tokens, `forwards` and `tpf`, their ratio.

    Raises:
        ValueError: If the model does not see its whole canvas.
    """
    if model.traits.topology is not None:
        raise ValueError(
            "`models` must see their whole canvas (got a block-causal one): what is decided in later blocks would not "
            "be seen. Leave it out."
        )
    tokens = forwards = 0
    with evaluating(model):
        for text in texts:
            found = roll_out(
                text.labels,
                (text.lengths + 1).clamp_max(text.labels.shape[1]),  # with the stop token
                torch.full(text.lengths.shape, _CERTAIN),
                _Right(model, text),
                block_length=bench.block_length,
                max_forwards=text.labels.shape[1],
                stop_token_id=stop_token_id,
            )
            tokens += int(text.lengths.sum())
            forwards += int(found.forwards.sum())
    return {"tokens": tokens, "forwards": forwards, "tpf": round(tokens / forwards, 3)}


class _Right:
    """Entropies for [`roll_out`]: none where the prediction is right, elsewhere the model's and 1 more."""

    def __init__(self, model: Any, text: Text):
        self.model, self.text = model, text

    def __call__(self, hidden: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
        model, text = self.model, self.text
        answers = text.labels.masked_fill(hidden, model.generation_config.mask_token_id)
        canvas = torch.cat([text.prompts, answers], dim=1)
        attention_mask = torch.cat([text.attention_mask, torch.ones_like(answers)], dim=1)
        first = text.prompts.shape[1] - model.traits.logit_shift
        logits = logits_of(model, canvas, attention_mask=attention_mask)[:, first : first + answers.shape[1]]
        rows = logits[among].float()
        entropy = torch.special.entr(rows.softmax(-1)).sum(-1)
        return torch.where(rows.argmax(-1) == text.labels[among], 0.0, 1 + entropy)


def measure_ceiling(names: Sequence[str], bench: CeilingBench) -> dict[str, Any]:
    """Decodes the text of each checkpoint.

    Args:
        names: folders, embedded checkpoints or Hub ids.

    Returns:
        the results: settings, versions; for each checkpoint the `answers` that count and its figures, see [`ceiling`].
    """
    with threads(1):  # tensors this small are slower on several
        rows = []
        for name in names:
            model, tokenizer = load_named(name, None, torch_dtype="float32", attn_implementation="eager")
            texts = right_answers(model, tokenizer, bench)
            answers = sum(len(text.lengths) for text in texts)
            figures = ceiling(model, texts, bench, tokenizer.eos_token_id)
            rows.append({"name": Path(name).name, "answers": answers} | figures)
    return {
        "suite": SUITE,
        "shape": asdict(bench),
        "provenance": on_device("cpu", 1),
        "rows": rows,
    }


def main(argv: list[str] | None = None) -> None:
    """Measure what the options say, print the table, and write the results where a file is named."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m trainers.bench.ceiling", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="checkpoints")
    for name, default in asdict(CeilingBench()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help="default: %(default)s")
    add_output(parser)
    given = vars(parser.parse_args(argv))
    output, names = given.pop("output"), given.pop("models")
    bench = CeilingBench(**given)
    report(parser, argv, output, lambda: measure_ceiling(names, bench))


if __name__ == "__main__":
    main()
