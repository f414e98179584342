"""Keep libraries from writing between RankFlow's own lines."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Hide the progress bars of datasets and transformers, and notes below the level of errors."""
    level = transformers_logging.get_verbosity()
    had_bars = transformers_logging.is_progress_bar_enabled()
    datasets = sys.modules.get("datasets")  # a second to import, where nothing else needs it
    had_data_bars = datasets is not None and not datasets.are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if datasets is not None:
        datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            # PEFT 0.21 asks transformers 5 for an attribute under its old name.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")
            yield
    finally:
        transformers_logging.set_verbosity(level)
        if had_bars:
            transformers_logging.enable_progress_bar()
        if datasets is not None and had_data_bars:
            datasets.enable_progress_bars()
