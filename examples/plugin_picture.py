"""Draw the picture of the view in the README: a run's report, as Chromium shows it.

    rankflow train examples/quickstart/run.toml
    python examples/plugin_picture.py runs/quickstart examples/rank_flow.png

It needs Playwright for Python (extra `test`) and Chromium (Debian's package `chromium`).
"""

import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from playwright.sync_api import sync_playwright

from rankflow.report.events import read_run
from rankflow.report.view.page import report_runs

SIZE = {"width": 1200, "height": 700}
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


def main(run: str, picture: str) -> None:
    """Show the run half way, and point at the deepest of the sites whose rank moves most often."""
    events = read_run(run)
    half = len(events) // 2
    moves = Counter(s for e in events for s in reversed(e.ranks) if e.ranks[s] != e.ranks_before[s])
    site, _ = max(moves.items(), key=lambda item: (item[1], list(events[0].ranks).index(item[0])))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page_file = report_runs([Path(run)], Path(folder) / "report.html")
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=ARGUMENTS
        )
        page = browser.new_page(viewport=SIZE, device_scale_factor=2, color_scheme="light")
        page.goto(page_file.as_uri())
        page.locator('input[name="at"]').fill(str(half))
        page.locator(f'[data-site="{site}"]').hover()
        page.screenshot(path=picture)
        browser.close()


if __name__ == "__main__":
    arguments = sys.argv[1:] or ["runs/quickstart", "rank_flow.png"]
    main(*arguments)
