"""Write a folder or a file so that it is either whole and on disk, or not there at all.

A folder's files go into a temporary folder beside the final one. Each is flushed to disk, their
SHA-256 sums are written into ``SHA256SUMS`` (``sha256sum -c SHA256SUMS`` checks them), then the
folder changes places with what stood there and its parent is flushed. A crash at any moment leaves
the old folder or the new; what it leaves beside them goes with the next writing of the same name.
(Where a file system cannot exchange two names at once, a crash between two renames may leave the
old folder under a temporary name, and the next writing brings it back.)

Two processes that write the same thing are told apart by a lock, which a dead process does not
hold: the system releases it.
"""

import ctypes
import errno
import glob
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout

from rankflow.errors import RankFlowError

SUMS_FILE: Final = "SHA256SUMS"

# Behind a dot and the name: a folder that is being written, and one that is being replaced.
_MARK: Final = ".tmp."
_MARK_OLD: Final = ".tmp.old"

# How safetensors, tokenizers and torch say that a disk is full: by no OSError.
_FAILED_WRITES: Final = (
    "os error 28",
    "iostream error",
    "PytorchStreamWriter failed writing",
    "unexpected pos",
)
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)
_AT_WORKING_DIRECTORY: Final = -100  # of Linux: AT_FDCWD
_EXCHANGE: Final = 2  # RENAME_EXCHANGE


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of ``path`` when the block succeeds.

    An older folder at ``path`` stays until then; if the block raises, it stays for good.

    Args:
        path: The final folder; its parents are made.

    Raises:
        RankFlowError: Another process is writing it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with claim(path):
        _sweep_folders(path.parent, glob.escape(path.name))
        temporary = temporary_folder(path)
        temporary.mkdir()
        try:
            yield temporary
            seal(temporary)
            _put_in_place(temporary, path)
            _flush(path.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def write_file(path: Path, text: str) -> None:
    """Write a file that takes the place of an older one once it is whole.

    Args:
        path: The file; its parents are made.
        text: Its contents, to be written as UTF-8.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_text(text, encoding="utf-8")
        _flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush(path.parent)


def temporary_folder(path: Path) -> Path:
    """Return the folder that ``new_folder`` yields, for other processes that help to fill it."""
    return path.with_name(f".{path.name}{_MARK}new")


@contextmanager
def claim(path: Path) -> Iterator[None]:
    """Keep others from writing a folder while the block runs; blocks of one thread may nest.

    Args:
        path: The folder; it need not exist, and its parent is made.

    Raises:
        RankFlowError: Another process, or another thread, is writing it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name(f".{path.name}.lock")
    lock = FileLock(file.absolute(), blocking=False, is_singleton=True)
    try:
        lock.acquire()
    except Timeout as error:
        if not file.exists():  # it could not be made
            raise PermissionError(errno.EACCES, "Permission denied", str(path.parent)) from error
        raise RankFlowError(
            f"{path} is being written by another process, which holds {file}; wait until it has "
            "ended, or name another folder"
        ) from error
    try:
        yield
    finally:
        if lock.lock_counter == 1:
            with suppress(OSError):  # gone while it is held: nobody can come to hold it by mistake
                file.unlink()
        lock.release()


def sweep(parent: Path, names: str) -> None:
    """Remove what crashed writings of folders left behind; nobody may be writing them now.

    Args:
        parent: Where the folders are.
        names: What they were to be called, as a pattern of ``Path.glob``.
    """
    _sweep_folders(parent, names)
    for lock in parent.glob(f".{names}.lock"):
        lock.unlink(missing_ok=True)


def seal(folder: Path) -> None:
    """Flush all files of a folder to disk, and write their sums beside them.

    Args:
        folder: The folder; from now on ``find_damage`` finds what changes in it.
    """
    lines = []
    for file in _files(folder):
        _flush(file)
        lines.append(f"{_sum(file)}  {file.relative_to(folder).as_posix()}\n")
    write_file(folder / SUMS_FILE, "".join(lines))
    for inner in folder.rglob("*/"):
        _flush(inner)
    _flush(folder)


def find_damage(folder: Path, only: str | None = None) -> str | None:
    """Return what is wrong with a folder that was sealed, or None if it is as it was written.

    Files that came later are not looked at.

    Args:
        folder: The folder.
        only: The one file to look at; None for all.
    """
    sums = folder / SUMS_FILE
    try:
        lines = sums.read_text(encoding="ascii").splitlines()
    except FileNotFoundError:
        return f"it has no {SUMS_FILE}: its writing was not finished, or RankFlow did not do it"
    except (OSError, UnicodeDecodeError) as error:
        return f"its {SUMS_FILE} cannot be read ({error})"
    for line in lines:
        expected, separator, name = line.partition("  ")
        if len(expected) != 64 or not separator or not _is_inside(folder, name):
            return f"its {SUMS_FILE} is damaged: {line[:80]!r}"
        if only not in (None, name):
            continue
        file = folder / name
        try:
            found = _sum(file)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found != expected:
            return f"{name} is not what was written ({file.stat().st_size:,} bytes)"
    return None if lines else f"its {SUMS_FILE} is empty"


def is_failed_write(error: BaseException) -> bool:
    """Whether an error says that a disk is full, in the words of whichever library writes."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    return any(sign in str(error) for sign in _FAILED_WRITES)


def _sweep_folders(parent: Path, names: str) -> None:
    for leftover in parent.glob(f".{names}{_MARK}*"):
        path = parent / leftover.name[1:].partition(_MARK)[0]
        if leftover.name.endswith(_MARK_OLD) and not path.exists():
            leftover.rename(path)  # the crash fell between two renames
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def _is_inside(folder: Path, name: str) -> bool:
    try:
        return (folder / name).resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError):  # a name that is none
        return False


def _files(folder: Path) -> list[Path]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return sorted(file for file in files if file != folder / SUMS_FILE)


def _sum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _put_in_place(temporary: Path, path: Path) -> None:
    if not path.exists():
        temporary.rename(path)
        return
    if _exchange(temporary, path):
        shutil.rmtree(temporary, ignore_errors=True)
        return
    older = path.with_name(f".{path.name}{_MARK_OLD}")
    path.rename(older)
    try:
        temporary.rename(path)
    except BaseException:
        older.rename(path)
        raise
    shutil.rmtree(older, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change their names at once; False where the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    here = _AT_WORKING_DIRECTORY
    if rename(here, os.fsencode(one), here, os.fsencode(other), _EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
