"""Measuring curves of (tokens per forward, accuracy) point by point, so that a sweep may be stopped at any moment.

    points = sweep(model, tokenizer, word_problems(300), [Curve("d3llm")], "results.jsonl", label="d3llm-llada")

Points that the results file holds are not measured again; of a point that was interrupted the batches that are done
are kept in a file beside it. See `points.py` for the results file.
"""

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from ... import __version__
from ...autoregressive.causal import max_positions
from ...autoregressive.methods import AR_METHODS, check_drafters_used, complete_settings, is_autoregressive
from ...files import replace_file
from ...fingerprints import model_fingerprint
from ...locks import only_writer
from ...models.generation_d3llm import D3LLMGenerationMixin
from ...progress import progress_bar
from ..tasks.load import Task
from .causal import CausalDecoder, split_settings
from .grids import Curve
from .points import (
    CAUSAL_SAMPLES,
    CAUSAL_SUMS,
    SAMPLES,
    SCHEMA,
    Point,
    append_point,
    digest,
    intervals,
    key_of,
    ratios,
    read_points,
)


SUMS = ("positions", "seconds", "cpu_seconds")  # over the samples


def sweep(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    curves: Sequence[Curve],
    output: str | os.PathLike,
    *,
    label: str,
    max_new_tokens: int | None = None,
    batch_size: int = 25,
    chat: bool | None = None,
    revision: str | None = None,
    progress: bool | None = None,
    assistant: tuple[Any, Any] | None = None,
    draft_head: Any = None,
    command: str | None = None,
) -> list[Point]:
    """Decodes a task's prompts at every point of some curves, greedily unless the settings sample.

    1. Encode the prompts, name every point, and refuse what `generate` would refuse, before anything is decoded.
    2. Read the results file and the progress of a point that was interrupted.
    3. Decode what is missing, batch by batch; progress is kept after each.
    4. Append each point to the results file when it is complete.

    What is drawn at random (`do_sample`, `remasking="random"`) is drawn for each sample from the task's seed. The
    methods of `AR_METHODS` decode a causal model; those that draft take one row at a time, and their greedy answers
    are compared with plain greedy ones, outside of the time that is measured.

    Args:
        model: a model with the decoder of this package; a causal model of transformers for methods of `AR_METHODS`.
        tokenizer: its tokenizer.
        task: prompts and a judge, see `tasks/load.py`.
        curves: what to visit.
        output: results file, JSON lines; it is made or added to, by one sweep at a time, or another one is refused.
        label: name of the model in the results.
        max_new_tokens: length of an answer; the task's own where nothing is given.
        batch_size: prompts that are decoded together.
        chat: whether prompts go through the chat template; where nothing is given, if the tokenizer has one.
        revision: of the model, for the record; the Hub's commit where transformers knows it.
        progress: show a bar on stderr; where nothing is given, if that is a terminal.
        assistant: model and tokenizer of what drafts with the method `"ar_assistant"`.
        draft_head: an `Eagle3Head` for the model, which drafts with the method `"eagle3"`.
        command: what repeats the sweep, for the record.

    Returns:
        the points of these curves, in their order, as the results file holds them.

    Raises:
        TypeError: for a model that the method of a curve cannot decode.
        ArithmeticError: where a method that drafts gives other tokens than plain greedy decoding.
        ValueError: for an assistant or draft head that no curve takes, a batch size below 1, labels of curves that are
            not unique, settings that `generate` refuses (naming the point), prompts that do not fit into the model,
            damaged or foreign results or progress, and for results that another process is writing.
    """
    output = Path(output)
    if isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"`batch_size` must be a positive integer (got {batch_size!r}). Pass 1 or more.")
    names = [curve.name for curve in curves]
    if len(set(names)) < len(names):
        raise ValueError(f"`curves` must have different labels (got {names}). Set `label` of each.")
    check_drafters_used({"assistant": assistant, "draft_head": draft_head}, [curve.method for curve in curves])

    # 1. Encode the prompts, name every point, and refuse what `generate` would refuse
    chat = bool(tokenizer.chat_template) if chat is None else chat
    prompts = task.encode(tokenizer, chat)
    length = task.max_new_tokens if max_new_tokens is None else max_new_tokens
    _check_length(model, prompts, length)
    made = provenance(model) | {
        "model_revision": revision or getattr(model.config, "_commit_hash", None),
        "task_fingerprint": digest([prompts, task.about]),
        "max_new_tokens": length,
        "batch_size": batch_size,
        "chat": chat,
        "scored_by": task.scored_by,
    }
    made |= {} if command is None else {"command": command}
    causal = CausalDecoder(model, tokenizer, task, assistant, draft_head)
    wanted: list[Point] = []
    for curve in curves:
        for parameter, value, settings in curve.points(length):
            what = describe(label, curve.name, parameter, value)
            check_settings(settings, length, model, what=what, causal=causal)
            more = causal.made(settings, batch_size) if is_autoregressive(settings) else {}
            wanted.append(
                {
                    "schema": SCHEMA,
                    "kind": "point",
                    "model": label,
                    "method": curve.name,
                    "parameter": parameter,
                    "value": value,
                    "settings": settings,
                    "task": task.name,
                    "num_samples": len(prompts),
                    "seed": task.seed,
                    "provenance": made | more,
                }
            )

    # 2. Read the results file and the progress of a point that was interrupted
    with only_writer(output, "output"):
        finished = {key_of(point): point for point in (read_points(output) if output.exists() else [])}
        missing = [point for point in wanted if key_of(point) not in finished]
        journal = Journal(output)
        begun = journal.read(finished, missing)
        missing.sort(key=lambda point: key_of(point) != begun)  # stable: the interrupted one first

        # 3. Decode what is missing, batch by batch
        batches = {key_of(point): -(-len(prompts) // point["provenance"]["batch_size"]) for point in wanted}
        with progress_bar(sum(batches.values()), "batch", label, shown=progress) as bar:
            bar.update(sum(batches.values()) - sum(batches[key_of(point)] for point in missing))
            for point in missing:
                bar.set_postfix_str(describe(point["method"], None, point["parameter"], point["value"]), refresh=False)
                found = _measure(model, tokenizer, task, prompts, point, journal, bar.update, causal)

                # 4. Append the point to the results file
                complete = _complete(point, found)
                append_point(output, complete)
                journal.clear()
                finished[key_of(point)] = complete
        return [finished[key_of(point)] for point in wanted]


def check_settings(
    settings: dict[str, Any],
    length: int,
    model: Any = None,
    *,
    what: str = "point",
    causal: CausalDecoder | None = None,
) -> None:
    """Refuses what `generate` would refuse of some settings: alone, or with a checkpoint's own.

    A method of `AR_METHODS` is checked with `causal`, where there is one.

    Raises:
        ValueError, TypeError: what `generate` raises, with the point named before it.
    """
    from ...models.generation_config_d3llm import D3LLMGenerationConfig

    try:
        if is_autoregressive(settings):
            method, own = split_settings(settings)
            complete_settings(method, own)
            if causal is not None:
                causal.check(settings)
            return
        if model is not None:
            if not isinstance(model, D3LLMGenerationMixin):
                raise TypeError(
                    f"`model` must decode by diffusion for {settings.get('decoding_method')!r} (got "
                    f"{type(model).__name__}). Choose one of {list(AR_METHODS)}, or another checkpoint."
                )
            model.check_settings(**settings, max_new_tokens=length)
            return
        config = D3LLMGenerationConfig(**settings, max_new_tokens=length)
        config.validate()
        config.rules(length)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{what}: {error}") from error


def describe(*names: Any) -> str:
    """A point in a few words: model, curve, parameter and value."""
    *labels, parameter, value = names
    return ", ".join(filter(None, labels)) + (f", {parameter}={value}" if parameter else "")


def _check_length(model: Any, prompts: Sequence[Sequence[int]], length: int) -> None:
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise ValueError(f"`max_new_tokens` must be a positive integer (got {length!r}). Pass 1 or more.")
    longest = max(map(len, prompts))
    limit = model.max_positions if isinstance(model, D3LLMGenerationMixin) else max_positions(model)
    if limit is not None and longest + length > limit:
        raise ValueError(
            f"`max_new_tokens` must leave room for the longest prompt in the model's {limit} positions (got {longest} "
            f"+ {length}). Lower it, or choose a task with shorter prompts."
        )


def _measure(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    prompts: Sequence[list[int]],
    point: Point,
    journal: "Journal",
    advance: Callable[[int], Any],
    causal: CausalDecoder,
) -> dict[str, Any]:
    """Decodes the batches that the journal does not hold yet; returns what all have given."""

    def decode(rows: Sequence[list[int]], settings: dict[str, Any], start: int, length: int) -> tuple:
        if is_autoregressive(settings):
            return causal.decode(rows, settings, start, length)
        return _decode(model, tokenizer, task, rows, settings, start, length)

    made, key = point["provenance"], key_of(point)
    size, found = made["batch_size"], journal.start(point)
    done = len(found["tokens"])
    advance(-(-done // size))
    if done < len(prompts):  # one forward that is not counted, for whatever is set up by the first
        settings = {name: value for name, value in point["settings"].items() if name != "steps"}
        decode(prompts[done : done + size], settings, done, 1)
    for start in range(done, len(prompts), size):
        rows = prompts[start : start + size]
        answers, counted = decode(rows, point["settings"], start, made["max_new_tokens"])
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        counted["correct"] = [int(task.judge(start + row, text)) for row, text in enumerate(texts)]
        for name in SAMPLES + SUMS:
            found[name] += counted[name]
        for name in CAUSAL_SAMPLES:
            if name in counted:
                found[name] = found.get(name, []) + counted[name]
        for name in CAUSAL_SUMS:
            if name in counted and (name in found or start == 0):  # an earlier version's journal has none
                found[name] = found.get(name, 0) + counted[name]
        journal.write(key, found)
        advance(1)
    return found


def _decode(
    model: D3LLMGenerationMixin,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    rows: Sequence[list[int]],
    settings: dict[str, Any],
    start: int,
    length: int,
) -> tuple[list[list[int]], dict[str, Any]]:
    """Answers to some prompts, padded on the left, and their counts; `start` is the number of the first sample."""
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0  # hidden by the attention mask
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    more: dict[str, Any] = {"seed": [abs(task.seed) + start + row for row in range(len(rows))]}
    if task.stop_strings:
        more |= {"stop_strings": list(task.stop_strings), "tokenizer": tokenizer}
    began, cpu_began = time.perf_counter(), time.process_time()
    output = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=length,
        return_dict_in_generate=True,
        **({"do_sample": False} | settings | more),
    )
    # Lists wait for the device, so they belong to the time.
    counted = {
        "tokens": output.num_tokens.tolist(),
        "forwards": output.num_forwards.tolist(),
        "forwards_reference": output.num_forwards_reference.tolist(),
        "positions": int(output.positions_computed.sum()),
    }
    counted["seconds"] = time.perf_counter() - began
    counted["cpu_seconds"] = time.process_time() - cpu_began
    return output.sequences[:, width:].tolist(), counted


def _complete(point: Point, found: dict[str, Any]) -> Point:
    """The line of the results file."""
    samples = {name: found[name] for name in (*SAMPLES, *CAUSAL_SAMPLES) if name in found}
    tokens = sum(samples["tokens"])
    about = {name: value for name, value in point.items() if name != "provenance"}
    figures = ratios(samples) | intervals(samples)
    figures["tokens_per_second"] = round(tokens / max(found["seconds"], 1e-9), 2)
    figures["positions_per_token"] = round(found["positions"] / max(1, tokens), 2)
    figures |= {name: round(found[name], 3) for name in ("seconds", "cpu_seconds")}
    if "draft_forwards" in samples:
        figures["draft_forwards_per_token"] = round(sum(samples["draft_forwards"]) / max(1, tokens), 3)
    if "draft_positions" in found:
        figures["draft_positions_per_token"] = round(found["draft_positions"] / max(1, tokens), 2)
    return about | figures | {"samples": samples, "provenance": point["provenance"]}


class Journal:
    """The batches of the one point that is being measured, in a file beside the results: JSON with a checksum.

    Args:
        output: the results file; the journal is `.NAME.progress` in its folder.
    """

    def __init__(self, output: Path):
        self.path = output.with_name(f".{output.name}.progress")
        self.held: dict[str, Any] = {}

    def read(self, finished: dict[str, Point], missing: Sequence[Point]) -> str | None:
        """The key of the point that was interrupted, if it is one of this sweep; that of a finished point is cleared.

        Where nothing is missing the file may be of another model or task, whose turn comes later.

        Raises:
            ValueError: for a file that is damaged, or of another point than those that are missing.
        """
        if not self.path.exists():
            return None
        try:
            content = json.loads(self.path.read_bytes())
            checked = digest(content["found"]) == content["checksum"]
            key, found = content["key"], content["found"]
        except (ValueError, TypeError, KeyError) as error:
            raise self._refused(f"{type(error).__name__}: {error}", "damaged") from error
        if not checked:
            raise self._refused("another checksum than its own", "damaged")
        if key in finished:
            self.clear()
            return None
        if not missing:
            return None
        if key not in {key_of(point) for point in missing}:
            raise self._refused(f"a point of another sweep, {content.get('about')}", "foreign")
        self.held = {key: found}
        return key

    def _refused(self, what: str, kind: str) -> ValueError:
        return ValueError(
            f"`output` must have no {kind} progress file beside it (got {what} in {str(self.path)!r}). Finish that "
            "sweep, or delete the file: what it holds is one unfinished point."
        )

    def start(self, point: Point) -> dict[str, Any]:
        """What is known of a point so far."""
        self.about = describe(point["model"], point["method"], point["task"], point["parameter"], point["value"])
        empty: dict[str, Any] = {name: [] for name in SAMPLES} | dict.fromkeys(SUMS, 0)
        return self.held.pop(key_of(point), empty)

    def write(self, key: str, found: dict[str, Any]) -> None:
        """Keeps what is known of a point."""
        content = {"key": key, "about": self.about, "found": found, "checksum": digest(found)}
        replace_file(self.path, json.dumps(content).encode())

    def clear(self) -> None:
        """Forgets the point: it is in the results."""
        self.path.unlink(missing_ok=True)


def provenance(model: Any) -> dict[str, Any]:
    """What is needed to repeat a measurement: versions, machine, weights."""
    device = next(model.parameters()).device
    return {
        "d3llm_hf": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "model_fingerprint": model_fingerprint(model),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def commit() -> str | None:
    """The commit of this package's sources, with `-dirty` where they were changed; `None` where it is installed."""
    folder = Path(__file__).resolve().parents[2]
    git = ["git", "-C", str(folder)]
    try:
        # A package that is installed into a folder of some other repository is not tracked there.
        subprocess.run([*git, "ls-files", "--error-unmatch", "__init__.py"], capture_output=True, check=True)
        words = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(words, capture_output=True, check=True, text=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None
