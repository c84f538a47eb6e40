"""`generate()` for masked diffusion language models: transformers' `GenerationMixin` with another decoding core."""

import copy
import functools
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GenerateDecoderOnlyOutput

from .answer_count import AnswerCount
from .at_work import CanvasRows, RowsAtWork
from .cache_name import given_cache
from .call import Call
from .contract import CanvasContract
from .decoding import Rules
from .generation_config_d3llm import WAY_OUT, D3LLMGenerationConfig, unknown_field
from .input_shapes import check_shapes
from .processors import Processors
from .prompt_checks import check_positions
from .scoring import Sampler
from .slots import SlotRows
from .stock_settings import NO_INPUTS
from .streaming import Stream
from .text_config import text_setting
from .token_ids import vocabulary_of
from .wrappers import hooks_of_a_call


@dataclass
class D3LLMGenerationOutput(AnswerCount, GenerateDecoderOnlyOutput):
    """What `generate(..., return_dict_in_generate=True)` returns. B rows, P prompt slots, N new tokens.

    Args:
        sequences (`(B, P + N)` long): prompt and answer; pad tokens behind the first stop token.
        tokens_per_forward (`(B,)` float): answer tokens before the first stop token, over `num_forwards`.
        num_forwards (`(B,)` long): forwards that the row took part in, until it was finished. The cache is filled by
            the same forwards, and drafts are verified by them.
        num_forwards_reference (`(B,)` long): the same by the d3LLM code's count, which adds one when the fill after a
            stop token ends the row, and one for each block that Fast-dLLM's caches find finished by its first forward;
            by SDAR's with `"sdar"`, whose prompt and finished blocks have forwards of their own that store their keys;
            and so by Fast-dLLM v2's with `"fast_dllm_v2"`.
        num_store_forwards (`(B,)` long): forwards among `num_forwards` that only stored finished blocks, and read the
            first token of the next one behind them; 0 with other methods than `"fast_dllm_v2"`.
        step_map (`(B, N)` long): the forward, from 1, that committed each new token, the first one where it was
            replaced, the last one where it was taken back; -1 where none did. With infilling `(B, P + N)`, and -1 on
            the given text as well.
        tokens_per_forward_reference (`(B,)` float, *optional*): with `"refusion"` what its code reports: the mean over
            rounds of slots times their size over forwards, in which a slot that ends a row, and those that it takes
            away, count as whole ones; `None` with other methods.
        positions_computed (`(B,)` long): positions pushed through the model, summed over the row's forwards (twice
            with guidance, and over all drafted canvases; those of a shadow block as well): the cost that tokens per
            forward hide.
        num_revoked (`(B,)` long): how often a decided position was taken back; 0 with methods that never do.
        canvas_length (`(B,)` long): positions that the row had to decide when it ended: what `length="adaptive"` has
            found; with a fixed length all, in block-causal models to the end of the last block.

    The cache that transformers' output has is always `None`, as its scores and states are: cached keys hold
    approximations that only this decoding may read.
    """

    tokens_per_forward: torch.Tensor | None = None
    num_forwards: torch.Tensor | None = None
    num_forwards_reference: torch.Tensor | None = None
    num_store_forwards: torch.Tensor | None = None
    step_map: torch.Tensor | None = None
    tokens_per_forward_reference: torch.Tensor | None = None
    positions_computed: torch.Tensor | None = None
    num_revoked: torch.Tensor | None = None
    canvas_length: torch.Tensor | None = None


