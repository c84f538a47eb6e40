"""Extraction of trajectories: a teacher decodes prompts, and the order in which it commits its tokens is kept."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import d3llm_hf
from d3llm_hf.locks import clear_left, only_writer
from d3llm_hf.models.text_config import text_setting

from .trajectory_answers import SCORERS
from .trajectory_prompts import Prompts, Sample
from .trajectory_store import TrajectoryStore, open_store, tokenizer_fingerprint


logger = logging.getLogger(__name__)


@dataclass
class TrajectoryConfig:
    r"""How trajectories are decoded, judged and stored. All of it is part of the manifest.

    > Parameters that control the decoding:

        max_new_tokens (`int`, defaults to 256): Length N of the canvas.
        block_length (`int`, defaults to 32): Positions of a block.
        decoding_method (`str`, defaults to `"llada"`): One token a forward, unless `steps` says fewer forwards.
        remasking (`str`, *optional*): What ranks positions; the teacher's family decides when unset, as in d3LLM:
            `"low_confidence"`, or `"entropy"` for models with shifted logits (Dream). Methods without it get none.
        steps (`int`, *optional*): Forwards of the answer; one for each position when unset.
        decoding_settings (`dict` or JSON `str`, *optional*): Further settings of `generate`.
        early_stop (`bool`, defaults to `False`): End a row at its stop token. By default the teacher also decides
            what follows, as in d3LLM: training supervises the fill behind an answer, and so every position has its
            place in the order. With it extraction is faster, and the step map says -1 there.

    > Parameters that control the attempts:

        scorer (`str`, defaults to `"none"`): `"number"` compares the integer after `####`, `"boxed"` the contents of
            the last `\boxed{}`, `"none"` nothing.
        temperatures (`list[float]`, defaults to `[0.0, 0.1, 0.2, 0.3, 0.4]`): One attempt at each in turn, until the
            answer is right. Where none is, the first attempt is kept. Without a reference there is one attempt.
        only_correct (`bool`, defaults to `False`): Leave out answers that are wrong.
        seed (`int`, defaults to 0): With the sample's index and the attempt it determines what is drawn.

    > Parameters that control the data:

        prompt_column, response_column, answer_column (`str`, *optional*): See [`Prompts`].
        max_prompt_length (`int`, *optional*): Leave out prompts with more tokens.
        batch_size (`int`, defaults to 8): Rows that are decoded together.
        shard_size (`int`, defaults to 256): Samples of a shard, the unit of work: a killed run loses at most the one
            that each process was at.

    Raises:
        ValueError: If a value is outside its range.
    """

    max_new_tokens: int = field(default=256, metadata={"help": "Length of the canvas in tokens."})
    block_length: int = field(default=32, metadata={"help": "Positions of a block."})
    decoding_method: str = field(default="llada", metadata={"help": "The teacher's decoding method."})
    remasking: str | None = field(
        default=None, metadata={"help": "What ranks positions; low_confidence, or entropy for Dream, when unset."}
    )
    steps: int | None = field(
        default=None, metadata={"help": "Forwards of an answer; one for each position if unset."}
    )
    decoding_settings: str | None = field(  # a mapping when it comes from a recipe
        default=None, metadata={"help": "Further settings of `generate`, as JSON or as a section of the recipe."}
    )
    early_stop: bool = field(default=False, metadata={"help": "Decide nothing behind the stop token."})

    scorer: str = field(default="none", metadata={"help": f"How answers are judged: one of {sorted(SCORERS)}."})
    temperatures: list[float] = field(
        default_factory=lambda: [0.0, 0.1, 0.2, 0.3, 0.4],
        metadata={"help": "Temperatures of the attempts at an answer, in turn until it is right."},
    )
    only_correct: bool = field(default=False, metadata={"help": "Leave out answers that are wrong."})
    seed: int = field(default=0, metadata={"help": "Determines, with sample and attempt, what is drawn."})

    prompt_column: str | None = field(
        default=None, metadata={"help": "Prompt, text or turns; `messages` or `prompt` when unset."}
    )
    response_column: str | None = field(
        default=None, metadata={"help": "The data's own response, kept as `target_ids`; `completion` when unset."}
    )
    answer_column: str | None = field(
        default=None, metadata={"help": "Reference answer for the scorer; the response when unset."}
    )
    max_prompt_length: int | None = field(default=None, metadata={"help": "Leave out prompts with more tokens."})
    batch_size: int = field(default=8, metadata={"help": "Rows that are decoded together."})
    shard_size: int = field(default=256, metadata={"help": "Samples of a shard; a killed run loses the open ones."})

    def __post_init__(self):
        for name in ("max_new_tokens", "block_length", "batch_size", "shard_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1 (got {getattr(self, name)}). Raise it.")
        if self.scorer not in SCORERS:
            raise ValueError(f"`scorer` must be one of {sorted(SCORERS)} (got {self.scorer!r}). Pass one of them.")
        if not self.temperatures or min(self.temperatures) < 0:
            raise ValueError(
                f"`temperatures` must hold at least one, none below 0 (got {self.temperatures}). Pass 0.0 for the "
                "most probable tokens."
            )
        if self.only_correct and self.scorer == "none":
            raise ValueError(
                "`only_correct` needs a `scorer` (got 'none'): without one no answer is known to be right. Pass "
                f"one of {sorted(set(SCORERS) - {'none'})}."
            )
        if isinstance(self.decoding_settings, str):
            self.decoding_settings = json.loads(self.decoding_settings)
        if not isinstance(self.decoding_settings, dict | None):
            raise ValueError(
                f"`decoding_settings` must map names to values (got {self.decoding_settings!r}). Write for example "
                "'{\"cfg_scale\": 0.5}'."
            )


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
    """
    args = args or TrajectoryConfig()
    prompts = Prompts(dataset, tokenizer, args.prompt_column, args.response_column, args.answer_column)
    store = open_store(folder, _manifest(model, tokenizer, prompts, args, score, dataset_name))
    teacher = Teacher(model.eval(), tokenizer, args, score or SCORERS[args.scorer])
    own = range(process_index, store.num_shards, num_processes)
    todo = [shard for shard in own if not store.is_complete(shard)]
    with tqdm(
        total=sum(len(store.sample_ids(shard)) for shard in own),
        initial=sum(len(store.sample_ids(shard)) for shard in set(own) - set(todo)),
        desc="trajectories",
        unit="sample",
        disable=not progress,
    ) as bar:
        for shard in todo:
            with only_writer(store.path(shard), "folder"):
                store.write(shard, teacher.trajectories(prompts.samples(store.sample_ids(shard)), bar))
    clear_left(store.folder, ".*.lock")
    logger.info("%d of %d shards by this process: %s", len(todo), store.num_shards, teacher.summary())
    return store


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
        self.counts = dict.fromkeys(("samples", "correct", "judged", "tokens", "forwards", "positions"), 0)

    def trajectories(self, samples: Iterator[Sample], bar: tqdm) -> list[dict[str, Any]]:
        """The records of some samples, in their order; prompts that are too long and, if so asked, wrong answers
        are left out.
        """
        longest = self.args.max_prompt_length
        everything = list(samples)
        pending = [sample for sample in everything if longest is None or len(sample.prompt_ids) <= longest]
        bar.update(len(everything) - len(pending))
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
                bar.set_postfix_str(self.summary(), refresh=False)
                bar.update(len(batch) if attempt == 0 else 0)
            pending = wrong
        records = [found[sample_id] for sample_id in sorted(found)]
        return [record for record in records if record["correct"] is not False or not self.args.only_correct]

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

    def summary(self) -> str:
        """Counts so far; tokens are those before a stop token, of all attempts."""
        counts = self.counts
        parts = [f"accuracy {100 * counts['correct'] / counts['judged']:.1f} %"] if counts["judged"] else []
        parts.append(f"{counts['tokens'] / max(1, counts['forwards']):.2f} tokens/forward")
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
