"""The README and `docs/`: every example runs as a reader would paste it, and no link is dead.

The examples of a page run in their order, in one folder in which `d3llm init` wrote both embedded checkpoints, and the
Python ones share their names. A comment line before a block says what else holds for it:

    <!-- prints: TEXT -->       its output holds that text
    <!-- not run: REASON -->    it cannot run here; its syntax, and the options of its commands, are checked
    <!-- run in: FILE -->       another test runs it
    <!-- command: NAME -->      `.ci/run` runs it
"""

import ast
import functools
import importlib
import io
import json
import re
import shlex
import shutil
import sys
import types
import xml.etree.ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import named_paths
import pytest

from d3llm_hf import cli
from d3llm_hf.evaluation.sweep import grids
from d3llm_hf.models import methods, selection


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOK = ROOT / "docs" / "first_steps.ipynb"
# Options that an example shows in earnest -> what suffices to see it run.
SMALLER = {"--num-samples": "4", "--num_problems": "3"}
MARK = re.compile(r"<!-- (prints|not run|run in|command|output): (.+) -->")


@dataclass
class Block:
    """A fenced block of a page, with the marks on the lines before it."""

    language: str
    code: str
    line: int
    marks: dict[str, list[str]]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page in their order."""
    found, marks, fence = [], {}, None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if fence is not None and line == "```":
            found.append(fence)
            fence, marks = None, {}
        elif fence is not None:
            fence.code += line + "\n"
        elif line.startswith("```"):
            fence = Block(line[3:], "", number, marks)
        elif mark := MARK.fullmatch(line):
            marks.setdefault(mark[1], []).append(mark[2])
        else:
            marks = {}
    assert fence is None, f"{page.name}: the block of line {fence and fence.line} has no end"
    return found


def command_lines(code: str) -> list[list[str]]:
    """The commands of a shell example as words, with comments and settings of the environment taken off."""
    lines = [shlex.split(line, comments=True) for line in code.replace("\\\n", " ").splitlines()]
    for words in lines:
        while words and re.fullmatch(r"[A-Z_0-9]+=\S*", words[0]):
            del words[0]
    return [words for words in lines if words]


def run_command(words: list[str]) -> None:
    """Runs `d3llm ...`, `d3llm-eval ...` or `python trainers/SCRIPT.py ...` in this process."""
    words = [SMALLER.get(before, word) for before, word in zip(["", *words], words, strict=False)]
    if words[0] == "d3llm":
        assert cli.main(words[1:]) == 0, words
    elif words[0] == "d3llm-eval":
        from d3llm_hf.evaluation.harness import cli as lm_eval_cli

        assert lm_eval_cli.main(words[1:]) == 0, words
    else:
        assert words[0] == "python" and words[1].startswith("trainers/"), f"nothing here runs {words}"
        importlib.import_module(words[1].removesuffix(".py").replace("/", ".")).main([*words[2:], "--use_cpu"])


def check_command(words: list[str]) -> None:
    """Of a command that cannot run here: its options exist, and the files of the repository that it names."""
    if words[0] == "d3llm":
        cli.build_parser().parse_args(words[1:])
    if words[0] == "d3llm-eval":
        from d3llm_hf.evaluation.harness import cli as lm_eval_cli

        assert lm_eval_cli.main([*words[1:], "--show"]) == 0
    for word in words:
        assert not word.startswith("trainers/") or (ROOT / word).is_file(), f"there is no {word}"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> Path:
    """A folder with those that `d3llm init` writes."""
    folder = tmp_path_factory.mktemp("init")
    for name in ("d3llm-llada", "d3llm-llada-teacher", "d3llm-block"):
        assert cli.main(["init", name, str(folder / name)]) == 0
    return folder


@pytest.fixture
def quick(monkeypatch) -> None:
    """What takes longest is left out: pictures are laid out and not saved, lm-eval finds our tasks alone."""
    from lm_eval.tasks.manager import TaskManager

    from d3llm_hf.evaluation.leaderboard import pictures

    whole = TaskManager.__init__
    monkeypatch.setattr(
        TaskManager, "__init__", lambda self, *args, **more: whole(self, *args, **more | {"include_defaults": False})
    )
    monkeypatch.setattr(pictures, "_saved", lambda name, figure: dict.fromkeys((f"{name}.png", f"{name}.svg"), b"-"))


@pytest.fixture
def names(checkpoints, tmp_path, monkeypatch, quick) -> Iterator[dict]:
    """Names of a reader's session, in a folder of its own with the checkpoints in it."""
    import datasets

    shutil.copytree(checkpoints, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    session = types.ModuleType("session")
    monkeypatch.setitem(sys.modules, "session", session)
    tables = [methods.METHODS, methods.RULES, selection.SELECTORS, grids.NATURAL]  # a page adds a method
    before = [dict(table) for table in tables]
    yield vars(session)
    for table, rows in zip(tables, before, strict=True):
        table.clear()
        table.update(rows)


@pytest.mark.every(8)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_examples_of_a_page_run_in_their_order(page, names, capsys):
    for block in blocks(page):
        where = f"{page.name}, line {block.line}"
        if block.language not in ("python", "bash"):
            assert block.language in ("", "text"), f"{where}: nothing here runs {block.language}"
            continue
        if "command" in block.marks:
            assert f'"command: {block.marks["command"][0]}"' in (ROOT / ".ci" / "run").read_text(), where
            continue
        if "run in" in block.marks:
            assert page.name in (ROOT / block.marks["run in"][0]).read_text(encoding="utf-8"), where
            continue
        if block.language == "python":
            code = compile(block.code, where, "exec")
        commands = command_lines(block.code) if block.language == "bash" else []
        if "not run" in block.marks:
            for words in commands:
                check_command(words)
            continue
        capsys.readouterr()
        if block.language == "python":
            exec(code, names)
        for words in commands:
            run_command(words)
        shown = capsys.readouterr().out
        for text in block.marks.get("prints", []):
            assert text in shown, where


@pytest.mark.full
def test_the_notebook_runs_and_holds_no_output(names, monkeypatch):
    import matplotlib

    shutil.rmtree("d3llm-llada")  # the notebook writes it
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5) and "kernelspec" in notebook["metadata"]
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    matplotlib.use("Agg")
    for cell in notebook["cells"]:
        assert set(cell) == {"cell_type", "id", "metadata", "source"} | (
            {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        )
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, {cell['id']}", "exec"), names)
    assert Path("denoising.png").stat().st_size > 1000


def test_the_picture_is_what_its_script_draws_of_some_decoding(names):
    script = ROOT / "docs" / "draw_decoding.py"
    spec = importlib.util.spec_from_file_location("draw_decoding", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(["decoding.svg"])
    for drawn in (Path("decoding.svg"), ROOT / "docs" / "decoding.svg"):
        svg = xml.etree.ElementTree.parse(drawn).getroot()
        assert svg.tag == "{http://www.w3.org/2000/svg}svg" and "viewBox" in svg.attrib
        assert len(svg.findall(".//{*}rect")) > 50


# ---- links ---------------------------------------------------------------------------------------------------------


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"(?ms)^```.*?^```$", "", page.read_text(encoding="utf-8"))


@functools.cache
def anchors(page: Path) -> set[str]:
    """The anchors that headings get."""
    titles = re.findall(r"(?m)^#+ (.+)$", prose(page))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^()\s]+)\)|(?:src|href|srcset)=\"([^\"]+)\"", prose(page))
    for link in (one or other for one, other in links):
        if link.startswith(("https://", "http://")):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists() and ROOT in (target, *target.parents), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_no_document_names_what_is_gone():
    found = {document: named_paths.gone_of(document) for document in named_paths.documents()}
    assert {ROOT / "README.md", ROOT / "Makefile", ROOT / ".ci" / "run", NOTEBOOK, *PAGES} <= set(found)
    assert {str(document.relative_to(ROOT)): names for document, names in found.items() if names} == {}


