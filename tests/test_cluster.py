"""Capture and statistics on two real Ray nodes: the same files as in one process, also where a worker is killed."""

from __future__ import annotations

import builtins
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from analysis import places
from analysis.__main__ import main
from analysis.capture import CaptureCancelled, CaptureError, PromptTooLong, capture, plan_parts
from analysis.cluster import Cluster, ClusterError, _Crew, capture_on_cluster, statistics_on_cluster
from analysis.copying import copy_run
from analysis.files import stamp
from analysis.models import ModelError, load_model
from analysis.places import Place, digest
from analysis.stats import merge_statistics
from analysis.store import RunError, open_run, read_manifest
from analysis.verifying import count_part, verify_run
from analysis.writing import CAPTURE

from . import tiny
from .conftest import ROOT
from .raylets import documents, saved, two_nodes
from .s3server import CREDENTIALS, bucket

TEXTS = documents(24)
LABELS = ["x", None, "y"] * 8
OPTIONS: dict[str, Any] = {"batch_size": 3, "part_tokens": 80}
pytestmark = pytest.mark.timeout(1200)  # every replica imports torch anew: with ten times as much work as cores, minutes each


@pytest.fixture(scope="module")
def nodes() -> Iterator[str]:
    if find_spec("ray") is None:
        pytest.skip("no Ray: pip install -r requirements-cluster.txt")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():  # of the nodes, which take them from here
            patch.setenv(name, value)
        with two_nodes() as address:
            yield address


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as one process records it."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    capture(*load_model(model), TEXTS, labels=LABELS, out=out, model_path=model, **OPTIONS)
    return out


def spread(model: Path, out: Path | str, texts: list[str] = TEXTS, **given: Any) -> Any:
    return capture_on_cluster(model, texts, out=out, cluster=given.pop("cluster", Cluster()), **{"labels": LABELS, **OPTIONS, **given})


def contents(run: Path) -> dict[str, bytes]:
    """Every file of a run; of the manifest all but when it was made and in what time."""
    files = {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file()}
    files["run.json"] = b"\n".join(x for x in files["run.json"].split(b"\n") if b'"created"' not in x and b'"seconds"' not in x)
    return files


def test_every_file_equals_that_of_one_process(nodes: str, model: Path, alone: Path, tmp_path: Path) -> None:
    seen: list[Any] = []
    trace = spread(model, tmp_path / "spread", progress=seen.append)
    assert contents(tmp_path / "spread") == contents(alone) and len(trace.options) == len(OPTIONS) + 1
    assert len(list((alone / "routing").iterdir())) == len(seen) >= 8
    assert [p.documents for p in seen] == sorted(p.documents for p in seen) and seen[-1].documents == seen[-1].total == len(TEXTS)
    assert seen[-1].tokens == trace.n_tokens("decoder")


def test_without_weights_files_equal_those_of_one_process(nodes: str, model: Path, tmp_path: Path) -> None:
    given = {**OPTIONS, "weights": "none"}
    capture(*load_model(model), TEXTS[:9], labels=LABELS[:9], out=tmp_path / "alone", model_path=model, **given)
    spread(model, tmp_path / "spread", TEXTS[:9], labels=LABELS[:9], weights="none")
    assert contents(tmp_path / "spread") == contents(tmp_path / "alone") and verify_run(tmp_path / "spread") == ()
    assert main(["stats", str(tmp_path / "spread"), "--cluster", nodes]) == 0  # counted again without weights


def test_two_streams_equal_those_of_one_process(nodes: str, tmp_path: Path) -> None:
    model = saved(tmp_path / "model", "switch_transformers")
    capture(*load_model(model), TEXTS[:6], labels=LABELS[:6], out=tmp_path / "alone", model_path=model, **OPTIONS)
    spread(model, tmp_path / "spread", TEXTS[:6], labels=LABELS[:6])
    assert contents(tmp_path / "spread") == contents(tmp_path / "alone")


class Killed:
    """Kills one worker, half way."""

    def __init__(self) -> None:
        self.pids: list[int] = []

    def one(self, progress: Any) -> None:
        import psutil

        if not self.pids and progress.documents > 3:
            busy = [p for p in psutil.Process().children(recursive=True) if p.name().startswith("ray::Replica")]
            busy[0].kill()
            self.pids.append(busy[0].pid)


def test_a_killed_worker_loses_and_duplicates_nothing(nodes: str, model: Path, alone: Path, tmp_path: Path) -> None:
    killed = Killed()
    spread(model, tmp_path / "spread", progress=killed.one)
    assert killed.pids and not Path(f"/proc/{killed.pids[0]}").exists()
    assert contents(tmp_path / "spread") == contents(alone) and verify_run(tmp_path / "spread") == ()


