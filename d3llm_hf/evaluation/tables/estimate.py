"""The table of the results file of `trainers/bench/estimate.py`."""

from collections.abc import Callable
from typing import Any


_HELD = {"copies": "copies (DDP)", "zero3": "FSDP, ZeRO-3", "zero2": "ZeRO-2"}
_PARTS = ("weights", "teacher", "activations", "logits")


def estimate_table(results: dict[str, Any]) -> str:
    """The Markdown of an estimate, with its formulas and how to repeat it."""
    gpu, measured = results["gpu"], results["measured"]
    heads = ["recipe", "objective", "weights over GPUs", *(f"{part}, GB" for part in _PARTS), "in all, GB", "s a step"]
    lines = [
        "Estimated, not measured:",
        "",
        f"| {' | '.join(heads)} |",
        f"|---|---|---|{'---:|' * (len(heads) - 3)}",
    ]
    for row in results["rows"]:
        sizes = [row["bytes"][part] for part in _PARTS]
        cells = [f"`{row['recipe']}`", row["objective"], _HELD[row["held"]]]
        cells += [f"{size / 1e9:.1f}" for size in (*sizes, sum(sizes))] + [f"{row['seconds']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"Of each of {results['gpus']} GPUs ({gpu['name']}), for a step of 64 samples of the greatest length. P "
        "weights, of them P_l in layers; A those of the adapter; N GPUs; T positions in all views of a "
        "micro-batch of B texts, M learnt ones at most, L tokens of a text and R of its answer; w width, l "
        "layers, V vocabulary. Weights: 2 P + 20 A bytes with an adapter, 16 P / N divided, 2 P + 14 P / N with "
        "ZeRO-2, gradients and AdamW's moments among them. Teacher: 4 P, none where the adapter's base teaches. "
        "Activations with gradient checkpointing: 2 T w (l + k). Logits: 8 M V, and 4 M V of a teacher. k = (step "
        f"- 4 P - 8 M V) / (4 T w l), the values that a layer keeps, is {results['kept']:g} by the step of `d3llm "
        f"bench train`, {measured['step_bytes'] / 1e9:.2f} GB. Operations of a micro-batch: T (8 P_l + 16 l w L) + "
        "6 M V w; 6 P_l + 8 A in place of 8 P_l with an adapter; for a rollout B (L (2 P_l + 4 l w L) + 2 R V w) "
        "more for each of its 8 forwards, for a teacher T (2 P_l + 4 l w L) + 2 M V w. Seconds: these over "
        f"{100 * gpu['share']:.0f} % of {gpu['flops'] / 1e12:.0f} T operations a second in bfloat16, an assumption "
        "that time is inversely proportional to. Left out: communication, the optimizer's own step, and what CUDA and "
        f"its allocator take, some GB. Regenerate: `{results['command']}`.",
    ]
    return "\n".join(lines) + "\n"


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {"training_estimate": estimate_table}
