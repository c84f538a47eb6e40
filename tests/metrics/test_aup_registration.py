"""Where the metric is copied for `evaluate.load`: when, how, and when not."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from places import REPOSITORY

from d3llm_hf import cli
from d3llm_hf.metrics import registration


IMPORT = """
import importlib.abc, sys
without = sys.argv[1:]

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname == "evaluate":
            raise ModuleNotFoundError(fullname)

if without:
    sys.meta_path.insert(0, Absent())
import d3llm_hf
print(sorted({"evaluate", "datasets", "numpy", "shutil", "tempfile"} & set(sys.modules)))
"""


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """An empty folder in the place of `~/.cache/huggingface`, with an `evaluate` that can be found."""
    for name in (registration.OPT_OUT, "HF_MODULES_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(registration.importlib.util, "find_spec", lambda name: name)
    return tmp_path / "home"


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def expected() -> dict[str, bytes]:
    modules = "modules/evaluate_modules/metrics/evaluate-metric--aup"
    above = ("modules", "modules/evaluate_modules", "modules/evaluate_modules/metrics", modules)
    slot = f"{modules}/{registration.SLOT_NAME}"
    return (
        {f"{folder}/__init__.py": b"" for folder in (*above, slot)}
        | {f"{slot}/{name}": (Path(registration.METRIC_FOLDER) / name).read_bytes() for name in registration.FILES}
    )  # fmt: skip


def test_registering_writes_the_metric_and_nothing_else(home):
    registration.register_metric()
    assert files(home) == expected()
    assert len(registration.SLOT_NAME) == 64  # what `evaluate` takes for a version


def test_registering_again_writes_nothing(home, monkeypatch):
    registration.register_metric()
    monkeypatch.setattr(registration, "install_metric", lambda: pytest.fail("wrote again"))
    registration.register_metric()


@pytest.mark.parametrize("name", registration.FILES)
def test_a_copy_of_another_version_is_refreshed(home, name):
    registration.register_metric()
    (Path(registration.slot()) / name).write_text("VERSION = 'older'\n")
    assert not registration.is_installed()
    registration.register_metric()
    assert files(home) == expected()


def test_files_that_are_there_already_are_left_alone(home):
    (home / "modules" / "evaluate_modules").mkdir(parents=True)
    other = home / "modules" / "evaluate_modules" / "__init__.py"
    other.write_text("# somebody else's\n")
    registration.register_metric()
    assert other.read_text() == "# somebody else's\n"
    assert registration.is_installed()


@pytest.mark.parametrize(
    "variables, modules",
    [
        ({"HF_MODULES_CACHE": "/m", "HF_HOME": "/h"}, "/m"),
        ({"HF_HOME": "/h"}, "/h/modules"),
        ({"HF_HOME": "~/h"}, "/home/me/h/modules"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/modules"),
        ({}, "/home/me/.cache/huggingface/modules"),
    ],
)
def test_the_place_is_the_one_evaluate_derives_from_the_environment(variables, modules, monkeypatch):
    for name in ("HF_MODULES_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": "/home/me"} | variables).items():
        monkeypatch.setenv(name, value)
    place = f"{modules}/evaluate_modules/metrics/evaluate-metric--aup/{registration.SLOT_NAME}"
    assert Path(registration.slot()) == Path(place)


@pytest.mark.parametrize("value, registered", [("1", False), ("yes", False), ("0", True), ("", True)])
def test_an_environment_variable_turns_it_off(home, monkeypatch, value, registered):
    monkeypatch.setenv(registration.OPT_OUT, value)
    registration.register_metric()
    assert home.exists() == registered


@pytest.mark.parametrize("error", [ImportError, ValueError])
def test_an_evaluate_that_is_broken_stops_nothing(home, monkeypatch, error):
    def broken(name):
        raise error(name)

    monkeypatch.setattr(registration.importlib.util, "find_spec", broken)
    registration.register_metric()
    assert not home.exists()


def test_a_home_that_cannot_be_written_stops_nothing(home, capsys):
    home.write_text("a file where a folder should be")
    registration.register_metric()
    assert cli.main(["metric", "install"]) == 2
    assert capsys.readouterr().err.startswith("d3llm: error: ")
    assert cli.main(["metric", "uninstall"]) == 0


def test_a_copy_that_cannot_be_read_stops_nothing(home):
    (Path(registration.slot()) / "curve.py").mkdir(parents=True)
    registration.register_metric()
    with pytest.raises(OSError):
        registration.is_installed()
    with pytest.raises(OSError):
        registration.install_metric()
    assert not [name for name in files(home) if name.endswith(".tmp")]


def test_many_may_install_at_once_and_readers_never_see_half_a_file(home):
    registration.install_metric()
    whole = expected()
    slot = Path(registration.slot())
    wrong = []
    done = threading.Event()

    def read():
        while not done.is_set():
            for name in registration.FILES:
                if (slot / name).read_bytes() != (Path(registration.METRIC_FOLDER) / name).read_bytes():
                    wrong.append(name)

    reader = threading.Thread(target=read)
    reader.start()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: registration.install_metric(), range(40)))
    done.set()
    reader.join()
    assert wrong == []
    assert files(home) == whole


@pytest.mark.parametrize("evaluate", ["there", "absent"])
def test_importing_the_package_registers_where_evaluate_is_installed_and_loads_nothing_for_it(evaluate, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != registration.OPT_OUT}
    (tmp_path / "packages" / "evaluate").mkdir(parents=True)
    (tmp_path / "packages" / "evaluate" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    paths = os.pathsep.join((str(REPOSITORY), str(tmp_path / "packages")))
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "home" / "modules"), "PYTHONPATH": paths}
    without = [] if evaluate == "there" else ["without"]
    done = subprocess.run(
        [sys.executable, "-c", IMPORT, *without],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert (done.stdout.count("\n"), done.stderr) == (1, "")
    assert not {"evaluate", "datasets", "numpy"} & set(done.stdout.replace("'", " ").replace("]", " ").split())
    assert files(tmp_path / "home") == (expected() if evaluate == "there" else {})


def test_the_command_installs_removes_and_says_where(home, capsys):
    assert cli.main(["metric", "path"]) == 0
    assert capsys.readouterr().out == registration.METRIC_FOLDER + "\n"
    assert not home.exists()

    assert cli.main(["metric", "install"]) == 0
    assert capsys.readouterr().err == f"wrote {registration.slot()}\n"
    assert files(home) == expected()

    assert cli.main(["metric", "uninstall"]) == 0
    assert f"removed {registration.slot()}\n" in capsys.readouterr().err
    assert not registration.is_installed()
    assert not Path(registration.slot()).exists()
    assert cli.main(["metric", "uninstall"]) == 0
    assert "nothing to remove\n" in capsys.readouterr().err
