"""Find the sites of a PEFT model, and see each as a matrix ``scale * B @ A``.

PEFT stores adapters of linear layers, convolutions and embeddings differently, but in all of them
the rank is the first axis of A and the second axis of B. That is the uniform view used here:

=========== ============================= ======================
kind        A                             B
=========== ============================= ======================
linear      ``(rank, in)``                ``(out, rank)``
conv        ``(rank, in, kh, kw)``        ``(out, rank, 1, 1)``
embedding   ``(rank, vocabulary)``        ``(width, rank)``
=========== ============================= ======================

``flatten(1)`` turns every A into ``(rank, in_features)`` and every B into ``(out_features, rank)``.
"""

import math
from collections.abc import Sequence

import numpy as np
from peft import LoraConfig, PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant, MultiheadAttention, ParamWrapper
from peft.tuners.lora.variants import (
    DoraConv1dVariant,
    DoraConv2dVariant,
    DoraConv3dVariant,
    DoraEmbeddingVariant,
    DoraLinearVariant,
)
from torch import Tensor, nn

from rankflow.adapters.dead import DeadVariant
from rankflow.adapters.gate import GatedVariant, effective_B, find_gate, find_row_gate
from rankflow.adapters.slots import Slots
from rankflow.errors import SiteError
from rankflow.records import BoolArray, SiteInfo, SiteKind
from rankflow.specs.budget import MagnitudeMode

_SUPPORTED_VARIANTS = (
    DeadVariant,
    DoraConv1dVariant,
    DoraConv2dVariant,
    DoraConv3dVariant,
    DoraEmbeddingVariant,
    DoraLinearVariant,
    GatedVariant,
)

_DORA = LoraConfig(use_dora=True)
# Where a magnitude's own module keeps what computes with it while nothing does.
_ASIDE = "rankflow_variant"


