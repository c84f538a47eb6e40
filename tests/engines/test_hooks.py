"""The vLLM plugin's sources against what two versions of vLLM have: a drift is told without installing one."""

import ast
import json

import pytest
import vllm_hooks
from vllm_hooks import CALLED, FACTS, attributes, facts, imported, sources

from d3llm_hf.commands.serve_vllm import VERSIONS


KNOWN = json.loads(FACTS.read_text(encoding="utf-8"))


def methods() -> dict[str, ast.arguments]:
    """`Class.method` of the plugin -> its parameters."""
    return {
        f"{node.name}.{method.name}": method.args
        for tree in sources()
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        for method in node.body
        if isinstance(method, ast.FunctionDef)
    }


def fits(ours: ast.arguments, theirs: list[str]) -> bool:
    """Whether a method takes what another one is called with."""
    names = [argument.arg for argument in ours.args if argument.arg != "self"]
    return names == theirs or (ours.vararg is not None and names == theirs[: len(names)])


@pytest.mark.parametrize("version", KNOWN)
class TestOfAVersion:
    def test_every_name_that_is_imported_is_there(self, version):
        assert {module: {*names} for module, names in KNOWN[version]["names"].items()} == imported()

    def test_every_field_that_is_read_is_there(self, version):
        for title, variable in CALLED.items():
            assert {*KNOWN[version]["fields"][title]} == attributes(variable), title

    def test_overridden_methods_take_what_they_are_called_with(self, version):
        known, ours = KNOWN[version]["parameters"], methods()
        state = known["vllm.v1.worker.gpu.model_states.interface:ModelState"]
        own = {name.partition(".")[2]: args for name, args in ours.items() if name.startswith("D3LLMModelState.")}
        assert {*own} <= {*state, "__init__"}
        assert all(fits(args, state[name]) for name, args in own.items() if name != "__init__")
        for name in ("update_from_output", "_preempt_request", "_free_request"):
            assert fits(ours[f"CanvasScheduler.{name}"], known[f"vllm.v1.core.sched.scheduler:Scheduler.{name}"])

    def test_functions_are_called_with_parameters_that_they_have(self, version):
        known = KNOWN[version]["parameters"]
        calls = [node for tree in sources() for node in ast.walk(tree) if isinstance(node, ast.Call)]
        for title in (
            "vllm.v1.worker.gpu.attn_utils:build_attn_metadata",
            "vllm.model_executor.layers.rotary_embedding:get_rope",
        ):
            name = title.partition(":")[2]
            found = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == name]
            assert found and all({k.arg for k in call.keywords} <= {*known[title]} for call in found), title

    def test_a_request_is_looked_at_where_it_is_processed(self, version):
        theirs = KNOWN[version]["parameters"]["vllm.v1.engine.input_processor:InputProcessor.process_inputs"]
        assert theirs[:3] == ["request_id", "prompt", "params"]


def test_the_versions_are_those_that_are_served():
    assert [version.rpartition(".")[0] for version in KNOWN] == [*VERSIONS]


def test_what_is_gone_is_missing_in_the_facts(tmp_path, monkeypatch):
    empty = facts(lambda path: None)
    assert not any(empty["names"].values()) and not any(empty["parameters"].values())
    folder = tmp_path / "vllm" / "v1" / "core" / "sched"
    folder.mkdir(parents=True)
    (folder / "diffusion_scheduler.py").write_text(
        "if True:\n    from x import y as DiffusionAsyncScheduler\n\nclass DiffusionScheduler:\n"
        "    def f(self, a, *, b): ...\n\ndef diffusion_canvas_width(request): ...\n"
    )
    monkeypatch.setattr(vllm_hooks, "FACTS", tmp_path / "facts.json")
    vllm_hooks.main([f"1.0={tmp_path}"])
    told = json.loads((tmp_path / "facts.json").read_text())["1.0"]
    module = "vllm.v1.core.sched.diffusion_scheduler"
    assert told["names"][module] == ["DiffusionAsyncScheduler"]
    assert told["parameters"][f"{module}:DiffusionScheduler"] == {"f": ["a", "b"]}
    assert told["parameters"][f"{module}:diffusion_canvas_width"] == ["request"]
