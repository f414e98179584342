"""Load the base of a cell, in its own precision or in 4 bits.

A 4-bit base is what QLoRA trains over (Dettmers et al. 2023, arXiv 2305.14314): NormalFloat with
double quantisation, whose products compute in bfloat16. All other weights (embeddings,
normalisations, heads) are float32, as ``peft.prepare_model_for_kbit_training`` makes them.
"""

import importlib.util

import torch
from transformers import BitsAndBytesConfig

from rankflow.errors import RankFlowError
from rankflow.specs.run import ModelSpec
from rankflow.training.models import BaseModel, build_meta_model, load_base_model


def load_base(spec: ModelSpec, labels: tuple[str, ...], *, quantised: bool) -> BaseModel:
    """Load a base model with a head for its task.

    Args:
        spec: Which model, for which task.
        labels: Class names by index; empty for language models.
        quantised: Whether the encoder's linear layers are stored in 4 bits; ``spec.dtype`` has no
            say then.

    Raises:
        SpecError: There is no such model, or none of its kind for the task, or with its attention.
        RankFlowError: bitsandbytes is missing, the checkpoint is incomplete, or the tokenizer is
            another model's.
    """
    if not quantised:
        return load_base_model(spec, labels)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RankFlowError(
            "a base in 4 bits needs bitsandbytes; install it by `pip install bitsandbytes`, or "
            "leave out the methods with a quantised base"
        )
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=_unquantised(build_meta_model(spec, labels)),
    )
    whole = spec.model_copy(update={"dtype": "float32"})
    base = load_base_model(whole, labels, config)
    _keep_order(base)
    return base


def _unquantised(base: BaseModel) -> list[str]:
    """Name what stays in float32: the heads, and a pooler, which trains where it is new."""
    head = base.model.get_output_embeddings()
    names = [
        name
        for name, module in base.model.named_modules()
        if (head is not None and module is head) or name.endswith(".pooler")
    ]
    return sorted({*base.full_modules, *names})


def _keep_order(base: BaseModel) -> None:
    """Keep 4-bit weights in the order of their rows on CPUs with AVX512-BF16.

    There bitsandbytes reorders a weight at the first forward in evaluation mode. Afterwards no
    gradient flows back through the layer, and what PEFT dequantises for DoRA's norm is wrong.
    """
    from bitsandbytes.nn import Linear4bit  # optional package

    for module in base.model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
