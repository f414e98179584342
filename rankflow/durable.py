"""Write a folder or a file so that it is either whole and on disk, or not there at all.

A folder's files go into a temporary folder beside the final one; each is flushed to disk, then the
folder is renamed into place and its parent flushed. A crash at any moment leaves the old folder or
the new.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of ``path`` when the block succeeds.

    An older folder at ``path`` stays until then; if the block raises, it stays for good.

    Args:
        path: The final folder; its parents are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        os.chmod(temporary, 0o755)  # mkdtemp's are private
        for file in temporary.rglob("*"):
            _flush(file)
        _flush(temporary)
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
    temporary.write_text(text, encoding="utf-8")
    _flush(temporary)
    os.replace(temporary, path)
    _flush(path.parent)


def _put_in_place(temporary: Path, path: Path) -> None:
    if not path.exists():
        temporary.rename(path)
        return
    older = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
    path.rename(older)  # over the empty folder just made
    try:
        temporary.rename(path)
    except BaseException:
        older.rename(path)
        raise
    shutil.rmtree(older)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
