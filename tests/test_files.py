"""Files that are complete or absent, and places where none could be written."""

import os
from pathlib import Path

import pytest

from d3llm_hf import files
from d3llm_hf.files import check_writable, check_writable_folder, without_folders, write_whole


def test_an_error_of_writing_names_the_file_and_leaves_nothing(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError) as error:
        write_whole(tmp_path / "no" / "out", b"x")
    assert error.value.filename == str(tmp_path / "no" / "out")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*out'"):
        write_whole(tmp_path / "out", b"x")
    assert list(tmp_path.iterdir()) == []


def test_places_where_nothing_can_be_written_are_refused(tmp_path, monkeypatch):
    check_writable(tmp_path / "out", "--output")
    check_writable(tmp_path / "a" / "b" / "out", "--output")
    with pytest.raises(ValueError, match=r"`--output` must be a file .got '.*', which is a folder"):
        check_writable(tmp_path, "--output")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"`--output` must lie in a folder .*file' is a file"):
        check_writable(tmp_path / "file" / "a" / "out", "--output")
    monkeypatch.setattr(os, "access", lambda *arguments: False)  # for root everything is writable
    with pytest.raises(ValueError, match=r"`output` must lie in a folder that you may write to .*is not writable"):
        check_writable_folder(tmp_path / "a", "output")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("/somewhere/out.json", "out.json"),
        (Path("/somewhere/out.json"), "out.json"),
        (Path("a/b.json"), "a/b.json"),
        ("--lengths", "--lengths"),
        ("", ""),
    ],
)
def test_a_command_that_is_to_be_repeated_names_no_folder_of_this_machine(name, expected):
    assert without_folders(name) == expected
