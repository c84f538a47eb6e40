"""Replicas on Ray Serve: what Ray is asked for, what is refused, and two of them on a real cluster."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
from fake_ray import DeploymentUnavailableError, FakeRay, FakeServe, RayActorError
from places import REPOSITORY

from d3llm_hf import cli
from d3llm_hf.cluster import Share
from d3llm_hf.commands import serve as command
from d3llm_hf.serving import replicas
from d3llm_hf.serving.gateway import Lost
from d3llm_hf.serving.recipe import Recipe
from d3llm_hf.serving.replicas import RayFleet, deployed


needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs ray")
RECIPE = Recipe("d3llm-llada", "d3llm-llada")
APP = "d3llm-d3llm-llada"


@pytest.fixture
def deploy(monkeypatch):
    """`deploy(serve)`: what was told while the replicas of an app were there."""
    monkeypatch.setattr(replicas, "POLL_SECONDS", 0.0)

    def run(serve) -> list[str]:
        told = []
        with deployed(serve, APP, RECIPE, Share(2, 0.5), 80, told.append) as handle:
            assert handle is serve and serve.app == APP
        return told

    return run


def test_replicas_are_placed_without_an_address_of_rays_and_end_with_the_command(deploy):
    serve = FakeServe([("DEPLOYING", 0, ""), ("DEPLOYING", 0, ""), ("DEPLOYING", 1, ""), ("RUNNING", 2, "")])
    assert deploy(serve)[-1] == "2 of 2 replicas run"
    steps = dict(serve.log)
    assert steps["start"] == {"proxy_location": "Disabled"}
    assert steps["run"] == {"route_prefix": None, "waits": False}
    assert steps["deployment"]["num_replicas"] == 2 and steps["deployment"]["max_ongoing_requests"] == 80
    assert steps["deployment"]["ray_actor_options"] == {"num_cpus": 0.5, "num_gpus": 0.0}
    assert [name for name, _ in serve.log][-2:] == ["delete", "shutdown"]


def test_other_apps_of_the_cluster_stay_and_their_names_are_taken(deploy):
    serve = FakeServe(others=["mine"])
    deploy(serve)
    assert serve.log[-1] == ("delete", APP)
    serve = FakeServe(others=[APP])
    with pytest.raises(ValueError, match=rf"`--name` must be new to the cluster \(got '{APP}'.*serve.delete"):
        deploy(serve)
    assert [name for name, _ in serve.log] == ["start"]


@pytest.mark.parametrize(
    ("serve", "message"),
    [
        (FakeServe(tells={"refusal": [None, "`block_length` must be 1"]}), "^`block_length` must be 1$"),
        (FakeServe([("DEPLOY_FAILED", 1, "no\n memory")]), r"Every replica must start \(got 1 of 2: no memory\)"),
    ],
)
def test_replicas_that_do_not_start_are_told_and_end(serve, message, deploy):
    with pytest.raises(ValueError, match=message):
        deploy(serve)
    assert ("delete", APP) in serve.log


def ask(serve, take=None) -> list:
    """The first `take` messages of a reply."""

    async def use():
        found, messages = [], RayFleet(FakeRay(), serve, APP, serve).ask({}, b"")
        async for message in messages:
            found.append(message)
            if len(found) == take:
                break
        await messages.aclose()
        return found

    return asyncio.run(use())


def test_a_reply_comes_from_ray_and_is_given_up_when_nobody_takes_it():
    serve = FakeServe(replies=[[1, 2], [1, 2]])
    assert ask(serve) == [1, 2] and serve.cancelled == 0
    assert ask(serve, take=1) == [1] and serve.cancelled == 1


@pytest.mark.parametrize("error", [RayActorError("the actor died"), DeploymentUnavailableError()])
def test_what_ray_says_of_a_replica_that_ended_is_that_it_is_lost(error):
    with pytest.raises(Lost):
        ask(FakeServe(replies=[[1, error]]))


def test_counts_are_those_of_the_replicas_that_answer():
    async def use(**fake):
        serve = FakeServe(**fake)
        serve.app = APP
        fleet = RayFleet(FakeRay(), serve, APP, serve)
        return await fleet.told(), await fleet.running()

    assert asyncio.run(use(tells={"told": [("one", "a 1"), RayActorError("gone")]})) == ({"one": "a 1"}, 2)
    assert asyncio.run(use(tells={"told": TimeoutError()})) == ({}, 2)
    assert asyncio.run(use(tells={"told": DeploymentUnavailableError()}, states=[("DEPLOYING", 0, "")])) == ({}, 0)


# The command


@pytest.fixture
def on_fakes(monkeypatch):
    """`on_fakes(ray, serve)`: Ray is these; what uvicorn was asked to run."""
    import uvicorn

    seen = {}
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: seen.update(options, app=app))
    monkeypatch.setattr("logging.basicConfig", lambda **options: None)
    monkeypatch.setattr(command, "check_address", lambda *address: None)

    def install(ray, serve):
        monkeypatch.setitem(sys.modules, "ray", ray)
        monkeypatch.setitem(sys.modules, "ray.serve", serve)
        return seen

    return install


def test_the_command_serves_replicas_behind_one_address(on_fakes, monkeypatch, capsys, tmp_path):
    serve = FakeServe()
    seen = on_fakes(FakeRay(), serve)
    monkeypatch.setenv("MY_KEY", "sesame")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    line = "serve mine --replicas 2 --num-cpus 1 --api-key-env MY_KEY --entropy-threshold 0.2 --max-queue 3 --port 9"
    assert cli.main(line.split()) == 0
    assert (seen["port"], seen["lifespan"], seen["http"].stall_seconds) == (9, "off", 120.0)
    # The folder is found from elsewhere, the key stays here, and no GPU is taken that Ray has not given.
    recipe = serve.recipe
    assert (recipe.model, recipe.name, recipe.device) == (str(tmp_path / "mine"), "mine", "cpu")
    assert (
        recipe.api_key is None and recipe.settings == {"entropy_threshold": 0.2} and recipe.limits == {"max_queue": 3}
    )
    assert dict(serve.log)["deployment"]["max_ongoing_requests"] == 3 + 8 + 16
    assert "serving mine on http://127.0.0.1:9/v1 (with a key)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--num-gpus 0.5", "`--num-gpus` needs `--replicas` (got 0.5 without it)"),
        ("--num-cpus 0.5", "`--num-cpus` needs `--replicas`"),
        ("--ray-address auto", "`--ray-address` needs `--replicas` (got auto without it)"),
        ("--replicas 0", "`--replicas` must be at least 1 (got 0)"),
        ("--replicas 2 --num-gpus 2", "`--num-gpus` must be from 0 to 1"),
        ("--replicas 2 --device cuda", "`--device` cuda needs `--num-gpus` with `--replicas`"),
        ("--replicas 2 --device cpu --num-gpus 1", "`--num-gpus` must go with `--device` auto or cuda (got cpu)"),
        (
            "--replicas 2 --device cuda:1 --num-gpus 1",
            "`--num-gpus` must go with `--device` auto or cuda (got cuda:1)",
        ),
        ("--replicas 3", "`--replicas` times `--num-cpus` must be at most what there is (got 3 times 1 CPUs"),
        ("--replicas 1 --ray-address head", "`--ray-address` must be auto, or HOST:PORT"),
    ],
)
def test_options_that_cannot_be_kept_are_refused(options, message, on_fakes, capsys):
    on_fakes(FakeRay(), FakeServe())
    assert cli.main(["serve", "d3llm-llada", *options.split()]) == 2
    assert message in capsys.readouterr().err


def test_without_ray_the_command_says_what_to_install(on_fakes, capsys):
    on_fakes(None, None)
    assert cli.main(["serve", "d3llm-llada", "--replicas", "2"]) == 2
    assert "pip install 'd3llm-hf[ray]'" in capsys.readouterr().err


def test_a_port_that_is_taken_is_refused_before_ray_starts(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert cli.main(["serve", "d3llm-llada", "--replicas", "2", "--port", port]) == 2
    assert "`--port` must be free" in capsys.readouterr().err


# With Ray


QUESTIONS = [f"Tom has {count} apples. He buys 7 more. How many apples does Tom have now?" for count in range(4, 12)]


def chat(question: str, **more) -> dict:
    return {"model": "d3llm-llada", "messages": [{"role": "user", "content": question}], "max_tokens": 64} | more


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Address of two replicas on a cluster of this machine, the command's number, and its home."""
    home = tmp_path_factory.mktemp("home")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"--replicas 2 --num-cpus 0.5 --port {port} --entropy-threshold 0.2 --dtype float32 --device cpu".split()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "HOME": str(home)}
    line = [sys.executable, "-m", "d3llm_hf", "serve", "d3llm-llada", *options]
    with open(home / "log", "wb") as log, subprocess.Popen(line, env=environment, stderr=log, stdout=log) as process:
        try:
            while "serving d3llm-llada" not in (home / "log").read_text():
                assert process.poll() is None, (home / "log").read_text()[-3000:]
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}", process.pid, home
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(120)
    assert not (home / ".ray").exists()  # Ray's token


