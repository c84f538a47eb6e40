"""The tables of results files of `d3llm bench`."""

from collections.abc import Callable
from typing import Any


# Column -> its text for a row of `trainers.bench_train`.
_TRAIN: dict[str, Callable[[dict[str, Any]], str]] = {
    "s a step": lambda row: f"{row['seconds']:.2f}",
    "faster": lambda row: f"{row['speedup']:.2f} x",
    "CPU s a step": lambda row: f"{row['cpu_seconds']:.2f}",
    "faster (CPU s)": lambda row: f"{row['cpu_speedup']:.2f} x",
    "peak, GB": lambda row: f"{row['peak_bytes'] / 1e9:.2f}",
    "of the first": lambda row: f"{row['peak_ratio']:.2f}",
    "of it the step's, GB": lambda row: f"{row['step_bytes'] / 1e9:.2f}",
    "of the first's": lambda row: f"{row['step_ratio']:.2f}",
}


def training_table(results: dict[str, Any]) -> str:
    """The Markdown of a results file of `d3llm bench train`, with what it takes to repeat it."""
    shape, made, positions, found = (results[key] for key in ("shape", "provenance", "positions", "agreement"))
    on_cpu = made["device"] == "cpu"
    where = f"CPU ({made['machine']}), threads: {made['threads']}" if on_cpu else made["machine"]
    counted = (
        "resident memory of a fresh process, with Python and its libraries"
        if on_cpu
        else "what torch's allocator has handed out"
    )
    missing = " Nothing was measured on CUDA." if on_cpu else ""
    extra = f", fine-tuning loss weighted {shape['sft_weight']}" if shape["sft_weight"] else ""
    lines = [
        f"| loss computed from | {' | '.join(_TRAIN)} |",
        f"|---|{'---:|' * len(_TRAIN)}",
        *(f"| {row['name']} | {' | '.join(text(row) for text in _TRAIN.values())} |" for row in results["rows"]),
        "",
        f"A forward and a backward pass of a random LLaDA of {results['parameters'] / 1e6:.1f} M parameters "
        f"({shape['layers']} layers of width {shape['d_model']}, {shape['vocab_size']} tokens) in {shape['dtype']}, "
        f"without the optimizer: {shape['batch_size']} samples of at most {shape['prompt_length']} tokens of prompt "
        f"and {shape['response_length']} of answer, windows of {shape['window']}, objective `{shape['objective']}`, "
        f"{'both views' if shape['complementary'] else 'one view'}{extra}. Of the first batch's {positions['all']} "
        f"positions in all views {positions['learnt']} are learnt. All rows have the same draws; losses differ by at "
        f"most {found['loss']:.0e} and gradients by {found['gradient']:.0e}, relatively. The first row runs a forward "
        "for each view and keeps logits and probabilities of the whole sequence in float32, the second keeps "
        "probabilities of the rows with a loss only, the last is `PseudoTrajectoryDistillTrainer`. Times are medians "
        f"of {shape['repeats']} turns of {shape['steps']} step{'s' * (shape['steps'] > 1)}, ratios medians within a "
        f"turn; CPU s is the processor's time, which other programs disturb less. Peak: {counted}; the step's share "
        f"is what came on top of model and libraries, gradients among it.{missing} {where}, torch {made['torch']}, "
        f"transformers {made['transformers']}. Regenerate: `{results['command']}`.",
    ]
    return "\n".join(lines) + "\n"


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {"bench_train": training_table}
