"""The tests under every kind of instructions that torch knows here, one and two threads, and another base seed.

    python tests/support/portability.py                          # everything, one run after the other: an hour or more
    python tests/support/portability.py tests/models --only seed # folders or files, and runs whose name begins so
    python tests/support/portability.py --seed 7 -- -x           # another base seed; what follows `--` is pytest's

torch takes other kernels with AVX-512 than with AVX2 or none, and these draw and round otherwise, as one and two
threads do. A test that holds on one machine alone falls here. One table at the end has each run with its figures and
the names of what fell; the whole output of each is in the folder that `--output` names.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

from base_seed import VARIABLE
from places import REPOSITORY


CAPABILITIES = ("default", "avx2", "avx512")
THREADS = (1, 2)
# With the further cases and examples that the default leaves out; threads are those of the run alone.
HOW = ("-q", "-n", "0", "-m", "not slow and not gpu and not hub", "--hypothesis-profile=full")
_ASKED = "ATEN_CPU_CAPABILITY"
_SAID = "import torch; print(torch.backends.cpu.get_cpu_capability())"
_NAMES = {"no avx": "default"}  # torch's own name of it in some versions


@dataclass
class Run:
    """One run of the tests: how, and what came of it."""

    name: str
    environment: dict[str, str]
    passed: int = 0
    failed: list[str] = field(default_factory=list)
    note: str = ""

    def row(self) -> tuple[str, str, str, str]:
        if self.note and not self.passed:
            return self.name, "-", "-", self.note
        return self.name, str(self.passed), str(len(self.failed)), ", ".join(filter(None, [*self.failed, self.note]))


def runs(seed: int) -> list[Run]:
    """All runs: another base seed first, which tells most."""
    one_thread = {"OMP_NUM_THREADS": "1"}
    found = [Run(f"seed {seed}", one_thread | {VARIABLE: str(seed)})]
    for capability in CAPABILITIES:
        for threads in THREADS:
            environment = {_ASKED: capability, "OMP_NUM_THREADS": str(threads)}
            found.append(Run(f"{capability}, {threads} thread{'s' * (threads > 1)}", environment))
    return found


def taken(capability: str) -> str:
    """The kind of instructions that torch takes when it is asked for one: the best of this machine at most.

    torch would take what the processor does not have, and be ended by it.
    """
    best = _said_by({name: value for name, value in os.environ.items() if name != _ASKED})
    if best in CAPABILITIES and CAPABILITIES.index(capability) > CAPABILITIES.index(best):
        return best
    return _said_by(os.environ | {_ASKED: capability})


def _said_by(environment: dict[str, str]) -> str:
    said = subprocess.run([sys.executable, "-c", _SAID], env=environment, capture_output=True, text=True, check=True)
    name = said.stdout.strip().lower()
    return _NAMES.get(name, name)


def carry_out(run: Run, words: list[str], folder: Path) -> None:
    """Runs pytest and reads what it found."""
    asked = run.environment.get(_ASKED)
    if asked is not None and (found := taken(asked)) != asked:
        run.note = f"not run: torch takes {found} here"
        return
    stem = folder / re.sub(r"\W+", "-", run.name)
    report = stem.with_suffix(".xml")
    with open(stem.with_suffix(".txt"), "w", encoding="utf-8") as output:
        code = subprocess.run(
            [sys.executable, "-m", "pytest", *HOW, f"--junit-xml={report}", *words],
            cwd=REPOSITORY,
            env=os.environ | run.environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        ).returncode
    if not report.exists():
        run.note = f"ended with code {code}, see {stem.name}.txt"
        return
    run.passed, run.failed = read_report(report)
    if code not in (0, 1):
        run.note = f"ended with code {code}, see {stem.name}.txt"


def read_report(report: Path) -> tuple[int, list[str]]:
    """How many tests passed, and the names of those that did not, from JUnit's XML."""
    passed, failed = 0, []
    for case in ElementTree.parse(report).iter("testcase"):
        outcomes = {child.tag for child in case}
        if outcomes & {"failure", "error"}:
            failed.append(f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}")
        elif "skipped" not in outcomes:
            passed += 1
    return passed, failed


def table(rows: list[tuple[str, ...]]) -> str:
    """Rows in columns, the last of which ends where it likes."""
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Carries the runs out; the exit code says whether all passed."""
    given = sys.argv[1:] if argv is None else argv
    cut = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", default=[], help="folders or files of tests (all)")
    parser.add_argument("--seed", type=int, default=1000, help="the other base seed (%(default)s)")
    parser.add_argument("--only", action="append", default=[], metavar="WORD", help="runs whose name begins with it")
    parser.add_argument("-o", "--output", type=Path, help="folder of the whole outputs (a temporary one)")
    args = parser.parse_args(given[:cut])
    chosen = [run for run in runs(args.seed) if not args.only or run.name.startswith(tuple(args.only))]
    if not chosen:
        parser.error(f"--only must begin one of {[run.name for run in runs(args.seed)]} (got {args.only})")
    folder = (args.output or Path(tempfile.mkdtemp(prefix="portability-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for run in chosen:
        carry_out(run, [*args.paths, *given[cut + 1 :]], folder)
        sys.stderr.write(table([run.row()]))
    sys.stdout.write(table([("run", "passed", "failed", "which"), *(run.row() for run in chosen)]))
    sys.stderr.write(f"The outputs are in {folder}.\n")
    return int(any(run.failed or run.note.startswith("ended") for run in chosen))


if __name__ == "__main__":
    raise SystemExit(main())
