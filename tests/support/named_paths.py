"""What documents name of this repository, paths and modules and the names in them, and what of it is gone.

    python tests/support/named_paths.py  # whatever is gone, one line each

Nothing that a document names is imported: a module's names are read from its source.
"""

import ast
import re
import sys
import tokenize
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import house
from places import REPOSITORY


# Whoever reads these takes what they name at its word. CHANGELOG.md is no document in this sense: it is history.
DOCUMENTS = (
    "*.md", "docs/**/*.md", "docs/*.ipynb", "docs/*.py", "model_cards/*.md", "tests/golden/README.md", "Makefile",
    ".ci/*", ".pre-commit-config.yaml", "pyproject.toml", "CITATION.cff", "constraints.txt",
    "d3llm_hf/**/*.md", "d3llm_hf/**/*.yaml", "d3llm_hf/**/*.py",
    "trainers/**/*.md", "trainers/**/*.yaml", "trainers/**/*.py",
)  # fmt: skip
HISTORY = {"CHANGELOG.md"}
# Pages that name files of other projects, so that a file without its folder need not be one of ours.
ABROAD = {"engines.md", "coming-from.md"}

FOLDERS = ("d3llm_hf", "trainers", "tests", "docs", "model_cards", ".ci")
# Not behind a slash or a word: there it is a path of something else, as in a link to another repository.
_FOLDER = f"(?:{'|'.join(map(re.escape, FOLDERS))})/"
_PATH = re.compile(rf"(?<![\w/.-])(?:\.\./)*({_FOLDER}[\w./*-]*)")
_MODULE = re.compile(r"(?<![\w/.-])((?:d3llm_hf|trainers)(?:\.\w+)+)")
_FILE = re.compile(rf"(?<![\w/.*<-])(?!{_FOLDER})([\w*][\w*/-]*\.py)\b")
_RUN = re.compile(r"-m (d3llm_hf[\w.]*|trainers[\w.]*)")


def documents(root: Path = REPOSITORY) -> list[Path]:
    """The files whose names of things are checked."""
    found = {file for pattern in DOCUMENTS for file in root.glob(pattern) if file.is_file()}
    return sorted(file for file in found if file.name not in HISTORY)


def told(document: Path) -> str:
    """What a document says; of a Python file its comments and strings, since in code a name may be a variable's."""
    if document.suffix != ".py":
        return document.read_text(encoding="utf-8")
    with document.open("rb") as file:
        kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
        return "\n".join(token.string for token in tokenize.tokenize(file.readline) if token.type in kinds)


def gone(text: str, root: Path = REPOSITORY, *, bare: bool = False) -> Iterator[str]:
    """What a text names of the repository at `root` that is not there; with `bare` also files without their folder."""
    known = _modules(root)
    for path in _named(_PATH, text):
        if not (_matches(path, root) if "*" in path else (root / path).exists()):
            yield path
    for name in _named(_MODULE, text):
        if not _is_known(name, known):
            yield name
    for name in _named(_RUN, text):
        if not _runs(name, known):
            yield f"-m {name}"
    for name in _named(_FILE, text) if bare else ():
        if not any(_matches(f"{folder}/{form}", root) for folder in FOLDERS for form in (name, f"*/{name}")):
            yield name


def gone_of(document: Path) -> list[str]:
    """What a document of this repository names of it that is not there."""
    bare = document.suffix == ".md" and document.name not in ABROAD
    return list(gone(told(document), bare=bare))


def _named(pattern: re.Pattern, text: str) -> list[str]:
    return sorted({found.rstrip(".-") for found in pattern.findall(text)})


def _matches(pattern: str, root: Path) -> bool:
    """Whether some file has a name of that form; a star stands for folders, too, as in `git grep`."""
    return any(fnmatch(file, pattern) for file in _files(root, pattern.partition("/")[0]))


# What lies in the repository is read once, since hundreds of documents ask for it.


@cache
def _modules(root: Path) -> dict[str, Path]:
    return house.modules(root)


@cache
def _files(root: Path, folder: str) -> list[str]:
    return [file.relative_to(root).as_posix() for file in (root / folder).rglob("*")]


def _is_known(name: str, known: Mapping[str, Path]) -> bool:
    """Whether a dotted name is a module, or a name that one has."""
    module, rest = name, ""
    while module not in known:
        module, _, rest = module.rpartition(".")
        if not module:
            return False
    return not rest or rest in _names(known[module])


@cache
def _names(file: Path) -> set[str]:
    """What a module defines or imports; of a package, whose names may come on first use, all words in quotes, too."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add(node.asname or node.name)
        elif isinstance(node, ast.Constant) and file.name == "__init__.py":
            names.add(node.value)
    return names


def _runs(name: str, known: Mapping[str, Path]) -> bool:
    """Whether `python -m NAME` does something."""
    main = known.get(f"{name}.__main__")
    return main is not None or (name in known and '__name__ == "__main__"' in known[name].read_text(encoding="utf-8"))


def main() -> int:
    lines = [f"{file.relative_to(REPOSITORY)}: {name}" for file in documents() for name in gone_of(file)]
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    return bool(lines)


if __name__ == "__main__":
    raise SystemExit(main())
