"""Read the tensors of a saved adapter."""

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from rankflow.errors import FileError, brief
from rankflow.export.adapter_files import WEIGHTS, check_adapter_files


def load_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of an adapter whose files have passed every check.

    Raises:
        FileError: They are damaged, not finite, or of a type that torch does not have.
    """
    check_adapter_files(folder)
    try:
        return load_file(folder / WEIGHTS)
    except Exception as error:  # of another reader, which may be stricter than ours
        raise FileError(
            f"{folder / WEIGHTS} cannot be read: {brief(error)}; save or copy it again"
        ) from error
