"""The runs of the tests on other kernels and with other draws: what is run, what is read, what is said of it."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import base_seed
import numpy as np
import portability
import pytest
import torch
from portability import CAPABILITIES, main, read_report, runs, table, taken


def draws(seed: int) -> list[float]:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    torches = [torch.rand(1).item(), torch.rand(1, generator=generator).item()]
    return [*torches, random.Random(seed).random(), np.random.default_rng(seed).random()]


@pytest.mark.full
def test_another_base_seed_is_added_to_every_seed():
    words = [sys.executable, __file__]  # a process of its own, where nothing has been shifted yet
    there = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    said = subprocess.run(words, env=there, capture_output=True, text=True, check=True).stdout
    zero, five, zero_shifted_by_five = json.loads(said)
    assert all(one != other for one, other in zip(zero, five, strict=True))
    assert zero_shifted_by_five == five


def test_the_runs_cover_all_instructions_with_one_and_two_threads_and_another_seed():
    found = {run.name: run.environment for run in runs(7)}
    assert len(found) == 1 + 2 * len(CAPABILITIES)
    assert found["seed 7"] == {base_seed.VARIABLE: "7", "OMP_NUM_THREADS": "1"}
    assert found["avx2, 2 threads"] == {"ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "2"}


def test_torch_is_asked_for_no_more_than_the_machine_has(monkeypatch):
    # torch believes what it is told, and the processor ends it.
    best = {"value": "avx2"}
    monkeypatch.setattr(portability, "_said_by", lambda said: said.get("ATEN_CPU_CAPABILITY", best["value"]))
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    assert [taken(asked) for asked in CAPABILITIES] == ["default", "avx2", "avx2"]
    best["value"] = "sve256"  # another family's; of it torch's own word counts
    assert taken("default") == "default"


@pytest.mark.full  # processes of their own
def test_the_plainest_instructions_are_there_on_every_machine():
    assert taken("default") == "default"


def test_a_report_names_what_fell_and_counts_no_skipped_test(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.test_a" name="good"/>'
        '<testcase classname="tests.test_a" name="bad[1]"><failure/></testcase>'
        '<testcase classname="tests.test_a" name="torn"><error/></testcase>'
        '<testcase classname="tests.test_a" name="left"><skipped/></testcase></testsuite></testsuites>'
    )
    assert read_report(report) == (1, ["test_a::bad[1]", "test_a::torn"])


def test_each_run_has_a_row_and_what_was_not_run_says_why(tmp_path, monkeypatch, capsys):
    asked = []

    def run(words, *, env, **kwargs):
        asked.append(words)
        report = Path(words[-4].partition("=")[2])
        shifted, held = base_seed.VARIABLE in env, env["OMP_NUM_THREADS"] == "1"
        if shifted or held:
            outcome = "<failure/>" if shifted else ""
            report.write_text(f'<testsuite><testcase classname="t" name="one">{outcome}</testcase></testsuite>')
        return subprocess.CompletedProcess(words, 1 if shifted else 0 if held else -11)

    monkeypatch.delenv(base_seed.VARIABLE, raising=False)
    monkeypatch.setattr(portability, "taken", lambda capability: "avx2" if capability == "avx512" else capability)
    monkeypatch.setattr(portability.subprocess, "run", run)
    words = ["tests/a", "--seed", "3", "--only", "seed", "--only", "default", "--only", "avx512, 1"]
    assert main([*words, "-o", str(tmp_path), "--", "-k", "word"]) == 1
    rows = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert [" ".join(" ".join(row).split()) for row in rows] == [
        "run passed failed which",
        "seed 3 0 1 t::one",
        "default, 1 thread 1 0",
        "default, 2 threads - - ended with code -11, see default-2-threads.txt",
        "avx512, 1 thread - - not run: torch takes avx2 here",
    ]
    assert len(asked) == 3 and asked[0][-3:] == ["tests/a", "-k", "word"]


def test_a_word_that_begins_no_run_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--only", "sse"])
    assert "--only must begin one of" in capsys.readouterr().err
    assert table([("a", "1", "2", "x"), ("bbb", "11", "2", "")]) == "a    1   2  x\nbbb  11  2\n"


if __name__ == "__main__":
    plain = [draws(0), draws(5)]
    base_seed.shift(5)
    sys.stdout.write(json.dumps([*plain, draws(0)]))