class Site:
    """One adapted module for one adapter name: PEFT's layer, and its tensors in the uniform view.

    A site reads the layer afresh at every access, so it stays right when PEFT or
    ``rankflow.surgery`` replaces a parameter.

    Args:
        name: Module path from the base model's root.
        layer: PEFT's layer.
        adapter_name: The adapter that is steered.

    Attributes:
        slots: Where its components are, if its tensors keep their shapes; None where a tensor has
            as many rows, or columns, as the site has components.
    """

    def __init__(self, name: str, layer: LoraLayer, adapter_name: str) -> None:
        self.name = name
        self.layer = layer
        self.adapter_name = adapter_name
        self.kind = _kind(name, layer, adapter_name)
        self.slots: Slots | None = None

    @property
    def A(self) -> nn.Parameter:  # noqa: N802
        """Right factor; its first axis is the rank, or the slots."""
        if self.slots is not None:
            return self.slots.A
        if self.kind == "embedding":
            return self.layer.lora_embedding_A[self.adapter_name]
        return self.layer.lora_A[self.adapter_name].weight

    @property
    def B(self) -> nn.Parameter:  # noqa: N802
        """Left factor; its second axis is the rank, or the slots."""
        if self.slots is not None:
            return self.slots.B
        if self.kind == "embedding":
            return self.layer.lora_embedding_B[self.adapter_name]
        return self.layer.lora_B[self.adapter_name].weight

    @property
    def gate(self) -> nn.Parameter | None:
        """Factor c of each component, shape ``(rank,)``, or None for ordinary components."""
        return find_gate(self.layer, self.adapter_name)

    @property
    def row_gate(self) -> nn.Parameter | None:
        """VeRA's factor b of each output row, shape ``(out,)``, or None if A and B are trained."""
        return find_row_gate(self.layer, self.adapter_name)

    @property
    def trained(self) -> tuple[nn.Parameter, ...]:
        """What the update trains: its factors, or VeRA's vectors alone."""
        gate, row_gate = self.gate, self.row_gate
        if gate is None or row_gate is None:
            return tuple(factor for factor, _ in self.factors)
        return gate, row_gate

    @property
    def factors(self) -> tuple[tuple[nn.Parameter, int], ...]:
        """A, B and, if there is one, the gate, each with its axis that runs over components."""
        gate = self.gate
        pair = ((self.A, 0), (self.B, 1))
        return pair if gate is None else (*pair, (gate, 0))

    @property
    def named_parameters(self) -> dict[str, nn.Parameter]:
        """What ``install`` puts in place, by its names: all that a resize may change."""
        gate, magnitude = self.gate, self.magnitude_slot
        named = {"A": self.A, "B": self.B, "gate": gate, "magnitude": magnitude}
        return {name: parameter for name, parameter in named.items() if parameter is not None}

    @property
    def effective_B(self) -> Tensor:  # noqa: N802
        """B with the gate folded in, so that the update is ``scale * effective_B @ A``."""
        return effective_B(self.layer, self.adapter_name)

    @property
    def magnitude(self) -> nn.Parameter | None:
        """DoRA's magnitude, ``out_features`` entries, or None where the site computes as LoRA."""
        slot = self.magnitude_slot
        return slot if slot is not None and slot.numel() > 0 else None

    @property
    def magnitude_slot(self) -> nn.Parameter | None:
        """The place of DoRA's magnitude, empty where it is turned off; None for plain LoRA."""
        if self.adapter_name not in self.layer.lora_magnitude_vector:
            return None
        return self.layer.lora_magnitude_vector[self.adapter_name].weight

    @property
    def rank(self) -> int:
        """Live components."""
        return self.A.shape[0] if self.slots is None else len(self.slots.live)

    @property
    def live_rows(self) -> Tensor:
        """Rows that newborns stay away from: those of A; for an embedding the columns of B."""
        factor = self.B.flatten(1).T if self.kind == "embedding" else self.A.flatten(1)
        return factor.detach()

    @property
    def scale(self) -> float:
        """Factor of every component; it never depends on the rank."""
        return float(self.layer.scaling[self.adapter_name])

    @property
    def in_features(self) -> int:
        """Columns of the matrix view."""
        return math.prod(self.A.shape[1:])

    @property
    def out_features(self) -> int:
        """Rows of the matrix view."""
        return self.B.shape[0]

    @property
    def parameters(self) -> int:
        """Trainable adapter parameters held now."""
        magnitude = self.magnitude
        trained = sum(parameter.numel() for parameter in self.trained)
        if self.slots is not None:
            trained = self.rank * (self.in_features + self.out_features)
        return trained + (0 if magnitude is None else magnitude.numel())

    def pieces(self, axis: int, first: int, count: int) -> list[tuple[int, int]]:
        """Return where consecutive components lie in what this process holds of a factor.

        Args:
            axis: The factor's axis that runs over components.
            first: The first component.
            count: Number of components.

        Returns:
            First index and length of each stretch along the axis.
        """
        if self.slots is None:
            return [(first, count)]
        return self.slots.pieces(axis, first, count)

    def describe(
        self,
        min_rank: int = 0,
        max_rank: int | None = None,
        *,
        magnitude: MagnitudeMode = "always",
    ) -> SiteInfo:
        """Return the site's facts, with bounds on its rank cut to what the matrix can hold.

        Args:
            min_rank: Smallest rank that the budget allows.
            max_rank: Largest rank that it allows; None for no bound.
            magnitude: What the budget does with DoRA's magnitudes.
        """
        has_magnitude = self.magnitude_slot is not None and magnitude != "never"
        largest = min(self.in_features, self.out_features)
        return SiteInfo(
            name=self.name,
            kind=self.kind,
            in_features=self.in_features,
            out_features=self.out_features,
            has_magnitude=has_magnitude,
            min_rank=min(min_rank, largest),
            max_rank=largest if max_rank is None else min(max_rank, largest),
            is_budgeted=has_magnitude and magnitude == "budgeted",
            has_gate=self.gate is not None,
            has_row_gate=self.row_gate is not None,
        )

    def install(
        self,
        A: nn.Parameter,
        B: nn.Parameter,
        *,
        gate: nn.Parameter | None = None,
        magnitude: nn.Parameter | None = None,
    ) -> None:
        """Put new parameters in place, and keep PEFT's own record of the rank in step.

        ``r``, ``lora_alpha`` and ``scaling`` stay consistent, so that PEFT's ``set_scale`` and
        ``unscale_layer`` do not rescale the adapter later. A dead site is recorded with ``r = 1``,
        since PEFT divides by it.

        Args:
            A: Right factor.
            B: Left factor, of the same rank.
            gate: Gate of the same rank, for a gated site only.
            magnitude: DoRA's magnitude, empty to turn it off; None for the one that it has.
        """
        rank = A.shape[0]
        if gate is not None:
            self.layer.lora_gate[self.adapter_name] = gate
        assert len(A) == B.shape[1] == len(A if self.gate is None else self.gate), "ranks differ"
        if self.kind == "embedding":
            self.layer.lora_embedding_A[self.adapter_name] = A
            self.layer.lora_embedding_B[self.adapter_name] = B
        else:
            _set_weight(self.layer.lora_A[self.adapter_name], A, outputs=rank)
            _set_weight(self.layer.lora_B[self.adapter_name], B, inputs=rank)
        nominal = max(rank, 1)
        self.layer.r[self.adapter_name] = nominal
        self.layer.lora_alpha[self.adapter_name] = self.scale * nominal
        self.layer.use_rslora[self.adapter_name] = False
        if magnitude is not None:
            self.layer.lora_magnitude_vector[self.adapter_name].weight = magnitude
        self.update_variant()

    @property
    def dora_variant(self) -> LoraVariant:
        """What computes the site as DoRA; set aside while it is dead or its magnitude is off."""
        current = self.layer.lora_variant.get(self.adapter_name)
        if isinstance(current, DeadVariant):
            current = current.revived
        if isinstance(current, GatedVariant):
            current = current.inner
        aside = getattr(self._magnitude_module, _ASIDE, None)
        variant = current or aside or self.layer.resolve_lora_variant(config=_DORA)
        assert variant is not None, "PEFT gave this layer a magnitude, and has no DoRA for it"
        return variant

    @dora_variant.setter
    def dora_variant(self, variant: LoraVariant) -> None:
        self.layer.lora_variant.pop(self.adapter_name, None)
        setattr(self._magnitude_module, _ASIDE, variant)
        self.update_variant()

    @property
    def _magnitude_module(self) -> nn.Module:
        return self.layer.lora_magnitude_vector[self.adapter_name]

    def update_variant(self) -> None:
        """Let PEFT compute what the site is now: dead, gated, DoRA or plain LoRA."""
        variant: LoraVariant | None = None  # PEFT's own LoRA
        if self.magnitude_slot is not None:
            dora = self.dora_variant
            setattr(self._magnitude_module, _ASIDE, dora)
            if self.magnitude is not None:
                variant = dora
        self.layer.lora_variant.pop(self.adapter_name, None)
        if self.gate is not None:
            variant = GatedVariant(variant)
        if self.rank == 0:
            variant = DeadVariant(revived=variant)
        if variant is not None:
            self.layer.lora_variant[self.adapter_name] = variant


