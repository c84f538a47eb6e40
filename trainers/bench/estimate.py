"""Memory and time of a step of the recipes for 7B and 8B: estimated from a measured step, not measured.

    python -m trainers.bench.estimate -o d3llm_hf/evaluation/results/training_estimate.json

`d3llm bench train` has measured a small model without gradient checkpointing, and the recipes have it. P weights, P_l
of them in layers, and A of an adapter; N GPUs; T positions in all views of a micro-batch, M learnt ones at most, in B
texts of L tokens; w the width, l the layers, V the vocabulary:

    weights      2 P + 20 A          an adapter's base in bfloat16; the adapter in float32, with gradients, AdamW's
                                     moments and the copy of its gradients that DDP reduces
                 16 P / N            all weights over N GPUs (FSDP, ZeRO-3): as much of each, without DDP's copy
                 2 P + 14 P / N      ZeRO-2: bfloat16 weights are whole
    teacher      4 P                 whole in each process, in the student's float32; 0 if the adapter's base is it
    activations  2 T w (l + k)       bytes: the inputs of all layers, and one layer whole, which keeps k values
    logits       8 M V               float32, with their gradient; 4 M V more for a teacher's
    k            (measured - 4 P - 8 M V) / (4 T w l), of the bench's own sizes: its step keeps all layers in float32

    multiplications and additions of a micro-batch
                 T (8 P_l + 16 l w L) + 6 M V w          forward, once more for the checkpoints, and twice backward
                 T (6 P_l + 8 A + 16 l w L) + 6 M V w    with an adapter: its base's weights have no gradient
                 + F B (L (2 P_l + 4 l w L) + 2 R V w)   a rollout's F forwards of B texts with R tokens of answer
                 + T (2 P_l + 4 l w L) + 2 M V w         a teacher's forward
    seconds      micro-batches of a step x these / (rate of a GPU x share of it)

What is left out: the optimizer's own step, communication, what CUDA and the allocator take (some GB), and, where
weights are divided, the one layer that is gathered.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from d3llm_hf import DreamConfig, DreamModel, LLaDAConfig, LLaDAModelLM
from d3llm_hf.evaluation.provenance import environment, write_json

from ..common.lora import lora_target_modules
from ..distill.config import PseudoTrajectoryDistillConfig


SCHEMA = 1
SUITE = "training_estimate"
RECIPES = Path(__file__).parents[1] / "recipes"
GPUS = 4
# NVIDIA's figure for dense bfloat16 products of an H100 SXM, and the share of it that a training step reaches: an
# assumption, which times are inversely proportional to.
GPU = {"name": "H100 of 80 GB", "flops": 989e12, "share": 0.4}
_LLADA = LLaDAConfig(mlp_hidden_size=12288)
# Recipe -> class and shape of its model, and how several GPUs hold it.
MODELS: dict[str, tuple[type, Any, list[str]]] = {
    "d3llm_llada_8b": (LLaDAModelLM, _LLADA, ["copies"]),
    "d3llm_dream_7b": (DreamModel, DreamConfig(), ["copies"]),
    "d3llm_dream_coder_7b": (DreamModel, DreamConfig(), ["zero3", "zero2"]),
}
# Objective -> what each recipe names behind its `#`, over its own lines.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "trajectory": {},
    "rollout": {"objective": "rollout", "rollout_block_length": 32, "loss_scale": 0.5},
    "target of a teacher": {"target": "teacher", "teacher_reveal": 0.5},
}


@dataclass(frozen=True)
class Sizes:
    """Of a model: all weights and those in layers, those that an adapter adds, width, layers, tokens known."""

    parameters: int
    in_layers: int
    adapter: int
    width: int
    layers: int
    vocabulary: int


@dataclass(frozen=True)
class Step:
    """A micro-batch: texts, their length and that of the answer, positions of all views, and how many are learnt."""

    texts: int
    length: int
    answer: int
    positions: int
    learnt: int
    rollout_forwards: int = 0
    asks_teacher: bool = False
    own_teacher: bool = False
    micro_batches: int = 1


def sizes_of(model_class: type, config: Any, rank: int = 0) -> Sizes:
    """Read off a model without storage; `rank` is that of the adapter on all of its projections, 0 without one."""
    with torch.device("meta"):
        model = model_class(config)
    named = lora_target_modules(model)
    inside = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in named
    }
    head = model.get_output_embeddings().weight
    return Sizes(
        parameters=model.num_parameters(),
        in_layers=sum(module.weight.numel() for module in inside.values()),
        adapter=rank * sum(module.in_features + module.out_features for module in inside.values()),
        width=head.shape[1],
        layers=config.num_hidden_layers,
        vocabulary=head.shape[0],
    )


def step_of(recipe: dict[str, Any]) -> Step:
    """What a micro-batch of a recipe has at most: full prompts, whole windows, and in a rollout all of the answer."""
    texts, answer = recipe["per_device_train_batch_size"], recipe["response_length"]
    length = recipe["max_prompt_length"] + answer
    rolls_out = recipe["objective"] == "rollout"
    defaults = PseudoTrajectoryDistillConfig
    if rolls_out:
        views = recipe.get("rollout_states", defaults.rollout_states)
        learnt = texts * views * answer
    else:
        views = 2 if recipe["complementary"] else 1
        learnt = texts * max(recipe["window_sizes"])  # each position in one of the views
    asks = recipe.get("target") == "teacher"
    return Step(
        texts=texts,
        length=length,
        answer=answer,
        positions=texts * length * views,
        learnt=learnt,
        rollout_forwards=recipe.get("rollout_max_forwards", defaults.rollout_max_forwards) if rolls_out else 0,
        asks_teacher=asks,
        own_teacher=asks and not recipe.get("use_peft", False),
        micro_batches=recipe["gradient_accumulation_steps"],
    )


def kept_by_a_layer(measured: dict[str, Any]) -> float:
    """k: values that a layer of the bench's model keeps for each position and unit of width."""
    logits = 8 * measured["learnt"] * measured["vocabulary"]
    rest = measured["step_bytes"] - 4 * measured["parameters"] - logits
    return rest / (4 * measured["positions"] * measured["width"] * measured["layers"])


