"""What one export starts from."""

from dataclasses import dataclass
from pathlib import Path

from peft import PeftModel

from rankflow.adapters.sites import Site
from rankflow.export.card import AdapterFacts
from rankflow.export.formats import Format
from rankflow.export.options import ExportOptions


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