def find_sites(model: nn.Module, adapter_name: str = "default") -> tuple[Site, ...]:
    """Find every site of one adapter, in module order.

    Args:
        model: A ``PeftModel`` with a LoRA or DoRA adapter.
        adapter_name: The adapter to steer; others in the model are left alone.

    Returns:
        The sites, at least one.

    Raises:
        SiteError: The model is not a ``PeftModel``, has no such adapter, has no LoRA layer, or has
            one that cannot be seen as a sum of rank-1 components; the message names the site.
    """
    root = lora_root(model, adapter_name)
    sites = sites_in(root, adapter_name)
    if not sites:
        raise SiteError(
            f"adapter {adapter_name!r} adapts no layer of {type(root).__name__}; "
            "check target_modules of its LoraConfig"
        )
    _refuse_shared(sites)
    return sites


def sites_in(root: nn.Module, adapter_name: str) -> tuple[Site, ...]:
    """Return the sites of one adapter in a base model, however its layers came there."""
    return tuple(
        Site(name, module, adapter_name)
        for name, module in root.named_modules()
        if isinstance(module, LoraLayer) and _holds(module, adapter_name)
    )


def magnitudes_on(sites: Sequence[Site]) -> BoolArray:
    """Return which sites train a magnitude now, shape ``(S,)``."""
    return np.array([site.magnitude is not None for site in sites], dtype=np.bool_)


