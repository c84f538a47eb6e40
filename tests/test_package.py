"""The package as a whole: light to import, silent, complete, and known to transformers' Auto classes."""

import ast
import importlib.metadata
import json
import re
import subprocess
import sys

import pytest
from places import REPOSITORY

import d3llm_hf


LIGHT = """
import socket, sys, time

def refused(*args, **kwargs):
    raise AssertionError("network")

socket.socket = socket.create_connection = socket.getaddrinfo = refused
start = time.perf_counter()
import d3llm_hf
seconds = time.perf_counter() - start
names = sorted({name.split(".")[0] for name in sys.modules} & {"torch", "transformers", "huggingface_hub", "numpy"})
dir(d3llm_hf), d3llm_hf.__version__
print(seconds, names)
"""

REGISTERED = """
import json, sys
order, llada, dream = sys.argv[1:]
if order == "transformers first":
    import transformers.models.auto.modeling_auto
import d3llm_hf
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM
early = [name for name in sys.modules if name.startswith("d3llm_hf.models.")]
facts = {"early": early}
for folder in (llada, dream):
    for auto in (AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM):
        loaded = auto.from_pretrained(folder)
        facts.setdefault(auto.__name__, []).append(f"{type(loaded).__module__}.{type(loaded).__name__}")
print()
print(json.dumps(facts))
"""


def start_python(script: str, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output_of(process: subprocess.Popen) -> list[str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return out.splitlines()


def test_importing_the_package_loads_no_torch_opens_no_connection_and_prints_nothing():
    out = output_of(start_python(LIGHT))
    assert len(out) == 1
    seconds, names = out[0].split(" ", 1)
    assert float(seconds) < 1.0
    assert names == "[]"


@pytest.mark.full
@pytest.mark.parametrize("order", ["package first", "transformers first"])
def test_auto_classes_load_official_folders_through_the_package(order, official):
    folders = [str(folder) for folder in official.values()]
    facts = json.loads(output_of(start_python(REGISTERED, order, *folders))[-1])
    assert facts.pop("early") == []  # nothing of ours is loaded before a checkpoint asks for it
    models = ["d3llm_hf.models.modeling_llada.LLaDAModelLM", "d3llm_hf.models.modeling_dream.DreamModel"]
    configs = ["d3llm_hf.models.configuration_llada.LLaDAConfig", "d3llm_hf.models.configuration_dream.DreamConfig"]
    assert facts.pop("AutoConfig") == configs
    assert facts == dict.fromkeys(("AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM"), models)


def test_auto_classes_build_models_from_our_configs():
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model("llada", vocab_size=8, d_model=4, n_layers=1, n_heads=1)
    assert type(config) is d3llm_hf.LLaDAConfig
    assert type(AutoModel.from_config(config)) is d3llm_hf.LLaDAModelLM


def test_a_stand_in_answers_as_the_class_it_stands_for_and_is_pickled_as_that():
    import copy
    import pickle

    from d3llm_hf.registration import families

    family = families.FAMILIES["llada"]
    stand_in = families._StandIn(family.config_class, (), {"__module__": family.config_module})
    assert stand_in.attribute_map == d3llm_hf.LLaDAConfig.attribute_map
    assert type(stand_in(d_model=8, n_heads=2)) is d3llm_hf.LLaDAConfig
    assert not hasattr(stand_in, "__wrapped__")
    assert pickle.loads(pickle.dumps(stand_in)) is d3llm_hf.LLaDAConfig
    assert copy.deepcopy(stand_in) is stand_in


def test_modules_that_load_late_are_found_as_ever():
    from d3llm_hf.registration import families

    finders = [finder for finder in sys.meta_path if isinstance(finder, families._AfterImport)]
    families.register_families()  # a second call changes nothing
    assert [finder for finder in sys.meta_path if isinstance(finder, families._AfterImport)] == finders
    assert len(finders) == 1
    finder = families._AfterImport({"d3llm_hf.no_such_module": lambda: None})
    assert finder.find_spec("d3llm_hf.no_such_module") is None
    assert finder.find_spec("json") is None


def test_every_public_name_exists_and_no_other_is_promised():
    assert 10 <= len(d3llm_hf.__all__) <= 50
    assert set(d3llm_hf.__all__) <= set(dir(d3llm_hf))
    for name in d3llm_hf.__all__:
        assert getattr(d3llm_hf, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'LLaDA'"):
        _ = d3llm_hf.LLaDA


def test_the_version_is_the_one_of_the_citation_the_changelog_and_the_installed_distribution():
    assert f"version: {d3llm_hf.__version__}\n" in (REPOSITORY / "CITATION.cff").read_text()
    assert f"## {d3llm_hf.__version__}" in (REPOSITORY / "CHANGELOG.md").read_text()
    try:
        installed = importlib.metadata.version("d3llm-hf")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package runs from its sources, nothing is installed")
    assert installed == d3llm_hf.__version__
    commands = {point.name: point.value for point in importlib.metadata.entry_points(group="console_scripts")}
    assert commands["d3llm"] == "d3llm_hf.cli:main"


def test_data_files_lie_where_the_wheel_takes_them_from():
    for name in ("py.typed", "hub/templates/model_card.md", "metrics/aup/README.md", "metrics/aup/requirements.txt"):
        assert (REPOSITORY / "d3llm_hf" / name).is_file()
    template = (REPOSITORY / "d3llm_hf" / "hub" / "templates" / "model_card.md").read_text()
    assert (REPOSITORY / "model_cards" / "TEMPLATE.md").read_text() == template


def test_constraints_name_one_version_of_each_package_and_no_build():
    lines = [line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in lines), lines
    names = [line.split("==")[0] for line in lines]
    assert names == sorted(set(names))
    assert {"torch", "transformers", "accelerate", "peft", "datasets", "trl", "evaluate", "lm-eval"} <= set(names)


def test_the_range_of_transformers_is_the_one_that_is_tested():
    def minor(version: str) -> tuple[int, int]:
        major, minor, *_ = version.split(".")
        return int(major), int(minor)

    ((lowest, above),) = re.findall(r'"transformers>=([\d.]+),<([\d.]+)"', (REPOSITORY / "pyproject.toml").read_text())
    newest = re.search(r"^transformers==(.*)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert (minor(newest)[0], minor(newest)[1] + 1) == minor(above)
    versions = re.search(r"versions=\((\d.*)\)", (REPOSITORY / ".ci" / "transformers_matrix").read_text())[1].split()
    assert minor(versions[0]) == minor(lowest) and versions[-1] == newest
    assert f"transformers_matrix --short {versions[0]})" in (REPOSITORY / ".ci" / "run").read_text()


def test_library_code_neither_prints_nor_asserts_its_input():
    for folder in ("d3llm_hf", "trainers"):
        for file in (REPOSITORY / folder).rglob("*.py"):
            tree = ast.parse(file.read_text())
            calls = [n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
            assert "print" not in calls, file
            assert not any(isinstance(node, ast.Assert) for node in ast.walk(tree)), file
