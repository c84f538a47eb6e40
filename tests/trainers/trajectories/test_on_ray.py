"""Shards as tasks of a Ray cluster: what one process writes, byte for byte, whatever ends on the way."""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from fake_ray import FakeRay
from official import tiny_tokenizer
from places import REPOSITORY
from tiny import tiny_model

from d3llm_hf.cluster import Share
from trainers import run_trajectories
from trainers.trajectories.config import TrajectoryConfig
from trainers.trajectories.extract import Extraction, extract_trajectories
from trainers.trajectories.on_ray import RESTARTS, extract_on_ray
from trainers.trajectories.records import TrajectoryError


needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs ray")
ARGS = TrajectoryConfig(max_new_tokens=2, block_length=2, batch_size=2, shard_size=1)
ROWS = [{"prompt": f"{i}?"} for i in range(4)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def teacher():
    return tiny_model("llada", vocab_size=512, spread=4.0), tiny_tokenizer()


@pytest.fixture(scope="module")
def alone(teacher, tmp_path_factory) -> dict[str, bytes]:
    """What one process writes."""
    folder = tmp_path_factory.mktemp("alone")
    extract_trajectories(*teacher, ROWS, folder, ARGS, progress=False)
    return contents(folder)


@pytest.fixture
def run(teacher, tmp_path):
    """`run(ray)`: an extraction of two workers, and the contents of its folder."""

    def extract(ray, make=lambda device: Extraction(*teacher, ROWS, ARGS), **share):
        extract_on_ray(ray, make, tmp_path / "run", Share(2, **share), progress=False)
        return contents(tmp_path / "run")

    return extract


def test_two_workers_write_what_one_process_writes_and_nothing_is_decoded_again(run, alone):
    ray = FakeRay()
    assert run(ray, num_cpus=0.5) == alone
    assert ray.options == {"num_cpus": 0.5, "num_gpus": 0.0, "max_restarts": RESTARTS, "max_task_retries": RESTARTS}
    assert [name for _, name in ray.calls] == ["manifest"] * 2 + ["records"] * 4
    assert {number for number, name in ray.calls if name == "records"} == {0, 1}
    again = FakeRay()
    assert run(again) == alone and {name for _, name in again.calls} == {"manifest"}


def test_a_worker_that_is_gone_costs_its_shard_which_the_next_run_decodes(run, alone, tmp_path):
    ray = FakeRay(ends=[3])  # the second shard that is asked for
    with pytest.raises(
        TrajectoryError, match=r"Every shard must outlive its worker \(got 1 of 4 .* such as number \d"
    ):
        run(ray)
    assert len(list((tmp_path / "run").glob("*.sha256"))) == 3
    again = FakeRay()
    assert run(again) == alone and [name for _, name in again.calls].count("records") == 1


def test_without_workers_all_that_waits_is_told_as_lost(run):
    with pytest.raises(TrajectoryError, match=r"got 4 of 4 whose workers ended, such as number 0"):
        run(FakeRay(ends=[2, 3]))


def test_what_a_worker_raises_is_raised_here_in_its_own_words(run, teacher):
    with pytest.raises(ValueError, match=r"`mode` must be right \(got 'wrong'\)"):
        run(FakeRay(), make=_fails)


def _fails(device):
    raise ValueError("`mode` must be right (got 'wrong'). Mend it.")


def test_workers_with_other_data_are_refused(run, teacher):
    made = iter([ROWS, ROWS[:3]])
    with pytest.raises(TrajectoryError, match=r"`dataset\.\w+` must be what the extraction in"):
        run(FakeRay(), make=lambda device: Extraction(*teacher, next(made), ARGS))


# The script


LINE = "--model_name_or_path x --output_dir x --dataset_name word_problems"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--num_gpus 0.5", r"`num_gpus` needs `ray` \(got 0.5 without it\)\. Add `--ray`"),
        ("--num_cpus 0.5", r"`num_cpus` needs `ray`"),
        ("--num_workers 2", r"`num_workers` needs `ray`"),
        ("--ray_address auto", r"`ray_address` needs `ray` \(got 'auto' without it\)"),
        ("--ray --use_cpu --num_gpus 1", r"`num_gpus` must be unset with `use_cpu` \(got 1\)"),
        ("--ray --num_workers 0", r"`num_workers` must be at least 1 \(got 0\)"),
        ("--ray --num_gpus 2", r"`num_gpus` must be from 0 to 1"),
        ("--ray --ray_address ray://head:1", r"`ray_address` must be auto, or HOST:PORT"),
    ],
)
def test_options_that_cannot_be_kept_are_refused(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match=message):
        run_trajectories.main(shlex.split(f"{LINE} {options}"))


