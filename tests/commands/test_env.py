"""`d3llm env`: complete, without secrets, and not stopped by what is broken."""

import json
import os

import pytest

from d3llm_hf import __version__, cli
from d3llm_hf.commands import env


@pytest.fixture
def printed(capsys):
    def command(*argv) -> str:
        assert cli.main(["env", *argv]) == 0
        return capsys.readouterr().out

    return command


def test_the_report_names_versions_devices_and_what_is_embedded(printed):
    import torch

    facts = json.loads(printed("--json"))
    assert list(facts) == ["d3llm-hf", "system", "packages", "torch", "variables", "checkpoints", "decoding"]
    assert facts["d3llm-hf"]["version"] == __version__
    assert facts["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]  # PyPI leaves the build out
    assert facts["torch"]["threads"] == torch.get_num_threads()
    assert facts["torch"]["CUDA or ROCm available"] == torch.cuda.is_available()
    assert facts["checkpoints"] == ["d3llm-block", "d3llm-causal", "d3llm-llada", "d3llm-llada-teacher"]
    assert {"d3llm", "dream"} <= set(facts["decoding"]["methods"])
    assert "vicinity" in facts["decoding"]["caches"]
    lines = printed().splitlines()
    assert f"  torch: {facts['packages']['torch']}" in lines
    assert "checkpoints: d3llm-block, d3llm-causal, d3llm-llada, d3llm-llada-teacher" in lines
    assert any(line.startswith("  methods: d3llm, dparallel, ") for line in lines)


def test_secrets_and_the_name_of_the_user_are_not_shown(printed, monkeypatch):
    home = os.path.expanduser("~")
    values = {
        "HF_TOKEN": "hf_secret1", "HUGGING_FACE_HUB_TOKEN": "hf_secret2", "HF_SOMETHING_NEW": "secret3",
        "D3LLM_HF_NO_METRIC": "1", "HF_ENDPOINT": "https://me:secret4@mirror.example",
        "HF_HUB_CACHE": f"{home}/models", "OTHER_VARIABLE": "secret5",
    }  # fmt: skip
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    text = printed("--json")
    assert "secret" not in text
    shown = json.loads(text)["variables"]
    assert {name: shown.get(name) for name in values} == {
        "HF_TOKEN": "set", "HUGGING_FACE_HUB_TOKEN": "set", "HF_SOMETHING_NEW": "set", "D3LLM_HF_NO_METRIC": "1",
        "HF_ENDPOINT": "https://***@mirror.example", "HF_HUB_CACHE": f"{env._homeless(home)}/models",
        "OTHER_VARIABLE": None,
    }  # fmt: skip
    monkeypatch.delenv("HF_TOKEN")
    assert "  HF_TOKEN: not set\n" in printed()


def test_what_is_broken_is_reported_in_its_place(printed, monkeypatch, tmp_path):
    (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10')\n")
    (tmp_path / "gradio.py").write_text("raise SystemExit('no display')\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = env.metadata.version

    def version(name):
        if name in ("trl", "gradio"):
            raise env.metadata.PackageNotFoundError(name)
        return {"flash-attn": "2.7", "peft": "0.1", "evaluate": None}.get(name) or found(name)

    def gone(name):
        return None if name in ("trl", "peft") else find(name)

    find = env.importlib.util.find_spec
    monkeypatch.setattr(env.metadata, "version", version)
    monkeypatch.setattr(env.importlib.util, "find_spec", gone)
    monkeypatch.delitem(env.sys.modules, "gradio", raising=False)
    monkeypatch.setattr(env, "_checkpoints", lambda: [])
    monkeypatch.setattr(env, "_torch", lambda: (_ for _ in ()).throw(OSError("libcudart.so.12: not found")))
    lines = printed().splitlines()
    assert "  flash-attn: 2.7 (error: ImportError: undefined symbol: _ZN3c10)" in lines
    assert "  gradio: unknown version" in lines  # it is not imported
    assert "  trl: not installed" in lines
    assert "  peft: 0.1 (error: there is no module peft)" in lines
    assert "torch: error: OSError: libcudart.so.12: not found" in lines
    assert "checkpoints: none" in lines
    monkeypatch.setattr(env, "PACKAGES", {"gradio": "gradio", "safetensors": "safetensors"})
    assert env.environment(imports=True)["packages"]["gradio"] == "unknown version (error: SystemExit: no display)"


def test_an_editable_installation_is_said_to_be_one(monkeypatch):
    class Installed:
        version = "0.1.0"
        origin = '{"dir_info": {"editable": true}, "url": "file:///x"}'

        def read_text(self, name):
            assert name == "direct_url.json"
            return self.origin

    monkeypatch.setattr(env.metadata, "distribution", lambda name: Installed())
    assert (env._own()["installed"], env._own()["editable"]) == ("0.1.0", True)
    Installed.origin = None
    assert env._own()["editable"] is False

    def absent(name):
        raise env.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(env.metadata, "distribution", absent)
    assert env._own()["installed"] == "not installed, runs from its sources"


@pytest.mark.parametrize(("cuda", "hip", "built"), [("12.8", None, "CUDA 12.8"), (None, "6.2", "ROCm 6.2")])
def test_accelerators_are_named(cuda, hip, built, monkeypatch):
    import torch

    class Device:
        name, total_memory = "Accelerator 9000", 80 * 2**30

    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Device)
    facts = env._torch()
    assert (facts["built for"], facts["devices"]) == (built, ["Accelerator 9000 (80 GiB)"])
