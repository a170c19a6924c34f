"""Parts brought to an object store by the code that a cluster's workers and its driver run, here in one process and without Ray."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from analysis import cluster, places
from analysis.__main__ import main
from analysis.capture import CaptureError, PlannedPart, capture, plan_parts
from analysis.cluster import Replica
from analysis.copying import copy_run
from analysis.files import scratch
from analysis.models import load_model
from analysis.places import Place
from analysis.store import RunError, open_run, read_manifest
from analysis.trace import ModelCard
from analysis.verifying import same_counts, verify_run
from analysis.writing import RunWriter

from .conftest import ROOT
from .raylets import documents, saved
from .s3server import CREDENTIALS, bucket
from .test_cluster import contents

TEXTS = documents(12)
OPTIONS: dict[str, Any] = {"batch_size": 3, "part_tokens": 80}
Planned = tuple[Replica, ModelCard, list[PlannedPart]]


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch, bucket() as addresses:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        yield addresses


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def planned(model: Path) -> Planned:
    replica = Replica(model, {}, 1)
    card, texts = replica.plan(TEXTS)
    return replica, card, plan_parts(texts, 80)


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "alone"
    capture(*load_model(model), TEXTS, out=out, model_path=model, **OPTIONS)
    return out


@pytest.fixture(autouse=True)
def own_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of scratch folders, which every test leaves empty."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


def captured(planned: Planned, where: str, wanted: range) -> None:
    replica, card, plan = planned
    for p in (plan[i] for i in wanted):
        replica.capture(p, card, TEXTS[p.first_document : p.first_document + len(p.documents)], where, OPTIONS)


def test_parts_that_are_half_there_are_none(
    s3: str, planned: Planned, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted capture keeps its whole parts; a part whose record, or one of whose files, is not there is captured again."""
    where, (_, card, plan) = s3 % "resumed", planned
    place, n, store = Place.of(where), len(plan), Place.store
    assert n >= 4

    def stopped(self: Place, folder: Path, *names: str) -> None:
        if names[0] == "progress/part-00002.json":
            raise KeyboardInterrupt
        store(self, folder, *names)

    with RunWriter.open(where, card, OPTIONS) as writer, monkeypatch.context() as patch:
        patch.setattr(Place, "store", stopped)
        with pytest.raises(KeyboardInterrupt):
            captured(planned, where, range(n))
        assert writer.refresh().keys() == {0, 1} and place.holds("routing/part-00002.parquet")
        place.filesystem.delete_file(f"{place.path}/routing/part-00001.parquet")
        assert writer.refresh().keys() == {0}
    with pytest.raises(RunError, match="used other options"):
        RunWriter.open(where, card, {**OPTIONS, "batch_size": 2})
    with RunWriter.open(where, card, OPTIONS) as writer:
        assert (writer.parts, writer.documents) == (1, len(plan[0].documents))
        captured(planned, where, range(1, n))
        assert len(writer.refresh()) == n
        writer.finish()
    assert set(place.sizes()) == set(contents(alone))
    copy_run(where, str(tmp_path / "back"))
    assert contents(tmp_path / "back") == contents(alone) and verify_run(tmp_path / "back") == ()
    with pytest.raises(RunError, match="resumed is a finished run"):
        RunWriter.open(where, card, OPTIONS)


def test_files_of_no_part_go_from_an_address_too(s3: str, planned: Planned) -> None:
    place, last = Place.of(s3 % "fewer"), len(planned[2]) - 1
    with RunWriter.open(place.address, planned[1], OPTIONS) as writer:
        captured(planned, place.address, range(last + 1))
        place.filesystem.delete_file(f"{place.path}/progress/part-{last:05d}.json")  # never whole, and now of no text
        writer.refresh()
        writer.finish()
    assert verify_run(place.address) == () and len(read_manifest(place)["parts"]) == last > 0
    other = Place.of(s3 % "other")
    with other.filesystem.open_output_stream(f"{other.path}/routing/mine.parquet") as out:
        out.write(b"x")
    with pytest.raises(RunError, match="such as routing/mine.parquet: choose another name"):
        RunWriter.open(other.address, planned[1], OPTIONS)


