"""Keep the reducer of DistributedDataParallel true to parameters that were replaced.

The reducer holds on to the parameters that it was built with, and would go on averaging those:
the processes would drift apart without a word. So it is built anew, as when the wrapper is
unpickled, at the first forward after a resize. That forward runs within the wrapper, which is found
there, whoever made it and when. A new wrapper would not do: a Trainer's loop keeps the old one.

Whether gradients are the same everywhere is then looked at once, in the first step after a resize:
nothing else would tell what becomes of a model that is called past its wrapper, or not wrapped.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from rankflow import processes
from rankflow.adapters.sites import Site
from rankflow.errors import RankFlowError
from rankflow.fingerprint import gradient_fingerprints


class Reducer:
    """Rebuilds the reducer around a model, if there is a job of processes, be it of one.

    Args:
        model: The model that a wrapper calls.

    Attributes:
        is_found: Whether a wrapper was seen that averages gradients within backward.
    """

    def __init__(self, model: nn.Module) -> None:
        self.is_found = False
        self._is_stale = True
        self._is_checked = False
        self._handle: RemovableHandle | None = None
        if dist.is_available() and dist.is_initialized():
            self._handle = model.register_forward_pre_hook(self._before_forward)

    def invalidate(self) -> None:
        """Have it rebuilt before it is used again: parameters were resized or replaced."""
        self._is_stale = True
        self._is_checked = False

    def check(self, sites: Sequence[Site], step: int) -> None:
        """Check that all processes have the same gradients, once after each resize.

        Args:
            sites: The sites.
            step: The step whose gradients are complete.

        Raises:
            RankFlowError: They differ, or a process did not take part.
        """
        if self._is_checked or not processes.are_several():
            return
        if self._handle is None:
            raise RankFlowError(
                "RankFlow was attached before the processes of the job were brought together, and "
                "does not see their gradients being averaged; call "
                "torch.distributed.init_process_group first"
            )
        what = f"comparing the gradients of step {step}"
        difference = processes.first_difference(gradient_fingerprints(sites), what)
        if difference is not None:
            index, others = difference
            raise RankFlowError(
                f"the gradients of step {step} differ between processes, first at site "
                f"{sites[index].name!r}, where those of process {others} are not those of "
                "process 0: wrap the model in DistributedDataParallel, call it through the "
                "wrapper, and leave its communication hooks averaging over all processes"
            )
        self._is_checked = True

    def close(self) -> None:
        """Leave the wrapper alone."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _before_forward(self, model: nn.Module, inputs: Any) -> None:
        wrapper = DistributedDataParallel._get_active_ddp_module()
        if wrapper is None:
            return
        self.is_found = True
        if self._is_stale and not _is_between(wrapper):
            rebuild(wrapper)
            self._is_stale = False


def rebuild(wrapper: DistributedDataParallel) -> None:
    """Build the reducer anew around the parameters that the model has now.

    Args:
        wrapper: The wrapper, within its forward and outside of backward.

    Raises:
        RankFlowError: The wrapper has an option whose state would not follow.
    """
    _check_options(wrapper)
    # Of a site without components empty tensors are left, which no loss depends on.
    empty = {name for name, p in wrapper.module.named_parameters() if p.numel() == 0}
    ignored = wrapper.parameters_to_ignore = _ignored_by_caller(wrapper) | empty
    wrapper._module_parameters = [
        p for name, p in wrapper.module.named_parameters() if name not in ignored
    ]
    # The old one keeps the parameters' places in the graph, and with them their old shapes.
    del wrapper.reducer, wrapper.logger
    parameters, sparse = wrapper._build_params_for_reducer()
    names = wrapper._build_debug_param_to_name_mapping(parameters)
    wrapper._ddp_init_helper(parameters, sparse, names, wrapper.static_graph)
    if wrapper.static_graph:
        wrapper.reducer._set_static_graph()
        assert wrapper.logger is not None  # it was made with the reducer
        wrapper.logger._set_static_graph()
        wrapper._static_graph_delay_allreduce_enqueued = False
    for hook, state in wrapper._comm_hooks:
        dist._register_comm_hook(wrapper.reducer, state, hook)  # type: ignore[attr-defined]
    wrapper._has_rebuilt_buckets = False
    if torch.is_grad_enabled() and wrapper.require_backward_grad_sync:
        wrapper.reducer.prepare_for_forward()


def _is_between(wrapper: DistributedDataParallel) -> bool:
    """Whether the reducer sleeps in this pass, and has to see a static graph in another one."""
    return (
        wrapper.static_graph
        and wrapper._static_graph_delay_allreduce_enqueued
        and not wrapper.require_backward_grad_sync
    )


def _ignored_by_caller(wrapper: DistributedDataParallel) -> set[str]:
    return set(vars(wrapper.module).get("_ddp_params_and_buffers_to_ignore", ()))


def _check_options(wrapper: DistributedDataParallel) -> None:
    for is_used, option in (
        (wrapper.mixed_precision is not None, "mixed_precision"),
        (wrapper._delay_all_reduce_params, "delay_all_reduce_named_params"),
        (wrapper._use_python_reducer, "a compiled reducer"),
        (any(isinstance(s, PowerSGDState) for _, s in wrapper._comm_hooks), "PowerSGD"),
        (_has_builtin_hook(wrapper), "a built-in communication hook"),
        (wrapper._join_config.enable, "join()"),
        (wrapper.process_group is not dist.group.WORLD, "a process group of its own"),
    ):
        if is_used:
            raise RankFlowError(
                f"DistributedDataParallel with {option} cannot follow ranks that change: its "
                "state belongs to the old shapes, or to other processes than those of the job; "
                "leave it out"
            )


def _has_builtin_hook(wrapper: DistributedDataParallel) -> bool:
    """Whether there is a hook that the wrapper has kept no record of, and that would be lost."""
    assert wrapper.logger is not None  # it is made with the reducer
    name = wrapper.logger._get_ddp_logging_data().strs_map.get("comm_hook", "")
    return bool(name) and not wrapper._comm_hooks
