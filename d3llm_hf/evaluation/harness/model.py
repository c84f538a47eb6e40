"""Diffusion language models under EleutherAI's lm-evaluation-harness, as the model `d3llm`.

import d3llm_hf.evaluation.harness.model  # registers it; `d3llm-eval` does so on the command line
lm_eval.simple_evaluate(model="d3llm", model_args={"pretrained": "d3llm-llada"}, tasks=["gsm8k"])
"""

import importlib
import json
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM, hash_args
from lm_eval.api.registry import register_model
from tqdm import tqdm

from ...likelihood import is_greedy, log_likelihood
from ...models.text_config import text_setting
from ...stops import StopInAnswer, before_stop, tokens_of
from ..sweep.points import digest
from ..tasks.contexts import Contexts
from .answer_cache import identity, keep_apart
from .generation_stats import GenerationRecord, totals, write_records
from .loading import load_checkpoint
from .processes import Processes
from .request_settings import LENGTHS, SETTINGS, RequestSettings, check_names, draws, request_settings


# `get_model` imports lm-eval's own models only while nothing is registered; after ours they would be unknown.
importlib.import_module("lm_eval.models")

logger = logging.getLogger(__name__)

DEFAULT_NEW_TOKENS = 256
DEFAULT_MAX_LENGTH = 4096

Pair = tuple[list[int], list[int]]
"""Token ids of a condition and of its completion."""


