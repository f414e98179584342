import os

import pytest

from rankflow.durable import new_folder, write_file


def write(folder, text):
    (folder / "part").mkdir()
    (folder / "part" / "file.txt").write_text(text)


def read(folder):
    return (folder / "part" / "file.txt").read_text()


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_a_folder_appears_whole_when_the_block_ends(tmp_path):
    path = tmp_path / "deep" / "final"
    with new_folder(path) as folder:
        write(folder, "new")
        assert not path.exists()
    assert read(path) == "new"
    assert names(path.parent) == ["final"]


def test_an_older_folder_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "final"
    path.mkdir()
    (path / "leftover").touch()
    with new_folder(path) as folder:
        write(folder, "new")
        assert (path / "leftover").exists()
    assert names(path) == ["part"]
    assert names(tmp_path) == ["final"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failing_block_leaves_the_older_folder_and_nothing_else(tmp_path, error):
    path = tmp_path / "final"
    with new_folder(path) as folder:
        write(folder, "old")

    def fail_midway():
        with new_folder(path) as folder:
            write(folder, "new")
            raise error

    with pytest.raises(error):
        fail_midway()
    assert read(path) == "old"
    assert names(tmp_path) == ["final"]


def test_a_failing_block_leaves_nothing_where_nothing_was(tmp_path):
    def fail():
        with new_folder(tmp_path / "final"):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert names(tmp_path) == []


def test_the_older_folder_comes_back_if_the_new_one_cannot_be_put_in_place(tmp_path, monkeypatch):
    path = tmp_path / "final"
    with new_folder(path) as folder:
        write(folder, "old")
    rename = type(path).rename

    def rename_all_but_the_new_one(source, target):
        if target == path and ".old." not in source.name:
            raise OSError("disk full")
        return rename(source, target)

    def replace():
        with new_folder(path) as folder:
            write(folder, "new")

    monkeypatch.setattr(type(path), "rename", rename_all_but_the_new_one)
    with pytest.raises(OSError, match="disk full"):
        replace()
    assert read(path) == "old"
    assert names(tmp_path) == ["final"]


def test_every_file_reaches_the_disk_before_the_folder_is_renamed(tmp_path, monkeypatch):
    opened, flushed = {}, []
    open_, fsync = os.open, os.fsync

    def note_open(path, *arguments, **keywords):
        descriptor = open_(path, *arguments, **keywords)
        opened[descriptor] = str(path)
        return descriptor

    def note_flush(descriptor):
        flushed.append(opened[descriptor])
        fsync(descriptor)

    monkeypatch.setattr(os, "open", note_open)
    monkeypatch.setattr(os, "fsync", note_flush)
    path = tmp_path / "final"
    with new_folder(path) as folder:
        write(folder, "new")
        inside = str(folder)
    assert flushed[-2:] == [inside, str(tmp_path)]
    assert sorted(flushed[:-2]) == [f"{inside}/part", f"{inside}/part/file.txt"]


def test_others_may_read_the_folder(tmp_path):
    with new_folder(tmp_path / "final") as folder:
        write(folder, "new")
    assert (tmp_path / "final").stat().st_mode & 0o777 == 0o755


def test_a_file_is_written_beside_and_takes_the_place_of_the_older_one(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    for text in ("older", "nächste"):
        write_file(path, text)
        assert path.read_text(encoding="utf-8") == text
        assert names(path.parent) == ["file.txt"]


def test_a_file_that_cannot_be_written_leaves_the_older_one(tmp_path):
    path = tmp_path / "file.txt"
    write_file(path, "older")
    with pytest.raises(UnicodeEncodeError):
        write_file(path, "\ud800")
    assert path.read_text() == "older"
