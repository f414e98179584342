import errno
import hashlib
import multiprocessing
import os
import subprocess
import threading

import pytest

from rankflow import durable
from rankflow.durable import (
    SUMS_FILE,
    claim,
    find_damage,
    is_failed_write,
    new_folder,
    seal,
    sweep,
    write_file,
)
from rankflow.errors import RankFlowError


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


@pytest.fixture(params=["exchanged", "renamed twice"])
def way(request, monkeypatch):
    """Run on a file system that exchanges two names at once, and on one that cannot."""
    if request.param == "renamed twice":
        monkeypatch.setattr(durable, "_exchange", lambda one, other: False)
    return request.param


def test_an_older_folder_is_replaced_as_a_whole(tmp_path, way):
    path = tmp_path / "final"
    path.mkdir()
    (path / "leftover").touch()
    with new_folder(path) as folder:
        write(folder, "new")
        assert (path / "leftover").exists()
    assert names(path) == [SUMS_FILE, "part"]
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
        if target == path and source == durable.temporary_folder(path):
            raise OSError("disk full")
        return rename(source, target)

    def replace():
        with new_folder(path) as folder:
            write(folder, "new")

    monkeypatch.setattr(durable, "_exchange", lambda one, other: False)
    monkeypatch.setattr(type(path), "rename", rename_all_but_the_new_one)
    with pytest.raises(OSError, match="disk full"):
        replace()
    assert read(path) == "old"
    assert names(tmp_path) == ["final"]


def test_what_the_system_says_of_a_failed_exchange_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="No such file or directory"):
        durable._exchange(tmp_path / "one", tmp_path / "other")


class Killed(BaseException):
    """Ends a writing as a kill would: nothing is tidied up."""


def kill_when(monkeypatch, what):
    """Let a function kill, and let nothing be removed any more."""

    def kill(*_):
        monkeypatch.setattr(durable.shutil, "rmtree", lambda *_, **__: None)
        monkeypatch.setattr(type(durable.Path()), "rename", lambda *_: None)
        raise Killed

    monkeypatch.setattr(durable, what, kill)


@pytest.mark.parametrize("moment", ["seal", "_put_in_place"])
def test_what_a_crash_leaves_is_swept_by_the_next_writing(tmp_path, monkeypatch, moment):
    path = tmp_path / "final"
    with new_folder(path) as folder:
        write(folder, "old")

    def write_until_killed():
        with new_folder(path) as folder:
            write(folder, "lost")

    with monkeypatch.context() as patch:
        kill_when(patch, moment)
        with pytest.raises(Killed):
            write_until_killed()
    assert names(tmp_path) == [".final.tmp.new", "final"]
    assert read(path) == "old"
    with new_folder(path) as folder:
        assert names(folder) == []
        write(folder, "new")
    assert read(path) == "new"
    assert names(tmp_path) == ["final"]


def test_the_next_writing_brings_back_what_a_crash_between_two_renames_hid(tmp_path):
    path = tmp_path / "final"
    with new_folder(path) as folder:
        write(folder, "old")
    path.rename(tmp_path / ".final.tmp.old")

    def fail():
        with new_folder(path):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert read(path) == "old"
    assert names(tmp_path) == ["final"]


def test_sweeping_leaves_what_is_called_otherwise(tmp_path):
    for name in (".step-1.tmp.new", ".step-22.tmp.new", ".stop-1.tmp.new", "step-3", ".step-1"):
        (tmp_path / name).mkdir()
    (tmp_path / ".step-3.lock").touch()
    sweep(tmp_path, "step-*")
    assert names(tmp_path) == [".step-1", ".stop-1.tmp.new", "step-3"]


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
    assert flushed[-1] == str(tmp_path)
    files = [f"{inside}/part/file.txt", f"{inside}/.{SUMS_FILE}.part"]
    assert [name for name in flushed if name in files] == files
    assert flushed[-3:-1] == [f"{inside}/part", inside]


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
    assert names(tmp_path) == ["file.txt"]


@pytest.fixture
def sealed(tmp_path):
    folder = tmp_path / "sealed"
    folder.mkdir()
    write(folder, "text")
    (folder / "weights").write_bytes(bytes(range(256)) * 8)
    seal(folder)
    return folder


