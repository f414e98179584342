"""What cannot be done in a Trainer, or not in every one: each has its reason and a remedy."""

from typing import Any, Final

from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerState, TrainingArguments

from rankflow import processes
from rankflow.errors import CheckpointError, RankFlowError

_REFUSED: Final = (
    "DataParallel",
    DistributedType.FSDP,
    DistributedType.DEEPSPEED,
    DistributedType.MEGATRON_LM,
    DistributedType.XLA,
)
_RESUME: Final = (
    "resume with RankFlowTrainer, or with "
    "trainer.train(resume_from_checkpoint=callback.resume(trainer))"
)


def refuse_other_ranks(model: nn.Module, state_dict: dict[str, Tensor], *_: Any) -> None:
    """Refuse to load weights of other ranks: a hook of a model that runs before it loads.

    Raises:
        CheckpointError: They are of other ranks.
    """
    for name, parameter in model.named_parameters():
        if ".lora_" not in name or name not in state_dict or parameter.numel() == 0:
            continue  # for what is empty a state dict holds a stand-in
        if state_dict[name].shape != parameter.shape:
            raise CheckpointError(
                f"the checkpoint holds {name} of shape {tuple(state_dict[name].shape)} and the "
                f"model has {tuple(parameter.shape)}: its ranks have moved, and this Trainer "
                f"cannot follow; {_RESUME}"
            )


def check_plain(args: TrainingArguments, state: TrainerState, is_new: bool) -> None:
    """Refuse what needs a Trainer that changes ranks before it loads weights.

    Args:
        args: The Trainer's arguments.
        state: Where its training stands.
        is_new: Whether the engine begins, and does not go on from a checkpoint.

    Raises:
        CheckpointError: The Trainer resumes by itself.
        RankFlowError: It is to load the best model.
    """
    if state.global_step > 0 and is_new:
        raise CheckpointError(
            f"the run was resumed at step {state.global_step}, and this Trainer does not restore "
            f"the scores and the budget's history; {_RESUME}"
        )
    if args.load_best_model_at_end:
        raise RankFlowError(
            "load_best_model_at_end=True needs a Trainer that brings the model to the ranks of "
            "the best checkpoint; use RankFlowTrainer, or set it to False"
        )


def check_engine(args: TrainingArguments) -> None:
    """Refuse the engines under which ranks cannot change, or would change without effect.

    Raises:
        RankFlowError: The Trainer trains under one of them.
    """
    engine = args.distributed_state.distributed_type if args.n_gpu <= 1 else "DataParallel"
    if engine is DistributedType.NO and processes.are_several():
        raise RankFlowError(
            "the job has several processes, and this Trainer trains in each of them as if it were "
            "alone; without accelerators set use_cpu=True in its arguments"
        )
    if engine in _REFUSED:
        raise RankFlowError(
            f"this Trainer trains under {getattr(engine, 'value', engine)}, where RankFlow cannot "
            "change ranks; use DistributedDataParallel: torchrun with one process for each device, "
            "and neither fsdp nor deepspeed. FSDP2 works in a loop of your own, with rf.RankFlow"
        )


def check_fresh(optimizer: Optimizer) -> None:
    """Refuse an optimizer that has taken steps where a run begins.

    Raises:
        RankFlowError: It has.
    """
    if optimizer.state:
        raise RankFlowError(
            "the optimizer has taken steps before, perhaps in an earlier train(), and its state "
            "does not fit the ranks at which a run begins; make a new Trainer for a new run"
        )
