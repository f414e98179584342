r"""Scores from the gradient of a gate that need not be there.

If component i were multiplied by a gate :math:`c_i`, then at :math:`c_i = 1`

.. math:: T_i = \partial L / \partial c_i
        = \langle a_i, \partial L/\partial a_i \rangle
        = \langle b_i, \partial L/\partial b_i \rangle,

for LoRA, and for DoRA with a detached norm. So the first-order change of the loss when component i
is removed costs one dot product a step, on one factor alone. Where components do have gates, all of
this holds for a factor on top of the gate, and :math:`T_i = c_i \, \partial L / \partial c_i`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rankflow.adapters.savepoint import Savepoint
from rankflow.adapters.sites import Site
from rankflow.importance.average import ComponentAverage
from rankflow.importance.dots import Dots
from rankflow.importance.rows import Rows


class GateGradient:
    r"""The moving second moment of the gate gradient, :math:`E[T_i^2]`.

    Of sharded factors it sees the rows that this process holds.

    Args:
        sites: The sites whose components are scored.
        decay: Decay of the average, in [0, 1).
    """

    def __init__(self, sites: Sequence[Site], decay: float) -> None:
        self._look_at(sites)
        self._second_moment = ComponentAverage(sum(self._rows.ranks), decay, like=sites[0].A)

    def observe(self, unclip: Tensor, accept: Tensor) -> None:
        """Fold in one step's gradients, if ``accept``."""
        gate = self._dots.read()
        if gate is None:
            pairs = zip(self._rows.weights(), self._rows.gradients(), strict=True)
            gate = self._rows.per_component([torch.linalg.vecdot(w, g) for w, g in pairs])
        self._second_moment.update((gate * unclip).square(), accept)

    def reindex(
        self, sites: Sequence[Site], sources: Tensor, before: Savepoint | None = None
    ) -> None:
        """Follow the components through a resize."""
        self._look_at(sites)
        self._second_moment = self._second_moment.followed(sources)

    def state(self) -> dict[str, Tensor]:
        """Return the average."""
        return self._second_moment.state()

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore the average."""
        self._second_moment.load(state)

    def second_moment(self) -> Tensor:
        """Return :math:`E[T_i^2]`, shape ``(C,)``."""
        return self._second_moment.read()

    def _look_at(self, sites: Sequence[Site]) -> None:
        rows = Rows.of_A(sites) if sites[0].gate is None else Rows.of_gates(sites)
        self._rows, self._dots = rows, Dots(rows.parameters, rows.ranks, rows.widths)


class Taylor(GateGradient):
    r"""Root mean square first-order change of the loss, :math:`\sqrt{E[T_i^2]}`.

    Source: Molchanov et al. 2019 (arXiv 1906.10771), applied to rank-1 components.
    """

    def read(self) -> Tensor:
        """Return the scores, shape ``(C,)``."""
        return self.second_moment().sqrt()


class Fisher(GateGradient):
    r"""Second-order change of the loss by the empirical Fisher diagonal, :math:`E[T_i^2] / 2`.

    Source: Theis et al. 2018 (arXiv 1801.05787), applied to rank-1 components.
    """

    def read(self) -> Tensor:
        """Return the scores, shape ``(C,)``."""
        return self.second_moment() / 2
