"""The vLLM plugin in vLLM itself, against `generate`.

vLLM wants an environment of its own. `make vllm-tests` makes one from `tests/engines/vllm-requirements.txt` and names
its interpreter in `D3LLM_VLLM_PYTHON`, without which these tests are skipped.
"""

import json
import os
import random
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch
from places import REPOSITORY, SUPPORT
from tiny import EOS, PAD, tiny_model, tiny_prompt
from transformers import AutoModel, AutoTokenizer

import d3llm_hf
from d3llm_hf.engines import hooks
from d3llm_hf.evaluation.tasks.word_problems import generate_problems


PYTHON = os.environ.get("D3LLM_VLLM_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="asks for D3LLM_VLLM_PYTHON (make vllm-tests)"),
]
COUNT = int(os.environ.get("D3LLM_VLLM_PROMPTS", "200"))
BLOCK = {"block_length": 16}
# The first three are those of the proof by numbers; of the others there are some.
SETTINGS = [
    {"decoding_method": "d3llm", "entropy_threshold": 0.3, **BLOCK},
    {"decoding_method": "dparallel", "entropy_threshold": 0.3, **BLOCK},
    {"decoding_method": "fast_dllm", "confidence_threshold": 0.8, **BLOCK},
]
FURTHER = [
    {"decoding_method": "llada", "steps": 16, **BLOCK},
    {"decoding_method": "llada", "remasking": "random", "steps": 12, "seed": 5, **BLOCK},
    {"decoding_method": "dream", "steps": 12},
    {"decoding_method": "dinfer", **BLOCK},
    {"decoding_method": "dinfer", "decoder": "hierarchy", **BLOCK},
    {"decoding_method": "dinfer", "decoder": "credit", **BLOCK},
    {"decoding_method": "entropy_bound", **BLOCK},
    {"decoding_method": "local_leap", **BLOCK},
    {"decoding_method": "d3llm", "window": "slide", "early_stop": False, **BLOCK},
]


def environment() -> dict[str, str]:
    """Of a process of vLLM: offline, without news from home, and with the Triton of its interpreter."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST")},
        "PYTHONPATH": f"{SUPPORT / 'vllm_shim'}",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "D3LLM_HF_NO_METRIC": "1",
    }


def embedded(folder: Path) -> tuple[Path, list[list[int]]]:
    """The embedded student, and word problems as prompts."""
    from d3llm_hf import cli

    assert cli.main(["init", "d3llm-llada", str(folder / "model")]) == 0
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    chats = [[{"role": "user", "content": problem.question}] for problem in generate_problems(COUNT, seed=7)]
    return folder / "model", [d3llm_hf.encode_chat(tokenizer, chat)["input_ids"][0].tolist() for chat in chats]


def decisive_dream(folder: Path) -> tuple[Path, list[list[int]]]:
    """A random Dream that is as sure of some positions as a trained one, of a width that vLLM's kernels take."""
    model = tiny_model("dream", width=128, layers=1, spread=4.0)
    model.generation_config.update(eos_token_id=EOS, pad_token_id=PAD)
    model.save_pretrained(folder / "model")
    draw = random.Random(3)
    return folder / "model", [tiny_prompt(seed, draw.randint(1, 60)) for seed in range(COUNT)]


def jobs_of(prompts: list[list[int]]) -> list[dict]:
    """The prompts with unequal lengths and all settings, in random order."""
    draw = random.Random(1)
    kinds = [SETTINGS[number % len(SETTINGS)] for number in range(len(prompts))]
    jobs = [{"prompt": p, "length": draw.choice([5, 24, 48, 64]), "settings": k} for p, k in zip(prompts, kinds)]
    jobs += [{"prompt": prompts[n % len(prompts)], "length": 33, "settings": k} for n, k in enumerate(FURTHER)]
    draw.shuffle(jobs)
    return jobs


def as_generate(folder: Path, job: dict) -> dict:
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval() if isinstance(folder, Path) else folder
    stops = model.generation_config.eos_token_id
    output = model.generate(
        torch.tensor([job["prompt"]]), max_new_tokens=job["length"], return_dict_in_generate=True, **job["settings"]
    )
    answer = output.sequences[0, len(job["prompt"]) :].tolist()
    stop = next((i for i, token in enumerate(answer) if token in (stops if isinstance(stops, list) else [stops])), None)
    return {
        "tokens": answer if stop is None else answer[: stop + 1],
        "finish": "length" if stop is None else "stop",
        "num_forwards": int(output.num_forwards[0]),
        "num_tokens": len(answer) if stop is None else stop,
        "tokens_per_forward": pytest.approx(float(output.tokens_per_forward[0])),
    }


@pytest.mark.parametrize("make", [embedded, decisive_dream])
def test_sequences_and_forwards_are_those_of_generate(make, tmp_path):
    folder, prompts = make(tmp_path)
    jobs = jobs_of(prompts)
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    subprocess.run(
        [PYTHON, SUPPORT / "vllm_offline.py", folder, tmp_path / "jobs.json", tmp_path / "answers.json"],
        env=environment(), check=True, timeout=1800, cwd=tmp_path,
    )  # fmt: skip
    answers = json.loads((tmp_path / "answers.json").read_text())
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    wanted = [as_generate(model, job) for job in jobs]
    wrong = [(job, got, want) for job, got, want in zip(jobs, answers, wanted, strict=True) if got != want]
    assert not wrong, f"{len(wrong)} of {len(jobs)} differ: {wrong[0]}"
    assert len({answer["num_forwards"] for answer in answers}) > 3, "the rules had something to decide"
