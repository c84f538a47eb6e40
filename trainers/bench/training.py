"""Step time and peak memory of distillation, against the same loss over full logits: `d3llm bench train`.

A random LLaDA of a given shape is taught the order of made-up trajectories, by

* `FullLogitsTrainer`: a forward for each view, logits and probabilities of the whole sequence in float32;
* `FullLogitsLearntRowsTrainer`: the same, with probabilities of the rows with a loss only;
* `PseudoTrajectoryDistillTrainer`: what this package trains with.

All have the same draws. A step is a forward and a backward pass; the optimizer, the same for all, is left out. With
`rollouts` the step of `objective="rollout"` is measured beside them; it learns other states, and has another loss.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from d3llm_hf import LLaDAConfig, LLaDAModelLM
from d3llm_hf.bench.memory import in_fresh_process, peak_memory, threads
from d3llm_hf.bench.shapes import HEAD_WIDTH, check_shape
from d3llm_hf.evaluation.provenance import on_device
from d3llm_hf.progress import progress_bar

from ..distill.config import PseudoTrajectoryDistillConfig
from ..distill.noisy_views import OBJECTIVES
from ..distill.trainer import PseudoTrajectoryDistillTrainer
from .plain_distill import FullLogitsLearntRowsTrainer, FullLogitsTrainer


SCHEMA = 1
SUITE = "bench_train"
BASELINE = "full logits"
OURS = "learnt positions only"
VARIANTS: dict[str, type[PseudoTrajectoryDistillTrainer]] = {
    BASELINE: FullLogitsTrainer,
    "full logits, probabilities of learnt rows": FullLogitsLearntRowsTrainer,
    OURS: PseudoTrajectoryDistillTrainer,
}
ROLLOUT = "states of a rollout"  # by the last of these; a row of its own, where it is asked for

# Largest relative difference of the loss, and of each weight's gradient (in norm, to the largest gradient's). The
# variants add up in another order, and in bfloat16 the head's rows are rounded before that.
TOLERANCES = {"float32": (1e-5, 1e-4), "bfloat16": (1e-2, 5e-2)}

_SEED = 0


@dataclass(frozen=True)
class TrainBench:
    """What is measured.

    Args:
        vocab_size, d_model, layers (`int`): Size of the model. Heads are 64 wide, the MLP three times as wide as it.
        batch_size (`int`): Samples of a batch.
        prompt_length, response_length (`int`): Canvas in tokens. Prompts and answers are made half as long or longer.
        window (`int`): Window of the answer that is learnt.
        objective (`str`), complementary (`bool`), sft_weight (`float`): See [`PseudoTrajectoryDistillConfig`].
        dtype (`str`): `"float32"` or `"bfloat16"`, of weights and activations.
        device (`str`): `"cpu"` or `"cuda"`.
        threads (`int`): Threads of a CPU.
        steps (`int`): Steps of a turn, each with a batch of its own.
        repeats (`int`): Turns of each variant.
        rollouts (`bool`): Whether a step with a rollout is measured, too, in blocks of `window`.

    Raises:
        ValueError: If a value is outside its range.
    """

    vocab_size: int = 126464
    d_model: int = 512
    layers: int = 8
    batch_size: int = 2
    prompt_length: int = 128
    response_length: int = 256
    window: int = 32
    objective: str = "trajectory"
    complementary: bool = True
    sft_weight: float = 0.0
    dtype: str = "float32"
    device: str = "cpu"
    threads: int = 1
    steps: int = 1
    repeats: int = 5
    rollouts: bool = False

    @property
    def rows(self) -> list[str]:
        """What is measured, in the order of the table."""
        return [*VARIANTS, *([ROLLOUT] if self.rollouts else [])]

    def __post_init__(self):
        least = {"vocab_size": 16, "prompt_length": 2, "response_length": 2}
        check_shape(self, least, {"objective": OBJECTIVES, "dtype": tuple(TOLERANCES), "device": ("cpu", "cuda")})
        if self.sft_weight < 0:
            raise ValueError(f"`sft_weight` must be at least 0 (got {self.sft_weight}). 0 leaves its view out.")


SHAPES: dict[str, TrainBench] = {
    "wide-vocab": TrainBench(),
    "tiny": TrainBench(
        vocab_size=512, d_model=32, layers=2, batch_size=2, prompt_length=8, response_length=16, window=8, repeats=2
    ),
}


@contextmanager
def prepared(
    bench: TrainBench,
) -> Iterator[tuple[LLaDAModelLM, dict[str, PseudoTrajectoryDistillTrainer], list[dict]]]:
    """The model, a trainer of each variant that shares it, and the batches of a turn.

    Every other token that the primary view hides and learns is what the model predicts there, so that it is right and
    has an entropy term; all others, and the teacher's order, are drawn at random.
    """
    last = bench.vocab_size - 1
    special = {"mask_token_id": last, "eos_token_id": last - 1, "pad_token_id": last - 2}
    config = LLaDAConfig(
        vocab_size=bench.vocab_size,
        d_model=bench.d_model,
        n_layers=bench.layers,
        n_heads=max(1, bench.d_model // HEAD_WIDTH),
        mlp_hidden_size=3 * bench.d_model,
        max_sequence_length=bench.prompt_length + bench.response_length,
        **special,
    )
    device = torch.device(bench.device)
    with threads(bench.threads), torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(_SEED)
        model = LLaDAModelLM(config).to(getattr(torch, bench.dtype)).to(device)
        shared: dict[str, Any] = {
            "use_cpu": bench.device == "cpu",
            "report_to": "none",
            "max_prompt_length": bench.prompt_length,
            "response_length": bench.response_length,
            "window_sizes": [bench.window],
            "complementary": bench.complementary,
            "sft_weight": bench.sft_weight,
        }
        args = PseudoTrajectoryDistillConfig(folder, objective=bench.objective, **shared)
        model.train()
        trainers = {name: cls(model, args, processing_class=_Tokens(**special)) for name, cls in VARIANTS.items()}
        if bench.rollouts:
            args = PseudoTrajectoryDistillConfig(
                folder, objective="rollout", rollout_block_length=bench.window, **shared
            )
            trainers[ROLLOUT] = PseudoTrajectoryDistillTrainer(model, args, processing_class=_Tokens(**special))
        collate = trainers[OURS].data_collator
        batches = []
        for step in range(bench.steps):
            batch = collate([_sample(bench, step * bench.batch_size + row) for row in range(bench.batch_size)])
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            batches.append(_with_predicted_tokens(model, trainers[OURS], batch))
        yield model, trainers, batches


@dataclass
class _Tokens:
    """All that the trainer asks of a tokenizer."""

    mask_token_id: int
    eos_token_id: int
    pad_token_id: int


def _sample(bench: TrainBench, sample_id: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(_SEED + sample_id)

    def between(longest: int) -> int:
        return int(torch.randint((longest + 1) // 2, longest + 1, (), generator=generator))

    prompt, response = between(bench.prompt_length), between(bench.response_length)
    text = torch.randint(bench.vocab_size - 3, (prompt + response,), generator=generator).tolist()
    order = (torch.randperm(response, generator=generator) + 1).tolist()
    return {
        "prompt_ids": text[:prompt],
        "response_ids": text[prompt:],
        "step_map": order,
        "sample_id": sample_id,
    }


@torch.no_grad()
def _with_predicted_tokens(
    model: LLaDAModelLM, trainer: PseudoTrajectoryDistillTrainer, batch: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    labels, views = batch["labels"], trainer._draw(batch, training=True)  # (B, R)
    length = labels.shape[1]
    canvas = batch["input_ids"].clone()
    canvas[:, -length:].masked_fill_(views.hidden[0], model.config.mask_token_id)
    predicted = [  # a row at a time: the logits of all would be the largest tensor of the whole bench
        model(input_ids=row, attention_mask=seen, logits_to_keep=length).logits.argmax(-1)
        for row, seen in zip(canvas.split(1), batch["attention_mask"].split(1), strict=True)
    ]
    every_other = torch.arange(length, device=labels.device) % 2 == 0
    labels = torch.where(views.learnt[0] & every_other, torch.cat(predicted), labels)
    return batch | {"input_ids": torch.cat([batch["input_ids"][:, :-length], labels], dim=1), "labels": labels}


def step(model: LLaDAModelLM, trainer: PseudoTrajectoryDistillTrainer, batch: Mapping[str, torch.Tensor]) -> float:
    """A forward and a backward pass from no gradient; returns the loss."""
    model.zero_grad()
    loss = trainer.compute_loss(model, dict(batch))
    loss.backward()
    return loss.item()


def agreement(
    bench: TrainBench,
    model: LLaDAModelLM,
    trainers: dict[str, PseudoTrajectoryDistillTrainer],
    batch: Mapping[str, torch.Tensor],
) -> dict[str, Any]:
    """Compares losses and gradients of all variants on a batch. Rollouts are another loss.

    Returns:
        the relative differences of the loss and, at most, of a weight's gradient, and what is allowed.

    Raises:
        ArithmeticError: If they differ by more than `TOLERANCES`.
    """
    loss = step(model, trainers[BASELINE], batch)
    expected = {name: weight.grad for name, weight in model.named_parameters()}
    largest = max(float(gradient.norm()) for gradient in expected.values())
    allowed = dict(zip(("loss", "gradient"), TOLERANCES[bench.dtype], strict=True))
    worst = dict.fromkeys(allowed, 0.0)
    for variant in [name for name in VARIANTS if name != BASELINE]:
        found = {"loss": abs(step(model, trainers[variant], batch) - loss) / abs(loss)}
        found["gradient"] = max(
            float((weight.grad - expected[name]).norm()) / largest for name, weight in model.named_parameters()
        )
        if not all(found[name] <= allowed[name] for name in allowed):
            raise ArithmeticError(
                f"`{variant}` must have the loss and gradients of `{BASELINE}` (got relative differences {found}, "
                f"allowed are {allowed}). This is a bug: report it with the arguments of the bench."
            )
        worst = {name: max(worst[name], found[name]) for name in allowed}
    return {**worst, "allowed": allowed}


def memory(bench: TrainBench, variant: str) -> tuple[int, int]:
    """Memory before a variant's steps and at most in them, in bytes; to be called in a fresh process."""
    with prepared(bench) as (model, trainers, batches):
        return peak_memory(
            lambda: [step(model, trainers[variant], batch) for batch in batches], torch.device(bench.device)
        )


