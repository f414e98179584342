import logging
import warnings
from contextlib import suppress

import datasets
import pytest
from transformers.utils import logging as transformers_logging

from rankflow.quiet import quiet_libraries


def test_libraries_are_quiet_inside_and_as_before_outside():
    before = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
        datasets.are_progress_bars_disabled(),
    )
    with suppress(KeyError), quiet_libraries():
        assert transformers_logging.get_verbosity() == logging.ERROR
        assert not transformers_logging.is_progress_bar_enabled()
        assert datasets.are_progress_bars_disabled()
        raise KeyError
    assert before == (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
        datasets.are_progress_bars_disabled(),
    )


def test_other_warnings_are_not_hidden():
    with pytest.warns(UserWarning, match="important"), quiet_libraries():
        warnings.warn("important", stacklevel=1)
