"""Under which names events stand in TensorBoard's files.

TensorBoard keeps a sample of the values under one tag, 10 by default, and would so lose most events
of a long run. Hence every event has a tag of its own.
"""

import re
from typing import Final

PLUGIN_NAME: Final = "rankflow"

_TAG: Final = re.compile(r"rankflow/event/(\d+)")


def event_tag(index: int) -> str:
    """Return the tag of an event.

    >>> event_tag(123)
    'rankflow/event/000123'
    """
    return f"rankflow/event/{index:06d}"


def event_index(tag: str) -> int | None:
    """Return the running number of the event under a tag, None if it is no event's.

    >>> event_index("rankflow/event/000123"), event_index("rankflow/spent")
    (123, None)
    """
    match = _TAG.fullmatch(tag)
    return int(match[1]) if match else None
