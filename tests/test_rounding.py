"""Gate weights in 8 bits: the error bound, what a run of them holds, and that nobody is left to believe them exact."""

import json
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from streamlit.testing.v1 import AppTest

from analysis.__main__ import main
from analysis.capture import CaptureError, capture
from analysis.export import describe, export_table
from analysis.files import stamp
from analysis.rounding import LARGEST_ERROR, ROUNDED, STEPS, rounded
from analysis.store import RunError, open_run
from analysis.verifying import verify_run
from app.model_card import origin
from app.report import report_html
from app.text import plain

from . import tiny
from .synthetic import differences, make_trace

ROOT = Path(__file__).parent.parent
TEXTS = ["def f(x): return x", "Il pleut.", "now and then and now"]
LARGEST = float(np.finfo(np.float32).max)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "rounded"
    capture(tiny.build("olmoe"), tiny.tokenizer(), TEXTS, labels=["a", "b", "a"], out=folder, weights="8-bit", part_tokens=20)
    return folder


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_no_weight_moves_further_than_the_bound(values: list[float]) -> None:
    exact = np.array(values, np.float32)
    near = rounded(exact)
    assert near.dtype == np.float32 and np.array_equal(rounded(near), near)
    assert np.array_equal(near == 0, exact == 0) and np.array_equal(np.signbit(near), np.signbit(exact))
    assert (np.abs(near.astype(float) - exact) <= np.abs(exact.astype(float)) * (LARGEST_ERROR + 1e-6)).all()


def test_the_bound_is_met_and_an_octave_has_its_values() -> None:
    octave = np.geomspace(1, 2, 100_001, endpoint=False).astype(np.float32)
    near = rounded(octave).astype(float)
    assert np.abs(near / octave - 1).max() == pytest.approx(LARGEST_ERROR, rel=1e-3)
    assert len(np.unique(near)) == STEPS + 1  # both ends
    assert np.array_equal(np.sort(near), near)


def test_a_run_differs_from_the_exact_one_in_weights_alone(run: Path) -> None:
    trace, exact = open_run(run), capture(tiny.build("olmoe"), tiny.tokenizer(), TEXTS, labels=["a", "b", "a"], part_tokens=20)
    assert not exact.weights_note and trace.weights_note == ROUNDED and verify_run(run) == ()
    for layer in trace.layers:
        mine, other = trace.routing(layer.index), exact.routing(layer.index)
        assert np.array_equal(mine.experts, other.experts) and np.array_equal(mine.weights, rounded(other.weights))
        assert not np.array_equal(mine.weights, other.weights)
        assert np.array_equal(trace.stats.load(layer.index), exact.stats.load(layer.index))
        np.testing.assert_allclose(trace.stats.gate_mass(layer.index), exact.stats.gate_mass(layer.index), rtol=LARGEST_ERROR)
    memory = capture(tiny.build("olmoe"), tiny.tokenizer(), TEXTS, labels=["a", "b", "a"], part_tokens=20, weights="8-bit")
    assert differences(memory, trace) == [] and memory.weights_note == ROUNDED


def test_every_reader_has_the_values_and_a_file_stores_indices(run: Path) -> None:
    trace, files = open_run(run), sorted((run / "routing").iterdir())
    [total] = duckdb.connect().execute(f"SELECT sum(w0::DOUBLE) FROM '{run}/routing/*.parquet'").fetchone() or [None]
    assert total == pytest.approx(sum(float(trace.weights(x.index)[:, 0].astype(float).sum()) for x in trace.layers))
    column = pq.read_metadata(files[0]).row_group(0).column(pq.read_schema(files[0]).names.index("w0"))
    assert "RLE_DICTIONARY" in column.encodings and "BYTE_STREAM_SPLIT" not in column.encodings


def altered(run: Path, tmp_path: Path, change: object) -> Path:
    """A copy of the run whose manifest went through ``change``."""
    copy = tmp_path / "copy"
    for path in run.rglob("*.*"):
        target = copy / path.relative_to(run)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    manifest = json.loads((copy / "run.json").read_text())
    change(copy, manifest)  # type: ignore[operator]
    (copy / "run.json").write_text(json.dumps(manifest))
    return copy


def test_weights_that_are_not_rounded_are_found(run: Path, tmp_path: Path) -> None:
    def change(copy: Path, manifest: dict) -> None:
        name = "routing/part-00000.parquet"
        file = pq.ParquetFile(copy / name)
        groups, at = [file.read_row_group(i) for i in range(file.num_row_groups)], file.schema_arrow.names.index("w0")
        with pq.ParquetWriter(copy / name, file.schema_arrow) as writer:
            for rows in groups:
                writer.write_table(rows.set_column(at, file.schema_arrow.field("w0"), [rows["w0"].to_numpy() * np.float32(1.01)]))
        manifest["parts"][0]["files"][name] = stamp(copy / name)

    [problem] = verify_run(altered(run, tmp_path, change))
    assert "gate weights that are not rounded" in problem


def test_a_way_to_keep_weights_that_is_not_known_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="no way '4-bit' to keep gate weights"):
        capture(tiny.build("olmoe"), tiny.tokenizer(), TEXTS, weights="4-bit")
    with pytest.raises(RunError, match="keeps gate weights as '4-bit'"):
        open_run(altered(run, tmp_path, lambda _, manifest: manifest["options"].update(weights="4-bit")))


@pytest.mark.parametrize("page", ["overview", "tokens", "load", "capacity", "specialization", "expert", "model"])
def test_every_page_warns(run: Path, page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROUTERSCOPE_RUNS", str(run.parent))
    monkeypatch.chdir(ROOT)
    for name, warned in ((run.name, [plain(ROUNDED)]), ("demo-run", [])):
        test = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=180)
        test.query_params["run"] = name
        if page != "overview":
            test.switch_page(f"views/{page}.py")
        test.run()
        assert not test.exception and [w.value for w in test.warning if "8 bits" in w.value] == warned


def test_files_and_the_command_line_say_so(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = open_run(run)
    export_table(trace, "decisions", "parquet", tmp_path / "d.parquet")
    about = json.loads(pq.read_schema(tmp_path / "d.parquet").metadata[b"routerscope"])
    assert about["gate_weights"] == ROUNDED and describe(make_trace(), "load")["gate_weights"] == "exact, as executed"
    assert "rounded to 8 bits" in origin(trace) and "8 bits" not in origin(replace(trace, options={}))
    assert "within 2.2%" in ROUNDED and "within 2.2%" in report_html(trace) and "8 bits" not in report_html(replace(trace, options={}))
    assert main(["stats", str(run)]) == 0 and ROUNDED in capsys.readouterr().out
