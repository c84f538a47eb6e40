"""What the plugin takes of vLLM, read from sources without running them: names, parameters and fields.

    python tests/support/vllm_hooks.py 0.32.0=WHEEL_OR_FOLDER 0.33.0=WHEEL_OR_FOLDER

writes `tests/golden/vllm_hooks.json`, of the files `vllm/...` in each wheel or folder. `tests/engines/test_hooks.py`
holds the plugin's sources against it.
"""

import ast
import json
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from places import GOLDEN, REPOSITORY

from d3llm_hf.files import write_whole


FACTS = GOLDEN / "vllm_hooks.json"
PLUGIN = REPOSITORY / "d3llm_hf" / "engines" / "vllm"
# Functions and methods that are called or overridden, and classes whose fields are read.
FUNCTIONS = {
    "vllm.v1.worker.gpu.model_states.interface": ["ModelState"],
    "vllm.v1.core.sched.diffusion_scheduler": [
        "DiffusionScheduler", "DiffusionAsyncScheduler", "diffusion_canvas_width",
    ],
    "vllm.v1.core.sched.scheduler": [
        "Scheduler.update_from_output", "Scheduler._preempt_request", "Scheduler._free_request",
    ],
    "vllm.v1.engine.input_processor": ["InputProcessor.process_inputs"],
    "vllm.v1.worker.gpu.attn_utils": ["build_attn_metadata"],
    "vllm.model_executor.layers.rotary_embedding": ["get_rope"],
}  # fmt: skip
# Class of vLLM -> what the plugin calls its objects.
CALLED = {
    "vllm.v1.worker.gpu.input_batch:InputBatch": "input_batch",
    "vllm.sampling_params:SamplingParams": "params",
    "vllm.v1.core.sched.output:NewRequestData": "new_req_data",
    "vllm.v1.core.sched.output:SchedulerOutput": "scheduler_output",
}


@cache
def sources() -> list[ast.Module]:
    """The plugin's files."""
    return [ast.parse(file.read_text(encoding="utf-8")) for file in sorted(PLUGIN.glob("*.py"))]


def attributes(variable: str) -> set[str]:
    """What the plugin reads or sets of a variable; of parameters those of its table `DRAWING` as well."""
    tables = [node for tree in sources() for node in tree.body if isinstance(node, ast.AnnAssign)]
    drawing = next(node.value for node in tables if isinstance(node.target, ast.Name) and node.target.id == "DRAWING")
    named = [ast.literal_eval(key) for key in drawing.keys]  # type: ignore[union-attr]
    return {*(named if variable == "params" else ())} | {
        node.attr
        for tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == variable
    }


def imported() -> dict[str, set[str]]:
    """Module of vLLM -> names that the plugin imports from it."""
    found: dict[str, set[str]] = {}
    for tree in sources():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "vllm":
                found.setdefault(node.module, set()).update(alias.name for alias in node.names)
    return found


def facts(read: Callable[[str], str | None]) -> dict[str, Any]:
    """What holds of one version.

    Args:
        read: the source of a file by its path in the package, `None` where there is none.
    """
    trees: dict[str, ast.Module | None] = {}

    def tree(module: str) -> ast.Module | None:
        if module not in trees:
            path = module.replace(".", "/")
            text = read(f"{path}.py") or read(f"{path}/__init__.py")
            trees[module] = None if text is None else ast.parse(text)
        return trees[module]

    return {
        "names": {module: sorted(names & {*_defined(tree(module))}) for module, names in sorted(imported().items())},
        "parameters": {
            f"{module}:{name}": _parameters(tree(module), name)
            for module, names in FUNCTIONS.items()
            for name in names
        },
        "fields": {
            title: sorted(attributes(variable) & {*_members(tree(title.partition(":")[0]), title.partition(":")[2])})
            for title, variable in CALLED.items()
        },
    }


def _defined(tree: ast.Module | None) -> Iterator[str]:
    """Names that a module has at its top, those under a condition included."""
    waiting: list[ast.AST] = [] if tree is None else [*tree.body]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If | ast.Try):
            waiting += [*node.body, *node.orelse, *getattr(node, "finalbody", [])]
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def _find(tree: ast.Module | None, name: str) -> ast.AST | None:
    node: ast.AST | None = tree
    for part in name.split("."):
        inside = [] if node is None else getattr(node, "body", [])
        node = next((n for n in inside if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name == part), None)
    return node


def _parameters(tree: ast.Module | None, name: str) -> Any:
    """The parameters of a function, or those of each method of a class."""
    node = _find(tree, name)
    if isinstance(node, ast.ClassDef):
        return {n.name: _names(n.args) for n in node.body if isinstance(n, ast.FunctionDef) and n.name != "__init__"}
    return _names(node.args) if isinstance(node, ast.FunctionDef) else None


def _names(args: ast.arguments) -> list[str]:
    return [a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs) if a.arg != "self"]


def _members(tree: ast.Module | None, name: str) -> Iterator[str]:
    """Fields and methods of a class."""
    node = _find(tree, name)
    for member in [] if node is None else node.body:  # type: ignore[attr-defined]
        if isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name):
            yield member.target.id
        elif isinstance(member, ast.FunctionDef) and not member.name.startswith("__"):
            yield member.name


def reader(source: Path) -> Callable[[str], str | None]:
    """Reads files of a wheel, or of a folder that holds `vllm/`."""
    if source.is_dir():
        return lambda path: (source / path).read_text(encoding="utf-8") if (source / path).is_file() else None
    wheel = zipfile.ZipFile(source)
    known = {*wheel.namelist()}
    return lambda path: wheel.read(path).decode("utf-8") if path in known else None


def main(arguments: list[str]) -> None:
    pairs = [argument.partition("=") for argument in arguments]
    told = {version: facts(reader(Path(source))) for version, _, source in pairs}
    write_whole(FACTS, (json.dumps(told, indent=1, sort_keys=True) + "\n").encode())


if __name__ == "__main__":
    main(sys.argv[1:])
