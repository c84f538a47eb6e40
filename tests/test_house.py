"""The walls of the house: who may import whom. `python tests/support/house.py` draws what is tested here."""

import re
import sys
from pathlib import Path

import house
import pytest
from places import REPOSITORY


KNOWN = house.modules()
COMMANDS = "d3llm_hf.commands"


@pytest.fixture(scope="module")
def arrows() -> house.Arrows:
    return house.arrows(KNOWN)


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def test_no_file_imports_itself_by_way_of_others(arrows):
    assert house.loop(arrows) == []


def test_no_wing_imports_itself_by_way_of_others(arrows):
    assert house.loop(house.between_wings(arrows, KNOWN)) == []


def test_commands_are_the_top_floor(arrows):
    above = {COMMANDS, "d3llm_hf.cli", "d3llm_hf.__main__"}
    for module, targets in arrows.items():
        if not within(module, COMMANDS) and module not in above:
            assert not [target for target in targets if within(target, COMMANDS)], module


def test_only_commands_take_from_the_trainers(arrows):
    for module, targets in arrows.items():
        if within(module, "d3llm_hf") and not within(module, COMMANDS):
            assert not [target for target in targets if within(target, "trainers")], module


def test_what_travels_in_a_checkpoint_imports_torch_transformers_and_its_siblings():
    allowed = {"torch", "transformers", *sys.stdlib_module_names}
    allowed |= {"huggingface_hub", "triton"}  # which come with transformers, and with torch for CUDA
    for module, file in KNOWN.items():
        if within(module, "d3llm_hf.models"):
            for name in house.named(file, module):
                parts = name.split(".")
                sibling = parts[:2] == ["d3llm_hf", "models"] and len(parts) <= 4  # a module there, or a name in it
                assert sibling or parts[0] in allowed, f"{module} imports {name}"


def floors(page: Path) -> dict[str, int]:
    """Wing -> floor, as the first picture of a page has them."""
    picture = re.search(r"```text\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)[1]
    found, floor = {}, None
    for line in picture.splitlines():
        number, *sides = line[:2].strip(), *line[2:].split("|")
        floor = int(number) if number else floor
        for package, names in zip(house.PACKAGES, sides, strict=True):
            for name in names.split():
                wing = f"{package}.{name.removesuffix('.py').rstrip('/').replace('/', '.')}"
                assert wing not in found, wing
                found[wing] = floor
    return found


def test_the_picture_of_the_wings_is_the_house(arrows):
    drawn, wings = floors(REPOSITORY / "docs" / "architecture.md"), house.between_wings(arrows, KNOWN)
    assert set(drawn) == set(wings)
    for wing, targets in wings.items():
        assert not [target for target in targets if drawn[target] >= drawn[wing]], wing


def test_everything_is_looked_at(arrows):
    """The tests above see imports in functions, for types, relative ones, and modules taken from a package."""
    assert "d3llm_hf.models.topology" in arrows["d3llm_hf.hub.checkpoints"]  # in a function
    assert "d3llm_hf.watch.chat" in arrows["d3llm_hf"]  # for types
    assert "d3llm_hf.evaluation.tables.bench" in arrows["d3llm_hf.evaluation.tables.fill"]  # from . import bench
    assert "trainers.bench.training" in arrows["d3llm_hf.commands.bench"]
    assert {module.partition(".")[0] for module in KNOWN} == set(house.PACKAGES)


@pytest.fixture
def built(tmp_path):
    """Builds a house of files with their sources: its arrows, and its modules."""

    def build(**sources: str) -> tuple[house.Arrows, dict[str, Path]]:
        for name, text in sources.items():
            file = tmp_path / "d3llm_hf" / f"{name.replace('__', '/')}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        known = house.modules(tmp_path)
        return house.arrows(known), known

    return build


def test_a_loop_of_files_is_found(built):
    found, _ = built(
        one="from . import two\n", two="def f():\n    from .three import x\n", three="import d3llm_hf.one\n"
    )
    circle = house.loop(found)
    assert circle[0] == circle[-1] and set(circle) == {"d3llm_hf.one", "d3llm_hf.two", "d3llm_hf.three"}


def test_a_loop_of_wings_is_found_where_no_file_is_in_one(built):
    found, known = built(a__x="from ..b import y\n", a__z="", b__y="", b__w="from ..a.z import q\n")
    assert house.loop(found) == []
    assert set(house.loop(house.between_wings(found, known))) == {"d3llm_hf.a", "d3llm_hf.b"}


@pytest.mark.full
def test_the_command_draws_each_wing_once(capsys):
    assert house.main([]) == 0
    wings = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert len(wings) == len(set(wings)) and wings.index("d3llm_hf.models") < wings.index(COMMANDS)
    assert house.main(["--files"]) == 0
    assert "d3llm_hf.models.cache" in capsys.readouterr().out


def test_the_command_names_a_loop(built, capsys, monkeypatch):
    known = built(a__x="from ..b import y\n", b__y="from ..a import x\n")[1]
    monkeypatch.setattr(house, "modules", lambda: known)
    assert house.main([]) == 1
    assert capsys.readouterr().out.startswith("loop: d3llm_hf.")