def running(home: Path) -> list[int]:
    """Numbers of the replicas that were started with this home."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            mine = f"HOME={home}".encode() in (file.parent / "environ").read_bytes().split(b"\0")
            if mine and file.read_bytes().startswith(b"ray::ServeReplica"):
                found.append(int(file.parent.name))
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def expected(loaded) -> list[str]:
    """What `generate` answers alone."""
    from d3llm_hf import encode_chat

    model, tokenizer = loaded
    answers = []
    for question in QUESTIONS:
        inputs = encode_chat(tokenizer, [{"role": "user", "content": question}])
        output = model.generate(**inputs, max_new_tokens=64, entropy_threshold=0.2)
        answers.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


@pytest.mark.slow
@needs_ray
def test_two_replicas_answer_and_stream_as_one_server_does(cluster, expected):
    address, _, home = cluster
    assert len(running(home)) == 2
    with ThreadPoolExecutor(8) as pool, httpx.Client(base_url=address, timeout=120) as client:
        whole = list(pool.map(lambda question: client.post("/v1/chat/completions", json=chat(question)), QUESTIONS))
        assert [reply.json()["choices"][0]["message"]["content"] for reply in whole] == expected
        asked = [chat(question, stream=True) for question in QUESTIONS]
        streams = list(pool.map(lambda body: client.post("/v1/chat/completions", json=body), asked))
        for reply, answer in zip(streams, expected, strict=True):
            events = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: ")]
            assert events[-1] == "[DONE]"
            texts = [json.loads(event)["choices"][0]["delta"].get("content", "") for event in events[:-1]]
            assert "".join(texts) == answer
        bad = client.post("/v1/chat/completions", json=chat("x", temperature=-1))
        assert bad.status_code == 400 and bad.json()["error"]["param"] == "temperature"
        metrics = client.get("/metrics").text
        assert 'd3llm_requests_total{outcome="ok"} 16\n' in metrics and "d3llm_replicas 2\n" in metrics
        assert client.get("/health").json() == {"status": "ok", "replicas": 2}


@pytest.mark.slow
@needs_ray
def test_a_replica_that_is_killed_under_load_costs_no_answer(cluster, expected):
    address, _, home = cluster
    victim = running(home)[0]
    threading.Timer(1.0, os.kill, (victim, signal.SIGKILL)).start()
    end = time.monotonic() + 20

    def load(number: int) -> list[tuple[int, bool]]:
        found = []
        with httpx.Client(base_url=address, timeout=120) as client:
            while time.monotonic() < end:
                number = (number + 1) % len(QUESTIONS)
                reply = client.post("/v1/chat/completions", json=chat(QUESTIONS[number]))
                right = reply.status_code == 200 and (
                    reply.json()["choices"][0]["message"]["content"] == expected[number]
                )
                found.append((reply.status_code, right))
        return found

    with ThreadPoolExecutor(6) as pool:
        found = [each for part in pool.map(load, range(6)) for each in part]
    assert {status for status, _ in found} <= {200, 503} and all(right for status, right in found if status == 200)
    assert sum(status == 200 for status, _ in found) >= len(found) - 1, found
    until = time.monotonic() + 120
    with httpx.Client(base_url=address, timeout=120) as client:
        while client.get("/health").json()["replicas"] < 2 or victim in running(home):
            assert time.monotonic() < until
            time.sleep(0.5)
        repeated = int(re.search(r"d3llm_repeated_requests_total (\d+)", client.get("/metrics").text)[1])
    assert repeated >= 1