@register_model("d3llm")
class D3LLMLM(TemplateLM):
    """A LLaDA, Dream or d3LLM checkpoint, or a loaded model, for lm-eval.

    Requests with equal arguments are decoded in batches, the longest prompts first. A request's own arguments (of the
    task or of `--gen_kwargs`) take precedence over the settings given here, and these over the checkpoint's. A prompt
    that leaves no room for its answer is cut on its left.

    Args:
        pretrained (`str` or model): folder, id on the Hub, name of an embedded checkpoint, or a loaded model.
        tokenizer (`str` or tokenizer, *optional*): the checkpoint's when unset; needed with a loaded model.
        revision, dtype, trust_remote_code, attn_implementation: as in `from_pretrained`; the data type is the
            checkpoint's when unset.
        peft (`str`, *optional*): folder or id of a PEFT adapter.
        device (`str`, *optional*): the GPU where there is one when unset. Under `accelerate launch` each process takes
            its own, and the requests are divided among them.
        batch_size (`int`): rows of a batch.
        max_length (`int`, *optional*): positions of prompt and answer; the model's when unset.
        add_bos_token (`bool`, *optional*): put a BOS token before a prompt; as the tokenizer does when unset. A prompt
            that begins with it, as most chat templates', gets no second one.
        end_at_until (`bool`): end a row once its decided text holds a stop string (`until`). Text and tokens are the
            same without it, but the row is decoded to its stop token or its end, as the published d3LLM figures were.
        stats_path (`str`, *optional*): file for a JSON line about each generated answer, see [`GenerationRecord`].
        num_samples, likelihood_batch_size, likelihood_seed (`int`): draws, canvases of a forward, and seed of the
            Monte-Carlo likelihood, see [`log_likelihood`].
        check_greedy (`bool`): also find whether greedy decoding would give a completion, up to one forward a token;
            otherwise lm-eval is told that it would not.
        settings: settings of decoding (`decoding_method`, `block_length`, ...) and other arguments of `generate`;
            `max_gen_toks` or `max_new_tokens` is the length of an answer where the request names none. A `seed` is
            that of the first request whose answer is drawn, each further one has the next. `cfg_scale` is the
            likelihood's, too.

    Raises:
        ValueError, TypeError: for unknown names, with the nearest one that exists, values outside their rule, a model
            that does not decode by diffusion.
    """

    known = SETTINGS
    """Settings of decoding that the model and a request may name."""
    decisive: tuple[str, ...] = (
        "max_length", "add_bos_token", "end_at_until", "num_samples", "likelihood_seed", "check_greedy"
    )  # fmt: skip
    """Attributes that decide an answer besides the settings of decoding."""
    load = staticmethod(load_checkpoint)

    def __init__(
        self,
        pretrained: Any,
        *,
        tokenizer: Any = None,
        revision: str | None = None,
        dtype: str = "auto",
        trust_remote_code: bool = False,
        attn_implementation: str | None = None,
        peft: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        end_at_until: bool = True,
        stats_path: str | None = None,
        num_samples: int = 128,
        likelihood_batch_size: int = 32,
        likelihood_seed: int = 0,
        check_greedy: bool = True,
        **settings,
    ):
        super().__init__()
        check_names(settings, OWN_ARGUMENTS, "`model_args`", self.known)
        self.settings = {name: value for name, value in settings.items() if value is not None}
        if isinstance(self.settings.get("seed"), (list, tuple)):
            raise TypeError(f"`seed` must be one integer (got {settings['seed']!r}). Each request has its own seed.")
        self.batch_size = _positive("batch_size", batch_size)
        self.num_samples = _positive("num_samples", num_samples)
        self.likelihood_batch_size = _positive("likelihood_batch_size", likelihood_batch_size)
        self.likelihood_seed, self.check_greedy = likelihood_seed, check_greedy
        self.end_at_until, self.add_bos_token, self.stats_path = end_at_until, add_bos_token, stats_path
        self.processes = Processes()
        self.model, self.tokenizer = self.load(
            pretrained,
            tokenizer,
            revision=revision,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
            peft=peft,
            device=self.processes.device or device,
        )
        self.contexts = Contexts(self.tokenizer)
        self.name, self.revision, self.peft = str(getattr(self.model.config, "_name_or_path", "")), revision, peft
        self._device = self.model.device
        self._rank, self._world_size = self.processes.rank, self.processes.count
        self.max_length = _positive("max_length", max_length or self._positions())
        self.records: list[GenerationRecord] = []  # of all processes, on the first
        self._drawn: set[str] = set()  # lm-eval's names of requests whose answers are not for the cache
        self._asked({})

    # ---- what lm-eval asks about the model -----------------------------------------------------------------------

    @property
    def max_gen_toks(self) -> int:
        """Length of an answer where neither the request nor the settings name one."""
        return self.model.generation_config.max_new_tokens or DEFAULT_NEW_TOKENS

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Stands for an empty condition; of a tokenizer that knows no such token, what fills up rows."""
        own = (self.tokenizer.bos_token_id, self.eot_token_id)
        return next((token for token in own if token is not None), self._pad_token_id())

    @property
    def tokenizer_name(self) -> str:
        """Names lm-eval's files of prompts: with what makes them, so that an edited template finds none of before."""
        special = {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()}
        made_by = digest([self.tokenizer.chat_template, special])[:12]
        return f"{self.tokenizer.name_or_path.replace('/', '__')}-{made_by}"

    def set_cache_hook(self, cache_hook) -> None:
        """A cache of answers, of which those of other models and settings are none of ours; see `answer_cache.py`."""
        super().set_cache_hook(cache_hook)
        self._drawn.clear()
        self._name_answers()

    def _name_answers(self) -> None:
        """Names what the cache is given from now on: a hook outlives its evaluation, and the model may change."""
        if self.cache_hook.dbdict is None:
            return
        decisive = {name: getattr(self, name) for name in self.decisive}
        owner = identity(self.model, self.tokenizer, {"decoding": self.settings, **decisive})
        keep_apart(self.cache_hook.dbdict, owner, self._drawn)

    def all_gather(self, tensor):
        return self.processes.all_gather(tensor)

    def gather_object(self, obj, dst: int = 0):
        return self.processes.gather_object(obj, dst)

    def barrier(self) -> None:
        self.processes.barrier()

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval adds to the `config` of its results: the model, its settings, and what the answers took."""
        by_task = defaultdict(list)
        for record in self.records:
            by_task[str(record.task)].append(record)
        return {
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.dtype),
            "model_revision": self.revision,
            "model_sha": getattr(self.model.config, "_commit_hash", None) or "",
            "peft": self.peft,
            "settings": self.settings | {"end_at_until": self.end_at_until},
            "generation_stats": totals(self.records) | {"tasks": {n: totals(some) for n, some in by_task.items()}},
        }

    # ---- text to tokens ------------------------------------------------------------------------------------------

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as a text; without `add_generation_prompt` its last message is the answer's beginning."""
        return self.contexts.write(chat_history, add_generation_prompt)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        bos = self.tokenizer.bos_token
        if add_special_tokens is None:
            begun = bool(bos) and string.startswith(bos)  # by the chat template
            add_special_tokens = False if begun else self.add_bos_token
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.contexts.encode(string, **special)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def _fitting(self, ids: list[int], room: int) -> list[int]:
        """The last tokens of a prompt, as many as there is room for."""
        if len(ids) > room:
            logger.warning("A prompt of %d tokens is cut on its left to %d.", len(ids), room)
        return ids[max(0, len(ids) - room) :]

    # ---- generation ----------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers, in the order of the requests; none holds one of its stop strings or anything behind it.

        What each took is added to `records` and written to `stats_path`.
        """
        self._name_answers()
        # 1. Requests with equal arguments make a group; those that are drawn have seeds by their order
        groups: dict[str, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True, default=str)].append(place)
        asked = {key: self._asked(requests[places[0]].args[1]) for key, places in groups.items()}
        drawn = sorted(place for key, places in groups.items() if self._draws(asked[key]) for place in places)
        self._drawn |= {hash_args("generate_until", requests[place].args) for place in drawn}
        seeds = {place: number * self.world_size + self.rank for number, place in enumerate(drawn)}

        # 2. Decode them in batches, the longest first
        texts: list[str] = [""] * len(requests)
        records: list[GenerationRecord | None] = [None] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank > 0, desc="generating") as progress:
            for key, places in groups.items():
                self._tell_overridden(requests[places[0]].args[1])
                prompts = self._prompts(requests, places, asked[key].max_new_tokens)
                places.sort(key=lambda place: -len(prompts[place]))
                for batch in _batches(places, self.batch_size):
                    rows = [prompts[place] for place in batch]
                    answers = self._answer(rows, [seeds.get(place, 0) for place in batch], asked[key])
                    for place, (text, took) in zip(batch, answers, strict=True):
                        texts[place], records[place] = text, self._record(requests, place, took)
                        self.cache_hook.add_partial("generate_until", requests[place].args, text)
                    progress.update(len(batch))

        # 3. Collect what they took; lm-eval fills up the requests of a process by repeating the last one
        seen: Counter[int] = Counter()
        for place, request in enumerate(requests):
            if seen[id(request)] >= (request.repeats or 1):
                records[place] = None
            seen[id(request)] += 1
        for some in self.gather_object([record for record in records if record is not None]) or []:
            self.records += some
        if self.stats_path is not None and self.rank == 0:
            self.records.sort(key=lambda record: (str(record.task), record.doc_id or 0, record.index, record.repeat))
            write_records(self.stats_path, self.records)
        return texts

    def _prompts(self, requests: Sequence[Instance], places: Sequence[int], length: int) -> dict[int, list[int]]:
        """The tokens of some requests, which leave room for an answer of `length`."""
        room = self.max_length - length
        if room < 1:
            raise ValueError(
                f"`max_gen_toks` must leave room for a prompt (got {length} of {self.max_length} positions). Choose a "
                "shorter answer."
            )
        return {
            place: self._fitting(self.tok_encode(requests[place].args[0]) or [self.prefix_token_id], room)
            for place in places
        }

    def _answer(
        self, prompts: list[list[int]], seeds: list[int], asked: RequestSettings
    ) -> list[tuple[str, dict[str, Any]]]:
        """Decodes a batch: each row's text, and what it took. `seeds` are added to the one of the settings."""
        # 1. The batch, its stops and its seeds
        inputs = self._padded(prompts, "left")
        width = inputs["input_ids"].shape[1]
        own, control = self._stop_token_ids(asked.stops)
        eos = [*own, *control] if self.end_at_until else own
        settings: dict[str, Any] = dict(asked.generate) | {"max_new_tokens": asked.max_new_tokens}
        if asked.stops and self.end_at_until:
            mask = settings.get("mask_token_id") or self._mask_token_id()
            settings["stopping_criteria"] = [StopInAnswer(self._decode, asked.stops, width, mask)]
        if settings.get("seed") is not None:  # a request draws the same in any batch
            settings["seed"] = [settings["seed"] + own_seed for own_seed in seeds]

        # 2. Decode
        began = time.perf_counter()
        settings |= {"eos_token_id": eos or None, "pad_token_id": self._pad_token_id()}
        output = self._generate({name: table.to(self.device) for name, table in inputs.items()}, settings)
        lengths = output.num_tokens.tolist()  # waits for the device
        seconds = (time.perf_counter() - began) / len(prompts)

        # 3. Cut and count
        counts = {
            "forwards": output.num_forwards.tolist(),
            "forwards_reference": output.num_forwards_reference.tolist(),
            "positions": output.positions_computed.tolist(),
        }
        if hasattr(output, "num_draft_forwards"):
            counts["draft_forwards"] = output.num_draft_forwards.tolist()
            counts["draft_positions"] = output.draft_positions_computed.tolist()
        answers = []
        for row, (ids, length) in enumerate(zip(output.sequences[:, width:].tolist(), lengths, strict=True)):
            length = next((place for place, token in enumerate(ids[:length]) if token in control), length)
            whole = self._decode(ids[:length])
            text = before_stop(whole, asked.stops)
            took = {name: values[row] for name, values in counts.items()}
            took |= {"prompt_tokens": len(prompts[row]), "max_new_tokens": asked.max_new_tokens, "seconds": seconds}
            took["tokens"] = length if text == whole else tokens_of(self._decode, ids[:length], text)
            answers.append((text, took))
        return answers

    def _asked(self, arguments: dict[str, Any]) -> RequestSettings:
        return request_settings(arguments, self.settings, self.max_gen_toks, self.known)

    def _draws(self, asked: RequestSettings) -> bool:
        return draws(asked, self.model)

    def _generate(self, inputs: dict[str, torch.Tensor], settings: dict[str, Any]) -> Any:
        return self.model.generate(**inputs, **settings, return_dict_in_generate=True)

    def _record(self, requests: Sequence[Instance], place: int, took: dict[str, Any]) -> GenerationRecord:
        request = requests[place]
        repeat = sum(earlier is request for earlier in requests[max(0, place - (request.repeats or 1)) : place])
        return GenerationRecord(request.task_name, request.doc_id, request.idx, repeat, **took)

    def _tell_overridden(self, asked: dict[str, Any]) -> None:
        """Warns of settings of the model that a request replaces: most tasks say `do_sample: false`."""
        own = {name: value for name, value in self.settings.items() if asked.get(name, value) != value}
        length = {name: self.settings[name] for name in LENGTHS if name in self.settings}
        if length and any(asked.get(name) not in (None, *length.values()) for name in LENGTHS):
            own |= length
        if own:
            logger.warning("The request's arguments replace %s of the model. Use `--gen_kwargs` for both.", own)

    def _stop_token_ids(self, stops: Iterable[str]) -> tuple[list[int], list[int]]:
        """The checkpoint's stop tokens, and those of stop strings that are control tokens: no text shows these."""
        own = self.model.generation_config.eos_token_id
        own = self.tokenizer.eos_token_id if own is None else own
        ids = [] if own is None else [own] if isinstance(own, int) else list(own)
        control = {str(token): index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return ids, [control[stop] for stop in stops if stop in control and control[stop] not in ids]

    def _pad_token_id(self) -> int:
        """Fills up rows. What stands behind an answer is cut off, so that any token would do."""
        own = (self.model.generation_config.pad_token_id, self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((token for token in own if token is not None), 0)

    def _mask_token_id(self) -> int:
        own = getattr(self.model.generation_config, "mask_token_id", None)
        return text_setting(self.model.config, "mask_token_id") if own is None else own

    def _positions(self) -> int:
        return self.model.max_positions or DEFAULT_MAX_LENGTH

    def _padded(self, rows: list[list[int]], side: str) -> dict[str, torch.Tensor]:
        width, pad = max(map(len, rows)), self._pad_token_id()
        gaps = [width - len(row) for row in rows]
        if side == "left":
            ids = [[pad] * gap + row for row, gap in zip(rows, gaps, strict=True)]
            seen = [[0] * gap + [1] * len(row) for row, gap in zip(rows, gaps, strict=True)]
        else:
            ids = [row + [pad] * gap for row, gap in zip(rows, gaps, strict=True)]
            seen = [[1] * len(row) + [0] * gap for row, gap in zip(rows, gaps, strict=True)]
        return {"input_ids": torch.tensor(ids, device="cpu"), "attention_mask": torch.tensor(seen, device="cpu")}

    # ---- likelihood ----------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        """Estimates of the bound, in nats, and greedy agreement; `requests` hold the texts and their token ids."""
        self._name_answers()
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        pairs = [(condition, completion) for _, condition, completion in requests]
        for place, answer in self._estimates(pairs, greedy=self.check_greedy, disable_tqdm=disable_tqdm):
            found[place] = answer
            self.cache_hook.add_partial("loglikelihood", requests[place][0], answer)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Estimates of the bound of whole texts, cut where the model's positions end; each part by itself."""
        self._name_answers()
        windows: list[tuple[int, Pair]] = []
        for place, request in enumerate(requests):
            parts = utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length - 1, 1
            )
            windows += ((place, utils.make_disjoint_window(part)) for part in parts)
        sums = [0.0] * len(requests)
        for number, (value, _) in self._estimates([pair for _, pair in windows], False, disable_tqdm):
            sums[windows[number][0]] += value
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def _estimates(self, pairs: Sequence[Pair], greedy: bool, disable_tqdm: bool):
        """Yields `(place, (nats, whether greedy decoding agrees))` of each pair, the longest first."""
        texts = [
            self._fitting(condition, self.max_length - len(completion)) + completion for condition, completion in pairs
        ]
        places = sorted(range(len(pairs)), key=lambda place: -len(texts[place]))
        common: dict[str, Any] = {
            "batch_size": self.likelihood_batch_size,
            "cfg_scale": self.settings.get("cfg_scale", 0.0),
        }
        if self.settings.get("mask_token_id") is not None:
            common["mask_token_id"] = self.settings["mask_token_id"]
        with tqdm(total=len(pairs), disable=disable_tqdm or self.rank > 0, desc="likelihoods") as progress:
            for batch in _batches(places, self.batch_size):
                tables: dict[str, Any] = self._padded([texts[place] for place in batch], "right")
                completion = torch.zeros_like(tables["input_ids"], dtype=torch.bool)
                for row, place in enumerate(batch):
                    end = len(texts[place])
                    completion[row, end - len(pairs[place][1]) : end] = True
                tables["completion_mask"] = completion
                values = log_likelihood(
                    self.model, **tables, **common, num_samples=self.num_samples, seed=self.likelihood_seed
                ).mean.tolist()
                agrees = is_greedy(self.model, **tables, **common).tolist() if greedy else [False] * len(batch)
                yield from zip(batch, zip(values, agrees, strict=True), strict=True)
                progress.update(len(batch))


OWN_ARGUMENTS = tuple(D3LLMLM.__init__.__kwdefaults__ or ())
"""Arguments of the model that are no settings of decoding."""


def _positive(name: str, value: Any) -> int:
    """`value` as a positive integer; lm-eval's command line hands on strings."""
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer (got {value!r}). Pass for example 8.")
    return value


def _batches(items: Sequence, size: int):
    for start in range(0, len(items), size):
        yield items[start : start + size]


__all__ = ["D3LLMLM"]
