"""The folder of the metric as a Space: what it holds, what it needs, and its app."""

import ast
import importlib.util
import json
import re
import sys
import types
from pathlib import Path

import pytest
import yaml

from d3llm_hf.metrics import registration
from d3llm_hf.metrics.aup.curve import aup_score


FOLDER = Path(registration.METRIC_FOLDER)


def load_app(gradio, monkeypatch) -> types.ModuleType:
    """The app as a Space runs it: its folder first on the path, and not part of a package."""
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    monkeypatch.delitem(sys.modules, "curve", raising=False)
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("aup_space_app", FOLDER / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules.pop("curve")
    return module


class Refusal(Exception):
    """Stands for `gradio.Error`."""

    def __init__(self, text, print_exception=True):
        super().__init__(text)


@pytest.fixture
def app(monkeypatch):
    pytest.importorskip("matplotlib")
    gradio = types.ModuleType("gradio")
    gradio.Error, gradio.Blocks = Refusal, object
    return load_app(gradio, monkeypatch)


def test_the_folder_holds_what_a_space_needs_and_nothing_else():
    held = {file.name for file in FOLDER.iterdir() if file.name != "__pycache__"}
    assert held == {"README.md", "__init__.py", "app.py", "aup.py", "curve.py", "requirements.txt"}


def test_the_front_matter_of_the_card_names_the_app_and_the_kind_of_metric():
    front, card = (FOLDER / "README.md").read_text(encoding="utf-8").split("---\n", 2)[1:]
    fields = yaml.safe_load(front)
    assert fields["title"] == "AUP"
    assert fields["sdk"] == "gradio"
    assert re.fullmatch(r"\d+\.\d+\.\d+", fields["sdk_version"])
    assert (FOLDER / fields["app_file"]).is_file()
    assert fields["tags"] == ["evaluate", "metric"]
    assert len(fields["description"]) > 50
    for section in ("Description", "Formula", "How to use", "Limitations", "Citation"):
        assert f"\n## {section}\n" in card


def test_the_requirements_are_the_packages_that_are_imported():
    required = {re.split(r"[<>=]", line)[0] for line in (FOLDER / "requirements.txt").read_text().split()}
    imported = set()
    for file in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {name.name.split(".")[0] for name in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    assert imported - set(sys.stdlib_module_names) - {"curve"} == required


def test_the_curve_needs_numpy_only():
    """It is copied alone beside aup.py, and `evaluate` looks for the imports of aup.py only."""
    lines = (FOLDER / "curve.py").read_text(encoding="utf-8").splitlines()
    imports = [line for line in lines if re.match(r"\s*(import|from)\s", line)]
    assert imports == [
        "import math",
        "from collections.abc import Sequence",
        "from dataclasses import dataclass",
        "import numpy as np",
    ]


def test_published_values_on_the_card_are_those_of_the_metric():
    rows = re.findall(r"^\| [\w-]+ \| (\(1, .*\)) \| ([\d.]+) \|$", (FOLDER / "README.md").read_text("utf-8"), re.M)
    assert len(rows) == 4
    for points, published in rows:
        tpf, accuracy = zip(*json.loads("[" + points.replace("(", "[").replace(")", "]") + "]"), strict=True)
        assert f"{aup_score(tpf, accuracy, y_max=74.98).aup + 1e-9:.1f}" == published


def test_rows_of_the_table_become_points_and_empty_ones_do_not(app):
    assert app.points_of([[1.0, 74], ["2.5", " 73 "], ["", ""], [None, None]]) == ([1.0, 2.5], [74.0, 73.0])
    for row in (["fast", 74], [1.0, ""]):
        with pytest.raises(ValueError, match="each row must be two numbers"):
            app.points_of([row])


def test_the_bars_of_the_figure_have_the_area_of_the_score(app):
    tpf, accuracy = [1.0, 2.0, 2.0, 3.0, 4.0], [74.0, 72.0, 72.5, 66.0, 73.0]
    result = app.aup_score(tpf, accuracy)
    (axes,) = app.figure_of(result).axes
    assert sum(bar.get_width() * bar.get_height() for bar in axes.patches) == pytest.approx(result.aup)
    used, dropped = axes.lines[:2]
    assert used.get_xydata().tolist() == [list(point) for point in result.used]
    assert dropped.get_xydata().tolist() == [[3.0, 66.0]]
    assert axes.get_title() == f"AUP {result.aup:.1f}"


def test_the_button_shows_the_score_or_says_why_there_is_none(app):
    figure, text = app.show([[1.0, 74.02], [9.11, 73.09]], 74.98, 3.0, 5.0)
    assert text == "## AUP 637.65\n\n74.0 + 563.6, with y_max = 74.98 and y_min = 69.02."
    assert len(figure.axes) == 1
    _, text = app.show([[1.0, 74.0], [3.0, 66.0], ["", ""]], 0, 3.0, 5.0)
    assert text.endswith("with y_max = 74 and y_min = 69.\n\nLeft out, under y_min: (3, 66).")
    for table in ([["", ""]], [[1.0, 0.74]], [["fast", 74]]):
        with pytest.raises(Refusal):
            app.show(table, None, 3.0, 5.0)


def test_every_example_has_a_score(app):
    scores = [app.show(*example)[1].splitlines()[0] for example in app.EXAMPLES]
    assert scores == ["## AUP 637.65", "## AUP 245.73", "## AUP 280.69"]


@pytest.mark.slow
def test_the_app_builds_with_the_real_gradio(monkeypatch):
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    gradio = pytest.importorskip("gradio")
    pytest.importorskip("matplotlib")
    demo = load_app(gradio, monkeypatch).build()
    assert isinstance(demo, gradio.Blocks)
    functions = [function.fn for function in demo.fns.values() if function.api_name in ("show", "show_1")]
    assert len(functions) == 2
    with pytest.raises(gradio.Error, match="`tpf` must be positive"):
        functions[0]([[0.0, 74.0]], None, 3.0, 5.0)
