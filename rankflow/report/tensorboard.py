"""Events in TensorBoard: the event itself for the tab "Rank flow", curves, and two heatmaps.

TensorBoard keeps a sample of the values under one tag, 10 by default, and would so lose most
events of a long run. Hence every event has tags of its own: ``rankflow/event/000003``, and for
those without the tab the images ``rankflow/ranks/event_0003`` and
``rankflow/importance/event_0003``.
"""

from pathlib import Path

from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR, Summary, SummaryMetadata
from tensorboard.util.tensor_util import make_tensor_proto
from torch.utils.tensorboard import SummaryWriter

from rankflow.records import RankEvent
from rankflow.report.events import encode_event
from rankflow.report.grid_figure import render_pixels
from rankflow.report.heatmap import importance_heatmap, rank_heatmap
from rankflow.report.plugin.tags import PLUGIN_NAME, event_tag
from rankflow.report.scalars import event_scalars


class TensorBoardSink:
    """A sink that writes each event for TensorBoard, readable once the call returns."""

    def __init__(
        self,
        target: str | Path | SummaryWriter,
        *,
        maximum: int | None = None,
        purge_step: int | None = None,
    ) -> None:
        """Choose where to write.

        Args:
            target: A log directory, or a writer that the caller owns.
            maximum: Rank at the top of every image's colour scale; None takes each event's
                largest rank.
            purge_step: First step that is to come; a resumed run gives it, so that the events
                that it repeats do not appear twice. A writer has its own.
        """
        self._owns_writer = not isinstance(target, SummaryWriter)
        self._writer = (
            target
            if isinstance(target, SummaryWriter)
            else SummaryWriter(target, purge_step=purge_step)
        )
        self._maximum = maximum

    def __call__(self, event: RankEvent) -> None:
        """Write the event, its numbers and its images at its step."""
        self._writer._get_file_writer().add_summary(event_summary(event), event.step)
        for tag, value in event_scalars(event).items():
            self._writer.add_scalar(tag, value, event.step)
        when = f"event {event.index}, step {event.step:,}"
        ranks = rank_heatmap(
            event.ranks,
            title=f"Rank, {when}",
            maximum=self._maximum,
            magnitudes=event.magnitudes,
        )
        importance = importance_heatmap(event.importance, title=f"Importance, {when}")
        for name, figure in (("ranks", ranks), ("importance", importance)):
            tag = f"rankflow/{name}/event_{event.index:04d}"
            self._writer.add_image(tag, render_pixels(figure), event.step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        """Close the writer if the sink made it; a writer that was given stays open."""
        if self._owns_writer:
            self._writer.close()


def event_summary(event: RankEvent) -> Summary:
    """Return the event as what the tab "Rank flow" reads: its line of ``events.jsonl``, a string.

    The line is the tensor and not the metadata's content, of which TensorBoard keeps the first
    that a tag had, where a run resumes, and which it sends whenever it is asked for the tags.
    """
    plugin = SummaryMetadata.PluginData(plugin_name=PLUGIN_NAME)
    metadata = SummaryMetadata(plugin_data=plugin, data_class=DATA_CLASS_TENSOR)
    tensor = make_tensor_proto(encode_event(event))
    return Summary(
        value=[Summary.Value(tag=event_tag(event.index), metadata=metadata, tensor=tensor)]
    )
