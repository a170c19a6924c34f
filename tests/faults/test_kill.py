"""kill -9 of a capturing process: nothing acknowledged is lost, and the resumed run equals an uninterrupted one."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from analysis.store import RunError, delete_run, open_run
from analysis.verifying import verify_run
from tests.synthetic import differences
from tests.writer import main as write_run

PARTS, KILLS = 12, 20
ROOT = Path(__file__).parent.parent.parent


def killed(folder: Path, after: int, delay: float) -> int:
    """Start the writer, kill it ``delay`` seconds after it acknowledged ``after`` more parts; parts acknowledged in all."""
    command = [sys.executable, "-m", "tests.writer", str(folder), str(PARTS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        lines = [line for line in (process.stdout.readline() for _ in range(after)) if line]
        time.sleep(delay)
        process.kill()
        lines += process.stdout.readlines()
    return int(lines[-1]) if lines else 0


def test_killed_at_random_points_resumes_to_the_same_run(tmp_path: Path) -> None:
    """20 kills, in runs that start anew when one got through; every one must leave a readable or a resumable folder."""
    write_run(tmp_path / "whole", PARTS)
    expected = open_run(tmp_path / "whole")
    rng, folder, acknowledged, interrupted = random.Random(7), tmp_path / "killed", 0, 0
    for _ in range(KILLS):
        after = rng.randrange(4)  # 0: while it starts, or resumes
        acknowledged = max(acknowledged, killed(folder, after, rng.random() * (0.03 if after else 0.6)))
        if (folder / "run.json").exists():
            assert differences(expected, open_run(folder)) == [] and verify_run(folder) == ()
            delete_run(tmp_path, "killed")
            acknowledged = 0
            continue
        interrupted += 1
        with pytest.raises(RunError, match=r"did not finish|no run\.json"):
            open_run(folder)
        records = len(list((folder / "progress").glob("part-*.json")))
        assert acknowledged <= records <= acknowledged + 1, "an acknowledged part was lost, or more than one ran ahead"
    assert interrupted >= KILLS // 2, "most kills came too late to interrupt anything: shorten the delay"
    if not (folder / "run.json").exists():
        write_run(folder, PARTS)
    assert differences(expected, open_run(folder)) == []
    assert verify_run(folder) == ()


def test_the_writer_does_not_import_torch() -> None:
    code = "import sys, tests.writer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
