"""Read pretrained and fine-tuned weights, one layer at a time.

Layers are named as in the base model, whatever stands around it in the fine-tuned one. An adapter
is loaded into the base model by PEFT, and each layer is merged in a float32 copy of its own: the
base stays as it is, no merged model is ever held, and every adapter that PEFT can merge will do.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import transformers
from peft import PeftConfig, PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rankflow.analysis.checkpoints import Checkpoint
from rankflow.analysis.naming import Renaming, match_names
from rankflow.errors import FileError, RankFlowError, brief
from rankflow.export.adapter_files import check_adapter_files
from rankflow.export.fit import check_fit
from rankflow.model_files import SAFE, check_model
from rankflow.quiet import quiet_libraries
from rankflow.report.layout import parse_site

Matrix = npt.NDArray[np.float32]

_ROOT = "base_model.model."  # what PEFT calls the adapted model

# PEFT takes the adapter's start out of the base weights when it makes one of these.
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class Weights:
    """A model and those of its layers that are matrices and were read from its files.

    Attributes:
        model: The model.
        layers: Linear layers and embeddings by name, in the model's order.
        embeddings: Names of those that have a row or a column for each token.
    """

    model: PreTrainedModel
    layers: dict[str, nn.Module]
    embeddings: frozenset[str]


@dataclass(frozen=True, slots=True)
class Pair:
    """A weight before and after.

    Attributes:
        site: The layer's name in the base model.
        before: Shape ``(out_features, in_features)``.
        after: Of the same shape.
    """

    site: str
    before: Matrix
    after: Matrix


def load_weights(source: str) -> Weights:
    """Load a model as the class that its configuration names, in the type in which it is stored.

    Args:
        source: A folder that ``save_pretrained`` wrote, or a hub id.

    Raises:
        RankFlowError: It cannot be read, or it is quantised.
    """
    check_model(source)
    try:
        with quiet_libraries():
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
            if getattr(config, "quantization_config", None) is not None:
                raise RankFlowError(
                    f"{source} is quantised, and its weights are codes rather than numbers; name "
                    "the model from which it was quantised"
                )
            architecture = (config.architectures or [""])[0]
            model, info = getattr(transformers, architecture, AutoModel).from_pretrained(
                source, config=config, dtype="auto", output_loading_info=True, **SAFE
            )
    except RankFlowError:
        raise
    except Exception as error:  # a damaged file makes these libraries raise anything
        raise RankFlowError(
            f"{source} cannot be read as a model: {brief(error)}; name 'minilm', a folder that "
            "`save_pretrained` wrote, or a hub id"
        ) from error
    absent = set(info["missing_keys"])
    layers = {
        name: module
        for name, module in model.named_modules()
        if weight_of(module) is not None and f"{name}.weight" not in absent
    }
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    embeddings = frozenset(
        name
        for name, module in layers.items()
        if isinstance(module, nn.Embedding) or any(module is end for end in ends)
    )
    return Weights(model, layers, embeddings)


def weight_of(module: nn.Module) -> Tensor | None:
    """Return the matrix of a layer as (out_features, in_features); None where it has none.

    An embedding's outputs are the features that it looks up, as in PEFT's DoRA.
    """
    if isinstance(module, nn.Linear):
        return module.weight.detach()
    if isinstance(module, Conv1D | nn.Embedding):
        return module.weight.detach().T
    return None


def read_pairs(base: Weights, checkpoint: Checkpoint, wanted: frozenset[str]) -> Iterator[Pair]:
    """Yield the weights that a checkpoint has changed, or could have, beside the base's.

    Args:
        base: The pretrained model, which is only borrowed: in the end it is as it was.
        checkpoint: An adapter, or a whole model.
        wanted: Names of the base's layers to compare; of these, an adapter yields those that it
            adapts, and a model those that it has.

    Raises:
        RankFlowError: The checkpoint is damaged, or made for another model.
    """
    read = _read_adapter if checkpoint.content == "adapter" else _read_model
    yield from read(base, checkpoint.folder, wanted)


def _read_model(base: Weights, folder: Path, wanted: frozenset[str]) -> Iterator[Pair]:
    tuned = load_weights(str(folder))
    kinds = [weights.model.config.model_type for weights in (tuned, base)]
    if kinds[0] != kinds[1]:
        raise _unfit(folder, f"it is a {kinds[0]} and the base is a {kinds[1]}")
    renaming = _match(folder, list(tuned.layers), base)
    for name, layer in tuned.layers.items():
        site = renaming.translate(name)
        if site in wanted:
            yield _pair(site, base.layers[site], layer, folder)


def _read_adapter(base: Weights, folder: Path, wanted: frozenset[str]) -> Iterator[Pair]:
    check_adapter_files(folder)
    config = _read_config(folder)
    prefix = f".{PEFT_TYPE_TO_PREFIX_MAPPING[config.peft_type]}"
    try:
        tensors = load_peft_weights(str(folder), device="cpu")
    except Exception as error:  # its reader may be stricter than the checks
        raise RankFlowError(f"the adapter in {folder} cannot be read: {error}") from error
    inside = {key for key in tensors if key.startswith(_ROOT)}
    for key in inside:
        if prefix not in key:  # of a head, or a bias; what lies outside the layers shares vectors
            del tensors[key]
    names = [key.removeprefix(_ROOT).partition(prefix)[0] for key in tensors if key in inside]
    renaming = _match(folder, list(dict.fromkeys(names)), base)
    with _adapted(base, renaming, config, tensors, folder) as host:
        for name, layer in host.named_modules():
            site = renaming.translate(name)
            if isinstance(layer, BaseTunerLayer) and site in wanted:
                yield _pair(site, layer.get_base_layer(), _merge(layer, site, folder), folder)


def _read_config(folder: Path) -> PeftConfig:
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # PEFT's classes of configurations raise anything
        raise RankFlowError(f"the adapter in {folder} cannot be read: {error}") from error
    if config.is_prompt_learning or config.peft_type not in PEFT_TYPE_TO_PREFIX_MAPPING:
        raise RankFlowError(
            f"the adapter in {folder} is of type {config.peft_type.value}, which leaves the "
            "model's weights as they are; name one that can be merged into them, such as LoRA"
        )
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_MOVES_BASE):
        raise RankFlowError(
            f"the adapter in {folder} was started by {start!r} on a base model that this changed; "
            "save it with PEFT's path_initial_model_for_weight_conversion, which makes a LoRA of "
            "the unchanged base model of it"
        )
    # A head trained beside the adapter is no part of the base model.
    config.modules_to_save = None
    config.trainable_token_indices = None
    config.inference_mode = True
    return config


@contextmanager
def _adapted(
    base: Weights,
    renaming: Renaming,
    config: PeftConfig,
    tensors: dict[str, Tensor],
    folder: Path,
) -> Iterator[nn.Module]:
    """Lend the base model with PEFT's layers in it, named as the adapter names them."""
    host: nn.Module = base.model.get_submodule(renaming.ours)
    for part in reversed(renaming.theirs.split(".") if renaming.theirs else []):
        holder = nn.Module()
        holder.add_module(part, host)
        host = holder
    try:
        if config.peft_type == PeftType.LORA:
            check_fit(folder, host, with_heads=False)
        with quiet_libraries():
            model = PeftModel(host, config)
    except FileError:
        raise
    except Exception as error:  # PEFT raises anything for a configuration that makes no sense
        raise _unfit(folder, error) from error
    try:
        try:
            set_peft_model_state_dict(model, tensors)
        except (KeyError, ValueError, RuntimeError) as error:
            raise _unfit(folder, error) from error
        yield model.get_base_model()
    finally:
        model.unload()


