"""Tiny models of every kind that RankFlow steers, random but seeded."""

import os
import pickle
import signal
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D


def pytest_configure(config):
    if hasattr(config, "workerinput"):  # pytest-xdist: one thread for each of its processes
        torch.set_num_threads(1)
    # PEFT 0.21 asks transformers 5.23 for an attribute under its old name.
    config.addinivalue_line(
        "filterwarnings", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
    )


class Host(nn.Module):
    """A base model around one layer."""

    def __init__(self, layer):
        super().__init__()
        self.block = nn.ModuleDict({"layer": layer})

    def forward(self, x):
        return self.block["layer"](x)


class MixedNet(nn.Module):
    """An embedding, a transposed linear layer, two linear layers and a convolution in a row.

    The first and the last have matrices of one width, so stacking by width changes the order.
    """

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        self.fan = Conv1D(5, 6)
        self.first = nn.Linear(5, 5)
        self.second = nn.Linear(5, 4, bias=False)
        self.conv = nn.Conv2d(2, 4, (3, 2), padding=1)

    def forward(self, tokens):  # (batch, 4)
        x = torch.tanh(self.fan(self.embed(tokens)))
        x = self.second(torch.tanh(self.first(x)))  # (batch, 4, 4)
        return self.conv(x.view(-1, 2, 2, 4)).flatten(1)


@dataclass(frozen=True)
class LayerCase:
    """One kind of layer, with the dense operation that its weight stands for."""

    make: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    apply: Callable[[nn.Module, Tensor, Tensor, Tensor | None], Tensor]
    kind: str = "linear"
    output_axis: int = 0

    def matrix(self, weight):
        """The weight as (out, in)."""
        return weight.movedim(self.output_axis, 0).flatten(1)

    def weight_like(self, matrix, weight):
        """The matrix (out, in) in the weight's own layout."""
        moved = weight.movedim(self.output_axis, 0)
        return matrix.view(moved.shape).movedim(0, self.output_axis)


def _convolve(convolution):
    def apply(layer, x, weight, bias):
        return convolution(x, weight, bias, layer.stride, layer.padding)

    return apply


def _features(*shape):
    return lambda: torch.randn(*shape)


LAYERS = {
    "linear": LayerCase(
        lambda: nn.Linear(6, 5),
        _features(7, 6),
        lambda layer, x, weight, bias: x @ weight.T + bias,
    ),
    "linear without bias": LayerCase(
        lambda: nn.Linear(5, 7, bias=False),
        _features(3, 2, 5),
        lambda layer, x, weight, bias: x @ weight.T,
    ),
    "Conv1D of transformers": LayerCase(
        lambda: Conv1D(7, 5),
        _features(3, 2, 5),
        lambda layer, x, weight, bias: x @ weight + bias,
        output_axis=1,
    ),
    "conv1d": LayerCase(
        lambda: nn.Conv1d(3, 6, 3, padding=1),
        _features(2, 3, 8),
        _convolve(functional.conv1d),
        kind="conv",
    ),
    "conv2d": LayerCase(
        lambda: nn.Conv2d(3, 6, (3, 2), stride=2, padding=(1, 0)),
        _features(2, 3, 8, 7),
        _convolve(functional.conv2d),
        kind="conv",
    ),
    "conv2d without bias": LayerCase(
        lambda: nn.Conv2d(5, 6, 1, bias=False),
        _features(2, 5, 4, 4),
        _convolve(functional.conv2d),
        kind="conv",
    ),
    "conv3d": LayerCase(
        lambda: nn.Conv3d(2, 5, 2),
        _features(2, 2, 4, 3, 4),
        _convolve(functional.conv3d),
        kind="conv",
    ),
    "embedding": LayerCase(
        lambda: nn.Embedding(11, 6),
        lambda: torch.randint(11, (3, 4)),
        lambda layer, x, weight, bias: weight[x],
        kind="embedding",
        output_axis=1,
    ),
}


def _adapt(base, *, adapter="default", onto=None, trained=True, **config):
    config = {"r": 3, "lora_alpha": 6, "target_modules": ["layer"], **config}
    with warnings.catch_warnings():
        # One config serves layers of both orientations; PEFT corrects the flag and says so.
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        if onto is None:
            model = peft.get_peft_model(base, peft.LoraConfig(**config), adapter_name=adapter)
        else:
            model = onto
            model.add_adapter(adapter, peft.LoraConfig(**config))
    if trained:
        for name, parameter in model.named_parameters():
            if f".{adapter}" not in name:
                continue
            if "lora_magnitude_vector" in name:
                parameter.data *= 0.5 + torch.rand_like(parameter)
            elif ".lora_" in name:
                parameter.data = 0.4 * torch.randn_like(parameter)
    return model


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(params=LAYERS.values(), ids=LAYERS.keys())
def layer_case(request):
    """Every kind of layer in turn."""
    return request.param


