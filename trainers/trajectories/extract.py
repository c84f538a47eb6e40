"""Extraction of trajectories: a teacher decodes prompts, and the order in which it commits its tokens is kept."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import d3llm_hf
from d3llm_hf.locks import clear_left, only_writer
from d3llm_hf.models.text_config import text_setting

from ..common.rows import in_row, position_limit, token_ids
from .answers import SCORERS
from .config import TrajectoryConfig
from .prompts import Prompts, Sample
from .store import TrajectoryStore, open_store, tokenizer_fingerprint


logger = logging.getLogger(__name__)

COUNTS = ("samples", "correct", "judged", "tokens", "forwards", "positions", "left_out")
"""What a [`Teacher`] counts of the answers that it decodes."""


def extract_trajectories(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Sequence[dict[str, Any]],
    folder: str | Path,
    args: TrajectoryConfig | None = None,
    *,
    score: Callable[[str, str], bool] | None = None,
    dataset_name: str | None = None,
    process_index: int = 0,
    num_processes: int = 1,
    progress: bool = True,
) -> TrajectoryStore:
    """Decodes every prompt of `dataset` and stores the trajectories in `folder`; [`read_trajectories`] reads them.

    1. Model, tokenizer, settings and data become a manifest; a folder that has one must have the same.
    2. Each process takes every n-th shard; complete ones stay as they are.
    3. The samples of a shard are decoded in batches, the wrong answers again at the next temperature.
    4. The shard is written, whole or not at all.

    A record depends on its sample, the settings and the batches of its shard alone: a run that is broken off and
    resumed, with any number of processes, writes the same records as an unbroken one on such hardware.

    Args:
        model: the teacher, a model with [`D3LLMGenerationMixin`]; put into evaluation mode.
        tokenizer: its tokenizer.
        dataset: rows by index, see [`Prompts`] for the columns.
        folder (path): where the shards go.
        args ([`TrajectoryConfig`], *optional*): settings.
        score (*optional*): whether a text agrees with a reference, in place of `args.scorer`.
        dataset_name (`str`, *optional*): noted in the manifest.
        process_index, num_processes (`int`): this process, of how many. They need no connection to each other.
        progress (`bool`): show a progress bar with samples/s, accuracy and tokens per forward.

    Returns:
        [`TrajectoryStore`]; complete once all processes have returned.

    Raises:
        TrajectoryError: for a folder of another run, or a damaged manifest.
        ValueError: for columns or settings that do not fit, and for a shard that another process is at.
        RowError: naming the row, for one that is no prompt, or a reference that the scorer of `args` cannot read.
        ValueError: for columns or settings that do not fit, or if no prompt does.
    """
    extraction = Extraction(model, tokenizer, dataset, args, score=score, dataset_name=dataset_name)
    store = open_store(folder, extraction.manifest)
    own = range(process_index, store.num_shards, num_processes)
    todo = [shard for shard in own if not store.is_complete(shard)]
    with progress_bar(store, own, todo, progress) as bar:
        for shard in todo:
            with only_writer(store.path(shard), "folder"):
                store.write(shard, extraction.records(store.sample_ids(shard), bar))
    clear_left(store.folder, ".*.lock")
    summary = summary_of(extraction.counts)
    logger.info("%d of %d shards by this process: %s", len(todo), store.num_shards, summary)
    return store


def progress_bar(store: TrajectoryStore, own: Sequence[int], todo: Sequence[int], shown: bool) -> tqdm:
    """A bar of the samples in a process' `own` shards, of which those in `todo` are still to be decoded."""
    return tqdm(
        total=sum(len(store.sample_ids(shard)) for shard in own),
        initial=sum(len(store.sample_ids(shard)) for shard in set(own) - set(todo)),
        desc="trajectories",
        unit="sample",
        disable=not shown,
    )


