"""Real runs, TensorBoard over them, and a browser to look at both."""

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

import rankflow as rf
from rankflow.records import RankEvent
from rankflow.report.events import EventLog, read_run
from rankflow.report.tensorboard import TensorBoardSink

QUIET = ("no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync")
QUIET += ("disable-background-networking", "disable-component-update")
TARGETS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj", "lm_head"]


@dataclass(frozen=True)
class TrainedRun:
    """A folder that a run left, and the events in its log."""

    folder: Path
    events: list[RankEvent]


@dataclass(frozen=True)
class View:
    """The view within a page or within a frame of one."""

    root: Any  # a page, or a frame of one

    def cell(self, site: str):
        return self.root.locator(f'[data-site="{site}"]')

    def texts(self) -> dict[str, str]:
        return self.read("cell.textContent")

    def colours(self) -> dict[str, str]:
        return self.read("getComputedStyle(cell).backgroundColor")

    def read(self, expression: str) -> dict[str, str]:
        """The value of an expression over each site's cell, by site name."""
        script = f"cells => cells.map((cell) => [cell.dataset.site, {expression}])"
        return dict(self.root.locator("[data-site]").evaluate_all(script))

    def wait_for_events(self, count: int) -> None:
        from playwright.sync_api import expect

        expect(self.slider("at")).to_have_attribute("max", str(count - 1), timeout=30_000)

    def dotted(self) -> set[str]:
        return {site for site, dot in self.read("cell.dataset.magnitude").items() if dot == "on"}

    def ground(self) -> str:
        return self.root.locator("[data-ground]").get_attribute("data-ground")

    def slider(self, name: str):
        return self.root.locator(f'input[name="{name}"]')

    def move(self, at: int, name: str = "at") -> None:
        self.slider(name).fill(str(at))

    def show(self, quantity: str) -> None:
        self.root.locator(f'input[value="{quantity}"] + span').click()

    def compare(self, choice: str) -> None:
        self.choose("compare", choice)

    def choose(self, name: str, choice: str) -> None:
        self.root.locator(f'select[name="{name}"]').select_option(choice)
        self.root.locator('[aria-busy="false"]').wait_for()

    def hover(self, site: str) -> dict[str, str]:
        """Point at a cell, and return the fields of the card."""
        self.cell(site).hover()
        return self.card()

    def card(self) -> dict[str, str]:
        fields = self.root.locator('[role="tooltip"] [data-field]').all()
        return {field.get_attribute("data-field"): field.inner_text() for field in fields}

    def field(self, name: str) -> str:
        return self.root.locator(f'.panel [data-field="{name}"]').inner_text()

    @staticmethod
    def number(text: str) -> float:
        """The number that a text shows: digits are grouped, and the minus is a long one."""
        plain = re.sub("[,+]", "", text).replace("\N{MINUS SIGN}", "-").replace("∞", "inf")
        return float(plain)


def train(folder, targets, seed):
    """Train DoRA on a tiny Llama, magnitudes and components under one budget."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=13,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
    )
    adapter = peft.LoraConfig(r=4, use_dora=True, target_modules=targets)
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), adapter)
    flow = rf.RankFlow(model, rf.load_budget("hybrid", rank=2, every=4), total_steps=60)
    board = TensorBoardSink(folder / "rankflow")
    flow.sinks = [EventLog(folder / "events.jsonl"), board]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(60):
        tokens = torch.randint(13, (8, 12))
        model(input_ids=tokens, labels=tokens.sort().values).loss.backward()
        flow.observe()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        flow.step(optimizer)
    board.close()
    return TrainedRun(folder, read_run(folder))


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """Two runs in one folder, of which "less" lacks the sites of o_proj."""
    folder = tmp_path_factory.mktemp("runs")
    fewer = [target for target in TARGETS if target != "o_proj"]
    return train(folder / "all", TARGETS, 0), train(folder / "less", fewer, 1)


@pytest.fixture(scope="session")
def chromium():
    """A browser; a test that was asked for fails where there is none."""
    path = shutil.which("chromium")
    if path is None:
        pytest.fail("no chromium here; Debian's package is called chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = [f"--{argument}" for argument in QUIET]
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium):
    """Open an address in a window of its own, which must end without an error in its console."""
    pages, errors = [], []

    def open_address(address, **options):
        page = chromium.new_page(**({"viewport": {"width": 1280, "height": 800}} | options))
        page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        pages.append(page)
        return page

    yield open_address
    for page in pages:
        page.close()
    assert errors == []


@pytest.fixture
def look():
    """Look at the view of a page."""
    return View


@pytest.fixture
def open_tab(open_page):
    """Open the tab of a TensorBoard, and return the view and the page around it."""

    def open_address(address, **options):
        page = open_page(f"{address}#rankflow", **options)
        view = View(page.frame_locator('iframe[src*="name=rankflow"]'))
        view.slider("at").wait_for(timeout=60_000)
        return view, page

    return open_address


@pytest.fixture(scope="session")
def serve():
    """Start TensorBoard over a folder on a free port, and return its address."""
    started = []

    def start(folder):
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder)]
        options = ["--port", "0", "--reload_interval", "1"]
        process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
        started.append(process)
        for line in process.stderr:
            if found := re.search(r"http://\S+", line.replace("https://github", "")):
                return found[0]
        pytest.fail("TensorBoard did not start")

    yield start
    for process in started:
        process.terminate()
        process.communicate()
