"""What vLLM's model runner asks of a model that decides canvases: states of requests, attention, and a sampler.

A canvas (prompt and answer) is what vLLM calls draft tokens: scheduled anew in each step, all of them rejected until
the answer is complete. Attention is over the canvas alone: it is written over the slots of the prompt, which vLLM has
filled before, and positions begin with 0.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.attn_utils import build_attn_metadata
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.sample.output import SamplerOutput

from ..requests import decoding_of
from ..rows import Plan, Rows
from .admission import served_by, settings_of


class D3LLMModelState(ModelState):
    """The canvases of all requests of a worker."""

    num_new_sampled_tokens_per_step = 0

    def __init__(self, vllm_config: Any, model: Any, encoder_cache: Any, device: torch.device):
        super().__init__(vllm_config, model, encoder_cache, device)
        self.served = served_by(vllm_config)
        self.rows = Rows(
            self.max_num_reqs, self.served.canvas_length, self.served.mask_token_id, model.logit_shift, device
        )
        self.slots: dict[str, int] = {}
        self.plan: Plan | None = None

    def get_supported_generation_tasks(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("generate",)

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        params = new_req_data.sampling_params
        prompt = [*new_req_data.prompt_token_ids]
        settings = settings_of(params)
        length = min(params.max_tokens, self.served.canvas_length - len(prompt))
        if length < 1:  # of vLLM's own warm-up alone; what people send is refused where it arrives
            return
        decoding = decoding_of(
            self.served, settings, length,
            stop_ids=tuple(params.stop_token_ids or ()), ignore_eos=params.ignore_eos,
        )  # fmt: skip
        self.rows.add(req_index, prompt, length, decoding, settings.get("seed") or 0)
        self.slots[new_req_data.req_id] = req_index

    def remove_request(self, req_id: str) -> None:
        slot = self.slots.pop(req_id, None)
        if slot is not None:
            self.rows.remove(slot)

    def prepare_inputs_embeds(self, *args: Any) -> None:
        return None

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        return {}

    def prepare_inputs(self, input_batch: Any, req_states: Any) -> dict[str, Any]:
        """Plans the step; positions of a canvas count from its own beginning, those of a prompt are right already."""
        deciding = _deciding(input_batch)
        if deciding is None:
            return {}
        slots = np.where(deciding, input_batch.idx_mapping_np[: input_batch.num_reqs], -1)
        first = input_batch.cu_num_logits[: input_batch.num_reqs].long()
        self.plan = self.rows.plan(slots, first)
        self.model.wanted = self.plan.wanted
        owner, column = _owners(input_batch)
        positions = input_batch.positions[: len(owner)]  # in place: a captured graph reads this very tensor
        inside = torch.as_tensor(deciding, device=positions.device)[owner]
        positions.copy_(torch.where(inside, column.to(positions.dtype), positions))
        return {}

    def prepare_attn(
        self,
        input_batch: Any,
        cudagraph_mode: CUDAGraphMode,
        block_tables: tuple[torch.Tensor, ...],
        slot_mappings: torch.Tensor,
        attn_groups: Any,
        kv_cache_config: Any,
        for_capture: bool = False,
        ubatch_idx: int = 0,
    ) -> dict[str, Any]:
        """Metadata of attention over each canvas alone.

        `slot_mappings` is rewritten in place: the layers write keys and values where it says.
        """
        full = cudagraph_mode == CUDAGraphMode.FULL
        rows = input_batch.num_reqs_after_padding if full else input_batch.num_reqs
        tokens = input_batch.num_tokens_after_padding if full else input_batch.num_tokens
        seen = input_batch.seq_lens
        deciding = _deciding(input_batch)
        if deciding is not None:
            owner, column = _owners(input_batch)
            canvas = torch.as_tensor(deciding, device=seen.device)
            for group, spec in enumerate(kv_cache_config.kv_cache_groups):
                size = spec.kv_cache_spec.block_size
                blocks = block_tables[group][owner, column // size]
                own = (blocks.long() * size + column % size).to(slot_mappings.dtype)
                mapped = slot_mappings[group, : len(owner)]
                mapped.copy_(torch.where(canvas[owner], own, mapped))
            starts = input_batch.query_start_loc[: input_batch.num_reqs + 1]
            width = (starts[1:] - starts[:-1]).to(seen.dtype)
            seen = seen.clone()
            seen[: len(width)] = torch.where(canvas, width, seen[: len(width)])
        return build_attn_metadata(
            attn_groups=attn_groups,
            num_reqs=rows,
            num_tokens=tokens,
            query_start_loc_gpu=input_batch.query_start_loc,
            query_start_loc_cpu=torch.from_numpy(input_batch.query_start_loc_np),
            max_query_len=int(input_batch.num_scheduled_tokens.max()),
            seq_lens=seen,
            max_seq_len=self.max_model_len,
            block_tables=block_tables,
            slot_mappings=slot_mappings,
            kv_cache_config=kv_cache_config,
            for_cudagraph_capture=for_capture,
            causal=False,
        )

    def custom_sampler(self, sampler: Any) -> tuple[Any, None]:
        return CanvasSampler(self, sampler), None


class CanvasSampler:
    """Decides positions by our rules in the place of vLLM's sampler.

    Args:
        state: the canvases.
        sampler: vLLM's, whose tables of requests the runner reads.
    """

    def __init__(self, state: D3LLMModelState, sampler: Any):
        self.state, self.req_states = state, sampler.req_states
        self.sampling_states, self.logprob_token_ids_state = sampler.sampling_states, sampler.logprob_token_ids_state
        self.penalties_state = SimpleNamespace(output_bin_counts=None)  # nothing to count

    def add_request(self, req_index: int, params: Any) -> None:
        self.sampling_states.add_request(req_index, params)
        self.logprob_token_ids_state.add_request(req_index, params)

    def apply_staged_writes(self) -> None:
        self.sampling_states.apply_staged_writes()
        self.logprob_token_ids_state.apply_staged_writes()

    def __call__(self, logits: torch.Tensor, input_batch: Any, draft_logits: Any = None) -> SamplerOutput:
        """Answers that are complete, and the canvases for the next step."""
        rows, plan = self.state.rows, self.state.plan
        self.state.plan = None
        batch = input_batch.num_reqs
        slots = input_batch.idx_mapping[:batch].long()
        if plan is None:  # prompts alone, or a dummy run
            tokens = torch.zeros(batch, 1, dtype=torch.int32, device=logits.device)
            counts = torch.zeros(batch, dtype=torch.int32, device=logits.device)
            rejected = counts
        else:
            decided = rows.decide(plan, logits, batch)
            tokens, counts = decided.tokens.int(), decided.counts.int()
            bounds = input_batch.cu_num_logits[: batch + 1]
            rejected = (bounds[1:] - bounds[:-1] - counts).clamp_min(0).int()
        drafts = self.req_states.draft_tokens
        if drafts.shape[1] == rows.canvas_length:
            drafts[slots] = rows.canvases(slots).to(drafts.dtype)
        return SamplerOutput(
            sampled_token_ids=tokens, logprobs_tensors=None, num_nans=None, num_sampled=counts, num_rejected=rejected
        )


def _deciding(input_batch: Any) -> np.ndarray | None:
    """Which requests `(B,)` of a step are decided, and not read for the first time; `None` where none is."""
    if input_batch.num_draft_tokens_per_req is None:
        return None
    deciding = input_batch.num_draft_tokens_per_req[: input_batch.num_reqs] > 0
    return deciding if deciding.any() else None


def _owners(input_batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each token of a step the request `(T,)` that it belongs to, and its place in it."""
    starts = input_batch.query_start_loc[: input_batch.num_reqs + 1].long()
    width = starts[1:] - starts[:-1]
    owner = torch.repeat_interleave(width, output_size=int(input_batch.query_start_loc_np[input_batch.num_reqs]))
    return owner, torch.arange(len(owner), device=owner.device) - starts[owner]


__all__ = ["CanvasSampler", "D3LLMModelState"]