def test_the_readme_names_every_page_and_every_command():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in (*PAGES[1:], NOTEBOOK):
        assert f"](docs/{page.name})" in readme
    for module in cli.COMMANDS:
        assert f"`d3llm {module.__name__.rpartition('.')[2]}" in readme


def test_the_pages_for_contributors_agree_on_the_files_of_a_new_method():
    architecture, new_method = (
        (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("architecture.md", "new-method.md")
    )
    told = architecture.split("**A decoding method**")[1].split("\n\n")[0]
    begun = new_method.split("It touches two files:")[1].split("\n\nBatches")[0]
    files = {"d3llm_hf/models/methods.py", "d3llm_hf/models/selection.py"}
    assert set(re.findall(r"`(d3llm_hf/\S+)`", told)) == set(re.findall(r"`(d3llm_hf/\S+)`", begun)) == files
    assert len(architecture.splitlines()) <= 120


# ---- the machinery above -------------------------------------------------------------------------------------------


def test_blocks_are_found_with_their_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "<!-- not run: lost -->\ntext\n<!-- prints: a -->\n<!-- prints: b -->\n"
        "```python\nx\n\ny\n```\n```bash\nz\n```\n"
    )
    first, second = blocks(page)
    assert (first.language, first.code, first.line) == ("python", "x\n\ny\n", 5)
    assert first.marks == {"prints": ["a", "b"]} and second.marks == {}


