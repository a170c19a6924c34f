"""kill -9 of cluster workers, twenty times at random: the run is that of one process, byte for byte."""

from __future__ import annotations

import os
import random
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from analysis.capture import capture
from analysis.cluster import Cluster, capture_on_cluster
from analysis.models import load_model
from analysis.verifying import verify_run
from tests.raylets import documents, saved, two_nodes
from tests.test_cluster import contents

KILLS = int(os.environ.get("ROUTERSCOPE_KILLS", "0"))
OPTIONS: dict[str, Any] = {"batch_size": 2, "part_tokens": 300}
pytestmark = [
    pytest.mark.skipif(find_spec("ray") is None, reason="no Ray: pip install -r requirements-cluster.txt"),
    pytest.mark.skipif(not KILLS, reason="takes minutes: make faults sets ROUTERSCOPE_KILLS=20"),
]


class Killer(threading.Thread):
    """Kills a random worker at a random moment after each stored part, so that a capture gets on, however slow the machine."""

    def __init__(self, seed: int) -> None:
        super().__init__(daemon=True)
        self.rng, self.killed, self.over, self.stored = random.Random(seed), 0, False, threading.Semaphore(0)

    def run(self) -> None:
        import psutil

        me = psutil.Process()
        while self.killed < KILLS and self.stored.acquire() and not self.over:
            while self.stored.acquire(blocking=False):  # parts stored since the last kill count once
                pass
            time.sleep(self.rng.random() * self.rng.choice((0.2, 3)))  # while a part is captured or written; while a model loads
            if not self.over and (busy := [p for p in me.children(recursive=True) if p.name().startswith("ray::Replica")]):
                self.rng.choice(busy).kill()
                self.killed += 1

    def stop(self) -> None:
        self.over = True
        self.stored.release()
        self.join()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_twenty_kills_lose_and_duplicate_nothing(tmp_path: Path) -> None:
    """Captures of the same text until twenty workers are dead, killed while a model loads, a part is captured or written."""
    model, texts = saved(tmp_path / "model"), documents(240, 160)
    capture(*load_model(model), texts, out=tmp_path / "alone", model_path=model, **OPTIONS)
    expected, killed, rounds, began = contents(tmp_path / "alone"), 0, 0, time.monotonic()
    with two_nodes():
        while killed < KILLS:
            killer, out = Killer(rounds), tmp_path / f"round-{rounds}"
            killer.start()
            capture_on_cluster(model, texts, out=out, cluster=Cluster(), progress=lambda _, k=killer: k.stored.release(), **OPTIONS)
            killer.stop()
            assert contents(out) == expected and verify_run(out) == ()
            rounds, killed = rounds + 1, killed + killer.killed
    print(f"{killed} workers killed in {rounds} captures of {len(expected)} files, {time.monotonic() - began:.0f} s")
