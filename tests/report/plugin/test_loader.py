import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import entry_points

from tensorboard.plugins.base_plugin import TBContext

from rankflow.report.plugin.loader import RankFlowLoader
from rankflow.report.plugin.plugin import RankFlowPlugin

# What TensorBoard's process does, by its fast loader, where nothing heavy can be imported.
PROCESS = """
import json, sys, time
for name in ("torch", "transformers", "peft"):
    sys.modules[name] = None
from tensorboard.data.server_ingester import SubprocessServerDataIngester, get_server_binary
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.util.grpc_util import ChannelCredsType
from werkzeug.test import Client
from rankflow.report.plugin.loader import RankFlowLoader

ingester = SubprocessServerDataIngester(
    get_server_binary(), sys.argv[1], reload_interval=0, channel_creds_type=ChannelCredsType.LOCAL
)
ingester.start()
plugin = RankFlowLoader().load(TBContext(data_provider=ingester.data_provider))
apps = plugin.get_plugin_apps()
while not (runs := Client(apps["/runs"]).get("/").json["runs"]) or runs[0]["events"] < 300:
    time.sleep(0.1)
events = Client(apps["/events"]).get("/", query_string={"run": "run"}).json["events"]
script = Client(apps["/index.js"]).get("/").text
print(json.dumps([[event["index"] for event in events], len(script)]))
"""


def test_tensorboard_finds_the_loader_by_its_entry_point():
    (found,) = entry_points(group="tensorboard_plugins", name="rankflow")
    assert found.load() is RankFlowLoader


def test_a_process_without_torch_serves_all_events(tmp_path, event, write):
    write(tmp_path / "run", [replace(event, index=i) for i in range(300)])
    result = subprocess.run(
        [sys.executable, "-c", PROCESS, str(tmp_path)],
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    indices, length = json.loads(result.stdout)
    assert indices == list(range(300))
    assert length > 10_000


def test_the_plugin_is_loaded():
    assert isinstance(RankFlowLoader().load(TBContext()), RankFlowPlugin)


def test_whatever_is_wrong_with_the_plugin_costs_only_its_tab(monkeypatch, caplog):
    def fail(self, context):
        raise ZeroDivisionError("no")

    for broken in ("missing", "failing"):
        with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
            if broken == "missing":
                patch.setitem(sys.modules, "rankflow.report.plugin.plugin", None)
            else:
                patch.setattr(RankFlowPlugin, "__init__", fail)
            assert RankFlowLoader().load(TBContext()) is None
    assert [record.args[0] for record in caplog.records] == [
        "ModuleNotFoundError",
        "ZeroDivisionError",
    ]