def test_cancelled_and_resumed_by_whom_ever(nodes: str, model: Path, alone: Path, tmp_path: Path) -> None:
    seen: list[Any] = []
    with pytest.raises(CaptureCancelled):
        spread(model, tmp_path / "spread", progress=seen.append, cancelled=lambda: len(seen) >= 3)
    stored = len(list((tmp_path / "spread/progress").glob("part-*.json")))
    assert 3 <= stored < 8 and not (tmp_path / "spread/run.json").exists()
    with pytest.raises(RunError, match="other texts"):
        spread(model, tmp_path / "spread", ["other", *TEXTS[1:]])
    seen.clear()
    again = tmp_path / "one"
    shutil.copytree(tmp_path / "spread", again)
    spread(model, tmp_path / "spread", progress=seen.append)
    assert seen[0].documents > 3 and contents(tmp_path / "spread") == contents(alone)
    capture(*load_model(model), TEXTS, labels=LABELS, out=again, model_path=model, **OPTIONS)
    assert contents(again) == contents(alone)


def test_cancelled_while_texts_are_planned(nodes: str, model: Path, tmp_path: Path) -> None:
    """Workers that load a model take seconds before they plan; asked again after 0.2 s, the capture ends before a run is begun."""
    asked = iter([False, False])
    with pytest.raises(CaptureCancelled):
        spread(model, tmp_path / "spread", cancelled=lambda: next(asked, True))
    assert not (tmp_path / "spread").exists()