def times(
    bench: TrainBench,
    model: LLaDAModelLM,
    trainers: dict[str, PseudoTrajectoryDistillTrainer],
    batches: list[dict[str, torch.Tensor]],
    advance: Callable[[], Any],
) -> dict[str, list[tuple[float, float]]]:
    """Seconds and processor seconds of a step, for each variant and turn, of which `advance` is told.

    The variants take turns.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in trainers}
    for _ in range(bench.repeats):
        for name, trainer in trainers.items():
            began, cpu_began = time.perf_counter(), time.process_time()
            for batch in batches:
                step(model, trainer, batch)
            if bench.device == "cuda":
                torch.cuda.synchronize()
            taken = time.perf_counter() - began, time.process_time() - cpu_began
            found[name].append((taken[0] / bench.steps, taken[1] / bench.steps))
            advance()
    return found


def _positions(trainer: PseudoTrajectoryDistillTrainer, batch: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Positions of all views of a batch, how many are learnt, and how many of those are predicted right."""
    views = trainer._draw(dict(batch), training=True)
    sums = next(iter(trainer._metric_sums.values()))
    return {
        "all": len(views.kinds) * batch["input_ids"].numel(),
        "learnt": int(views.learnt.sum()),
        "right": int(sums["right"] + sums["complement_right"]),
    }


