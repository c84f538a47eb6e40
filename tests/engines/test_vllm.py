"""The vLLM plugin in vLLM itself, against `generate`.

vLLM wants an environment of its own. `make vllm-tests` makes one from `tests/engines/vllm-requirements.txt` and names
its interpreter in `D3LLM_VLLM_PYTHON`, without which these tests are skipped.
"""

import json
import os
import random
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
import torch
import vllm_hooks
from places import SUPPORT
from tiny import EOS, PAD, tiny_model, tiny_prompt
from transformers import AutoModel, AutoTokenizer

import d3llm_hf
from d3llm_hf import cli
from d3llm_hf.evaluation.tasks.word_problems import exact_match, generate_problems


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
    """Of a process of vLLM: offline, without news from home, and on a CPU with Triton's interpreter."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST")},
        "PYTHONPATH": "" if torch.cuda.is_available() else str(SUPPORT / "vllm_shim"),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENGINE_READY_TIMEOUT_S": "3600",
        "HF_HUB_OFFLINE": "1",
        "D3LLM_HF_NO_METRIC": "1",
    }


def embedded(folder: Path) -> tuple[Path, list[list[int]]]:
    """The embedded student, and word problems as prompts."""
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
    jobs = [
        {"prompt": prompt, "length": draw.choice([5, 24, 48, 64]), "settings": kind}
        for prompt, kind in zip(prompts, kinds, strict=True)
    ]
    jobs += [{"prompt": prompts[n % len(prompts)], "length": 33, "settings": k} for n, k in enumerate(FURTHER)]
    draw.shuffle(jobs)
    return jobs


def as_generate(model, job: dict) -> dict:
    """What the plugin should tell of a request."""
    stops = model.generation_config.eos_token_id
    output = model.generate(
        torch.tensor([job["prompt"]]), max_new_tokens=job["length"], return_dict_in_generate=True, **job["settings"]
    )
    answer = output.sequences[0, len(job["prompt"]) :].tolist()
    stop = next(
        (i for i, token in enumerate(answer) if token in (stops if isinstance(stops, list) else [stops])), None
    )
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
        env=environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}, check=True, timeout=7200, cwd=tmp_path,
    )  # fmt: skip
    answers = json.loads((tmp_path / "answers.json").read_text())
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    wanted = [as_generate(model, job) for job in jobs]
    wrong = [(job, got, want) for job, got, want in zip(jobs, answers, wanted, strict=True) if got != want]
    assert not wrong, f"{len(wrong)} of {len(jobs)} differ: {wrong[0]}"
    assert len({answer["num_forwards"] for answer in answers}) > 3, "the rules had something to decide"


def test_the_facts_about_hooks_are_those_of_the_installed_version():
    code = (
        "from importlib import metadata, util; name = metadata.packages_distributions()['vllm'][0]; "
        "print(metadata.version(name), util.find_spec('vllm').origin)"
    )
    process = subprocess.run([PYTHON, "-c", code], env=environment(), check=True, capture_output=True, text=True)
    version, _, file = process.stdout.strip().partition(" ")
    known = json.loads(vllm_hooks.FACTS.read_text(encoding="utf-8"))
    assert vllm_hooks.facts(vllm_hooks.reader(Path(file).parents[1])) == known[version]


# ---- the server ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(tmp_path_factory) -> Iterator[openai.OpenAI]:
    """A client of `d3llm serve --engine vllm`, which serves the embedded student."""
    folder = tmp_path_factory.mktemp("server")
    with httpx.Client(trust_env=False) as plain, open(folder / "log", "wb") as log:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        server = subprocess.Popen(
            [PYTHON, "-m", "d3llm_hf", "serve", "--engine", "vllm", "d3llm-llada", "--dtype", "float32", "--port",
             str(port), "--canvas-length", "192", "--max-batch-size", "8"],
            env=environment(), stdout=log, stderr=subprocess.STDOUT, cwd=folder,
        )  # fmt: skip
        try:
            answers(plain, f"http://127.0.0.1:{port}/health", server, folder / "log")
            yield openai.OpenAI(
                base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=0, timeout=900, http_client=plain
            )
        finally:
            server.terminate()
            server.wait(timeout=120)


def answers(plain: httpx.Client, address: str, server: subprocess.Popen, log: Path) -> None:
    """Waits until a server answers, which takes minutes on a small machine."""
    end = time.monotonic() + 3600
    while server.poll() is None and time.monotonic() < end:
        try:
            if plain.get(address, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(2)
    raise AssertionError(log.read_text(errors="replace")[-4000:])


def asked(client: openai.OpenAI, question: str, **more):
    chat = [{"role": "user", "content": question}]
    return client.chat.completions.create(model="d3llm-llada", messages=chat, **{"temperature": 0} | more)


def told(reply) -> dict:
    """What the plugin tells of an answer."""
    return reply.model_extra["kv_transfer_params"]["d3llm"]


def test_the_server_answers_and_tells_the_forwards(client):
    problems = generate_problems(8, seed=11)
    replies = [asked(client, problem.question) for problem in problems]
    right = [exact_match(r.choices[0].message.content, p.answer) for r, p in zip(replies, problems, strict=True)]
    assert sum(right) >= 6
    assert {reply.choices[0].finish_reason for reply in replies} == {"stop"}
    for reply in replies:
        assert told(reply)["num_tokens"] == reply.usage.completion_tokens - 1  # vLLM counts the stop token
        assert told(reply)["tokens_per_forward"] == told(reply)["num_tokens"] / told(reply)["num_forwards"]


def test_settings_of_a_request_count(client):
    question = generate_problems(1, seed=12)[0].question
    slow = {"decoding_method": "llada", "early_stop": False}
    quick = {"entropy_threshold": 1.0}
    forwards = [told(asked(client, question, extra_body={"vllm_xargs": x}))["num_forwards"] for x in (slow, quick)]
    assert forwards[0] == 64 > 4 * forwards[1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"temperature": 0.7}, "`temperature` must be 0, or left out"),
        ({"max_tokens": 191}, "must fit the canvas of 192 positions"),
        ({"extra_body": {"vllm_xargs": {"blocklength": 3}}}, "Did you mean `block_length`"),
    ],
)
def test_what_cannot_be_carried_out_is_refused_in_our_words(client, more, message):
    with pytest.raises(openai.BadRequestError, match=message):
        asked(client, "How many?", **more)


def test_the_server_streams(client):
    question = generate_problems(1, seed=13)[0].question
    whole = asked(client, question).choices[0].message.content
    parts = [part.choices[0].delta.content or "" for part in asked(client, question, stream=True) if part.choices]
    assert "".join(parts) == whole


def test_the_server_survives_an_aborted_request_and_64_at_once(client):
    asked(client, "How many apples?", stream=True, extra_body={"vllm_xargs": {"decoding_method": "llada"}}).close()
    problems = generate_problems(64, seed=14)
    with ThreadPoolExecutor(64) as pool:
        together = [*pool.map(lambda problem: asked(client, problem.question).choices[0].message.content, problems)]
    assert sum(map(exact_match, together, [problem.answer for problem in problems])) >= 48
    assert asked(client, problems[5].question).choices[0].message.content == together[5]