def _merge(layer: Any, site: str, folder: Path) -> nn.Module:
    merged = deepcopy(layer).float()
    try:
        merged.merge(safe_merge=True)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise RankFlowError(
            f"the adapter in {folder} cannot be merged at {site}: {error}"
        ) from error
    return merged.get_base_layer()


def _match(folder: Path, names: list[str], base: Weights) -> Renaming:
    """Find the base model among the layers of a checkpoint, which may have a head of its own."""
    renaming = match_names(names, base.layers)
    known = {name for name, _ in base.model.named_modules()}
    stacks = {parse_site(name).stack for name in base.layers}
    shared = [] if renaming is None else [renaming.translate(name) for name in names]
    surplus = [
        name
        for name in shared
        if name is not None and name not in known and parse_site(name).stack in stacks
    ]
    if renaming is None or surplus:
        example = surplus[0] if surplus else names[0] if names else "no layer"
        raise _unfit(folder, f"it has {example}, and {type(base.model).__name__} has not")
    return renaming


def _pair(site: str, before: nn.Module, after: nn.Module, folder: Path) -> Pair:
    old, new = _to_numpy(before), _to_numpy(after)
    if old.shape != new.shape:
        raise _unfit(folder, f"{site} is {new.shape} there and {old.shape} in the base model")
    if not np.isfinite(new).all():
        raise RankFlowError(
            f"{site} is not finite in {folder}: the training diverged; leave this checkpoint out"
        )
    return Pair(site, old, new)


def _to_numpy(module: nn.Module) -> Matrix:
    weight = weight_of(module)
    assert weight is not None, "only layers with a matrix are sites"
    return weight.float().numpy()


def _unfit(folder: Path, reason: object) -> RankFlowError:
    return RankFlowError(
        f"{folder} does not fit the base model: {reason}; name the model that was fine-tuned as "
        "the base"
    )
