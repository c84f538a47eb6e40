"""`generate()` for masked diffusion language models: transformers' `GenerationMixin` with another decoding core."""

import copy
from dataclasses import dataclass

import torch
from transformers.generation import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode
from transformers.utils import ModelOutput

from .cache import SlotCache
from .canvas import Canvas
from .decoding import (
    State,
    candidates,
    choose,
    commit,
    fill_after_stop,
    finished,
    open_blocks,
    plan_cache,
    stop_position,
)
from .generation_config_d3llm import METHODS, D3LLMGenerationConfig, unknown_field
from .ledger import Ledger
from .processors import Processors
from .scoring import Sampler, Scorer


@dataclass
class D3LLMGenerationOutput(ModelOutput):
    """What `generate(..., return_dict_in_generate=True)` returns. B rows, P prompt slots, N new tokens.

    Args:
        sequences (`(B, P + N)` long): prompt and answer; pad tokens behind the first stop token.
        tokens_per_forward (`(B,)` float): answer tokens before the first stop token, over `num_forwards`.
        num_forwards (`(B,)` long): forwards that the row took part in, until it was finished. The cache is filled by
            the same forwards.
        num_forwards_reference (`(B,)` long): the same by the d3LLM code's count, which adds one when the fill after a
            stop token ends the row.
        step_map (`(B, N)` long): the forward, from 1, that committed each new token; -1 where none did.
        positions_computed (`(B,)` long): positions pushed through the model, summed over the row's forwards (twice
            with guidance): the cost that tokens per forward hide.
        past_key_values (`SlotCache`, *optional*): always `None`; cached keys hold approximations that only this
            decoding may read.
    """

    sequences: torch.LongTensor | None = None
    tokens_per_forward: torch.FloatTensor | None = None
    num_forwards: torch.LongTensor | None = None
    num_forwards_reference: torch.LongTensor | None = None
    step_map: torch.LongTensor | None = None
    positions_computed: torch.LongTensor | None = None
    past_key_values: SlotCache | None = None


