"""Server time of every page on a stored run, first and second view, and until the first one answers: python -m tests.bench.bench_pages [FOLDER [page ...]]

Each page in a process of its own, which has shown the same page of the demo run before and has its kernels loaded, as a server has 5 s
after its first page: a server that is up, but has not seen the run. The first view opens the run and counts; the second follows at once. CPU and wall seconds, and the peak of memory. It has answered when its
first heading below the title and its first figure, or table, were sent; a heading that ends in an ellipsis only says what is being counted.
Without FOLDER, a run of 1e7 decisions is made up for it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from streamlit.runtime.forward_msg_queue import ForwardMsgQueue
from streamlit.testing.v1 import AppTest

from analysis import policies, shuffling
from tests.bench.bench_scale import write_run
from tests.bench.bench_stats import peak_memory

ROOT = Path(__file__).parent.parent.parent
PAGES = ("overview", "tokens", "load", "capacity", *(f"specialization?by={x}" for x in ("label", "class", "position", "token", "pairs", "flow")),
         "expert", "model", "runs", "glossary")  # fmt: skip


def view(page: str, run: str) -> AppTest:
    """One view by a new session."""
    name, _, choice = page.partition("?by=")
    test = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=600)
    test.query_params["run"] = run
    if choice:
        test.query_params["by"] = choice
    if name != "overview":
        test.switch_page(f"views/{name}.py")
    test.run()
    if test.exception:
        raise RuntimeError(f"{page}: {test.exception[0].message}")
    return test


def told(element: Any) -> str:
    """What an element adds to a page's answer: its "heading", its "figure", or nothing."""
    kind = element.WhichOneof("type")
    if kind in ("plotly_chart", "dataframe", "table", "bidi_component"):
        return "figure"
    said = element.markdown.body if kind == "markdown" else f"{element.heading.tag}{element.heading.body}" if kind == "heading" else ""
    return "heading" if said.startswith(("## ", "h2")) and not said.endswith("…") else ""


def answered(show: Callable[[], object]) -> float | None:
    """Wall seconds until a page has sent its first heading and its first figure; None where it has not both."""
    sent: dict[str, float] = {}
    start, enqueue = time.perf_counter(), ForwardMsgQueue.enqueue

    def watched(queue: ForwardMsgQueue, message: Any) -> None:
        if message.HasField("delta") and message.delta.HasField("new_element"):
            sent.setdefault(told(message.delta.new_element), time.perf_counter() - start)
        enqueue(queue, message)

    with patch.object(ForwardMsgQueue, "enqueue", watched):
        show()
    return max(sent["heading"], sent["figure"]) if {"heading", "figure"} <= sent.keys() else None


def measure(page: str, run: str) -> dict[str, float | None]:
    """Seconds of the first and the second view, and MB."""
    view(page, "demo-run")
    policies.warm_up()
    shuffling.warm_up()
    figures: dict[str, float | None] = {}
    for name in ("first", "second"):
        cpu, wall = time.process_time(), time.perf_counter()
        figures[f"{name} answered"] = answered(lambda: view(page, run))
        figures |= {f"{name} cpu": time.process_time() - cpu, f"{name} wall": time.perf_counter() - wall}
    return figures | {"MB": peak_memory()}


def main(folder: Path, pages: list[str]) -> None:
    environment = {**os.environ, "ROUTERSCOPE_RUNS": str(folder.resolve().parent)}
    print("| page | answered, wall s | first view, CPU s (wall) | second view, CPU s (wall) | peak MB |\n|---|---|---|---|---|")
    for page in pages or PAGES:
        command = [sys.executable, "-m", "tests.bench.bench_pages", "--one", page, folder.name]
        said = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        if said.returncode:
            print(f"| {page} | failed: {said.stderr.strip().splitlines()[-1]} | | | |")
            continue
        f = json.loads(said.stdout.splitlines()[-1])
        when = "–" if f["first answered"] is None else f"{f['first answered']:.2f}"
        print(
            f"| {page} | {when} | {f['first cpu']:.2f} ({f['first wall']:.2f}) | {f['second cpu']:.2f} ({f['second wall']:.2f}) | {f['MB']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        print(json.dumps(measure(sys.argv[2], sys.argv[3])))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            if len(sys.argv) == 1:
                write_run(Path(scratch) / "made-up", (64, 8, 16), 10**7)
            main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(scratch) / "made-up", sys.argv[2:])