def lora_root(model: nn.Module, adapter_name: str) -> nn.Module:
    """Return the base model inside a ``PeftModel`` whose named adapter is LoRA or DoRA.

    Raises:
        SiteError: The model is not such a model.
    """
    if not isinstance(model, PeftModel):
        raise SiteError(
            f"RankFlow steers a peft.PeftModel, received {type(model).__name__}; "
            "call peft.get_peft_model(model, peft.LoraConfig(...)) first"
        )
    if adapter_name not in model.peft_config:
        raise SiteError(
            f"the model has no adapter {adapter_name!r}; it has {sorted(model.peft_config)}: "
            "pass one of them as adapter_name"
        )
    kind = model.peft_config[adapter_name].peft_type
    if kind != PeftType.LORA:
        raise SiteError(
            f"adapter {adapter_name!r} is of type {getattr(kind, 'value', kind)}, and only LORA "
            "(with or without use_dora) is made of rank-1 components; use a LoraConfig"
        )
    return model.get_base_model()


def _holds(layer: LoraLayer, adapter_name: str) -> bool:
    return adapter_name in layer.lora_A or adapter_name in layer.lora_embedding_A


def _kind(name: str, layer: LoraLayer, adapter_name: str) -> SiteKind:
    variant = layer.lora_variant.get(adapter_name)
    if variant is not None and not isinstance(variant, _SUPPORTED_VARIANTS):
        raise SiteError(
            f"site {name!r} uses {type(variant).__name__}, which is not a sum of rank-1 "
            "components; use plain LoRA or use_dora=True, or take the site out of target_modules"
        )
    if isinstance(layer, ParamWrapper):
        raise SiteError(
            f"site {name!r} adapts the parameter {layer.parameter_name!r} of no linear layer, such "
            "as stacked experts, and cannot be resized; leave target_parameters out, and where "
            "target_modules='all-linear' brought it, name the linear layers instead, e.g. "
            "target_modules=['q_proj', 'k_proj', 'v_proj', 'o_proj']"
        )
    if isinstance(layer, MultiheadAttention):
        raise SiteError(
            f"site {name!r} is a MultiheadAttention, which RankFlow cannot resize; take it out of "
            "target_modules"
        )
    if layer.lora_bias.get(adapter_name, False):
        raise SiteError(
            f"site {name!r} was made with lora_bias=True, a bias that belongs to no component; "
            "set lora_bias=False"
        )
    if adapter_name in layer.lora_embedding_A:
        return "embedding"
    factor = layer.lora_A[adapter_name]
    if isinstance(factor, nn.modules.conv._ConvNd):
        _check_convolution(name, layer.get_base_layer())
        return "conv"
    if isinstance(factor, nn.Linear):
        return "linear"
    raise SiteError(
        f"site {name!r} has an adapter of type {type(factor).__name__}; RankFlow knows linear "
        "layers, convolutions and embeddings: take the site out of target_modules"
    )


def _check_convolution(name: str, base: nn.modules.conv._ConvNd) -> None:
    if base.groups > 1:
        raise SiteError(
            f"site {name!r} is a convolution with groups={base.groups}, whose adapter is not a sum "
            "of rank-1 components over all channels; take it out of target_modules"
        )
    if base.padding_mode != "zeros" or any(step != 1 for step in base.dilation):
        raise SiteError(
            f"site {name!r} is a convolution with dilation={base.dilation} and padding_mode="
            f"{base.padding_mode!r}, which PEFT's adapter ignores, so that its forward and its "
            "merge differ; take it out of target_modules"
        )


def _refuse_shared(sites: Sequence[Site]) -> None:
    owner: dict[int, str] = {}
    for site in sites:
        for parameter in (site.A, site.B):
            # PEFT ties adapters by a transposed view of one storage; empty tensors have no address.
            other = owner.setdefault(parameter.data_ptr() or id(parameter), site.name)
            if other != site.name:
                raise SiteError(
                    f"sites {other!r} and {site.name!r} share one adapter tensor, so neither can "
                    "be resized alone; set ensure_weight_tying=False in the LoraConfig"
                )


def _set_weight(
    module: nn.Module,
    weight: nn.Parameter,
    *,
    inputs: int | None = None,
    outputs: int | None = None,
) -> None:
    module.weight = weight
    suffix = "channels" if isinstance(module, nn.modules.conv._ConvNd) else "features"
    if inputs is not None:
        setattr(module, f"in_{suffix}", inputs)
    if outputs is not None:
        setattr(module, f"out_{suffix}", outputs)