def memory_of(sizes: Sizes, step: Step, held: str, kept: float) -> dict[str, float]:
    """Bytes of a GPU: `weights`, `teacher`, `activations` and `logits`.

    Args:
        held (`str`): `"copies"` of a frozen base with an adapter, or all weights by `"zero3"` (FSDP likewise) or
            `"zero2"`, over `GPUS`.
        kept (`float`): Of [`kept_by_a_layer`].
    """
    parameters = sizes.parameters
    weights = {
        "copies": 2 * parameters + 20 * sizes.adapter,
        "zero3": 16 * parameters / GPUS,
        "zero2": 2 * parameters + 14 * parameters / GPUS,
    }[held]
    return {
        "weights": weights,
        "teacher": 4 * parameters if step.own_teacher else 0,
        "activations": 2 * step.positions * sizes.width * (sizes.layers + kept),
        "logits": (12 if step.asks_teacher else 8) * step.learnt * sizes.vocabulary,
    }


def operations_of(sizes: Sizes, step: Step) -> float:
    """Multiplications and additions of a micro-batch."""
    attention = 4 * sizes.layers * sizes.width * step.length  # of a position, in a forward
    forward = 2 * sizes.in_layers + attention
    head = 2 * sizes.vocabulary * sizes.width
    weighted = 6 * sizes.in_layers + 8 * sizes.adapter if sizes.adapter else 8 * sizes.in_layers
    total = step.positions * (weighted + 4 * attention) + 3 * step.learnt * head
    total += step.rollout_forwards * step.texts * (step.length * forward + step.answer * head)
    if step.asks_teacher:
        total += step.positions * forward + step.learnt * head
    return total


def estimate(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each recipe, objective and way of holding the weights, from what the bench has measured."""
    kept = kept_by_a_layer(measured)
    rows = []
    for name, (model_class, config, ways) in MODELS.items():
        recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
        sizes = sizes_of(model_class, config, recipe["lora_r"] if recipe.get("use_peft") else 0)
        for held in ways:
            for objective, changes in OBJECTIVES.items():
                step = step_of(recipe | changes)
                memory = memory_of(sizes, step, held, kept)
                seconds = step.micro_batches * operations_of(sizes, step) / (GPU["flops"] * GPU["share"])
                rows.append(
                    {
                        "recipe": name,
                        "objective": objective,
                        "held": held,
                        "bytes": {part: round(size) for part, size in memory.items()},
                        "seconds": round(seconds, 3),
                    }
                )
    return rows


def measured_step(results: dict[str, Any]) -> dict[str, Any]:
    """What is taken from the results of `d3llm bench train`: the step of this package, and the sizes it had."""
    shape, row = results["shape"], results["rows"][2]
    return {
        "step_bytes": row["step_bytes"],
        "parameters": results["parameters"],
        "positions": results["positions"]["all"],
        "learnt": results["positions"]["learnt"],
        "width": shape["d_model"],
        "layers": shape["layers"],
        "vocabulary": shape["vocab_size"],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Estimates from a results file of the bench, and writes the rows as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = Path("d3llm_hf/evaluation/results")
    parser.add_argument("--measured", type=Path, default=results / "bench_train.json", help="of `d3llm bench train`")
    parser.add_argument("-o", "--output", type=Path, required=True, help="results file to write")
    args = parser.parse_args(argv)
    measured = measured_step(json.loads(args.measured.read_text(encoding="utf-8")))
    write_json(
        args.output,
        {
            "schema": SCHEMA,
            "suite": SUITE,
            "gpus": GPUS,
            "gpu": GPU,
            "measured": measured,
            "kept": round(kept_by_a_layer(measured), 2),
            "provenance": environment(),
            "rows": estimate(measured),
            "command": f"python -m trainers.bench.estimate -o {args.output.as_posix()}",
        },
    )


if __name__ == "__main__":
    main()
