"""Full fine-tuning: every parameter of the base trains."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass

from rankflow.ablation.methods.method import Built, Setting
from rankflow.ablation.methods.preparing import hold_in_float32
from rankflow.training.models import BaseModel


@dataclass(frozen=True, slots=True)
class FullFineTuning:
    """Trains every weight, in float32; it has no size, and is over every budget.

    For the fields see ``Method``.
    """

    summary: str = "full fine-tuning: every parameter of the base trains, whatever the budget"
    source: str = "Devlin et al. 2019, arXiv 1810.04805"
    rate: float = 4e-4
    scalings: tuple[float, ...] = (1.0,)
    quantised: bool = False
    size_name: str = ""

    def sizes(self, base: BaseModel, setting: Setting) -> Sequence[int]:
        """Return no sizes."""
        return ()

    def build(self, base: BaseModel, setting: Setting, size: int | None) -> Built:
        """Let everything train."""
        model = base.model
        finish = hold_in_float32(model)
        model.requires_grad_(True)
        return Built(model, finish=finish, merge=lambda: deepcopy(model))