class D3LLMGenerationMixin(GenerationMixin):
    """Gives a bidirectional masked language model `generate()`.

    The model needs a mask token (`config.mask_token_id`, or the generation config's), a forward over whole canvases
    whose attention is not causal, and `logit_shift`: 0 where logits row i predicts token i, 1 where it predicts i + 1.
    """

    generation_config_class = D3LLMGenerationConfig
    _supported_generation_modes = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
    logit_shift = 0
    supports_position_mask = False

    # ---- what transformers asks before decoding ------------------------------------------------------------------

    def adjust_generation_fn(self, *args, **kwargs):
        """transformers reads `generation_config.json` into its own class; ours has more fields."""
        super().adjust_generation_fn(*args, **kwargs)
        self.generation_config = D3LLMGenerationConfig.coerce(self.generation_config)

    def _prepare_generation_config(self, generation_config: GenerationConfig | None, **kwargs):
        """Arguments > `generation_config` > the checkpoint's (of the same method) > transformers' global defaults."""
        given = D3LLMGenerationConfig() if generation_config is None else copy.deepcopy(generation_config)
        if not isinstance(given, D3LLMGenerationConfig):
            given = D3LLMGenerationConfig.coerce(given)
        own = self.generation_config
        if not isinstance(own, D3LLMGenerationConfig):  # transformers made it, for a model built from its config
            own = D3LLMGenerationConfig.coerce(own)
        default = next(iter(METHODS))
        own_method = getattr(own, "decoding_method", None) or default
        method = kwargs.get("decoding_method") or given.decoding_method or own_method
        inherited = {name: value for name, value in own.to_dict().items() if not name.startswith("_")}
        if method != own_method:  # a checkpoint's thresholds belong to the method that it names
            belongs = METHODS.get(own_method, {})
            inherited = {name: value for name, value in inherited.items() if name not in belongs}
            inherited.pop("decoding_method", None)
        inherited.pop("use_cache", None)  # official configs say False of a cache that is not ours; a call may say so
        model_kwargs = given.update(**kwargs)
        if given.max_length is not None:  # the caller's length, in whichever form, beats the checkpoint's
            inherited.pop("max_new_tokens", None)
        given.update(**inherited, defaults_only=True, allow_custom_entries=True)
        if given.do_sample and given.top_k is None:
            given.top_k = 0  # no hidden truncation: transformers would sample from the 50 best tokens
        given.update(**given._get_default_generation_params(), defaults_only=True)
        given.refuse_unfitting()
        return given, model_kwargs

    def _validate_model_kwargs(self, model_kwargs):
        """As transformers', but a misspelt setting is answered with the nearest one."""
        try:
            super()._validate_model_kwargs(dict(model_kwargs))
        except ValueError as error:
            known = [name for name in model_kwargs if f"'{name}'" in str(error)]
            raise ValueError(" ".join(unknown_field(name) for name in known) or str(error)) from error

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """The cache is the decoding loop's own; it depends on the method."""
        if model_kwargs.get("past_key_values") is not None:
            raise ValueError(
                "`past_key_values` cannot be continued: in a bidirectional model the keys of the prompt depend on the "
                f"answer (got {type(model_kwargs['past_key_values']).__name__}). Pass the whole text as `input_ids`."
            )

    def generate_batch(self, *args, **kwargs):
        """Refused: paged continuous batching would decode left to right."""
        raise ValueError(
            '`generate_batch` and `cache_implementation="paged"` decode left to right. Pass a left-padded batch to '
            "`generate`."
        )

    def _sampler(self, generation_config: D3LLMGenerationConfig) -> Sampler:
        """The source of random numbers of one call; see [`Sampler`]."""
        return Sampler(generation_config.seed)

    # ---- decoding ------------------------------------------------------------------------------------------------

    def _sample(
        self,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: D3LLMGenerationConfig,
        synced_gpus: bool = False,
        streamer=None,
        tokenizer=None,
        **model_kwargs,
    ) -> D3LLMGenerationOutput | torch.LongTensor:
        r"""Decodes a batch of canvases, each until its own end.

        1. Settings become rules, the prompt becomes a canvas.
        2. Open blocks and plan the window of the next forward.
        3. Forward the window; logits of the candidates only.
        4. Score the candidates: a token and a cost each.
        5. Commit what the rules choose; fill after a stop token.
        6. Rows that are finished, or that a criterion stops, leave the batch.
        7. Pad behind the stop tokens and count.
        """
        # 1. Settings become rules, the prompt becomes a canvas
        device = input_ids.device
        canvas = Canvas.of_prompt(self, input_ids, generation_config, model_kwargs)
        rules = generation_config.rules(canvas.new_length, self.logit_shift)
        state = State.start(canvas.batch, canvas.new_length, rules, canvas.mask_token_id, device)
        stop_ids = generation_config._eos_token_tensor
        ledger = Ledger(canvas, state, input_ids, stop_ids, stopping_criteria, streamer)
        scorer = Scorer(
            rules,
            canvas.mask_token_id,
            sampler=self._sampler(generation_config),
            sampling=bool(generation_config.do_sample),
            processors=Processors(
                logits_processor,
                rules,
                prompt=input_ids,
                seen=None if canvas.mask is None else canvas.mask[:, : input_ids.shape[1]],
                tokens=ledger.tokens,
                step_map=ledger.step_map,
                stop_ids=stop_ids,
                vocab_size=self.config.get_text_config().vocab_size,
            ),
        )
        cache = None
        if rules.delayed_cache:
            cache = SlotCache(self.config.get_text_config().num_hidden_layers, canvas.length)

        with ledger:
            while self._has_unfinished_sequences(state.rows.numel() == 0, synced_gpus, device):
                if state.rows.numel() == 0:  # another process is not finished, and its forwards are collective
                    self(**canvas.idle_inputs())
                    continue

                # 2. Open blocks and plan the window of the next forward
                open_blocks(state, rules, stop_position(state.tokens, ~state.undecided, stop_ids))
                start, cached = torch.zeros_like(state.rows), state.cached
                if cache is not None:
                    start, cached = plan_cache(state, rules, canvas.prompt_length)
                among = candidates(state, rules)

                # 3. Forward the window; logits of the candidates only
                where = among.nonzero(as_tuple=True)  # rows and columns, (n,) each
                logits = canvas.forward(self, state, rules, cache, start, where)
                state.cached = cached

                # 4. Score the candidates: a token and a cost each
                scores = scorer(logits, state, where)

                # 5. Commit what the rules choose; fill after a stop token
                commits, forced = choose(scores.cost, scores.force_cost, among, state, rules)
                state.step += 1
                tokens = torch.where(forced, scores.best_tokens, scores.tokens)
                commits = scorer.processors.constraints.compatible(commits, tokens, scores.cost, state)
                commit(state, commits, tokens)
                stop = stop_position(state.tokens, ~state.undecided, stop_ids)
                filled = torch.zeros_like(scores.broken, dtype=torch.bool)
                if rules.eos_fill and stop_ids is not None:
                    filled = state.undecided.any(1)
                    fill_after_stop(state, stop, canvas.fill_token_id)
                done = finished(state, rules, stop)

                # 6. Rows that are finished, or that a criterion stops, leave the batch
                keep = ledger.leave(state, canvas, done, filled, scores.broken)
                if keep is not None:
                    state = state.select(keep)
                    canvas.select(keep)
                    if cache is not None:
                        cache.select_rows(keep)

        # 7. Pad behind the stop tokens and count
        answers, lengths = ledger.answers()
        sequences = torch.cat([input_ids, answers], dim=1)
        if not generation_config.return_dict_in_generate:
            return sequences
        return D3LLMGenerationOutput(
            sequences=sequences,
            tokens_per_forward=lengths / ledger.forwards.clamp_min(1),
            num_forwards=ledger.forwards,
            num_forwards_reference=ledger.reference,
            step_map=ledger.step_map,
            positions_computed=ledger.computed,
        )


__all__ = ["D3LLMGenerationMixin", "D3LLMGenerationOutput"]
