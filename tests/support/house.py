"""Who imports whom, read from the sources without running them.

    python tests/support/house.py          # each wing with the wings that it imports, lowest first
    python tests/support/house.py --files  # the same of files

A wing is a folder; the files that lie loose in a package are wings of their own. Imports inside functions and those
for the sake of types count like all others: what a file names, a reader must know.
"""

import argparse
import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from places import REPOSITORY


PACKAGES = ("d3llm_hf", "trainers")

Arrows = dict[str, set[str]]


def modules(root: Path = REPOSITORY) -> dict[str, Path]:
    """Dotted name -> file, of every module of the packages; a package goes by its own name."""
    found = {}
    for package in PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            parts = file.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def named(file: Path, module: str) -> Iterator[str]:
    """Every dotted name that a file imports: `a.b` for `import a.b`, `a.b.c` for `from a.b import c`."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def arrows(known: Mapping[str, Path]) -> Arrows:
    """Module -> the modules of ours that it imports."""
    return {
        module: {found for name in named(file, module) if (found := _module_of(name, known)) not in (None, module)}
        for module, file in known.items()
    }


def _module_of(name: str, known: Iterable[str]) -> str | None:
    """The module that an imported name is, or lies in."""
    while name:
        if name in known:
            return name
        name = name.rpartition(".")[0]
    return None


def between_wings(found: Arrows, known: Mapping[str, Path]) -> Arrows:
    """The same arrows from folder to folder. What is imported of a package itself, its version, is no arrow."""
    wings: Arrows = {}
    for module, targets in found.items():
        here = wing(module, known)
        if here in PACKAGES:  # an `__init__` that names all public things
            continue
        wings.setdefault(here, set()).update({wing(target, known) for target in targets} - {here, *PACKAGES})
    return wings


def wing(module: str, known: Mapping[str, Path]) -> str:
    """The folder that a module lies in, or the module itself where it lies loose in a package."""
    folder = module if known[module].name == "__init__.py" else module.rpartition(".")[0]
    return module if folder in PACKAGES else folder


def loop(found: Arrows) -> list[str]:
    """The names of a loop of arrows, in its order, the first again at its end; nothing where there is none."""
    try:
        TopologicalSorter(found).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", action="store_true", help="files in place of wings")
    args = parser.parse_args(argv)
    known = modules()
    found = arrows(known)
    if not args.files:
        found = between_wings(found, known)
    circle = loop(found)
    if circle:
        sys.stdout.write("loop: " + " -> ".join(circle) + "\n")
        return 1
    for name in TopologicalSorter(found).static_order():
        if name in found:
            sys.stdout.write(" ".join([f"{name}:", *sorted(found[name])]) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
