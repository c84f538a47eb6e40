"""Decodes requests with vLLM, in the environment that has it: `python vllm_offline.py MODEL JOBS ANSWERS [CANVAS]`.

JOBS is a JSON list of requests with `prompt` (token ids), `length` and `settings`; ANSWERS becomes one with `tokens`,
`finish` and what the plugin tells of the forwards. D3LLM_VLLM_GRAPHS=1 lets vLLM capture CUDA graphs.
"""

import json
import os
import sys
from pathlib import Path


def main(model: str, jobs: str, answers: str, canvas: str = "192") -> None:
    from vllm import LLM, SamplingParams

    requests = json.loads(Path(jobs).read_text())
    engine = LLM(
        model=model,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=2 * int(canvas),
        enforce_eager=not os.environ.get("D3LLM_VLLM_GRAPHS"),
        max_num_seqs=8,
        diffusion_config={"canvas_length": int(canvas)},
        enable_prefix_caching=False,
        max_num_batched_tokens=2048,
        scheduler_cls="d3llm_hf.engines.vllm.scheduler.CanvasScheduler",
        generation_config="vllm",
    )
    outputs = engine.generate(
        [{"prompt_token_ids": request["prompt"]} for request in requests],
        [
            SamplingParams(
                max_tokens=request["length"], temperature=0, detokenize=False, extra_args=request["settings"]
            )
            for request in requests
        ],
        use_tqdm=False,
    )
    told = [
        {
            "tokens": list(output.outputs[0].token_ids),
            "finish": output.outputs[0].finish_reason,
            **output.kv_transfer_params["d3llm"],
        }
        for output in outputs
    ]
    Path(answers).write_text(json.dumps(told))


if __name__ == "__main__":  # vLLM starts further processes, which import this file
    main(*sys.argv[1:])
