"""The tokenizer beside a model or an adapter, with its chat template."""

from pathlib import Path
from typing import Final

from transformers import AutoTokenizer, PreTrainedTokenizerBase

TOKENIZER: Final = "tokenizer_config.json"


def find_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer in a local folder, if there is one; nothing is downloaded."""
    if not (Path(folder) / TOKENIZER).is_file():
        return None
    return AutoTokenizer.from_pretrained(folder)
