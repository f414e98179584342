import time

import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from torch.utils.tensorboard import SummaryWriter

from rankflow.report.tensorboard import event_summary


@pytest.fixture
def write():
    """Write events as the sink does, without its images."""

    def write_events(folder, events):
        writer = SummaryWriter(folder)
        for event in events:
            writer._get_file_writer().add_summary(event_summary(event), event.step)
        writer.close()
        time.sleep(0.01)  # a later file has another name, and later times

    return write_events


@pytest.fixture
def load():
    """Load a log directory as TensorBoard does, keeping as much of each tag as it does."""

    def make_provider(folder):
        multiplexer = EventMultiplexer(size_guidance={"tensors": 10})
        multiplexer.AddRunsFromDirectory(str(folder))
        multiplexer.Reload()
        return MultiplexerDataProvider(multiplexer, str(folder))

    return make_provider
