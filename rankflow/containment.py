"""Files that lie in a folder, and not where a name or a link in it leads to."""

from pathlib import Path

from rankflow.errors import FileError


def contained(folder: Path, name: str) -> Path:
    """Return the path of a file in a folder, which must not lead out of it.

    The cache of the hub is the one exception: there, files are links to ``blobs`` beside
    ``snapshots``.

    Args:
        folder: The folder; it may be a link itself.
        name: A relative path, as a file in the folder tells it.

    Raises:
        FileError: The name or a link leads out of the folder.
    """
    try:
        root, target = folder.resolve(), (folder / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, null bytes
        raise FileError(f"{folder} names {name!r}, which is no path: {error}") from error
    homes = [root]
    if root.parent.name == "snapshots":
        homes.append(root.parent.parent / "blobs")
    if target == root or not any(target.is_relative_to(home) for home in homes):
        raise FileError(
            f"{folder} names {name!r}, which leads out of the folder to {target}; put the file "
            "itself into the folder"
        )
    return folder / name
