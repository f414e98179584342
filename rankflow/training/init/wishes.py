"""What the user of ``rankflow init`` asks for."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rankflow.specs.run import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """The options of the command.

    Attributes:
        model: ``minilm``, a folder, or a hub id.
        data: ``docstrings``, a file, or a hub id.
        config: Configuration of a hub data set; None for its only one.
        task: What the model is to learn; None for what model and data say.
        columns: Columns by their key under ``[data]``: ``text``, ``label`` and so on; what is not
            among them is chosen.
        chat_template: File with a chat template; None for the tokenizer's own.
        budget: A preset's name, or the path of a budget.
        rank: The budget as a rank of plain LoRA.
        output: The run spec to write.
    """

    model: str
    data: str
    config: str | None
    task: Task | None
    columns: Mapping[str, str]
    chat_template: Path | None
    budget: str
    rank: float
    output: Path