class Extraction:
    """A teacher and its prompts, checked: the records of any samples, and the manifest of what they are of.

    Args:
        model, tokenizer, dataset, args, score, dataset_name: see [`extract_trajectories`].

    Raises:
        ValueError, RowError: see [`extract_trajectories`].
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        dataset: Sequence[dict[str, Any]],
        args: TrajectoryConfig | None = None,
        *,
        score: Callable[[str, str], bool] | None = None,
        dataset_name: str | None = None,
    ):
        args = args or TrajectoryConfig()
        self._prompts = Prompts(
            dataset,
            tokenizer,
            args.prompt_column,
            args.response_column,
            args.answer_column,
            args.control_tokens_in_text,
        )
        self._teacher = Teacher(model.eval(), tokenizer, args, score or SCORERS[args.scorer])
        self.manifest = _manifest(model, tokenizer, self._prompts, args, score, dataset_name)  # reads every row
        _check_prompts(self._prompts, self._teacher, score is None)

    @property
    def counts(self) -> dict[str, int]:
        """What was decoded so far, for [`summary_of`]."""
        return self._teacher.counts

    def records(self, sample_ids: Sequence[int], bar: tqdm) -> list[dict[str, Any]]:
        """The records of some samples, in their order."""
        return self._teacher.trajectories(self._prompts.samples(sample_ids), bar)


class Teacher:
    """A model that decodes samples into records.

    Args:
        model, tokenizer, args: see [`extract_trajectories`].
        score: whether a text agrees with a reference; `None` judges nothing.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        args: TrajectoryConfig,
        score: Callable[[str, str], bool] | None,
    ):
        self.model, self.tokenizer, self.args, self.score = model, tokenizer, args, score
        ends = model.generation_config.eos_token_id
        ends = tokenizer.eos_token_id if ends is None else ends
        self.stop_ids = [ends] if isinstance(ends, int) else list(ends)
        self.settings = _decoding_settings(model, args)
        self.longest_prompt = _longest_prompt(model, args, self.settings["max_new_tokens"])
        self.counts = dict.fromkeys(COUNTS, 0)

    def takes(self, sample: Sample) -> bool:
        """Whether a prompt has a length that can be decoded.

        Raises:
            RowError: for ids that the model does not have.
        """
        with in_row(sample.sample_id):
            token_ids(sample.prompt_ids, "prompt_ids", _vocab_size(self.model))
        return 0 < len(sample.prompt_ids) <= (self.longest_prompt or len(sample.prompt_ids))

    def trajectories(self, samples: Iterator[Sample], bar: tqdm) -> list[dict[str, Any]]:
        """The records of some samples, in their order; prompts that are too long and, if so asked, wrong answers
        are left out.
        """
        pending, left_out = [], []
        for sample in samples:
            (pending if self.takes(sample) else left_out).append(sample)
        self._leave_out(left_out)
        bar.update(len(left_out))
        pending.sort(key=lambda sample: -len(sample.prompt_ids))  # rows of a batch with little padding
        found: dict[int, dict[str, Any]] = {}
        for attempt in range(len(self.args.temperatures)):
            wrong = []
            for start in range(0, len(pending), self.args.batch_size):
                batch = pending[start : start + self.args.batch_size]
                for sample, record in zip(batch, self.decode(batch, attempt), strict=True):
                    if record["correct"] is False:
                        wrong.append(sample)
                    if attempt == 0 or record["correct"]:
                        found[sample.sample_id] = record
                    self._count(record, attempt)
                bar.set_postfix_str(summary_of(self.counts), refresh=False)
                bar.update(len(batch) if attempt == 0 else 0)
            pending = wrong
        records = [found[sample_id] for sample_id in sorted(found)]
        return [record for record in records if record["correct"] is not False or not self.args.only_correct]

    def _leave_out(self, samples: Sequence[Sample]) -> None:
        self.counts["left_out"] += len(samples)
        if samples:
            logger.warning(
                "Rows %s are left out: their prompts are empty, or longer than the %s tokens for which "
                "`max_prompt_length` and the model's positions beside `max_new_tokens` leave room.",
                [sample.sample_id for sample in samples],
                self.longest_prompt,
            )

    def decode(self, batch: Sequence[Sample], attempt: int) -> list[dict[str, Any]]:
        """One attempt at each sample of a batch, as records."""
        width, fill = max(len(sample.prompt_ids) for sample in batch), self.tokenizer.eos_token_id
        padding = [width - len(sample.prompt_ids) for sample in batch]
        ids = [[fill] * n + sample.prompt_ids for n, sample in zip(padding, batch, strict=True)]
        mask = [[0] * n + [1] * (width - n) for n in padding]
        temperature = self.args.temperatures[attempt]
        seeds = [seed_of(self.args.seed, sample.sample_id, attempt) for sample in batch]
        output = self.model.generate(
            torch.tensor(ids, device=self.model.device),
            attention_mask=torch.tensor(mask, device=self.model.device),
            **self.settings,
            **({"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}),
            # Tokens behind a stop token are kept as they were decoded, unless nothing is decoded there: where no token
            # stops, nothing is padded.
            eos_token_id=self.stop_ids if self.args.early_stop else [],
            pad_token_id=fill,
            seed=seeds,
            return_dict_in_generate=True,
        )
        tokens, steps = output.sequences[:, width:].tolist(), output.step_map.tolist()
        counts = zip(output.num_forwards.tolist(), output.positions_computed.tolist(), strict=True)
        return [
            self._record(sample, answer, order, forwards, positions) | {"attempt": attempt, "seed": seed}
            for sample, answer, order, (forwards, positions), seed in zip(
                batch, tokens, steps, counts, seeds, strict=True
            )
        ]

    def _record(self, sample: Sample, answer: list[int], order: list[int], forwards: int, positions: int) -> dict:
        end = next((i for i, token in enumerate(answer) if token in self.stop_ids), len(answer))
        if self.args.early_stop:
            order = order[: end + 1] + [-1] * (len(order) - end - 1)
        correct = None
        if self.score is not None and sample.answer is not None:
            text = self.tokenizer.decode(answer[:end], skip_special_tokens=True)
            correct = bool(self.score(text, sample.answer))
        return {
            "sample_id": sample.sample_id,
            "prompt_ids": sample.prompt_ids,
            "response_ids": answer,
            "step_map": order,
            "num_forwards": forwards,
            "positions_computed": positions,
            "correct": correct,
            "target_ids": sample.target_ids,
        }

    def _count(self, record: dict[str, Any], attempt: int) -> None:
        answer, judged = record["response_ids"], record["correct"] is not None
        self.counts["samples"] += attempt == 0
        self.counts["judged"] += attempt == 0 and judged
        self.counts["correct"] += bool(record["correct"])
        self.counts["tokens"] += next((i for i, t in enumerate(answer) if t in self.stop_ids), len(answer))
        self.counts["forwards"] += record["num_forwards"]
        self.counts["positions"] += record["positions_computed"]


def summary_of(counts: Mapping[str, int]) -> str:
    """What counts of a [`Teacher`] say; tokens are those before a stop token, of all attempts."""
    parts = [f"accuracy {100 * counts['correct'] / counts['judged']:.1f} %"] if counts["judged"] else []
    parts.append(f"{counts['tokens'] / max(1, counts['forwards']):.2f} tokens/forward")
    if counts["left_out"]:
        parts.append(f"{counts['left_out']} left out")
    return ", ".join([*parts, f"{counts['forwards']} forwards", f"{counts['positions']} positions"])


def seed_of(seed: int, sample_id: int, attempt: int) -> int:
    """The seed of one attempt at one sample, below 2**63; different ones are unrelated."""
    digest = hashlib.sha256(f"{seed} {sample_id} {attempt}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def weights_sha256(model: torch.nn.Module) -> str:
    """SHA-256 of all weights, by name: what a teacher is, wherever it came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _vocab_size(model: PreTrainedModel) -> int:
    return model.get_input_embeddings().weight.shape[0]


def _longest_prompt(model: PreTrainedModel, args: TrajectoryConfig, max_new_tokens: int) -> int | None:
    """Tokens that a prompt may have: `max_prompt_length`, and what the canvas leaves of the model's positions."""
    limit = position_limit(model)
    room = None if limit is None else limit - max_new_tokens
    if room is not None and room < 1:
        raise ValueError(
            f"`max_new_tokens` must leave room for a prompt in the model's {limit} positions (got {max_new_tokens}). "
            "Lower it."
        )
    return min((length for length in (args.max_prompt_length, room) if length is not None), default=None)


def _check_prompts(prompts: Prompts, teacher: Teacher, score_is_ours: bool) -> None:
    """What would end an extraction on its way is refused before it begins."""
    if teacher.score is not None and score_is_ours:
        prompts.check_answers(teacher.score)
    if len(prompts) and not any(map(teacher.takes, prompts.samples(range(len(prompts))))):
        raise ValueError(
            f"At least one prompt must fit (got {len(prompts)}, of which all are empty or longer than the "
            f"{teacher.longest_prompt} tokens for which `max_prompt_length` and the model's positions beside "
            "`max_new_tokens` leave room). Raise the first, or lower the last."
        )


def _decoding_settings(model: PreTrainedModel, args: TrajectoryConfig) -> dict[str, Any]:
    """Arguments of `generate` that are the same for every sample."""
    settings = {name: getattr(args, name) for name in ("max_new_tokens", "block_length", "decoding_method", "steps")}
    settings["remasking"] = args.remasking
    if args.remasking is None and args.decoding_method == "llada":
        settings["remasking"] = "entropy" if getattr(model, "logit_shift", 0) else "low_confidence"
    settings |= {"early_stop": args.early_stop} | (args.decoding_settings or {})
    return {name: value for name, value in settings.items() if value is not None}


def _manifest(model, tokenizer, prompts: Prompts, args: TrajectoryConfig, score, dataset_name) -> dict[str, Any]:
    """What [`open_store`] compares when a run is resumed."""
    settings = asdict(args) | {"decoding": _decoding_settings(model, args)}
    if not args.control_tokens_in_text:  # as in folders from before there was a choice
        del settings["control_tokens_in_text"]
    if score is not None:
        settings["scorer"] = f"{score.__module__}.{score.__qualname__}"
    mask_token_id = text_setting(model.config, "mask_token_id")
    defaults = json.loads(model.generation_config.to_json_string())
    defaults.pop("transformers_version", None)
    return {
        "versions": {package.__name__: package.__version__ for package in (d3llm_hf, torch, transformers)},
        "teacher": {
            "name": name.name if (name := Path(model.config.name_or_path)).is_absolute() else str(name),
            "revision": getattr(model.config, "_commit_hash", None),
            "weights_sha256": weights_sha256(model),
            "dtype": str(model.dtype).removeprefix("torch."),
            "vocab_size": _vocab_size(model),
            "generation_config": defaults,  # what `generate` takes where the settings say nothing
            "mask_token_id": tokenizer.mask_token_id if mask_token_id is None else mask_token_id,
        },
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "settings": settings,
        "dataset": {"name": dataset_name, "num_samples": len(prompts), "fingerprint": prompts.fingerprint()},
    }
