"""`d3llm serve`: what it hands to the server, and what it refuses."""

import socket
import sys

import pytest

from d3llm_hf import cli
from d3llm_hf.commands import serve
from d3llm_hf.commands.common import check_address


@pytest.fixture
def served(monkeypatch):
    """What uvicorn was asked to run: `{"app": ..., "host": ..., "port": ...}`."""
    import uvicorn

    seen = {}
    monkeypatch.setattr(uvicorn, "run", lambda app, **options: seen.update(options, app=app))
    monkeypatch.setattr("logging.basicConfig", lambda **options: None)
    monkeypatch.setattr(serve, "check_address", lambda *address: None)  # whatever listens there now
    return seen


def test_the_command_serves_a_checkpoint_with_its_settings(served, capsys):
    options = [
        "--port",
        "9",
        "--name",
        "mine",
        "--entropy-threshold",
        "0.2",
        "--temperature",
        "0.5",
        "--max-tokens",
        "32",
    ]
    assert cli.main(["serve", "d3llm-llada", *options]) == 0
    worker = served["app"].state.worker
    config = worker.model.generation_config
    assert (config.entropy_threshold, config.temperature, config.do_sample) == (0.2, 0.5, True)
    assert (served["host"], served["port"]) == ("127.0.0.1", 9)
    assert "serving mine on http://127.0.0.1:9/v1" in capsys.readouterr().err


def test_a_key_is_read_from_the_environment_and_shown_nowhere(served, capsys, monkeypatch):
    monkeypatch.setenv("MY_KEY", "sesame")
    assert (
        cli.main(["serve", "d3llm-llada", "--api-key-env", "MY_KEY", "--host", "0.0.0.0", "--temperature", "0"]) == 0
    )
    err = capsys.readouterr().err
    assert "(with a key)" in err and "sesame" not in err
    assert served["app"].state.worker.model.generation_config.do_sample is False
    monkeypatch.setenv("MY_KEY", "")
    assert cli.main(["serve", "d3llm-llada", "--api-key-env", "MY_KEY"]) == 2
    assert "`--api-key-env` must name a variable" in capsys.readouterr().err


def test_an_address_that_others_reach_is_pointed_out(served, capsys):
    assert cli.main(["serve", "d3llm-llada", "--host", "0.0.0.0"]) == 0
    assert "anyone who reaches this address" in capsys.readouterr().err


def test_without_its_packages_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert cli.main(["serve", "d3llm-llada"]) == 2
    assert "pip install 'd3llm-hf[serve]'" in capsys.readouterr().err


def test_an_address_where_no_server_can_listen_is_refused_before_the_model_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr("d3llm_hf.serving.recipe.load", None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        cases = {
            ("--port", port): f"`--port` must be free at `--host` (got {port} at 127.0.0.1: ",
            ("--port", "65536"): "`--port` must be from 0 to 65535 (got 65536)",
            ("--host", "a..b"): "`--host` must be an address of this machine (got 'a..b': ",
        }
        for argv, message in cases.items():
            assert cli.main(["serve", "d3llm-llada", *argv]) == 2
            assert message in capsys.readouterr().err
            assert cli.main(["demo", "d3llm-llada", "--port", "7860", *argv]) == 2
            assert message in capsys.readouterr().err
    check_address("127.0.0.1", 0)  # any free port
