"""The tables of results files of `d3llm bench`."""

from collections.abc import Callable
from typing import Any


# Column -> its text for a row of `trainers.bench.training`.
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
    counted = "resident memory of a fresh process, with Python and its libraries"
    handed_out = "what torch's allocator has handed out"
    if made["device"] == "cuda":
        counted = handed_out
    elif "cuda" in results:
        counted += f" (on CUDA {handed_out})"
    rolled = ""
    if shape.get("rollouts"):
        rolled = (
            " A step of `objective='rollout'` has forwards of its own in front; it learns other states, more of them."
        )
    extra = f", fine-tuning loss weighted {shape['sft_weight']}" if shape["sft_weight"] else ""
    lines = [
        *_lines("loss computed from", _TRAIN, _with_cuda(results, lambda row: row["name"])),
        "",
        f"A forward and a backward pass of a random LLaDA of {results['parameters'] / 1e6:.1f} M parameters "
        f"({shape['layers']} layers of width {shape['d_model']}, {shape['vocab_size']} tokens) in {shape['dtype']}, "
        f"without the optimizer: {shape['batch_size']} samples of at most {shape['prompt_length']} tokens of prompt "
        f"and {shape['response_length']} of answer, windows of {shape['window']}, objective `{shape['objective']}`, "
        f"{'both views' if shape['complementary'] else 'one view'}{extra}. Of the first batch's {positions['all']} "
        f"positions in all views {positions['learnt']} are learnt. All rows have the same draws; losses differ by at "
        f"most {found['loss']:.0e} and gradients by {found['gradient']:.0e}, relatively. The first row runs a forward "
        "for each view and keeps logits and probabilities of the whole sequence in float32, the second keeps "
        f"probabilities of the rows with a loss only, the {'third' if rolled else 'last'} is "
        f"`PseudoTrajectoryDistillTrainer`.{rolled} Times are medians "
        f"of {shape['repeats']} turns of {shape['steps']} step{'s' * (shape['steps'] > 1)}, ratios medians within a "
        f"turn; CPU s is the processor's time, which other programs disturb less. Peak: {counted}; the step's share "
        f"is what came on top of model and libraries, gradients among it. {_where(results)} Regenerate: "
        f"`{results['command']}`.",
    ]
    return "\n".join(lines) + "\n"


