"""Takes the README's pictures: ``python -m tests.screenshots docs`` serves the app and photographs each page."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parent.parent
PAGES = ("overview", "tokens", "load", "runs")
QUIET = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync"
).split()


@contextmanager
def served() -> Iterator[str]:
    """Serve the app on a free port with an empty folder of runs; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", "app/serve.py", "--server.port", str(port)]
    with tempfile.TemporaryDirectory() as runs:
        process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "ROUTERSCOPE_RUNS": runs})
        try:
            _wait(f"http://127.0.0.1:{port}/_stcore/health", process)
            yield f"http://localhost:{port}"
        finally:
            process.terminate()
            process.wait(20)


def _wait(address: str, process: subprocess.Popen[bytes], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            urlopen(address, timeout=2)
            return
        except (URLError, ConnectionError):
            time.sleep(0.2)
    raise SystemExit(f"the app did not answer at {address} within {seconds:.0f} s (exit {process.poll()})")


def photograph(page: Page, address: str, target: Path) -> None:
    """Open a page, wait until its script has ended without an error box, and save the picture."""
    page.goto(address)
    page.locator("[data-testid=stApp][data-test-script-state=notRunning]").wait_for(timeout=60_000)
    page.locator("[data-testid=stMain] h1, [data-testid=stMain] h2").first.wait_for(timeout=60_000)
    page.wait_for_timeout(2_500)  # charts are drawn after the script has ended, and nothing says when
    if page.locator("[data-testid=stException]").count():
        raise SystemExit(f"{address} shows an error; no picture taken")
    page.screenshot(path=target)
    print(f"{target}  {target.stat().st_size / 1024:.0f} kB")


def main(folder: Path) -> None:
    """Photograph every page, light, and the overview dark."""
    folder.mkdir(parents=True, exist_ok=True)
    chromium = os.environ.get("CHROMIUM", "/usr/bin/chromium")
    with served() as address, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=QUIET)
        shots = [(name, "light", name) for name in PAGES] + [("overview", "dark", "overview-dark")]
        for name, scheme, file in shots:
            page = browser.new_page(viewport={"width": 1280, "height": 860}, color_scheme=scheme)  # type: ignore[arg-type]
            photograph(page, f"{address}/" if name == "overview" else f"{address}/{name}", folder / f"{file}.png")
            page.close()
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs"))
