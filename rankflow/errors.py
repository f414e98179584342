"""Every error that RankFlow raises on purpose.

A message says which invariant broke, the value received, and the remedy; it names the site where
there is one.
"""


class RankFlowError(Exception):
    """Base of all errors below; catch it to catch everything that RankFlow raises on purpose."""


def brief(error: BaseException) -> str:
    r"""Return the first line of another library's message, ready to be quoted in one of ours.

    >>> brief(OSError("There is no such model.\nCheck your connection."))
    'There is no such model'
    """
    return str(error).strip().partition("\n")[0].rstrip(". ")


def excerpt(value: object) -> str:
    """Return a value as it is written in Python, up to 40 characters of it.

    >>> excerpt("short"), len(excerpt("long" * 20))
    ("'short'", 43)
    """
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


class SpecError(RankFlowError):
    """A spec (budget, run, or ablation) is wrong; all faults of it are listed at once."""


class SiteError(RankFlowError):
    """The model has no site that RankFlow can steer, or has one of an unsupported kind."""


class BudgetError(RankFlowError):
    """A budget cannot be met: below the minimum ranks, or above the capacity of the sites."""


class SurgeryError(RankFlowError):
    """A resize was refused or failed; the model and the optimizer are as they were before it."""


class DivergenceError(RankFlowError):
    """Loss, gradients or weights are not finite, and training on would not mend it."""


class FileError(RankFlowError):
    """A file is damaged, or asks for what no file may: code, or files outside its folder."""


class CheckpointError(RankFlowError):
    """A checkpoint is missing, damaged, or belongs to another model or budget."""


class ExportError(RankFlowError):
    """An adapter could not be written so that its consumer would read the same function."""
