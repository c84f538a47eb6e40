"""The points of a sweep that a causal model decodes from left to right: what is refused, decoded and compared."""

import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from transformers.generation import StopStringCriteria

from ...autoregressive.agreement import agrees
from ...autoregressive.drafters import ASSISTANT, DRAFT_HEAD, drafter_arguments
from ...autoregressive.generate import check_drafter, check_model, generate
from ...autoregressive.methods import AR_METHODS, complete_settings
from ...fingerprints import head_fingerprint, model_fingerprint
from ..tasks.load import Task


def split_settings(settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The method of a point, and its other settings."""
    return settings["decoding_method"], {n: value for n, value in settings.items() if n != "decoding_method"}


def alone(settings: Mapping[str, Any]) -> bool:
    """Whether the rows of a point are decoded one by one: transformers takes no batch, or each draws by its seed."""
    method, own = split_settings(settings)
    return AR_METHODS[method].one_row or bool(own.get("do_sample"))


class CausalDecoder:
    """Decodes the batches of a task with a causal model.

    Args:
        model, tokenizer: the target's.
        task: prompts and a judge.
        assistant: model and tokenizer of what drafts with `"ar_assistant"`.
        draft_head: what drafts with `"eagle3"`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        task: Task,
        assistant: tuple[Any, Any] | None = None,
        draft_head: Any = None,
    ):
        self.model, self.tokenizer, self.task = model, tokenizer, task
        self.assistant, self.draft_head = assistant, draft_head
        self.plain: dict[tuple[int, ...], list[int]] = {}  # prompt -> its plain greedy answer

    @cached_property
    def drafter(self) -> dict[str, Any]:
        """The arguments of `generate` about all that could draft."""
        return drafter_arguments(self.model, self.tokenizer, self.assistant, self.draft_head)

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Option -> digest of what was given to draft."""
        found = {}
        if self.assistant is not None:
            found[ASSISTANT.option] = model_fingerprint(self.assistant[0])
        if self.draft_head is not None:
            found[DRAFT_HEAD.option] = head_fingerprint(self.draft_head)
        return found

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuses settings that the model cannot be decoded with.

        Raises:
            ValueError, TypeError: as [`~d3llm_hf.autoregressive.generate.generate`] would.
        """
        method, own = split_settings(settings)
        check_model(self.model, method, own)
        check_drafter(self.model, method, own, **self._drafter_of(method))

    def made(self, settings: Mapping[str, Any], batch_size: int) -> dict[str, Any]:
        """What the record of a point says besides: the batch that it is decoded in, and what drafted."""
        found: dict[str, Any] = {"batch_size": 1 if alone(settings) else batch_size}
        needs = AR_METHODS[settings["decoding_method"]].needs
        if needs is not None:
            found[f"{needs.option}_fingerprint"] = self.fingerprints[needs.option]
        return found

    def _drafter_of(self, method: str) -> dict[str, Any]:
        row = AR_METHODS[method]
        return {} if row.needs is None else row.drafter_of(self.drafter)

    def decode(
        self, rows: Sequence[list[int]], settings: Mapping[str, Any], start: int, length: int
    ) -> tuple[list[list[int]], dict[str, Any]]:
        """Answers to some prompts and their counts; `start` is the number of the first sample.

        Raises:
            ArithmeticError: where greedy tokens are not those of plain greedy decoding.
        """
        method, own = split_settings(settings)
        more = self._drafter_of(method)
        if own.get("do_sample"):
            more["seed"] = [abs(self.task.seed) + start + row for row in range(len(rows))]
        began, cpu_began = time.perf_counter(), time.process_time()
        output, answers = self._generate(rows, length, method=method, settings=own, **more)
        counted = {
            "tokens": output.num_tokens.tolist(),
            "forwards": output.num_forwards.tolist(),
            "forwards_reference": output.num_forwards_reference.tolist(),
            "positions": int(output.positions_computed.sum()),
            "draft_forwards": output.num_draft_forwards.tolist(),
            "draft_positions": int(output.draft_positions_computed.sum()),
        }
        counted["seconds"] = time.perf_counter() - began
        counted["cpu_seconds"] = time.process_time() - cpu_began
        if AR_METHODS[method].drafts and not complete_settings(method, own)["do_sample"] and length > 1:
            counted["equal_to_plain"] = [
                int(agrees(self.model, row, answer, self._plain(row, length), method))
                for row, answer in zip(rows, answers, strict=True)
            ]
        return answers, counted

    def _plain(self, row: list[int], length: int) -> list[int]:
        """The plain greedy answer, decoded once for all points of a sweep."""
        if tuple(row) not in self.plain:
            self.plain[tuple(row)] = self._generate([row], length)[1][0]
        return self.plain[tuple(row)]

    def _generate(self, rows: Sequence[list[int]], length: int, **chosen: Any) -> tuple[Any, list[list[int]]]:
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self.model.device)
        stops = list(self.task.stop_strings)
        criteria = [StopStringCriteria(self.tokenizer, stops)] if stops else []
        own = self.model.generation_config.eos_token_id
        eos = self.tokenizer.eos_token_id if own is None else own
        output = generate(
            self.model, ids, mask, max_new_tokens=length, stopping_criteria=criteria,
            eos_token_id=[] if eos is None else eos, pad_token_id=pad, **chosen,
        )  # fmt: skip
        answers = output.sequences[:, width:].tolist()
        ends = output.num_tokens.tolist()  # before the stop tokens
        return output, [answer[:end] for answer, end in zip(answers, ends, strict=True)]
