"""What a step of block-causal training costs beside two plain forwards.

    python -m trainers.bench.doubled_step --layers 4 --d_model 512 --length 256

Both ways compute as many positions, and logits of as many: the doubled sequence B rows of 2L slots, the plain one the
noisy and the clean texts as 2B rows of L slots, which learns something else. What is dearer is attention, over keys
twice as many.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import HfArgumentParser

from d3llm_hf import SDARConfig, SDARForCausalLM
from d3llm_hf.bench.memory import threads
from d3llm_hf.bench.shapes import HEAD_WIDTH, check_shape
from d3llm_hf.evaluation.provenance import on_device

from ..sft.block_masking import BlockObjective, draw_block_mask
from ..sft.block_views import DoubledCanvas
from ..sft.masking import generator_for


@dataclass(frozen=True)
class DoubledBench:
    """What is measured: a random SDAR in float32.

    Args:
        vocab_size, d_model, layers (`int`): Size of the model. Heads are 64 wide, the MLP three times as wide as it.
        block_length (`int`): Tokens of a block.
        batch_size, length (`int`): Texts of a step, and tokens of each.
        device (`str`): `"cpu"` or `"cuda"`.
        threads (`int`): Threads of a CPU.
        repeats (`int`): Steps of each way, which take turns.

    Raises:
        ValueError: If a value is outside its range.
    """

    vocab_size: int = 1024
    d_model: int = 512
    layers: int = 4
    block_length: int = 32
    batch_size: int = 1
    length: int = 256
    device: str = "cpu"
    threads: int = 1
    repeats: int = 5

    def __post_init__(self):
        check_shape(self, {"vocab_size": 2}, {"device": ("cpu", "cuda")})


def measure_doubled(bench: DoubledBench) -> dict[str, Any]:
    """Times forward and backward passes of both ways.

    Returns:
        shape, versions and machine; medians in seconds of a `doubled` step and of `two_plain` forwards, and `ratio`,
        the median of the ratios within a turn.
    """
    with threads(bench.threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ways = _ways(bench)
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(bench.repeats + 1):  # the first one warms up
            for name, step in ways.items():
                began = time.perf_counter()
                step()
                if bench.device == "cuda":
                    torch.cuda.synchronize()
                taken[name] += [time.perf_counter() - began] if turn else []
    ratios = [doubled / plain for doubled, plain in zip(taken["doubled"], taken["two_plain"], strict=True)]
    return {
        "shape": asdict(bench),
        **{name: round(statistics.median(seconds), 4) for name, seconds in taken.items()},
        "ratio": round(statistics.median(ratios), 3),
        "provenance": on_device(bench.device, bench.threads),
    }


def _ways(bench: DoubledBench) -> dict[str, Callable[[], None]]:
    heads, last = max(1, bench.d_model // HEAD_WIDTH), bench.vocab_size - 1
    config = SDARConfig(
        vocab_size=bench.vocab_size,
        hidden_size=bench.d_model,
        num_hidden_layers=bench.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=bench.d_model // heads,
        intermediate_size=3 * bench.d_model,
        max_position_embeddings=bench.length,
        block_size=bench.block_length,
        mask_token_id=last,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = SDARForCausalLM(config).to(bench.device)
    clean = torch.randint(last, (bench.batch_size, bench.length))
    documents, positions = torch.zeros_like(clean), torch.arange(bench.length).expand_as(clean)
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
    """Measure what the options say, and write the results as JSON."""
    (bench,) = HfArgumentParser(DoubledBench).parse_args_into_dataclasses(sys.argv[1:] if argv is None else argv)
    sys.stdout.write(json.dumps(measure_doubled(bench), indent=1) + "\n")


if __name__ == "__main__":
    main()
