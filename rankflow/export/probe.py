"""Seeded inputs for a model, its outputs on them, and how far two outputs are apart."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PretrainedConfig

from rankflow.errors import ExportError
from rankflow.export.copies import evaluate
from rankflow.export.diffusion import draw_diffusion_inputs, is_diffusers_model

SEED: Final = 0
_TOKENS: Final = 16
# Largest error of an output, as a share of the largest output, that another order of the same
# arithmetic explains: a product rounds to half the type's last digit, the factored norm may lose
# two digits of float32, and a deep network multiplies both by some tens.
TOLERANCES: Final = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


@dataclass(frozen=True, slots=True)
class Probe:
    """Inputs of a model, and its live outputs on them.

    Attributes:
        inputs: Keyword arguments of the forward.
        outputs: Floating-point outputs in float64, in the forward's order.
        said: What the inputs are, in words.
    """

    inputs: dict[str, Any]
    outputs: tuple[Tensor, ...]
    said: str


@dataclass(frozen=True, slots=True)
class Unprobed:
    """No outputs could be compared.

    Attributes:
        reason: Why.
    """

    reason: str


@dataclass(frozen=True, slots=True)
class Difference:
    """How far outputs are from the live model's.

    Attributes:
        absolute: Largest error of an output.
        relative: The same as a share of the largest output, the worst over the outputs' tensors.
    """

    absolute: float
    relative: float


@contextmanager
def as_exported(model: PeftModel, adapter_name: str) -> Iterator[None]:
    """Let the live model compute by one adapter in evaluation mode; all is as before afterwards.

    The state of the random generators is kept too, so that a run that exports goes on as one that
    does not.
    """
    training = {module: module.training for module in model.modules()}
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    active = list(model.active_adapters)
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):
        try:
            evaluate(model)
            if active != [adapter_name]:
                model.base_model.set_adapter(adapter_name)
            yield
        finally:
            if active != [adapter_name]:
                model.base_model.set_adapter(active)
            for module, flag in training.items():
                module.training = flag
            for parameter, flag in trainable.items():
                if parameter.requires_grad is not flag:
                    parameter.requires_grad_(flag)


def probe_model(model: nn.Module, inputs: Mapping[str, Any] | None) -> Probe | Unprobed:
    """Run a model on inputs, made from its configuration unless they are given.

    Args:
        model: A base model in evaluation mode, its adapter in place.
        inputs: Keyword arguments of its forward, or None.

    Raises:
        ExportError: It gives no finite outputs.
    """
    if inputs is not None:
        return _probe(model, dict(inputs), "the caller's inputs")
    made = _make_inputs(model)
    if made is None:
        return Unprobed(f"nothing tells what {type(model).__name__} takes; hand in its inputs")
    shapes = ", ".join(_shapes(made))
    try:
        return _probe(model, made, f"{shapes}, drawn with seed {SEED}")
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        return Unprobed(
            f"{type(model).__name__} does not take {shapes} ({error}); hand in its inputs"
        )


@torch.no_grad()
def outputs_of(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Return a model's floating-point outputs in float64, on the CPU."""
    device = next(model.parameters()).device
    found = model(**_move(inputs, device))
    return tuple(tensor.detach().cpu().double() for tensor in _tensors(found))


def compare(expected: Sequence[Tensor], found: Sequence[Tensor]) -> Difference:
    """Return how far outputs are from the expected ones; infinitely far where they are no numbers.

    >>> compare([torch.tensor([1.0, -4.0])], [torch.tensor([1.5, -4.0])])
    Difference(absolute=0.5, relative=0.125)
    """
    if [t.shape for t in expected] != [t.shape for t in found]:
        return Difference(float("inf"), float("inf"))
    absolute, relative = [0.0], [0.0]
    for want, have in zip(expected, found, strict=True):
        error = torch.where(want == have, 0, (want - have).abs())  # equal infinities are no error
        error = torch.where(error.isnan(), float("inf"), error)
        worst = float(error.max()) if error.numel() else 0.0
        finite = want[want.isfinite()]
        size = float(finite.abs().max()) if finite.numel() else 0.0
        absolute.append(worst)
        relative.append(worst / size if size else worst)
    return Difference(max(absolute), max(relative))


def tolerance(*models: nn.Module) -> float:
    """Return the relative error that the coarsest type of the models' parameters explains."""
    types = {p.dtype for model in models for p in model.parameters() if p.is_floating_point()}
    return max(TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16]) for dtype in types)


def _probe(model: nn.Module, inputs: dict[str, Any], said: str) -> Probe:
    outputs = outputs_of(model, inputs)
    if not outputs:
        raise ExportError(f"{type(model).__name__} gives no floating-point output to compare")
    if any(tensor.isnan().any() for tensor in outputs):
        raise ExportError(
            f"the live model gives NaN on {said}; the base weights or the inputs are at fault"
        )
    return Probe(inputs, outputs, said)


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Mapping):
        return {name: _move(inner, device) for name, inner in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


def _shapes(inputs: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in inputs.items():
        if isinstance(value, Mapping):
            yield from _shapes(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor):
            yield f"{prefix}{name} {tuple(value.shape)}"
        else:
            yield f"{prefix}{name} {value!r}"


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)


def _make_inputs(model: nn.Module) -> dict[str, Any] | None:
    if is_diffusers_model(model):
        return draw_diffusion_inputs(model, SEED)
    config = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if isinstance(config, PretrainedConfig) and main == "input_ids":
        return _make_tokens(model, config)
    if isinstance(config, PretrainedConfig) and main == "pixel_values":
        return _make_pixels(model, config)
    dummies = getattr(model, "dummy_inputs", None)
    return dict(dummies) if isinstance(dummies, Mapping) else None


def _make_tokens(model: nn.Module, config: PretrainedConfig) -> dict[str, Tensor]:
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None) or 2 * _TOKENS
    # Decoders that classify need a padding token to take several texts; some models count positions
    # from the padding id on, so half of them is safe.
    texts = 1 if getattr(text, "pad_token_id", None) is None else 2
    generator = torch.Generator().manual_seed(SEED)
    shape = (texts, min(_TOKENS, positions // 2))
    tokens = torch.randint(text.vocab_size, shape, generator=generator)
    inputs = {"input_ids": tokens}
    if "attention_mask" in inspect.signature(model.forward).parameters:
        inputs["attention_mask"] = torch.ones_like(tokens)
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = tokens
    return inputs


def _make_pixels(model: nn.Module, config: PretrainedConfig) -> dict[str, Tensor] | None:
    size = getattr(config, "image_size", None)
    if size is None:
        return None
    height, width = size if isinstance(size, list | tuple) else (size, size)
    generator = torch.Generator().manual_seed(SEED)
    shape = (2, getattr(config, "num_channels", 3), height, width)
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return {"pixel_values": torch.randn(shape, generator=generator).to(dtype)}