def test_to_an_object_store_also_where_a_worker_is_killed(nodes: str, model: Path, alone: Path, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Workers bring the parts there; through this process go documents and statistics alone."""
    killed, seen = Killed(), []
    copy = places.copy_file

    def noting(from_: Any, source: str, to: Any, target: str) -> None:
        seen.append(source)
        copy(from_, source, to, target)

    with bucket() as addresses:
        out = addresses % "spread"
        with monkeypatch.context() as patch:
            patch.setattr(places, "copy_file", noting)
            trace = spread(model, out, progress=killed.one)
        assert trace.tokens.equals(open_run(alone).tokens) and verify_run(out) == ()
        assert killed.pids and not Path(f"/proc/{killed.pids[0]}").exists()
        place = Place.of(out)
        assert place.sizes().keys() == contents(alone).keys()
        assert {d: digest(place.filesystem, f"{place.path}/{d}") for d in contents(alone) if d != "run.json"} == {
            d: stamp(alone / d)["sha256"] for d in contents(alone) if d != "run.json"
        }
        assert len(seen) > 8 and not [s for s in seen if "/tokens/" in s or "/routing/" in s or "/scores/" in s]
        with pytest.raises(RunError, match="spread is a finished run"):
            spread(model, out)
        copy_run(out, str(tmp_path / "back"))
    assert contents(tmp_path / "back") == contents(alone) and verify_run(tmp_path / "back") == ()


def test_a_cancelled_capture_to_an_object_store_resumes(nodes: str, model: Path, alone: Path, tmp_path: Path) -> None:
    seen: list[Any] = []
    with bucket() as addresses:
        out = addresses % "spread"
        with pytest.raises(CaptureCancelled):
            spread(model, out, progress=seen.append, cancelled=lambda: len(seen) >= 3)
        there = Place.of(out).sizes()
        assert 3 <= sum(n.startswith("progress/part-") for n in there) < 8 and "run.json" not in there
        with pytest.raises(RunError, match="other texts"):
            spread(model, out, ["other", *TEXTS[1:]])
        seen.clear()
        spread(model, out, progress=seen.append)
        assert seen[0].documents > 3
        copy_run(out, str(tmp_path / "back"))
    assert contents(tmp_path / "back") == contents(alone)


def test_statistics_over_parts_equal_those_counted_here(nodes: str, alone: Path) -> None:
    parts = read_manifest(alone)["parts"]
    assert len(parts) > 3
    expected = merge_statistics(count_part(Place.of(alone), open_run(alone), part) for part in parts)
    with bucket() as addresses:
        copy_run(str(alone), addresses % "alone")
        for run in (alone, addresses % "alone"):
            found = statistics_on_cluster(run, Cluster())
            assert all(getattr(found, t).equals(getattr(expected, t)) for t in ("core", "by_token", "by_document"))


def test_the_command_line(nodes: str, model: Path, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                          monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    out = tmp_path / "run"
    assert main(["capture", "--model", str(model), "--text", "Il pleut", "--out", str(out), "--cluster", "auto", "--workers", "1"]) == 0
    assert "8 decoder tokens" in capsys.readouterr().err and verify_run(out) == ()
    assert main(["stats", str(out), "--cluster", "auto"]) == 0
    assert "on the cluster: equal to the stored statistics" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr("analysis.cluster.statistics_on_cluster", lambda *_: open_run(alone).stats)
        assert main(["stats", str(out), "--cluster", "auto"]) == 2
    assert "its statistics are not those of its decisions" in capsys.readouterr().err
    with bucket() as addresses:
        address = addresses % "run"
        assert main(["capture", "--model", str(model), "--text", "Il pleut", "--out", address, "--cluster", "auto", "--workers", "1"]) == 0
        assert "8 decoder tokens" in capsys.readouterr().err
        assert main(["stats", address, "--cluster", "auto"]) == 0
        copy_run(address, str(tmp_path / "back"))
    assert contents(tmp_path / "back") == contents(out)


def test_what_a_node_raises_is_raised_here(nodes: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(PromptTooLong, match="document 2 has 300 tokens"):
        spread(model, tmp_path / "a", ["fine", "x" * 300], labels=None)
    with pytest.raises(CaptureError, match="texts, labels and names differ in number"):  # of what the last replica to plan was given
        spread(model, tmp_path / "a", TEXTS, labels=[*LABELS, "one more"])
    with pytest.raises(ModelError, match="no model at"):
        spread(tmp_path / "nowhere", tmp_path / "b")
    with pytest.raises(ClusterError, match="room for 2 replicas of 1 CPUs"):
        spread(model, tmp_path / "c", cluster=Cluster(replicas=3))
    with pytest.raises(ClusterError, match="room for 0 replicas of 1 CPUs and 1 GPUs"):
        spread(model, tmp_path / "d", cluster=Cluster(gpus=1))
    with pytest.raises(ClusterError, match="not known beforehand"):
        spread(model, tmp_path / "e", new_tokens=3)


def test_nodes_whose_models_differ_are_refused(nodes: str, model: Path, tmp_path: Path) -> None:
    """Two replicas on two nodes: the second one's folder, which would be a stale copy, has other weights."""
    import ray

    stale = saved(tmp_path / "stale")
    tiny.build("olmoe", seed=1).save_pretrained(stale)
    mine, other = (_Crew(ray, Cluster(), folder, {}) for folder in (model, stale))
    try:
        mine.grow(1)
        other.grow(1)
        card, documents = mine.plan(TEXTS[:1], None, None, None, None)
        mine.actors += other.actors
        with pytest.raises(ClusterError, match="different weights or tokenizers in the model's folder"):
            mine.plan(TEXTS, LABELS, None, None, None)
        [part] = plan_parts(documents, 80)
        (tmp_path / CAPTURE).parent.mkdir()
        (tmp_path / CAPTURE).touch()
        with pytest.raises(ClusterError, match="has other weights or another tokenizer in stale"):  # a node that came after the plan
            other.capture([(part, card, TEXTS[:1], str(tmp_path), {})], [part], None, None)
    finally:
        mine.dismiss()
        other.dismiss()


def test_a_cluster_started_here_listens_on_loopback_alone() -> None:
    """Sockets of every process that Ray starts for ``--cluster auto``, workers included. In a process of its own: this one is connected."""
    pytest.importorskip("ray", reason="no Ray: pip install -r requirements-cluster.txt")
    code = """
import os, psutil, ray
from analysis.cluster import _start_here
_start_here(ray, {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False})
assert ray._private.ray_constants.ENABLE_RAY_CLUSTER and "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in os.environ
ray.get(ray.remote(num_cpus=1)(lambda: None).remote())
for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
    for socket in process.net_connections("inet"):
        print(process.name(), socket.status, socket.laddr.ip)
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=True)
    found = [line.split() for line in done.stdout.splitlines()]
    listening = {name for name, status, _ in found if status in ("LISTEN", "NONE")}
    assert {"gcs_server", "raylet"} <= listening and len(listening) > 3
    assert {address.removeprefix("::ffff:") for *_, address in found} == {"127.0.0.1"}


def test_without_ray_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def refuse(name: str, *given: Any, **named: Any) -> Any:
        if name == "ray":
            raise ImportError(name)
        return real(name, *given, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ClusterError, match="pip install -r requirements-cluster.txt"):
        spread(tmp_path, tmp_path / "run")


@pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray")
@pytest.mark.parametrize("address", ["127.0.0.1:1", "localhost:1", "256.1.1.1:99999", "[::1]:1"])
def test_an_address_where_nothing_listens_is_said_at_once(address: str) -> None:
    """Ray itself tries for minutes, and fills the terminal with its log."""
    command = [sys.executable, "-m", "analysis", "stats", "data/demo-run", "--cluster", address]  # a process that is in no cluster yet
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90)
    assert done.returncode == 2 and done.stderr.startswith(f"error: no cluster answers at '{address}': nothing listens there")