def measure_training(bench: TrainBench) -> dict[str, Any]:
    """Checks that all variants agree, and measures them.

    Returns:
        the results: shape, versions and machine, the agreement found, and for each variant `seconds` and
        `cpu_seconds` of a step (medians over turns), `speedup` and `cpu_speedup` over the baseline (medians of the
        ratios within a turn), `peak_bytes` of its process, `step_bytes` of it that came with the steps, and
        `peak_ratio` and `step_ratio`, fractions of the baseline's.

    Raises:
        ArithmeticError: If the variants do not have the same loss and gradients.
    """
    with progress_bar(len(bench.rows) * (2 + bench.repeats), "turn", "bench") as bar:
        usage = {}
        for name in bench.rows:
            usage[name] = in_fresh_process(memory, bench, name)
            bar.update()
        with prepared(bench) as (model, trainers, batches):
            agreed = agreement(bench, model, trainers, batches[0])  # and warms up
            bar.update(len(bench.rows))
            positions = _positions(trainers[OURS], batches[0])
            parameters = model.num_parameters()
            taken = times(bench, model, trainers, batches, bar.update)
    return {
        "schema": SCHEMA,
        "suite": SUITE,
        "shape": asdict(bench),
        "parameters": parameters,
        "positions": positions,
        "agreement": agreed,
        "provenance": on_device(bench.device, bench.threads),
        "rows": [_row(name, taken, usage) for name in bench.rows],
    }


def _row(
    name: str, taken: dict[str, list[tuple[float, float]]], usage: dict[str, tuple[int, int]]
) -> dict[str, str | int | float]:
    pairs = list(zip(taken[BASELINE], taken[name], strict=True))
    median = [statistics.median(turn[which] for turn in taken[name]) for which in (0, 1)]
    ratio = [statistics.median(base[which] / max(turn[which], 1e-9) for base, turn in pairs) for which in (0, 1)]
    (base_before, base_peak), (before, peak) = usage[BASELINE], usage[name]
    return {
        "name": name,
        "seconds": round(median[0], 4),
        "cpu_seconds": round(median[1], 4),
        "speedup": round(ratio[0], 3),
        "cpu_speedup": round(ratio[1], 3),
        "peak_bytes": peak,
        "step_bytes": peak - before,
        "peak_ratio": round(peak / base_peak, 3),
        "step_ratio": round((peak - before) / max(base_peak - base_before, 1), 3),
    }
