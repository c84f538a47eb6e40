"""vLLM's scheduler of canvases, which also counts what an answer took."""

from typing import Any

from vllm.v1.core.sched.diffusion_scheduler import DiffusionAsyncScheduler

from ..requests import stops_of
from .admission import served_by


class CanvasScheduler(DiffusionAsyncScheduler):
    """Counts the forwards of each request, and hands them out with its answer.

    They come in the field that vLLM's outputs, and its OpenAI server's replies, have for what a connector says of a
    finished request: `kv_transfer_params["d3llm"]`, with `num_forwards`, `num_tokens` (before the stop token) and
    `tokens_per_forward`, as `generate` counts them.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.stop_ids = {*stops_of(served_by(self.vllm_config))}
        self.forwards: dict[str, int] = {}

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        for req_id in scheduler_output.scheduled_spec_decode_tokens:
            request = self.requests.get(req_id)
            if request is not None and not request.is_finished() and request.num_stale_output_tokens == 0:
                self.forwards[req_id] = self.forwards.get(req_id, 0) + 1
        return super().update_from_output(scheduler_output, model_runner_output)

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        self.forwards.pop(request.request_id, None)  # it begins anew
        super()._preempt_request(request, *args, **kwargs)

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        ours, others = super()._free_request(request, *args, **kwargs)
        forwards = self.forwards.pop(request.request_id, 0)
        output, params = request.output_token_ids, request.sampling_params
        stops = {*(params.stop_token_ids or ())} | (set() if params.ignore_eos else self.stop_ids)
        tokens = len(output) - (len(output) > 0 and output[-1] in stops)
        told = {
            "num_forwards": forwards,
            "num_tokens": tokens,
            "tokens_per_forward": tokens / forwards if forwards else 0.0,
        }
        return (ours or {}) | {"d3llm": told}, others


__all__ = ["CanvasScheduler"]
