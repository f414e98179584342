"""One norm for each state of the weights.

Gradient accumulation, checkpointing, evaluation and scores reuse it. A tensor's version counter
alone cannot tell when it is stale, for fused optimizers do not advance it; so the steps of all
optimizers are counted too. A write through ``.data`` that no optimizer made leaves no trace.
"""

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from rankflow.adapters.capture import is_capturing
from rankflow.adapters.gate import stored_factors
from rankflow.adapters.row_norms import measure_norms, squares_of_base


class Epoch:
    """Counts optimizer steps of any optimizer: fused ones change weights and leave no trace."""

    steps = 0
    _watching = False

    @classmethod
    def watch_optimizers(cls) -> None:
        """Count from now on; once is enough for a process."""
        if not cls._watching:
            register_optimizer_step_post_hook(cls.count)
            cls._watching = True

    @classmethod
    def count(cls, *_: Any) -> None:
        """Count a step; that of a graph that is replayed tells nobody."""
        cls.steps += 1


class NormCache:
    """The norms of one site, computed anew whenever one of its weights may have changed.

    It holds on to the weight's storage, so that no new tensor can take its address. Those of the
    factors it only watches: an event frees them.
    """

    def __init__(self) -> None:
        self._seen: tuple[object, ...] = ()
        self._norms: Tensor | None = None
        self._epoch = -1
        self._seen_weight: tuple[object, ...] = ()
        self._squares: Tensor | None = None
        self._watched: list[StorageWeakRef] = []

    def __reduce__(self) -> tuple[type["NormCache"], tuple[()]]:
        """Copy and pickle as an empty cache."""
        return NormCache, ()

    def norms(self, layer: LoraLayer, adapter_name: str, A: Tensor, B: Tensor) -> Tensor:
        """Return the norms of ``W + s B A``, shape ``(out,)``, which nobody may change.

        A gate is folded into B. What is captured into a CUDA graph is measured in it, at every
        replay: of these the cache never hears.
        """
        scale = layer.scaling[adapter_name]
        if torch.compiler.is_compiling() or is_capturing(A):
            return measure_norms(layer, A, B, scale)
        factors = stored_factors(layer, adapter_name)
        weight = layer.get_base_layer().weight
        seen_weight = (_identity(weight), Epoch.steps if weight.requires_grad else None)
        epoch = Epoch.steps if len(A) > 0 else None  # W alone is not what optimizers change
        seen = (epoch, scale, seen_weight, *(_identity(factor) for factor in factors))
        is_gone = any(storage.expired() for storage in self._watched)
        if self._norms is None or seen != self._seen or is_gone:
            self._seen = ()  # an interruption leaves nothing that is taken for known
            with torch.inference_mode(False):  # training may follow
                if seen_weight != self._seen_weight:
                    self._squares = squares_of_base(layer, A, B)
                    self._seen_weight = seen_weight
                self._norms = measure_norms(layer, A, B, scale, squares=self._squares)
            self._alive = weight.untyped_storage()
            self._watched = [StorageWeakRef(factor.untyped_storage()) for factor in factors]
            self._seen = seen
        self._epoch = Epoch.steps
        return self._norms

    def latest(self) -> Tensor | None:
        """Return the norms of the last forward, if no optimizer has stepped since; else None.

        It compares no tensors: between forward and the optimizer nothing else changes them.
        """
        return self._norms if self._epoch == Epoch.steps else None

    def expire(self) -> None:
        """Let ``latest`` wait for the next forward: the factors may be others now."""
        self._epoch = -1


class FreshNorms:
    """Norms that are measured at every call: a gathered parameter does not tell that it changed."""

    def norms(self, layer: LoraLayer, adapter_name: str, A: Tensor, B: Tensor) -> Tensor:
        """Return the norms of ``W + s B A``, shape ``(out,)``."""
        return measure_norms(layer, A, B, layer.scaling[adapter_name])

    def latest(self) -> None:
        """Return None: nothing is kept."""

    def expire(self) -> None:
        """Do nothing."""


def _identity(tensor: Tensor) -> tuple[object, ...]:
    """What changes when a tensor is written to in place, replaced, moved or converted."""
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.dtype, tensor.device, tensor.shape
