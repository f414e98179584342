import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import IMAGES, SCALARS, EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from rankflow.report.events import encode_event
from rankflow.report.grid_figure import render_pixels
from rankflow.report.heatmap import rank_heatmap
from rankflow.report.tensorboard import TensorBoardSink


def read_back(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={SCALARS: 0, IMAGES: 0})
    return accumulator.Reload()


def decode(image):
    return np.array(Image.open(io.BytesIO(image.encoded_image_string)))


def test_the_numbers_of_each_event_stand_at_its_step(tmp_path, event):
    sink = TensorBoardSink(tmp_path)
    sink(event)
    sink(replace(event, index=4, step=150, spent=99))
    sink.close()
    log = read_back(tmp_path)
    spent = log.Scalars("rankflow/spent")
    assert [(scalar.step, scalar.value) for scalar in spent] == [(120, 165_120), (150, 99)]
    expected = {
        "rankflow/budget": 165_888,
        "rankflow/spent": 165_120,
        "rankflow/total_rank": 8,
        # shares 3/4, 1/4 and 0 over three sites
        "rankflow/rank_entropy": (0.75 * np.log(4 / 3) + 0.25 * np.log(4)) / np.log(3),
        "rankflow/churn": (3 + 1) / (10 + 8),
        "rankflow/mean_score": 0.1,
    }
    assert set(log.Tags()["scalars"]) == set(expected)
    first = {tag: log.Scalars(tag)[0].value for tag in expected}
    assert first == pytest.approx(expected, rel=1e-6)


def test_no_image_is_lost_in_what_tensorboard_samples(tmp_path, event):
    sink = TensorBoardSink(tmp_path)
    for index in range(12):  # TensorBoard keeps 10 images of a tag
        sink(replace(event, index=index, step=10 * index))
    sink.close()
    log = EventAccumulator(str(tmp_path)).Reload()
    tags = log.Tags()["images"]
    kinds = ("ranks", "importance")
    assert set(tags) == {f"rankflow/{kind}/event_{i:04d}" for kind in kinds for i in range(12)}
    assert [image.step for image in log.Images("rankflow/ranks/event_0011")] == [110]


def test_an_image_is_the_heatmap_of_its_event(tmp_path, event):
    sink = TensorBoardSink(tmp_path, maximum=12)
    sink(event)
    sink.close()
    (image,) = read_back(tmp_path).Images("rankflow/ranks/event_0003")
    figure = rank_heatmap(event.ranks, title="Rank, event 3, step 120", maximum=12)
    np.testing.assert_array_equal(decode(image), render_pixels(figure))
    (importance,) = read_back(tmp_path).Images("rankflow/importance/event_0003")
    assert len(np.unique(decode(importance).reshape(-1, 3), axis=0)) > 3


def test_each_event_stands_whole_under_a_tag_of_its_own(tmp_path, event):
    events = [event, replace(event, index=4, importance=dict.fromkeys(event.ranks, float("nan")))]
    sink = TensorBoardSink(tmp_path)
    for one in events:
        sink(one)
    sink.close()
    log = read_back(tmp_path)
    tags = ["rankflow/event/000003", "rankflow/event/000004"]
    assert log.Tags()["tensors"] == tags
    for tag, one in zip(tags, events, strict=True):
        (value,) = log.Tensors(tag)
        assert value.step == one.step
        assert value.tensor_proto.string_val[0] == encode_event(one)
        plugin = log.SummaryMetadata(tag).plugin_data
        assert (plugin.plugin_name, plugin.content) == ("rankflow", b"")


def test_an_event_can_be_read_while_the_sink_is_still_open(tmp_path, event):
    sink = TensorBoardSink(tmp_path)
    sink(event)
    assert read_back(tmp_path).Scalars("rankflow/spent")[0].step == 120
    sink.close()


def test_a_writer_that_was_given_stays_open(tmp_path, event):
    writer = SummaryWriter(tmp_path)
    sink = TensorBoardSink(writer)
    sink(event)
    sink.close()
    writer.add_scalar("loss", 0.5, 121)
    writer.close()
    assert {"loss", "rankflow/spent"} <= set(read_back(tmp_path).Tags()["scalars"])