class D3LLMGenerationMixin(CanvasContract, GenerationMixin):
    """Gives a bidirectional masked language model `generate()`; it comes first among the bases.

    The model needs a mask token (`config.mask_token_id`, or the generation config's) and keeps [`CanvasContract`]:
    a forward over whole canvases whose attention is not causal, and `logit_shift`.
    """

    generation_config_class: type[GenerationConfig] = D3LLMGenerationConfig
    _supported_generation_modes = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)

    def generate(self, *args, **kwargs):
        _check_arguments(args, kwargs)
        with hooks_of_a_call(self):
            if kwargs.get("streamer") is None:
                return super().generate(*args, **kwargs)
            with Stream.of(kwargs["streamer"]) as stream:  # ended whatever happens, also where arguments are refused
                return super().generate(*args, **(kwargs | {"streamer": stream}))

    # ---- what transformers asks before decoding ------------------------------------------------------------------

    def adjust_generation_fn(self, *args, **kwargs):
        """transformers reads `generation_config.json` into its own class; ours has more fields."""
        super().adjust_generation_fn(*args, **kwargs)
        try:
            self.generation_config = D3LLMGenerationConfig.coerce(self.generation_config)
        except (TypeError, ValueError) as error:
            rule = str(error).removesuffix(f" {WAY_OUT}")
            raise type(error)(
                f"{rule} It stands in the checkpoint's generation_config.json; correct it there."
            ) from error

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, **kwargs):
        """Arguments > `generation_config` > the checkpoint's (of the same method) > transformers' global defaults."""
        given = D3LLMGenerationConfig() if generation_config is None else copy.deepcopy(generation_config)
        if not isinstance(given, D3LLMGenerationConfig):
            given = D3LLMGenerationConfig.coerce(given)
        own = self.generation_config
        if not isinstance(own, D3LLMGenerationConfig):  # transformers made it, for a model built from its config
            own = D3LLMGenerationConfig.coerce(own)
        model_kwargs = given.inherit(own, kwargs, self.traits)
        if given.do_sample and given.top_k is None:
            given.top_k = 0  # no hidden truncation: transformers would sample from the 50 best tokens
        given.refuse_unfitting()
        given.update(**given._get_default_generation_params(), defaults_only=True)
        given.check_against(vocabulary_of(self.config), text_setting(self.config, "mask_token_id"))
        return given, model_kwargs

    def check_settings(self, *, max_new_tokens: int, **settings) -> D3LLMGenerationConfig:
        """The config that `generate` would make of some settings, refused before there is a prompt to decode.

        Args:
            max_new_tokens: the answer's length, which some settings have to fit.
            settings: further arguments of `generate`, none of the model's forward.

        Raises:
            ValueError, TypeError: what `generate` raises for them.
        """
        config, unknown = self._prepare_generation_config(None, **settings, max_new_tokens=max_new_tokens)
        if unknown:
            raise ValueError(" ".join(map(unknown_field, unknown)))
        config.validate()
        rules = config.rules(max(config.max_new_tokens or 0, 1), self.traits)
        model: Any = self  # transformers annotates these methods for a class of its own
        model._validate_generation_mode(config.get_generation_mode(None), config, {})
        self._check_processors(copy.deepcopy(config), rules)
        return config

    def _prepare_model_inputs(self, *args, **kwargs):
        """As transformers', then what came beside the prompt has to fit it."""
        prompt, name, model_kwargs = super()._prepare_model_inputs(*args, **kwargs)
        width = getattr(self.get_input_embeddings(), "embedding_dim", None)
        check_shapes(name, prompt, model_kwargs, width)
        check_positions(model_kwargs.get("position_ids"), model_kwargs.get("attention_mask"), self.position_offset)
        return prompt, name, model_kwargs

    def _check_processors(self, config: D3LLMGenerationConfig, rules: Rules) -> None:
        """Makes the processors of a call, which check the settings that they are made of."""
        prompt = torch.zeros(1, 1, dtype=torch.long, device="cpu")
        model: Any = self  # as above
        model._prepare_special_tokens(config, True, device="cpu")
        config.max_length = 1 + (config.max_new_tokens or 0)
        processors = self._get_logits_processor(
            generation_config=config, input_ids_seq_length=1, encoder_input_ids=prompt, device="cpu", model_kwargs={}
        )
        Processors.check(processors, rules, vocabulary_of(self.config))

    def _prepare_generated_length(self, generation_config, *args, **kwargs):
        """Infilling appends nothing unless the call says how much."""
        if generation_config.appends:
            return super()._prepare_generated_length(generation_config, *args, **kwargs)
        generation_config.max_length = kwargs["input_ids_length"]
        return generation_config

    def _validate_generated_length(self, generation_config, *args, **kwargs):
        if generation_config.appends:
            super()._validate_generated_length(generation_config, *args, **kwargs)

    def _validate_model_kwargs(self, model_kwargs):
        """As transformers', but a misspelt setting is answered with the nearest one, and nothing has no effect."""
        for name, reason in NO_INPUTS.items():
            if model_kwargs.get(name) is not None:
                raise ValueError(f"`{name}` has no effect on diffusion decoding: {reason}. Leave it out.")
        try:
            super()._validate_model_kwargs({n: v for n, v in model_kwargs.items() if n != "infill_mask"})
        except ValueError as error:
            unknown = [name for name in model_kwargs if f"'{name}'" in str(error)]
            raise ValueError(" ".join(self._unknown(n, model_kwargs[n]) for n in unknown) or str(error)) from error

    def _unknown(self, name: str, value) -> str:
        """The message for an argument that nothing reads: tokenizers return tensors, people misspell settings."""
        if not isinstance(value, torch.Tensor):
            return unknown_field(name)
        hint = f" (`tokenizer(..., return_{name}=False)`)" if name == "token_type_ids" else ""
        return f"`{name}` is no input of {type(self).__name__}, whose forward does not take it. Leave it out{hint}."

    def _get_logits_processor(self, *args, **kwargs):
        for name in ("negative_prompt_ids", "negative_prompt_attention_mask"):
            if kwargs.get(name) is not None:
                raise ValueError(f"`{name}` has no effect on diffusion decoding: {NO_INPUTS[name]}. Leave it out.")
        return super()._get_logits_processor(*args, **kwargs)

    def _prepare_cache_for_generation(self, *args, **kwargs):
        """The cache is the decoding loop's own; it depends on the method."""

    def generate_batch(self, *args, **kwargs):
        """Refused: paged continuous batching would decode left to right."""
        raise ValueError(
            '`generate_batch` and `cache_implementation="paged"` decode left to right. Pass a left-padded batch to '
            "`generate`."
        )

    def init_continuous_batching(self, *args, **kwargs):
        """Refused as `generate_batch`, of which it is the first step; servers call it by itself."""
        self.generate_batch()

    def _sampler(self, generation_config: D3LLMGenerationConfig) -> Sampler:
        """The source of random numbers of one call; see [`Sampler`]."""
        return Sampler(generation_config.seed)

    # ---- decoding ------------------------------------------------------------------------------------------------

    def prepare(self, *args, **kwargs) -> Call:
        """The call that `generate` would make of its arguments, which nobody has decoded yet.

        [`RowsAtWork.admit`] takes it. A streamer is told the prompts here and all else from then on; nothing of what
        is refused here.

        Raises:
            ValueError, TypeError: what `generate` raises before its first forward, and for arguments that say how it
                goes on from there.
        """
        _check_arguments(args, kwargs)
        for name in ("tokenizer", "synced_gpus", "custom_generate"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"`{name}` has no effect on a call that is only prepared (got one). Leave it out; a stopping "
                    "criterion can read stop strings."
                )
        prepared = functools.partial(Call.of, streamer=kwargs.get("streamer"))
        with hooks_of_a_call(self):
            return super().generate(*args, custom_generate=prepared, **kwargs)

    def rows_at_work(self, call: Call) -> RowsAtWork:
        """Where a prepared call, and others of its kind, are decoded; nobody is at work there yet."""
        return SlotRows(self) if call.rules.slot_size else CanvasRows(self)

    def _sample(  # type: ignore[override]  # the config is ours: see `_prepare_generation_config`
        self,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: D3LLMGenerationConfig,
        synced_gpus: bool = False,
        streamer=None,
        tokenizer=None,
        **model_kwargs,
    ) -> D3LLMGenerationOutput | torch.Tensor:
        r"""Decodes a batch of canvases, each until its own end.

        1. Settings become rules, the prompt becomes a canvas (`Call.of`; of static shapes where `compile_config` asks
           for them).
        2. Draft canvases beside the decided ones, where the rules ask for it.
        3. Open blocks and plan which slots the next forward recomputes.
        4. Forward them; logits of the candidates only, and of decided positions that may still change.
        5. Score the candidates: a token and a cost each.
        6. Commit what the rules choose, take back, replace, settle which canvases stay; fill after a stop; lengthen or
           shorten the canvas.
        7. Rows that are finished, or that a criterion stops, leave the batch.
        8. Pad behind the stop tokens and count (`_result`).

        2 to 7 are a step of `RowsAtWork`; a method of slots has one of its own (`SlotRows`).
        """
        # 1. Settings become rules, the prompt becomes a canvas
        call = Call.of(
            self, input_ids, logits_processor, stopping_criteria, generation_config, streamer, **model_kwargs
        )
        with self.rows_at_work(call) as rows:
            rows.admit(call)
            while self._has_unfinished_sequences(rows.size == 0, synced_gpus, input_ids.device):
                if rows.size:  # 2. to 7.
                    rows.step()
                    call.check()
                else:  # another process is not finished, and its forwards are collective
                    self(**self.accepted(rows.canvas.idle_inputs()))
        return self._result(call)

    @staticmethod
    def _result(call: Call) -> D3LLMGenerationOutput | torch.Tensor:
        """Stage 8: pad behind the stop tokens and count."""
        sequences, step_map, lengths = call.answers()
        if not call.config.return_dict_in_generate:
            return sequences
        counts = call.ended.counts  # type: ignore[union-attr]  # its rows have left
        return D3LLMGenerationOutput(
            sequences=sequences,  # type: ignore[arg-type]  # transformers' annotation is a type that nothing has
            tokens_per_forward=lengths.float() / counts.forwards.clamp_min(1),
            num_forwards=counts.forwards,
            num_forwards_reference=counts.reference,
            num_store_forwards=counts.stored,
            step_map=step_map,
            tokens_per_forward_reference=call.official_rates,
            positions_computed=counts.computed,
            num_revoked=counts.revoked,
            canvas_length=counts.extent,
        )


def _check_arguments(args: tuple, kwargs: dict[str, Any]) -> None:
    """Refuses what transformers would take apart before it asks anyone."""
    if (given := given_cache(kwargs)) is not None:
        raise ValueError(
            f"`{given[0]}` cannot be continued: in a bidirectional model the keys of the prompt depend on the "
            f"answer (got {type(given[1]).__name__}). Pass the whole text as `input_ids`."
        )
    config = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    if not isinstance(config, GenerationConfig | None):
        raise TypeError(
            f"`generation_config` must be a `GenerationConfig` (got {type(config).__name__}). Pass settings as "
            "`generate(..., **settings)`, or make a `D3LLMGenerationConfig` of them."
        )


# Signature and documentation stay transformers'. (A decorator would hide from type checkers that it is bound.)
functools.update_wrapper(D3LLMGenerationMixin.generate, GenerationMixin.generate)

__all__ = ["D3LLMGenerationMixin", "D3LLMGenerationOutput"]