def test_a_byte_changed_on_the_way_is_no_part(s3: str, planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = places.copy_file

    def damaging(from_: Any, source: str, to: Any, target: str) -> None:
        copy(from_, source, to, target)
        if target.endswith("scores/part-00000.parquet"):
            with to.open_output_stream(target) as out:
                out.write(Path(source).read_bytes()[:-1] + b"?")

    monkeypatch.setattr(places, "copy_file", damaging)
    with RunWriter.open(s3 % "damaged", planned[1], OPTIONS) as writer:
        with pytest.raises(RunError, match=r"scores/part-00000\.parquet arrived in damaged with another sha256"):
            captured(planned, s3 % "damaged", range(1))
        assert writer.refresh() == {}


def test_the_same_capture_in_a_folder_needs_no_scratch(planned: Planned, alone: Path, tmp_path: Path) -> None:
    out = f"file://{tmp_path}/run"
    with RunWriter.open(out, planned[1], OPTIONS) as writer:
        captured(planned, out, range(len(planned[2])))
        writer.refresh()
        writer.commit()
    assert contents(tmp_path / "run") == contents(alone)


def test_a_part_is_written_while_the_next_is_captured(
    planned: Planned, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a cluster asks a replica from two threads; at the model itself parts take turns."""
    out, write, capture_it = tmp_path / "run", cluster.write_part, Replica._captured
    after, at_the_model, most = threading.Event(), [], []

    def writing(place: Place, part: Any, layers: Any) -> None:
        if part.index:
            after.set()
        elif not after.wait(60):
            raise TimeoutError("nothing was captured while part 0 was written")
        write(place, part, layers)

    def capturing(*given: Any) -> Any:
        at_the_model.append(1)
        most.append(len(at_the_model))
        part = capture_it(*given)
        at_the_model.pop()
        return part

    monkeypatch.setattr(cluster, "write_part", writing)
    monkeypatch.setattr(Replica, "_captured", capturing)
    with RunWriter.open(out, planned[1], OPTIONS) as writer:
        with ThreadPoolExecutor(cluster.AT_ONCE) as pool:
            list(pool.map(lambda i: captured(planned, str(out), range(i, i + 1)), range(len(planned[2]))))
        writer.refresh()
        writer.commit()
    assert set(most) == {1} and contents(out) == contents(alone)


def test_scratch_of_a_killed_process_goes_with_the_next_one(own_scratch: Path) -> None:
    code = "import sys, time; from analysis.files import scratch\nwith scratch() as f: (f / 'text').write_text('x'); print(f, flush=True); time.sleep(99)"
    environment = {**os.environ, "TMPDIR": str(own_scratch)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment) as other:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        with scratch() as mine:
            assert mine != theirs and (theirs / "text").exists()  # it lives
        other.send_signal(signal.SIGKILL)
    with scratch() as mine:
        assert list(own_scratch.iterdir()) == [mine]


@pytest.fixture(scope="module")
def there(s3: str, alone: Path) -> str:
    """The address of a copy of ``alone``."""
    copy_run(str(alone), s3 % "there")
    return s3 % "there"


def test_a_run_is_read_where_it_lies(there: str, alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a folder gives comes from an address too, and no file before something in it is asked for."""
    read, file = [], Place.file
    monkeypatch.setattr(Place, "file", lambda self, name: read.append(name) or file(self, name))
    here, far = open_run(alone), open_run(there)
    assert far.name == "there" and here.model == far.model and here.documents.equals(far.documents)
    assert not [n for n in read if "/" in n]
    start, stop = 70, 210  # across parts
    for i in range(len(here.layers)):
        a, b = here.routing(i, start, stop), far.routing(i, start, stop)
        assert a.experts.tolist() == b.experts.tolist() and a.weights.tobytes() == b.weights.tobytes()
        assert here.scores(i, start, stop).entropy.tobytes() == far.scores(i, start, stop).entropy.tobytes()
        assert here.stats.load(i).tolist() == far.stats.load(i).tolist()
    assert far.tokens.equals(here.tokens) and same_counts(here.stats, far.stats) and verify_run(there) == ()


def test_only_the_ranges_asked_for_come_here(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few rows of a site are a fraction of the file, fetched in a few requests: the footer, and the columns together."""
    asked: list[int] = []

    class Noting(io.RawIOBase):
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def read(self, size: int = -1) -> bytes:
            asked.append(size)
            return bytes(self.inner.read(size))

        def readable(self) -> bool:
            return True

        def seekable(self) -> bool:
            return True

        def seek(self, at: int, whence: int = 0) -> int:
            return int(self.inner.seek(at, whence))

        def tell(self) -> int:
            return int(self.inner.tell())

    file = Place.file
    copy_run(str(ROOT / "data/demo-run"), s3 % "demo")
    far = open_run(s3 % "demo")
    monkeypatch.setattr(Place, "file", lambda self, name: pa.PythonFile(Noting(file(self, name)), mode="r"))
    for kind, read in (("scores", far.scores), ("routing", far.routing)):
        size = (ROOT / f"data/demo-run/{kind}/part-00000.parquet").stat().st_size
        asked.clear()
        read(0, 0, 10)
        assert 0 < sum(asked) < size / 4 and len(asked) <= 3, (kind, asked, size)


def test_damage_at_an_address_is_named(s3: str, there: str, alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place.of(s3 % "broken")
    copy_run(there, place.address)
    raw = (alone / "routing/part-00001.parquet").read_bytes()

    def put(name: str, content: bytes) -> None:
        with place.filesystem.open_output_stream(f"{place.path}/{name}") as out:
            out.write(content)

    at = len(raw) // 2
    put("routing/part-00001.parquet", raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
    put("left.tmp", b"x")
    assert verify_run(place.address) == (
        "routing/part-00001.parquet: its sha256 differs from the manifest",
        "left.tmp: not part of the run",
    )
    trace = open_run(place.address)
    with pytest.raises(RunError, match=r"broken/routing/part-00001\.parquet is damaged"):
        for i in range(len(trace.layers)):
            trace.routing(i, 0, trace.n_tokens("decoder"))
    place.filesystem.delete_file(f"{place.path}/scores/part-00000.parquet")
    with pytest.raises(RunError, match=r"scores/part-00000\.parquet is missing"):
        trace.scores(0, 0, 10)
    with pytest.raises(RunError, match=r"broken/scores/part-00000\.parquet is missing or has the wrong size"):
        open_run(place.address)
    put("run.json", b"{")
    with pytest.raises(RunError, match=r"broken/run\.json is damaged"):
        open_run(place.address)

    def denied(*given: Any) -> None:
        raise OSError("AWS Error ACCESS_DENIED during GetObject operation: Access Denied")

    monkeypatch.setattr(Place, "file", denied)
    with pytest.raises(RunError, match=r"tokens/part-00000\.parquet is damaged or out of reach: .*ACCESS_DENIED"):
        trace.stream_tokens("decoder", 0, 1)


def test_the_command_line_takes_addresses(there: str, alone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said, tables = [], []
    for run in (str(alone), there):
        capsys.readouterr()
        assert main(["stats", run]) == 0
        said.append(capsys.readouterr().out.removeprefix(Place.of(run).name))
        assert main(["export", run, "--table", "decisions", "--format", "csv", "-o", str(tmp_path / "table.csv")]) == 0
        tables.append((tmp_path / "table.csv").read_bytes())
    assert said[0] == said[1] and tables[0] == tables[1]
    capsys.readouterr()
    assert main(["verify", there]) == 0 and capsys.readouterr().out == f"{there}: sound\n"


def test_many_small_files_come_at_once(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests wait together: while one file's waits, the others' do too."""
    place, folder = Place.of(s3 % "many"), tmp_path / "many"
    folder.mkdir()
    names = [f"{i}.json" for i in range(8)]
    for name in names:
        (folder / name).write_text(name)
    together, copy = threading.Barrier(8, timeout=60), places.copy_file

    def waiting(*given: Any) -> None:
        together.wait()
        copy(*given)

    monkeypatch.setattr(places, "copy_file", waiting)
    place.store(folder, *names)
    (tmp_path / "back").mkdir()
    place.fetch(tmp_path / "back", *names)
    assert [(tmp_path / "back" / n).read_text() for n in names] == names


def test_what_an_address_cannot_do_is_said(s3: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunError, match=r"nothing is not a finished run: there is no run\.json"):
        open_run(s3 % "nothing")
    with pytest.raises(RunError, match="give it as text"):
        open_run(Path(s3 % "nothing"))
    with pytest.raises(CaptureError, match="one process captures into a folder"):
        capture(*load_model(model), TEXTS, out=s3 % "mine")
    assert main(["capture", "--model", str(model), "--text", "a", "--out", s3 % "mine"]) == 2
    assert "give --cluster" in capsys.readouterr().err and Place.of(s3 % "mine").sizes() == {}
    assert main(["verify", s3 % "mine"]) == 1 and "mine is not a finished run" in capsys.readouterr().out
    assert main(["stats", "nowhere://bucket/run"]) == 2 and "no folder and no address that pyarrow opens" in capsys.readouterr().err