def test_the_sums_are_those_of_sha256sum(sealed):
    digest = hashlib.sha256(b"text").hexdigest()
    assert f"{digest}  part/file.txt" in (sealed / SUMS_FILE).read_text().splitlines()
    subprocess.run(
        ["sha256sum", "--check", "--strict", "--quiet", SUMS_FILE], cwd=sealed, check=True
    )


def test_a_folder_as_it_was_written_has_no_damage_and_may_get_more_files(sealed):
    assert find_damage(sealed) is None
    (sealed / "note").write_text("mine")
    assert find_damage(sealed) is None


def test_of_one_file_alone_only_its_own_damage_counts(sealed):
    (sealed / "part/file.txt").write_text("other")
    assert find_damage(sealed, only="weights") is None
    (sealed / "weights").write_bytes(b"")
    assert find_damage(sealed, only="weights") == "weights is not what was written (0 bytes)"


@pytest.mark.parametrize("length", [0, 1, 2047])
def test_a_file_cut_short_is_found(sealed, length):
    file = sealed / "weights"
    file.write_bytes(file.read_bytes()[:length])
    assert find_damage(sealed) == f"weights is not what was written ({length:,} bytes)"


@pytest.mark.parametrize("bit", [0, 9_999, 16_383])
def test_a_flipped_bit_is_found(sealed, bit):
    content = bytearray((sealed / "weights").read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    (sealed / "weights").write_bytes(content)
    assert find_damage(sealed) == "weights is not what was written (2,048 bytes)"


def test_a_missing_file_is_found(sealed):
    (sealed / "part/file.txt").unlink()
    assert find_damage(sealed) == "part/file.txt cannot be read (No such file or directory)"


def test_a_folder_that_was_never_sealed_is_told(tmp_path):
    reason = "its writing was not finished, or RankFlow did not do it"
    assert find_damage(tmp_path) == f"it has no {SUMS_FILE}: {reason}"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty"),
        (b"0123  weights\n", "is damaged: '0123  weights'"),
        (b"a" * 64 + b" weights\n", "is damaged"),
        (b"a" * 64 + b"  ../outside\n", "is damaged"),
        (b"a" * 64 + b"  out\0side\n", "is damaged"),
        (b"a" * 64 + b"  /etc/hostname\n", "is damaged"),
        (b"\xff\xfe", "cannot be read"),
    ],
)
def test_damaged_sums_are_told_and_lead_to_no_file_outside(sealed, content, told):
    (sealed.parent / "outside").write_text("secret")
    (sealed / SUMS_FILE).write_bytes(content)
    reason = find_damage(sealed)
    assert reason is not None
    assert told in reason


def test_a_link_out_of_the_folder_is_not_followed(sealed):
    outside = sealed.parent / "outside"
    (sealed / "weights").rename(outside)
    (sealed / "weights").symlink_to(outside)
    assert "is damaged" in str(find_damage(sealed))


def hold(path, held, may_go):
    with claim(path):
        held.set()
        may_go.wait()


@pytest.mark.parametrize("ending", ["ends", "is killed"])
def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path, ending):
    path = tmp_path / "final"
    context = multiprocessing.get_context("fork")
    held, may_go = context.Event(), context.Event()
    process = context.Process(target=hold, args=(path, held, may_go))
    process.start()
    held.wait()
    with (
        pytest.raises(RankFlowError, match=r"is being written by another process.*wait until"),
        new_folder(path),
    ):
        pass
    if ending == "ends":
        may_go.set()
    else:
        process.kill()
    process.join()
    with new_folder(path) as folder:
        write(folder, "new")
    assert names(tmp_path) == ["final"]


def test_a_second_thread_is_refused_and_one_thread_may_claim_twice(tmp_path):
    path = tmp_path / "final"
    refused = []

    def try_to_claim():
        try:
            with claim(path):
                pass
        except RankFlowError as error:
            refused.append(error)

    with claim(path):
        with claim(path):
            pass
        thread = threading.Thread(target=try_to_claim)
        thread.start()
        thread.join()
    assert len(refused) == 1
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "is_failed"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (OSError(errno.ENOENT, "No such file or directory"), False),
        (RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0"), True),
        (RuntimeError("[enforce fail] . unexpected pos 64 vs 0"), True),
        (Exception("No space left on device (os error 28)"), True),
        (RuntimeError("shapes do not match"), False),
    ],
)
def test_a_full_disk_is_told_from_other_errors(error, is_failed):
    assert is_failed_write(error) is is_failed
