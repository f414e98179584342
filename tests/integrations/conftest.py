import gc

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for each other cost these tiny tensors twenty times their arithmetic."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True, scope="module")
def frozen_imports():
    """Every Trainer collects garbage when it begins, which takes longer than these runs."""
    gc.freeze()
    yield
    gc.unfreeze()
