"""A file is replaced at once or stays as it was."""

from __future__ import annotations

import os

import pytest

from lookup_tables.whole_file import check_can_be_written, write_whole


def test_text_and_bytes_arrive_in_folders_that_are_made(tmp_path):
    write_whole(tmp_path / "new" / "a.txt", "µs\n")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "µs\n".encode()
    write_whole(tmp_path / "new" / "a.txt", b"\x00")
    assert (tmp_path / "new" / "a.txt").read_bytes() == b"\x00"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_killed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    (tmp_path / "a.txt").write_text("old")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, step, killed)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a.txt", "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_what_cannot_be_written_is_told_before_and_what_can_leaves_nothing(tmp_path):
    check_can_be_written(tmp_path / "new" / "a.txt")
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == []
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "a.txt"):
        with pytest.raises(ValueError, match="cannot be written"):
            check_can_be_written(path)
