"""What one export starts from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from peft import PeftModel, TaskType

from rankflow.adapters.sites import Site
from rankflow.errors import ExportError
from rankflow.export.card import AdapterFacts
from rankflow.export.formats import Format
from rankflow.export.options import ExportOptions
from rankflow.export.write import About

_CLASSIFIERS: Final = (TaskType.SEQ_CLS, TaskType.TOKEN_CLS)


@dataclass(frozen=True, slots=True)
class ExportJob:
    """A live adapter, and how to write it where.

    Attributes:
        model: The live model, which stays as it is.
        adapter_name: The adapter.
        sites: All of its sites.
        path: The folder to write.
        format: What to write.
        options: What was asked of it.
        facts: What the run knows of the adapter.
    """

    model: PeftModel
    adapter_name: str
    sites: tuple[Site, ...]
    path: Path
    format: Format
    options: ExportOptions
    facts: AdapterFacts | None

    @property
    def base_model(self) -> str:
        """Name or path of the base model; may be empty."""
        return self.model.peft_config[self.adapter_name].base_model_name_or_path or ""

    @property
    def classes(self) -> dict[str, Any] | None:
        """What the configuration of a classifier says of its classes; None for other models."""
        if self.model.peft_config[self.adapter_name].task_type not in _CLASSIFIERS:
            return None
        config = self.model.get_base_model().config
        return {"id2label": config.id2label, "problem_type": config.problem_type}

    @property
    def about(self) -> About:
        """What is told of the adapter if it is written as it is."""
        return About(
            ranks={site.name: site.rank for site in self.sites},
            trained=sum(site.parameters for site in self.sites),
            base_model=self.base_model,
            facts=self.facts,
            classes=self.classes,
            tokenizer=self.options.tokenizer,
        )


def refuse_nothing(sites: Sequence[Site], adapter_name: str) -> None:
    """Refuse an adapter that changes nothing.

    Raises:
        ExportError: No site has a component or a magnitude.
    """
    if all(site.rank == 0 and site.magnitude is None for site in sites):
        raise ExportError(
            f"all {len(sites)} sites of adapter {adapter_name!r} have rank 0: it is the base "
            "model, and PEFT cannot load an adapter of nothing"
        )
