"""What one process writes piece by piece, no other one writes meanwhile; a process that is killed keeps nobody out."""

import errno
import fcntl
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from d3llm_hf.locks import InUseError, clear_left, lock_file, only_writer


HOLDER = """
import sys
from d3llm_hf.locks import only_writer
with only_writer(sys.argv[1], "output"):
    print("inside", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Starts a process that writes what it is given until its input ends."""
    started = []

    def start(path):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "inside\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_process_is_told_what_is_written_and_by_whom(tmp_path, holder):
    path = tmp_path / "made" / "points.jsonl"
    other = holder(path)
    expected = (
        rf"`output` must be written by one process at a time .got '.*points.jsonl', which process {other.pid} on "
        rf"{socket.gethostname()} is writing.. Wait until"
    )
    with pytest.raises(InUseError, match=expected), only_writer(path, "output"):
        pass
    with only_writer(path.with_name("another.jsonl"), "output"):
        pass
    other.communicate()
    with only_writer(path, "output"):
        assert os.listdir(path.parent) == [".points.jsonl.lock"]
    assert os.listdir(path.parent) == []


def test_a_process_that_was_killed_keeps_nobody_out(tmp_path, holder):
    path = tmp_path / "points.jsonl"
    other = holder(path)
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert lock_file(path).exists()
    with only_writer(path, "output"):
        assert lock_file(path).read_text().split() == [str(os.getpid()), socket.gethostname()]
    assert not lock_file(path).exists()


def test_what_was_left_is_cleared_and_what_is_held_is_not(tmp_path, holder):
    left, held = tmp_path / "left", tmp_path / "held"
    lock_file(left).write_text("1 elsewhere\n")
    holder(held)
    clear_left(tmp_path, ".*.lock")
    assert os.listdir(tmp_path) == [lock_file(held).name]


def test_who_is_inside_may_enter_again_but_another_thread_may_not(tmp_path):
    refused = []

    def enter():
        try:
            with only_writer(tmp_path / "a", "output"):
                pass
        except InUseError as error:
            refused.append(str(error))

    with only_writer(tmp_path / "a", "output"):
        with only_writer(tmp_path / "b" / ".." / "a", "other name"):
            pass
        assert lock_file(tmp_path / "a").exists()
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        assert f"process {os.getpid()} on" in refused[0]
    enter()
    assert len(refused) == 1


def test_the_lock_ends_with_an_error_inside(tmp_path):
    with pytest.raises(KeyError), only_writer(tmp_path / "a", "output"):
        raise KeyError
    assert os.listdir(tmp_path) == []


def test_a_folder_is_locked_beside_it_or_within_where_nothing_can_be_written_beside_it(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    assert lock_file(tmp_path / "folder") == tmp_path / ".folder.lock"
    monkeypatch.chdir(tmp_path / "folder")
    assert lock_file(Path(".")) == lock_file(Path("../folder")) == tmp_path / ".folder.lock"
    assert lock_file(Path("/")) == Path("/.lock")
    monkeypatch.setattr(os, "access", lambda *arguments: False)
    assert lock_file(tmp_path / "folder") == tmp_path / "folder" / ".lock"


def test_a_lock_file_that_is_removed_meanwhile_is_made_anew(tmp_path, monkeypatch):
    locked = fcntl.flock
    removals = iter([True, False])

    def flock(descriptor, operation):
        locked(descriptor, operation)
        if next(removals):
            lock_file(tmp_path / "a").unlink()

    monkeypatch.setattr(fcntl, "flock", flock)
    with only_writer(tmp_path / "a", "output"):
        assert lock_file(tmp_path / "a").exists()


def test_a_holder_that_has_not_said_who_it_is_is_another_process(tmp_path):
    file = lock_file(tmp_path / "a")
    with file.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with (
            pytest.raises(InUseError, match="which another process is writing"),
            only_writer(tmp_path / "a", "output"),
        ):
            pass


def test_a_file_system_without_locks_is_told_and_other_errors_are_raised(tmp_path, monkeypatch, caplog):
    def failing(number):
        def flock(descriptor, operation):
            raise OSError(number, os.strerror(number))

        return flock

    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    with caplog.at_level(logging.WARNING), only_writer(tmp_path / "a", "output"):
        assert "cannot be locked" in caplog.text
    monkeypatch.setattr(fcntl, "flock", failing(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), only_writer(tmp_path / "a", "output"):
        pass
