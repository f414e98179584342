"""How errors end: as a message and exit code 2, without a traceback."""

import errno
from typing import Any, Final

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from rankflow.durable import is_failed_write
from rankflow.errors import RankFlowError, brief

_OS_REMEDIES: Final = {
    errno.EACCES: "choose a place that you may write to, or change its permissions",
    errno.EPERM: "choose a place that you may write to, or change its permissions",
    errno.EROFS: "choose a place that you may write to",
    errno.ENOSPC: "free some space, or write elsewhere",
    errno.EDQUOT: "free some space, or write elsewhere",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a file lies where a folder is meant; name another path",
    errno.EEXIST: "a file lies where a folder is meant; name another path",
    errno.EISDIR: "a folder lies where a file is meant; name another path",
}


class CleanErrors(TyperGroup):
    """Commands whose errors end as a message and exit code 2, without a traceback.

    These are the errors that RankFlow raises on purpose, and those of files and connections; any
    other one is a defect, and keeps its traceback.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            text = tell_error(error)
            if ctx.params["debug"] or text is None:
                raise
            console = Console(stderr=True)
            message = Text.assemble(("error: ", "bold red"), (text, "red"))
            console.print(message, soft_wrap=not console.is_terminal)
            raise typer.Exit(2) from error


def tell_error(error: Exception) -> str | None:
    """Say what went wrong and what to do; None for a defect.

    >>> tell_error(OSError(errno.ENOSPC, "No space left on device", "runs/a"))
    'runs/a: No space left on device; free some space, or write elsewhere'
    """
    if isinstance(error, RankFlowError):
        return str(error)
    if is_failed_write(error) and not isinstance(error, OSError):
        return f"a file could not be written ({brief(error)}); {_OS_REMEDIES[errno.ENOSPC]}"
    if not isinstance(error, OSError) or error.errno == errno.EPIPE:
        return None
    if error.errno is None:  # of a connection, or of a library
        return str(error)
    place = "" if error.filename is None else f"{error.filename}: "
    return f"{place}{error.strerror}; {_OS_REMEDIES.get(error.errno, 'name another path')}"
