"""How a model is spread over processes, and which budgets can be steered there."""

from collections.abc import Sequence
from typing import Final

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Shard

from rankflow import processes
from rankflow.adapters.sites import Site
from rankflow.errors import RankFlowError
from rankflow.specs.budget import BudgetSpec

LOCAL_SCORES: Final = ("taylor", "fisher")
"""Scores of a component that the process which holds its row of A can tell alone."""

_SCORES: Final = (*LOCAL_SCORES, "random", "uniform")  # the last two look at no tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether the model is under FSDP2, with its parameters as they are between steps.

    Raises:
        RankFlowError: It is spread over devices in a way under which ranks cannot change.
    """
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise _refusal("FullyShardedDataParallel (FSDP1), whose flat parameters have no rows")
    if any(getattr(p, "ds_id", None) is not None for p in model.parameters()):
        raise _refusal("DeepSpeed ZeRO-3, which gathers parameters by the shapes they began with")
    gather_again(model)
    split = next((name for name, p in model.named_parameters() if isinstance(p, DTensor)), None)
    if split is None:
        return False
    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        raise _refusal(f"tensor parallelism ({split})")
    return True


def gather_again(model: nn.Module) -> None:
    """Have FSDP2 gather every parameter anew at the next forward, and show its shards until then.

    After a forward without backward it keeps those of the root as they were gathered.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def check_shards(sites: Sequence[Site]) -> None:
    """Check that every site's tensors are split over all processes along their first axis.

    Raises:
        RankFlowError: One is not; the message names its site.
    """
    for site in sites:
        for tensor in site.named_parameters.values():
            _check_tensor(site.name, tensor)
        if site.magnitude_slot is not None and _has_units(site.layer):
            raise RankFlowError(
                f"parts of the DoRA site {site.name!r} are FSDP units of their own, and its norms "
                "need its base weight and its adapter at once; call fully_shard on the layer or on "
                "its block, not within it, or use LoraConfig(use_dora=False)"
            )


def _has_units(layer: nn.Module) -> bool:
    return any(isinstance(m, FSDPModule) for m in layer.modules() if m is not layer)


def _check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, DTensor):
        raise RankFlowError(
            f"the adapter of site {name!r} is not sharded, and others of the model are; call "
            "fully_shard on the whole model too, without ignored_params, or shard nothing"
        )
    mesh = tensor.device_mesh
    if tensor.placements != (Shard(0),) or mesh.size() != processes.count():
        raise RankFlowError(
            f"the adapter of site {name!r} is placed as {tensor.placements} over "
            f"{mesh.size()} of {processes.count()} processes (HSDP, tensor parallelism, or a "
            "placement of your own), and RankFlow follows Shard(0) over all of them; call "
            "fully_shard with a mesh of one dimension, and without shard_placement_fn"
        )
    if mesh.device_type != tensor.device.type:
        raise RankFlowError(
            f"the adapter of site {name!r} is kept on {tensor.device.type!r} by CPUOffloadPolicy, "
            "where its scores would wait for every step; leave offload_policy out"
        )


def check_budget(budget: BudgetSpec) -> None:
    """Check that a budget asks for nothing that only whole tensors can tell.

    Raises:
        RankFlowError: It does; the message names the key.
    """
    faults = []
    if budget.components != "factors":
        faults.append(f"components = {budget.components!r}: use 'factors'")
    if budget.magnitude != "always":
        faults.append(f"magnitude = {budget.magnitude!r}: use 'always', or plain LoRA")
    if budget.renormalise != "none":
        faults.append(f"renormalise = {budget.renormalise!r}: use 'none'")
    if budget.score not in _SCORES:
        faults.append(
            f"score = {budget.score!r} needs whole factors: use one of {', '.join(_SCORES)}"
        )
    if budget.dem > 0:
        faults.append(f"dem = {budget.dem:g}: use 0")
    if faults:
        raise RankFlowError(
            "under FSDP2 RankFlow cannot follow this budget: "
            f"{'; '.join(faults)}; or train under DistributedDataParallel"
        )


def _refusal(what: str) -> RankFlowError:
    return RankFlowError(
        f"the parameters of this model are held by {what}, and ranks cannot change there; use "
        "FSDP2 (torch.distributed.fsdp.fully_shard) or DistributedDataParallel"
    )
