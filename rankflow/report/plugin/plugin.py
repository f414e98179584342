"""The plugin: four routes, and the data that they read.

``/index.js``
    the view's script.
``/runs``
    the runs that have events, and how many: ``{"runs": [{"name": "a", "events": 3}]}``.
``/events?run=a&from=2``
    the events of a run from the third on, as a ``RunView``.
``/layout?run=a&run=b``
    the places of the sites of one run, or of several together, as a ``GridView``.

A request that cannot be served gets ``{"error": "..."}`` and a fitting status.
"""

from collections.abc import Callable

from tensorboard.backend.experiment_id import WSGI_ENVIRON_KEY
from tensorboard.backend.http_util import Respond
from tensorboard.context import from_environ
from tensorboard.plugins.base_plugin import FrontendMetadata, TBContext, TBPlugin
from werkzeug import Request, Response

from rankflow.report.plugin.reading import EventReader
from rankflow.report.plugin.tags import PLUGIN_NAME
from rankflow.report.view.data import encode, view_grid, view_run
from rankflow.report.view.script import view_script

Answer = Callable[[Request, EventReader], object]


class RequestError(Exception):
    """A request that cannot be served, with the status to answer it by."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class RankFlowPlugin(TBPlugin):
    """The tab "Rank flow" of TensorBoard."""

    plugin_name = PLUGIN_NAME

    def __init__(self, tensorboard: TBContext) -> None:
        self._provider = tensorboard.data_provider

    def frontend_metadata(self) -> FrontendMetadata:
        """Tell where the script is, and the tab's name."""
        return FrontendMetadata(es_module_path="/index.js", tab_name="Rank flow")

    def is_active(self) -> bool:
        """Tell nothing: TensorBoard shows the tab once a file holds data of our name."""
        return False

    def get_plugin_apps(self) -> dict[str, Callable[..., object]]:
        """Return what answers each route."""
        return {
            "/index.js": _serve_script,
            "/runs": self._serve(tell_runs),
            "/events": self._serve(tell_events),
            "/layout": self._serve(tell_layout),
        }

    def _serve(self, answer: Answer) -> Callable[..., object]:
        @Request.application
        def serve(request: Request) -> Response:
            environ = request.environ
            experiment = environ.get(WSGI_ENVIRON_KEY, "")
            reader = EventReader(self._provider, from_environ(environ), experiment)
            try:
                return _respond(request, answer(request, reader))
            except RequestError as error:
                return _respond(request, {"error": str(error)}, error.status)

        return serve


def tell_runs(request: Request, reader: EventReader) -> object:
    """Answer ``/runs``."""
    runs = reader.runs().items()
    return {"runs": [{"name": name, "events": len(indices)} for name, indices in runs]}


def tell_events(request: Request, reader: EventReader) -> object:
    """Answer ``/events``.

    Raises:
        RequestError: The run is unknown, ``from`` is no count, or an event cannot be read.
    """
    name, first = request.args.get("run", ""), request.args.get("from", "0")
    if not first.isdecimal():
        raise RequestError(400, f"from = {first!r}: a whole number from 0 on was expected")
    indices = _find(reader.runs(), name)[int(first) :]
    try:
        return view_run(name, reader.events(name, indices))
    except ValueError as error:
        raise RequestError(500, f"run {name!r}: an event cannot be read: {error}") from error


def tell_layout(request: Request, reader: EventReader) -> object:
    """Answer ``/layout``.

    Raises:
        RequestError: No run is named, one is unknown, or its event cannot be read.
    """
    names = request.args.getlist("run")
    if not names:
        raise RequestError(400, "no run was named; ask for /layout?run=NAME")
    runs = reader.runs()
    try:
        firsts = [reader.events(name, _find(runs, name)[:1]) for name in names]
    except ValueError as error:
        raise RequestError(500, f"an event cannot be read: {error}") from error
    return view_grid(site for events in firsts for event in events for site in event.ranks)


def _find(runs: dict[str, list[int]], name: str) -> list[int]:
    if name not in runs:
        raise RequestError(404, f"run {name!r} has no events; there are {', '.join(runs)}")
    return runs[name]


@Request.application
def _serve_script(request: Request) -> Response:
    return Respond(request, view_script(), "text/javascript")


def _respond(request: Request, value: object, status: int = 200) -> Response:
    return Respond(request, encode(value), "application/json", code=status)
