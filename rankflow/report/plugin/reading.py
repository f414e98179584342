"""Events out of TensorBoard's own storage."""

from collections.abc import Mapping
from typing import Final

from tensorboard.context import RequestContext
from tensorboard.data.provider import DataProvider, RunTagFilter, TensorDatum, TensorTimeSeries

from rankflow.records import RankEvent
from rankflow.report.events import decode_event
from rankflow.report.plugin.tags import PLUGIN_NAME, event_index, event_tag

_MOST_OF_A_TAG: Final = 1000  # a tag has one value for each time that its event was repeated


class EventReader:
    """The runs of one request's experiment, and their events.

    Args:
        provider: TensorBoard's storage.
        context: The request's.
        experiment: The request's experiment.
    """

    def __init__(self, provider: DataProvider, context: RequestContext, experiment: str) -> None:
        self._provider = provider
        self._context = context
        self._experiment = experiment

    def runs(self) -> dict[str, list[int]]:
        """Return the running numbers of the events that each run has, by its name."""
        series = self._provider.list_tensors(
            self._context, experiment_id=self._experiment, plugin_name=PLUGIN_NAME
        )
        indices = {run: current_indices(tags) for run, tags in series.items()}
        return {run: indices[run] for run in sorted(indices) if indices[run]}

    def events(self, run: str, indices: list[int]) -> list[RankEvent]:
        """Return some events of a run.

        Args:
            run: Its name.
            indices: The running numbers of those to read; ``runs`` tells which there are.

        Raises:
            ValueError: One of them is of another schema, or damaged.
        """
        tags = [event_tag(index) for index in indices]
        read = self._provider.read_tensors(
            self._context,
            experiment_id=self._experiment,
            plugin_name=PLUGIN_NAME,
            downsample=_MOST_OF_A_TAG,
            run_tag_filter=RunTagFilter(runs=[run], tags=tags),
        )
        values = read.get(run, {})
        latest = [max(values[tag], key=_time_of) for tag in tags if tag in values]
        return [decode_event(datum.numpy.item()) for datum in latest]


def current_indices(tags: Mapping[str, TensorTimeSeries]) -> list[int]:
    """Return the running numbers of a run's events, without those that a resumed run left behind.

    A run that was killed and resumed writes again what came after its checkpoint, so the event that
    was written last is the run's last one.

    Args:
        tags: What TensorBoard tells of each tag of the run.
    """
    times = {event_index(tag): series.max_wall_time for tag, series in tags.items()}
    written = {index: time for index, time in times.items() if index is not None}
    last = max(written, key=lambda index: (written[index], index), default=-1)
    return sorted(index for index in written if index <= last)


def _time_of(datum: TensorDatum) -> float:
    return datum.wall_time