@pytest.fixture
def layer_cases():
    """Every kind of layer by name."""
    return LAYERS


@pytest.fixture(params=[False, True], ids=["LoRA", "DoRA"])
def use_dora(request):
    return request.param


@pytest.fixture
def adapt():
    """Wrap a base model by PEFT, with random factors and magnitudes as after some training."""
    return _adapt


@pytest.fixture
def host():
    """Put one layer of a case into a base model."""
    return lambda case: Host(case.make())


@pytest.fixture
def mixed():
    """Make the net that holds every kind of layer, adapted at all of them."""

    def make(**config):
        targets = ["embed", "fan", "first", "second", "conv"]
        return _adapt(MixedNet(), **{"target_modules": targets, **config})

    return make


def _llama():
    config = transformers.LlamaConfig(
        vocab_size=13,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
    )
    return transformers.LlamaForCausalLM(config)


def _bert():
    config = transformers.BertConfig(
        vocab_size=13,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)


def _bart():
    config = transformers.BartConfig(
        vocab_size=13,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        max_position_embeddings=16,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=2,
    )
    return transformers.BartForConditionalGeneration(config)


def _gpt2():
    config = transformers.GPT2Config(
        vocab_size=13,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=16,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return transformers.GPT2LMHeadModel(config)


TRANSFORMERS = {"llama": _llama, "bert": _bert, "bart": _bart, "gpt2": _gpt2}


@pytest.fixture(params=TRANSFORMERS.values(), ids=TRANSFORMERS.keys())
def transformer(request):
    """Makers of tiny random transformers: Llama-, BERT-, BART- and GPT-2-shaped."""
    return request.param


@pytest.fixture
def llama():
    return _llama


@dataclass(frozen=True)
class Ended:
    """How one process of a job came to its end.

    Attributes:
        value: What its work returned.
        error: What it raised instead, or None.
        told: The traceback of that.
        seconds: When it ended, after the start of the job.
    """

    value: object = None
    error: BaseException | None = None
    told: str = ""
    seconds: float = 0.0


def _take_part(number, count, work, folder, patience):
    """Be one process of a job, and leave a record of the end."""
    torch.set_num_threads(1)  # the threads of the process that forked this one are not here
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["OMP_NUM_THREADS"] = "1"  # accelerate warns where it is not set
    began = time.monotonic()
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'store'}",
            rank=number,
            world_size=count,
            timeout=timedelta(seconds=patience),
        )
        ended = Ended(work(number), seconds=time.monotonic() - began)
    except BaseException as error:
        told = traceback.format_exc()
        error.__cause__ = error.__context__ = None  # these may hold what cannot be pickled
        ended = Ended(None, error, told, time.monotonic() - began)
    (folder / f"{number}.pickle").write_bytes(pickle.dumps(ended))
    if ended.error is None:  # whoever left now would cut off what the others still read
        with suppress(RuntimeError):
            dist.barrier()


@pytest.fixture
def processes(tmp_path):
    """Run ``work(number)`` in several processes of a job, and return how each of them ended.

    ``killed`` is in the place of one that was. Whoever hangs much longer than ``patience``, the
    timeout of the job in seconds, fails the test.
    """
    jobs = iter(range(1000))

    def run(count, work, *, patience=60.0):
        folder = tmp_path / f"job-{next(jobs)}"
        folder.mkdir()
        pids = []
        for number in range(count):
            pid = os.fork()
            if pid == 0:
                try:
                    _take_part(number, count, work, folder, patience)
                finally:
                    os._exit(0)
            pids.append(pid)
        _reap(pids, patience + 60)
        records = [folder / f"{number}.pickle" for number in range(count)]
        return [pickle.loads(r.read_bytes()) if r.exists() else "killed" for r in records]

    return run


def _reap(pids, seconds):
    end = time.monotonic() + seconds
    left = set(pids)
    while left:
        left -= {pid for pid in left if os.waitpid(pid, os.WNOHANG)[0]}
        if time.monotonic() > end:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            raise AssertionError(f"{len(left)} of {len(pids)} processes hung")
        time.sleep(0.005)


@pytest.fixture
def in_processes(processes):
    """Run ``work(number)`` in several processes of a job, and return what each returned."""

    def run(count, work, **options):
        ended = processes(count, work, **options)
        assert all(each != "killed" and each.error is None for each in ended), "".join(
            f"\nprocess {n}: {each if each == 'killed' else each.told}"
            for n, each in enumerate(ended)
        )
        return [each.value for each in ended]

    return run
