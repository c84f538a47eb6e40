"""What a step of block-causal training costs beside two plain forwards.

    python -m trainers.bench.doubled_step --lengths 256 1024 --repeats 3 -o results.json

Both ways compute as many positions, and logits of as many: the doubled sequence B rows of 2L slots, the plain one the
noisy and the clean texts as 2B rows of L slots, which learns something else. What is dearer is attention, over keys
twice as many.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from d3llm_hf import SDARForCausalLM
from d3llm_hf.bench.blocks import sdar_config
from d3llm_hf.bench.memory import threads
from d3llm_hf.bench.shapes import check_shape
from d3llm_hf.evaluation.provenance import on_device

from ..sft.block_masking import BlockObjective, draw_block_mask
from ..sft.block_views import DoubledCanvas
from ..sft.masking import generator_for
from .report import add_output, report


SCHEMA = 1
SUITE = "bench_doubled_step"


@dataclass(frozen=True)
class DoubledBench:
    """What is measured: a random SDAR in float32.

    Args:
        vocab_size, d_model, layers (`int`): Size of the model. Heads are 64 wide, the MLP three times as wide as it.
        block_length (`int`): Tokens of a block.
        batch_size (`int`): Texts of a step.
        lengths (`tuple[int, ...]`): Tokens of each text; a row of the results for each length.
        device (`str`): `"cpu"` or `"cuda"`.
        threads (`int`): Threads of a CPU.
        repeats (`int`): Steps of each way, which take turns.

    Raises:
        ValueError: If a value is outside its range, or there is no length.
    """

    vocab_size: int = 1024
    d_model: int = 512
    layers: int = 4
    block_length: int = 32
    batch_size: int = 1
    lengths: tuple[int, ...] = (256, 512, 1024)
    device: str = "cpu"
    threads: int = 1
    repeats: int = 5

    def __post_init__(self):
        check_shape(self, {"vocab_size": 2}, {"device": ("cpu", "cuda")})
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"`lengths` must be positive integers, at least one (got {self.lengths}). Try 256.")


def measure_doubled(bench: DoubledBench) -> dict[str, Any]:
    """Times forward and backward passes of both ways.

    Returns:
        the results: shape, versions and machine; for each length medians in seconds of a `doubled` step and of
        `two_plain` forwards, and `ratio`, the median of the ratios within a turn.
    """
    with threads(bench.threads), torch.random.fork_rng(devices=[]):
        rows = [_row(bench, length) for length in bench.lengths]
    return {
        "schema": SCHEMA,
        "suite": SUITE,
        "shape": asdict(bench),
        "provenance": on_device(bench.device, bench.threads),
        "rows": rows,
    }


def _row(bench: DoubledBench, length: int) -> dict[str, int | float]:
    torch.manual_seed(0)
    ways = _ways(bench, length)
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(bench.repeats + 1):  # the first one warms up
        for name, step in ways.items():
            began = time.perf_counter()
            step()
            if bench.device == "cuda":
                torch.cuda.synchronize()
            taken[name] += [time.perf_counter() - began] if turn else []
    ratios = [doubled / plain for doubled, plain in zip(taken["doubled"], taken["two_plain"], strict=True)]
    seconds = {name: round(statistics.median(found), 4) for name, found in taken.items()}
    return {"length": length, **seconds, "ratio": round(statistics.median(ratios), 3)}


def _ways(bench: DoubledBench, length: int) -> dict[str, Callable[[], None]]:
    last = bench.vocab_size - 1
    model = SDARForCausalLM(sdar_config(bench, length)).to(bench.device)
    clean = torch.randint(last, (bench.batch_size, length))
    documents, positions = torch.zeros_like(clean), torch.arange(length).expand_as(clean)
    blocks = positions // bench.block_length
    learnt = torch.ones_like(clean, dtype=torch.bool)
    hidden = draw_block_mask(learnt, documents, blocks, generator_for(0), BlockObjective(), min_mask_ratio=0.5).hidden
    noisy = torch.where(hidden, last, clean)
    canvas = DoubledCanvas.of(noisy, clean, positions, documents, blocks)
    wanted, nothing = hidden[0].to(bench.device), torch.zeros_like(hidden[0]).to(bench.device)
    plain_mask = (blocks[:, :, None] >= blocks[:, None])[:, None].repeat(2, 1, 1, 1)
    given = {
        "doubled": {
            "input_ids": canvas.input_ids,
            "position_ids": canvas.position_ids,
            "attention_mask": canvas.attention_mask,
            "logits_to_keep": torch.cat([wanted, nothing], dim=1),
        },
        "two_plain": {
            "input_ids": torch.cat([noisy[0], clean]),
            "position_ids": positions.repeat(2, 1),
            "attention_mask": plain_mask,
            "logits_to_keep": torch.cat([wanted, nothing]),
        },
    }
    targets = clean[hidden[0]].to(bench.device)

    def step(inputs: dict[str, torch.Tensor]) -> None:
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(**inputs).logits, targets).backward()

    def bound(inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
        placed = {name: tensor.to(bench.device) for name, tensor in inputs.items()}
        return lambda: step(placed)

    return {name: bound(inputs) for name, inputs in given.items()}


def main(argv: list[str] | None = None) -> None:
    """Measure what the options say, print the table, and write the results where a file is named."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m trainers.bench.doubled_step", description=(__doc__ or "").split("\n")[0]
    )
    for field in fields(DoubledBench):
        flag, default = f"--{field.name.replace('_', '-')}", field.default
        if field.name == "lengths":
            parser.add_argument(flag, type=int, nargs="+", default=default, metavar="N", help=f"default: {default}")
        else:
            parser.add_argument(flag, type=type(default), default=default, help=f"default: {default}")
    add_output(parser)
    given = vars(parser.parse_args(argv))
    output = given.pop("output")
    bench = DoubledBench(**given | {"lengths": tuple(given["lengths"])})
    report(parser, argv, output, lambda: measure_doubled(bench))


if __name__ == "__main__":
    main()