def test_a_launcher_is_refused_beside_ray(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"`ray` must be started as one process: .* \(got 2 of a launcher\)"):
        run_trajectories.main(shlex.split(f"{LINE} --ray"))


def test_without_ray_the_script_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"`run_trajectories.py --ray` needs Ray .*pip install 'd3llm-hf\[ray\]'"):
        run_trajectories.main(shlex.split(f"{LINE} --ray"))


@pytest.mark.full
def test_the_script_fills_the_cluster_and_writes_what_it_writes_alone(official, tmp_path, monkeypatch):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1?"}\n{"prompt": "2?"}\n')
    line = f"--model_name_or_path {official['llada']} --dataset_name {tmp_path / 'prompts.jsonl'} --use_cpu"
    line += f" --max_new_tokens 4 --block_length 4 --shard_size 1 --output_dir {tmp_path}"
    run_trajectories.main(shlex.split(f"{line}/one"))
    ray = FakeRay([("CPU", 3.0)])
    monkeypatch.setitem(sys.modules, "ray", ray)
    run_trajectories.main(shlex.split(f"{line}/two --ray"))
    assert contents(tmp_path / "two") == contents(tmp_path / "one") and len(ray.workers) == 3
    with pytest.raises(ValueError, match=r"`num_workers` times `num_cpus` .* \(got 4 times 1 CPUs, and there are 3\)"):
        run_trajectories.main(shlex.split(f"{line}/two --ray --num_workers 4"))


# With Ray


@pytest.mark.slow
@needs_ray
@pytest.mark.parametrize("killed", [False, True], ids=["unbroken", "a worker killed"])
def test_two_workers_of_ray_write_what_one_process_writes(killed, tmp_path):
    line = "--model_name_or_path d3llm-llada-teacher --dataset_name word_problems --num_problems 8 --shard_size 2"
    line += f" --max_new_tokens 32 --block_length 16 --scorer number --use_cpu --output_dir {tmp_path}"
    run_trajectories.main(shlex.split(f"{line}/one"))
    command = [sys.executable, str(REPOSITORY / "trainers" / "run_trajectories.py")]
    command += shlex.split(f"{line}/two --ray --num_workers 2 --num_cpus 0.5")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "HOME": str(tmp_path)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        ended = []
        if killed:
            threading.Thread(target=_kill_a_worker, args=(process.pid, tmp_path / "two", ended), daemon=True).start()
        errors = process.communicate(timeout=500)[1]
    assert process.returncode == 0, errors[-3000:]
    assert len(ended) == int(killed)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert not (tmp_path / ".ray").exists()  # Ray's token


def _kill_a_worker(parent: int, folder: Path, ended: list[int]) -> None:
    """Kills a worker that is at a shard, once the first one is written."""
    while not list(folder.glob("*.sha256")):
        time.sleep(0.05)
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            name, number = file.read_bytes(), int(file.parent.name)
            environment = (file.parent / "environ").read_bytes()
        except OSError:
            continue
        if name.startswith(b"ray::TeacherWorker") and f"HOME={folder.parent}".encode() in environment.split(b"\0"):
            os.kill(number, signal.SIGKILL)
            ended.append(number)
            return