def _seconds_of(part: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: f"{row['split'][part]:.2f}"


# Column -> its text for a row of `bench.decoding.measure_decoding`; between these and those of `_COST`, its split.
_DECODE: dict[str, Callable[[dict[str, Any]], str]] = {
    "tokens/s": lambda row: f"{row['tokens_per_second']:.2f}",
    "faster": lambda row: f"{row['speedup']:.2f} x",
    "faster (CPU s)": lambda row: f"{row['cpu_speedup']:.2f} x",
    "forwards": lambda row: f"{row['forwards']}",
    "tokens per forward": lambda row: f"{row['tpf']:.2f}",
    "positions per token": lambda row: f"{row['positions_per_token']:.0f}",
    "same tokens": lambda row: f"{row['equal_tokens']:.1f} %",
}
_COST: dict[str, Callable[[dict[str, Any]], str]] = {
    "ms of deciding a forward": lambda row: f"{row['decide_ms']:.2f}",
    "head + score + decide of backbone": lambda row: f"{100 * row['overhead']:.0f} %",
    "of the matmul rate": lambda row: f"{100 * row['matmul_fraction']:.0f} %",
    "peak, GB": lambda row: f"{row['peak_bytes'] / 1e9:.2f}",
}
_GROWTH: dict[str, Callable[[dict[str, Any]], str]] = {
    **{name: _DECODE[name] for name in ("tokens/s", "faster", "faster (CPU s)")},
    "ms a step, mean": lambda row: f"{row['ms_per_step']:.1f}",
    "median": lambda row: f"{row['ms_median_step']:.1f}",
    **{name: _DECODE[name] for name in ("positions per token", "same tokens")},
}
_BLOCKS: dict[str, Callable[[dict[str, Any]], str]] = {
    "tokens/s": _DECODE["tokens/s"],
    "positions per token": lambda row: f"{row['positions_per_token']:.1f}",
    "forwards": _DECODE["forwards"],
    "ms a step": lambda row: f"{row['ms_median_step']:.1f}",
}
_DOUBLED: dict[str, Callable[[dict[str, Any]], str]] = {
    "doubled, s a step": lambda row: f"{row['doubled']:.3f}",
    "two plain forwards, s": lambda row: f"{row['two_plain']:.3f}",
    "times as long": lambda row: f"{row['ratio']:.2f} x",
}
_QUANTISED: dict[str, Callable[[dict[str, Any]], str]] = {
    "accuracy": lambda row: f"{row['accuracy']:.1f} %",
    **{name: _DECODE[name] for name in ("same tokens", "tokens per forward")},
    "tokens/s": lambda row: f"{row['tokens_per_second']:.1f}",
    **{name: _DECODE[name] for name in ("faster", "faster (CPU s)")},
    "weights, MB": lambda row: f"{row['weight_bytes'] / 1e6:.2f}",
}
NEVER_MEASURED = "never measured"
_AXES = {"prompt_length": "prompt", "new_tokens": "answer", "batch_size": "batch"}


def _lines(head: str, columns: dict[str, Callable], named: list[tuple[str, dict[str, Any] | str]]) -> list[str]:
    """A table of named rows; a text in place of a row says why there are no figures."""
    lines = [f"| {head} | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for name, row in named:
        missing = row if isinstance(row, str) else row.get("reason")
        texts = [missing] + [""] * (len(columns) - 1) if missing else [text(row) for text in columns.values()]
        lines.append(f"| {name} | {' | '.join(texts)} |")
    return lines


def _with_cuda(
    results: dict[str, Any], name: Callable[[dict[str, Any]], str]
) -> list[tuple[str, dict[str, Any] | str]]:
    """The rows, and behind those of a CPU the ones that another machine has given for CUDA, or that there are none."""
    named: list[tuple[str, dict[str, Any] | str]] = [(name(row), row) for row in results["rows"]]
    if results["provenance"]["device"] == "cuda":
        return named
    if "cuda" in results:
        return named + [(f"{name(row)}, on CUDA", row) for row in results["cuda"]["rows"]]
    return [*named, ("on CUDA", NEVER_MEASURED)]


def _where(results: dict[str, Any]) -> str:
    """Machine and versions of a results file, and of the one for CUDA beside it."""
    made = results["provenance"]
    threads = f", threads: {made['threads']}" if made["device"] == "cpu" else ""
    text = f"{made['device'].upper()} ({_processor(made)}){threads}, torch {made['torch']}, transformers "
    text += f"{made['transformers']}."
    if "cuda" in results:
        text += f" {_where(results['cuda'])}"
    return text


def _processor(made: dict[str, Any]) -> str:
    """What a device is called, and the instructions of a processor where the results file has them."""
    if "instructions" not in made:
        return made["machine"]
    found = made["instructions"]
    text = f"{made['machine']}, {found['torch']}"
    if found["bfloat16"] is None:  # torch does not say
        return text
    return f"{text}, " + (" and ".join(found["bfloat16"]) or "no instructions for bfloat16")


def _shape(results: dict[str, Any]) -> str:
    """What was decoded, and by which settings."""
    shape = results["shape"]
    if shape["model"]:
        what = f"`{shape['model']}` on word problems, {shape['prompts'] or shape['batch_size']} of them"
    else:
        what = (
            f"a random LLaDA ({shape['layers']} layers of width {shape['d_model']}, {shape['vocab_size']} tokens), "
            f"sure of {100 * shape['sure']:.0f} % of the masks, {shape['prompt_length']} tokens of prompt"
        )
    return f"{what}, {shape['new_tokens']} new tokens, batch {shape['batch_size']}, {shape['dtype']}"


def _settings(row: dict[str, Any]) -> str:
    return ", ".join(f"`{name}={value!r}`" for name, value in row["settings"].items())


def decoding_table(results: dict[str, Any]) -> str:
    """The Markdown of a results file of `d3llm bench decode`, with what it takes to repeat it."""
    parts = results["rows"][0]["split"]
    columns = _DECODE | {f"{part}, s": _seconds_of(part) for part in parts} | _COST
    if results["shape"]["model"]:
        columns = {"accuracy": lambda row: f"{row['accuracy']:.1f} %"} | columns
    lines = _lines("decoding", columns, _with_cuda(results, lambda row: row["name"]))
    lines += [
        "",
        f"Decoded: {_shape(results)}; {_settings(results['rows'][-1])}. Times are medians over "
        f"{results['shape']['repeats']} turn{'s' * (results['shape']['repeats'] > 1)}, ratios medians within a turn, "
        f"of tokens a second. {_where(results)} Regenerate: `{results['command']}`.",
    ]
    return "\n".join(lines) + "\n"


def growth_table(results: dict[str, Any]) -> str:
    """The Markdown of a results file of `d3llm bench growth`."""

    def name(row: dict[str, Any]) -> str:
        return f"{_AXES[row['axis']]} {row['value']}, {row['name']}"

    repeats = results["shape"]["repeats"]
    lines = _lines("point", _GROWTH, _with_cuda(results, name))
    lines += [
        "",
        f"One axis at a time from {_shape(results)}; {_settings(results['rows'][-1])}. Times are medians over "
        f"{repeats} turn{'s' * (repeats > 1)}. The median step is of one turn; with a cache it is a step that reads "
        f"it, while the mean has those that refresh it, too. {_where(results)} Regenerate: `{results['command']}`.",
    ]
    return "\n".join(lines) + "\n"


def blocks_table(results: dict[str, Any]) -> str:
    """The Markdown of a results file of `d3llm bench blocks`."""
    shape = results["shape"]

    def name(row: dict[str, Any]) -> str:
        return f"prompt {row['prompt_length']}, {row['name']}"

    lines = _lines("decoding", _BLOCKS, _with_cuda(results, name))
    lines += [
        "",
        f"A random SDAR ({shape['layers']} layers of width {shape['d_model']}, {shape['vocab_size']} tokens) in "
        f"{shape['dtype']}, {shape['new_tokens']} new tokens in blocks of {shape['block_length']}, "
        f"{shape['schedule']} of them a forward, batch {shape['batch_size']}. Full attention: the same "
        "weights with every position seeing all others. A step is from one forward to the next, the median of a "
        f"turn; times are medians over {shape['repeats']} turn{'s' * (shape['repeats'] > 1)}. "
        f"{_where(results)} Regenerate: "
        f"`{results['command']}`.",
    ]
    return "\n".join(lines) + "\n"


def doubled_step_table(results: dict[str, Any]) -> str:
    """The Markdown of a results file of `trainers.bench.doubled_step`."""
    shape = results["shape"]
    lines = _lines("text", _DOUBLED, _with_cuda(results, lambda row: f"{row['length']} tokens"))
    lines += [
        "",
        f"A forward and a backward pass of a random SDAR ({shape['layers']} layers of width {shape['d_model']}, "
        f"{shape['vocab_size']} tokens) in float32, without the optimizer: batch {shape['batch_size']}, blocks of "
        f"{shape['block_length']}. Both ways compute as many positions and logits; the plain forwards learn something "
        f"else. Times are medians of {shape['repeats']} turn{'s' * (shape['repeats'] > 1)}, ratios medians within a "
        f"turn. {_where(results)} Regenerate: `{results['command']}`.",
    ]
    return "\n".join(lines) + "\n"


def ceiling_table(results: dict[str, Any]) -> str:
    """The Markdown of a results file of `trainers.bench.ceiling`."""
    shape = results["shape"]
    lines = ["| predictions of | right answers | tokens per forward |", "|---|---:|---:|"]
    lines += [f"| `{row['name']}` | {row['answers']} | {row['tpf']:.2f} |" for row in results["rows"]]
    lines += [
        "",
        f"The text is each model's own: its right answers, one token a forward, to {shape['num_problems']} held-out "
        f"word problems, in blocks of {shape['block_length']}. Every hidden position of an open block whose most "
        "probable token is the text's is decided at once, and at least one. "
        f"{_where(results)} Regenerate: `{results['command']}`.",
    ]
    return "\n".join(lines) + "\n"


def quantised_table(results: dict[str, Any]) -> str:
    """The Markdown of a results file of `d3llm bench quantised`."""
    libraries = ", ".join(f"{name} {version}" for name, version in results["libraries"].items() if version)
    lines = _lines("weights", _QUANTISED, _with_cuda(results, lambda row: row["name"]))
    lines += [
        "",
        f"`{results['model']}` on {results['problems']} held-out word problems, at most {results['new_tokens']} new "
        f"tokens, greedy, batches of {results['batch_size']}, the rows taking turns batch by batch; "
        f"{_settings(results) or 'the settings of the checkpoint'}. Same tokens: with those of the first row. "
        f"{libraries + '. ' if libraries else ''}{_where(results)} Regenerate: `{results['command']}`.",
    ]
    return "\n".join(lines) + "\n"


_CAUSAL: dict[str, Callable[[dict[str, Any]], str]] = {
    **{name: _DECODE[name] for name in ("tokens/s", "faster", "faster (CPU s)", "forwards", "tokens per forward")},
    "draft forwards": lambda row: f"{row['draft_forwards']}",
    "positions per token": _BLOCKS["positions per token"],
    "draft positions per token": lambda row: f"{row['draft_positions_per_token']:.1f}",
    "answers as plain greedy's": lambda row: (
        "drawn" if row["equal_answers"] is None else f"{row['equal_answers']:.1f} %"
    ),
}


def autoregressive_table(results: dict[str, Any]) -> str:
    """The Markdown of a results file of `d3llm bench autoregressive`."""
    shape, columns = results["shape"], _CAUSAL
    if shape["model"]:
        columns = {"accuracy": lambda row: f"{row['accuracy']:.1f} %"} | columns
        what = f"`{shape['model']}` on {shape['prompts']} word problems"
    else:
        what = (
            f"A random Llama ({shape['layers']} layers of width {shape['d_model']}, {shape['vocab_size']} tokens), "
            f"{shape['prompts']} prompts of {shape['prompt_length']} tokens"
        )
    lines = _lines("decoding", columns, [(f"{row['name']}: {_settings(row)}", row) for row in results["rows"]])
    lines += [
        "",
        f"{what}, one by one, at most {shape['new_tokens']} new tokens, {shape['dtype']}. Forwards are the target's; "
        f"tokens before the stop token count. Times are medians over {shape['repeats']} turn"
        f"{'s' * (shape['repeats'] > 1)}, ratios medians within a turn, of tokens a second. {_where(results)} "
        f"Regenerate: `{results['command']}`.",
    ]
    return "\n".join(lines) + "\n"


_STUDENTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "batch": lambda row: f"{row['batch']}",
    "`entropy_threshold`": lambda row: f"{row['settings']['entropy_threshold']}",
    "accuracy": lambda row: f"{row['accuracy']:.1f} %",
    "tokens per forward": lambda row: f"{row['tpf']:.2f}",
    "positions per token": lambda row: f"{row['positions_per_token']:.1f}",
    "tokens/s": lambda row: f"{row['tokens_per_second']:.0f}",
}


def students_table(results: dict[str, Any]) -> str:
    """The Markdown of a results file of `d3llm_hf.evaluation.students`."""
    named: list[tuple[str, dict[str, Any] | str]] = [(f"{row['model']}, {row['way']}", row) for row in results["rows"]]
    lines = _lines("student", _STUDENTS, named)
    lines += [
        "",
        f"{results['problems']} {results['task']}, at most 64 new tokens, `decoding_method='d3llm'` "
        "(block by block: 'dparallel'), blocks of 16, float32; blocks are kept in the exact cache. "
        f"Seconds are those in `generate`, the settings taking turns batch by batch. {_where(results)} "
        f"Regenerate: `{results['command']}`.",
    ]
    return "\n".join(lines) + "\n"


_SERVE: dict[str, Callable[[dict[str, Any]], str]] = {
    "tokens/s": lambda row: f"{row['tokens_per_second']:.1f}",
    "of batches' tokens/s": lambda row: f"{row['gain']:.2f} x",
    "tokens per CPU s": lambda row: f"{row['cpu_gain']:.2f} x",
    "first token, p50 s": lambda row: f"{row['first_p50']:.2f}",
    "p95": lambda row: f"{row['first_p95']:.2f}",
    "last token, p50 s": lambda row: f"{row['last_p50']:.2f}",
    "p95 s": lambda row: f"{row['last_p95']:.2f}",
    "of batches' p95": lambda row: f"{row['wait']:.2f} x",
    "rows a forward": lambda row: f"{row['rows_per_step']:.1f}",
    "same answers": lambda row: f"{row['equal_answers']:.1f} %",
}


def serving_table(results: dict[str, Any]) -> str:
    """The Markdown of a results file of `d3llm bench serve`."""
    bench = results["bench"]

    def name(row: dict[str, Any]) -> str:
        return f"{row['rate']:.1f} requests/s ({row['load']:g} x), {row['name']}"

    lengths = ", ".join(map(str, bench["lengths"]))
    lines = _lines("load", _SERVE, _with_cuda(results, name))
    lines += [
        "",
        f"`{bench['model']}` on {bench['requests']} word problems a turn, which come as a Poisson process and ask for "
        f"answers of at most {lengths} tokens; {bench['slots']} rows at work at most, {bench['dtype']}; "
        f"{_settings(bench) or 'the settings of the checkpoint'}. 1 x is what the server without joining answers when "
        f"all wait at once. Same answers: with those of the batches. Times are medians over {bench['repeats']} turn"
        f"{'s' * (bench['repeats'] > 1)}, the two by turns. {_where(results)} Regenerate: `{results['command']}`.",
    ]
    return "\n".join(lines) + "\n"


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "bench_train": training_table,
    "bench_decode": decoding_table,
    "bench_growth": growth_table,
    "bench_blocks": blocks_table,
    "bench_doubled_step": doubled_step_table,
    "bench_ceiling": ceiling_table,
    "bench_quantised": quantised_table,
    "bench_autoregressive": autoregressive_table,
    "students": students_table,
    "bench_serve": serving_table,
}
