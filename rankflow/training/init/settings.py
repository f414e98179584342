"""Choose sizes and rates for a first run, from the lengths of the rows and the model's size.

They are starting points, and the spec that holds them says so.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Final

from rankflow.specs.run import Dtype, Task
from rankflow.training.chat import Conversation, check_template
from rankflow.training.init.checkpoint import Checkpoint
from rankflow.training.init.choose import Reading
from rankflow.training.messages import present

_LADDER: Final = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)  # tokens
_COVERED: Final = 0.99  # of the rows
_LARGE: Final = 1_000_000_000  # parameters
_UNKNOWN: Final = _LARGE  # parameters: what is careful where their number is not known
# Up to so many parameters, so many tokens of a batch, and this learning rate.
_SIZES: Final = (
    (100_000_000, 8_192, 2e-3),
    (_LARGE - 1, 4_096, 1e-3),
    (10_000_000_000, 2_048, 2e-4),
)
_LARGEST: Final = (1_024, 1e-4)
_ROWS: Final = {"causal-lm": 16, "seq2seq-lm": 16}  # of an optimizer step
_CLASSIFIED: Final = 32


@dataclass(frozen=True, slots=True)
class Settings:
    """Sizes and rates of a run.

    Attributes:
        max_length: Longest row (tokens).
        longest: Longest of the first rows (tokens).
        covered: Share of the first rows that are no longer than ``max_length``.
        dtype: Type of the base weights.
        batch: Rows of a forward pass.
        accumulation: Forward passes of a step.
        learning_rate: Largest learning rate.
    """

    max_length: int
    longest: int
    covered: float
    dtype: Dtype
    batch: int
    accumulation: int
    learning_rate: float


def choose_settings(
    model: Checkpoint, task: Task, lengths: Sequence[int], *, whole: bool
) -> Settings:
    """Choose sizes and rates.

    Args:
        model: What the model's files say.
        task: What it learns.
        lengths: Lengths of the first rows (tokens).
        whole: Whether no row may be cut.
    """
    max_length = choose_length(lengths, model.positions, 1.0 if whole else _COVERED)
    size = _UNKNOWN if model.parameters is None else model.parameters
    tokens, rate = next((rest for limit, *rest in _SIZES if size <= limit), _LARGEST)
    rows = _ROWS.get(task, _CLASSIFIED)
    batch = rows
    while batch > 1 and batch * max_length > tokens:
        batch //= 2
    return Settings(
        max_length=max_length,
        longest=max(lengths),
        covered=sum(length <= max_length for length in lengths) / len(lengths),
        dtype=choose_dtype(model.dtype, size),
        batch=batch,
        accumulation=rows // batch,
        learning_rate=rate,
    )


def choose_length(lengths: Sequence[int], positions: int | None, share: float) -> int:
    """Return the smallest round length that a share of the rows fits in.

    >>> choose_length([10] * 99 + [5000], 512, 0.99), choose_length([10, 5000], 512, 1.0)
    (16, 512)
    """
    needed = sorted(lengths)[max(0, round(share * len(lengths)) - 1)]
    length = next((step for step in _LADDER if step >= needed), _LADDER[-1])
    return length if positions is None else min(length, positions)


def choose_dtype(stored: str | None, parameters: int) -> Dtype:
    """Return the type to hold the base in: half for large ones, and never float16.

    A float16 base gives gradients that underflow; bfloat16 is as small and has float32's range.

    >>> choose_dtype("float16", 10), choose_dtype("float32", 10), choose_dtype(None, 10**10)
    ('bfloat16', 'float32', 'bfloat16')
    """
    return "bfloat16" if stored in ("bfloat16", "float16") or parameters >= _LARGE else "float32"


def measure_rows(reading: Reading, model: Checkpoint) -> list[int]:
    """Return how many tokens each of the first rows has.

    Raises:
        SpecError: Conversations need a chat template, and there is none.
        RankFlowError: The template cannot write one of them.
    """
    columns = {key: column.values for key, column in reading.columns.items()}
    if "messages" in columns:
        check_template(model.tokenizer)
        targets: Iterable[Any] = columns.get("target") or repeat([])
        chats = zip(columns["messages"], targets, strict=False)
        texts = [
            Conversation(model.tokenizer, present([*messages, *target])).text
            for messages, target in chats
        ]
        return _lengths(model, texts, add_special_tokens=False)
    lengths = _lengths(
        model, columns["text"], is_split_into_words=reading.task == "token-classification"
    )
    second = columns.get("text_pair") or columns.get("target")
    if second is None:
        return lengths
    others = _lengths(model, second)
    joined = max if reading.task == "seq2seq-lm" else sum  # there the two are rows of their own
    return [joined(pair) for pair in zip(lengths, others, strict=False)]


def _lengths(model: Checkpoint, texts: Sequence[Any], **options: bool) -> list[int]:
    encoded = model.tokenizer(list(texts), truncation=False, verbose=False, **options)
    return [len(ids) for ids in encoded["input_ids"]]
