"""A change of ranks and of all that goes with it, which succeeds as a whole or leaves no trace."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from peft import PeftModel
from torch.optim import Optimizer

from rankflow.adapters.savepoint import Savepoint, undone_on_error
from rankflow.adapters.sites import Site
from rankflow.resizing.resizer import Resizer


@contextmanager
def transaction(
    what: str,
    resizer: Resizer,
    model: PeftModel,
    sites: Sequence[Site],
    optimizer: Optimizer | None = None,
    others: Iterable[object] = (),
) -> Iterator[Savepoint]:
    """Put everything back if lack of memory, a keyboard or anything else interrupts the block.

    Args:
        what: What the block does, as the subject of a sentence.
        resizer: Knows which values a resize overwrites.
        model: The model.
        sites: Its sites.
        optimizer: The optimizer that trains them, or None.
        others: All objects whose attributes the block may change.

    Raises:
        SurgeryError: The block raised an error of the machine, such as a lack of memory.
    """
    with (
        undone_on_error(what, sites, model=model, optimizer=optimizer, others=others) as before,
        resizer.undone_on_error(optimizer, what),
    ):
        yield before
