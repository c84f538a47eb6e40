"""Causal models of transformers under lm-eval, as the model `d3llm-ar`: the prompts, stops and counts of `d3llm`.

import d3llm_hf.evaluation.harness.causal  # registers it; `d3llm-eval` does so on the command line
lm_eval.simple_evaluate(model="d3llm-ar", model_args={"pretrained": "gpt2", "decoding_method": "ar"}, tasks=["gsm8k"])
"""

from functools import partial
from typing import Any

import torch
from lm_eval.api.registry import register_model

from ...autoregressive.causal import max_positions
from ...autoregressive.drafters import drafter_arguments
from ...autoregressive.generate import check_drafter, check_model, generate
from ...autoregressive.methods import AR_METHODS, complete_settings
from ...autoregressive.settings import COMMON
from ...fingerprints import head_fingerprint, model_fingerprint
from ...hub.loading import load_draft_head
from .loading import load_checkpoint
from .model import D3LLMLM, DEFAULT_MAX_LENGTH
from .request_settings import RequestSettings


LIKELIHOOD = ("num_samples", "likelihood_batch_size", "likelihood_seed", "check_greedy")


@register_model("d3llm-ar")
class CausalD3LLMLM(D3LLMLM):
    """A causal checkpoint, decoded by one of `AR_METHODS`; for tasks that generate text.

    Args:
        pretrained (`str` or model): folder, id on the Hub, or a loaded model.
        assistant (`str` or model, *optional*): what drafts with `"ar_assistant"`; a loaded model has the target's
            tokenizer.
        draft_head (`str` or `Eagle3Head`, *optional*): what drafts with `"eagle3"`.
        arguments: as [`~.model.D3LLMLM`]'s; settings of decoding are `decoding_method` (`"ar"` when unset), those of
            the method, and `do_sample`, `temperature`, `top_p`, `top_k`, `seed`.

    Raises:
        ValueError, TypeError: for what `d3llm` refuses, settings that the method does not have, a batch with a method
            that takes one row, and for arguments of the likelihood, which lm-eval's own `hf` computes exactly.
    """

    known = frozenset({"decoding_method", "seed", *COMMON}.union(*(row.settings for row in AR_METHODS.values())))
    decisive = ("max_length", "add_bos_token", "end_at_until", "assistant_fingerprint", "draft_head_fingerprint")
    load = staticmethod(partial(load_checkpoint, causal=True))

    def __init__(self, pretrained: Any, *, assistant: Any = None, draft_head: Any = None, **arguments: Any):
        for name in LIKELIHOOD:
            if name in arguments:
                raise ValueError(
                    f"`{name}` is of the estimated likelihood of diffusion models (got {arguments[name]!r}). Leave it "
                    "out; lm-eval's `--model hf` computes the likelihood of causal ones."
                )
        self.drafter: dict[str, Any] = {}
        super().__init__(pretrained, **arguments)
        loaded = None
        if assistant is not None:
            same = {name: arguments[name] for name in ("dtype", "device") if name in arguments}
            tokenizer = None if isinstance(assistant, str) else self.tokenizer
            loaded = load_checkpoint(assistant, tokenizer, causal=True, **same)
        if isinstance(draft_head, str):
            draft_head = load_draft_head(draft_head).to(self.model.device, self.model.dtype)
        self.drafter = drafter_arguments(self.model, self.tokenizer, loaded, draft_head)
        self.assistant_fingerprint = None if loaded is None else model_fingerprint(loaded[0])
        own = self._own(self._asked({}).generate)
        check_model(self.model, self.method, own)
        check_drafter(self.model, self.method, own, **self.drafter)
        self.draft_head_fingerprint = None if draft_head is None else head_fingerprint(draft_head)
        if AR_METHODS[self.method].one_row and self.batch_size > 1:
            raise ValueError(
                f"`batch_size` must be 1 with {self.method}, which takes one row at a time (got {self.batch_size}). "
                "Leave it out."
            )

    @property
    def method(self) -> str:
        return self.settings.get("decoding_method", "ar")

    def _asked(self, arguments: dict[str, Any]) -> RequestSettings:
        asked = super()._asked(arguments)
        if asked.generate.get("decoding_method", self.method) != self.method:
            raise ValueError(
                f"`decoding_method` in `gen_kwargs` must be that of the model, {self.method} (got "
                f"{asked.generate['decoding_method']!r}). Pass it in `model_args`."
            )
        complete_settings(self.method, self._own(asked.generate))
        return asked

    def _draws(self, asked: RequestSettings) -> bool:
        return bool(asked.generate["do_sample"])

    def _own(self, settings: Any) -> dict[str, Any]:
        """The settings of the method among those of a request."""
        return {name: value for name, value in settings.items() if name not in ("decoding_method", "seed")}

    def _generate(self, inputs: dict[str, torch.Tensor], settings: dict[str, Any]) -> Any:
        own = {name: value for name, value in self._own(settings).items() if name in self.known}
        names = ("max_new_tokens", "stopping_criteria", "pad_token_id")
        more: dict[str, Any] = {name: settings[name] for name in names if name in settings}
        if own["do_sample"] and "seed" in settings:
            more["seed"] = settings["seed"]
        return generate(
            self.model,
            inputs["input_ids"],
            inputs["attention_mask"],
            method=self.method,
            settings=own,
            eos_token_id=settings["eos_token_id"] or [],
            **self.drafter,
            **more,
        )

    def _mask_token_id(self) -> int:
        return -1  # no text holds it: nothing here is undecided

    def _positions(self) -> int:
        return max_positions(self.model) or DEFAULT_MAX_LENGTH

    def _estimates(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            "`tasks` must generate text with `--model d3llm-ar` (got one that asks for likelihoods). lm-eval's "
            "`--model hf` computes those of causal models."
        )


__all__ = ["CausalD3LLMLM"]
