"""The tokenizer beside a model or an adapter, with its chat template."""

from pathlib import Path
from typing import Final

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rankflow.errors import FileError, brief
from rankflow.model_files import check_model

TOKENIZER: Final = "tokenizer_config.json"


def find_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer in a local folder, if there is one; nothing is downloaded.

    Raises:
        FileError: Its files are damaged, or ask for code or for files from elsewhere.
    """
    if not (Path(folder) / TOKENIZER).is_file():
        return None
    check_model(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a damaged file makes these libraries raise anything
        raise FileError(
            f"the tokenizer in {folder} cannot be read: {brief(error)}; put the model's tokenizer "
            "files there, or remove those that are there"
        ) from error