@pytest.fixture
def repository(tmp_path) -> Path:
    """A package with two modules, of which one can be run."""
    (tmp_path / "d3llm_hf" / "wing").mkdir(parents=True)
    (tmp_path / "d3llm_hf" / "__init__.py").write_text("__all__ = ['first_used']\n")
    (tmp_path / "d3llm_hf" / "wing" / "__init__.py").write_text("")
    (tmp_path / "d3llm_hf" / "wing" / "room.py").write_text("class Chair: ...\n")
    (tmp_path / "d3llm_hf" / "wing" / "__main__.py").write_text("")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("`d3llm_hf/wing/room.py`, [it](../docs/page.md), `docs/`, d3llm_hf/wing.", []),
        ("of `docs/*.md` and 'd3llm_hf/*.py'", []),
        ("`d3llm_hf.wing.room.Chair` of `d3llm_hf.first_used`; python -m d3llm_hf.wing x", []),
        ("https://github.com/a/b/docs/gone.md, outputs/docs/gone.md and my-trainers/gone.md", []),
        ("`d3llm_hf/room.py`, docs/gone/ and see docs/gone.md.", ["d3llm_hf/room.py", "docs/gone.md", "docs/gone/"]),
        ("`docs/*.ipynb` and `tests/*`", ["docs/*.ipynb", "tests/*"]),
        ("`d3llm_hf.room.Chair`, `d3llm_hf.wing.room.Table`", ["d3llm_hf.room.Chair", "d3llm_hf.wing.room.Table"]),
        ("`trainers.wing`", ["trainers.wing"]),
        ("accelerate launch -m d3llm_hf.wing.room", ["-m d3llm_hf.wing.room"]),
        ("`wing/room.py`, `r*.py` and `table.py`", ["table.py"]),
    ],
)
def test_names_of_what_is_gone_are_found(repository, text, expected):
    assert list(named_paths.gone(text, repository, bare=True)) == expected


def test_of_code_the_comments_and_texts_are_read(tmp_path):
    file = tmp_path / "code.py"
    file.write_text('"""See docs/one.md."""\ntrainers.items()  # docs/two.md\nf"docs/three.md {trainers.x}"\n')
    assert {f"docs/{name}.md" for name in ("one", "two", "three")} <= set(named_paths.gone(named_paths.told(file)))
    assert "trainers.items" not in named_paths.told(file)


@pytest.mark.full
def test_the_command_names_what_is_gone(monkeypatch, capsys, tmp_path):
    assert (named_paths.main(), capsys.readouterr().out) == (0, "")
    page = tmp_path / "page.md"
    page.write_text("`docs/gone.md`")
    monkeypatch.setattr(named_paths, "REPOSITORY", tmp_path)
    monkeypatch.setattr(named_paths, "documents", lambda: [page])
    assert (named_paths.main(), capsys.readouterr().out) == (1, "page.md: docs/gone.md\n")


def test_commands_are_taken_as_a_shell_reads_them():
    code = "# nothing\nA=1 B_2=x d3llm env  # here\n\npython trainers/x.py 'a b' \\\n    --c d\n"
    assert command_lines(code) == [["d3llm", "env"], ["python", "trainers/x.py", "a b", "--c", "d"]]


def test_what_is_not_run_is_still_checked():
    with pytest.raises(SystemExit):
        check_command(["d3llm", "serve", "x", "--no-such-option"])
    with pytest.raises(AssertionError, match=r"there is no trainers/gone\.py"):
        check_command(["accelerate", "launch", "trainers/gone.py"])
    with pytest.raises(AssertionError, match="nothing here runs"):
        run_command(["rm", "x"])


def test_python_examples_that_are_not_run_are_at_least_python():
    for page in PAGES:
        for block in blocks(page):
            if block.language == "python":
                ast.parse(block.code)
