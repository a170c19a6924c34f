import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest

from analysis.store import RunError, RunWriter, delete_run, list_runs, open_run, valid_run_name, verify_run
from analysis.trace import LayerInfo, Part, SiteRouting, Trace

from .synthetic import MANY, PLAIN, TWO_STREAMS, card, differences, make_part, make_parts, make_trace, site
from .writer import main as write_run

UNEVEN = (site(0, 6, 1), site(1, 9, 3))


def stored(folder: Path, layers: tuple[LayerInfo, ...] = PLAIN, parts: list[Part] | None = None) -> Trace:
    with RunWriter.open(folder, card(layers), {"seed": 0}) as writer:
        for part in parts or make_parts(layers):
            writer.write(part)
        return writer.commit()


@pytest.mark.parametrize("layers", [PLAIN, MANY, TWO_STREAMS, UNEVEN], ids=["plain", "many", "streams", "uneven"])
def test_a_stored_run_equals_the_trace(tmp_path: Path, layers: tuple[LayerInfo, ...]) -> None:
    stored(tmp_path / "run", layers)
    assert differences(make_trace(layers), open_run(tmp_path / "run")) == []
    assert verify_run(tmp_path / "run") == ()
    trace = open_run(tmp_path / "run")
    for layer in layers:
        n = trace.n_tokens(layer.stream)
        for start, stop in ((0, 1), (3, n), (n - 1, n), (15, 19), (5, 5)):
            part, whole = trace.routing(layer.index, start, stop), trace.routing(layer.index)
            assert np.array_equal(part.experts, whole.experts[start:stop])
            assert np.array_equal(part.weights, whole.weights[start:stop])


def test_every_reader_gives_equal_sums(tmp_path: Path) -> None:
    trace = stored(tmp_path / "run", MANY)
    files = str(tmp_path / "run" / "routing" / "*.parquet")
    expected = sum(float(trace.weights(x.index)[:, 0].astype(float).sum()) for x in trace.layers)
    ids = sum(int(trace.experts(x.index)[:, 0].astype(int).sum()) for x in trace.layers)
    by_pandas = pd.read_parquet(tmp_path / "run" / "routing")
    assert by_pandas["w0"].astype(float).sum() == pytest.approx(expected, rel=1e-12) and by_pandas["e0"].astype(int).sum() == ids
    row = duckdb.sql(f"SELECT sum(w0::DOUBLE), sum(e0::BIGINT) FROM '{files}'").fetchall()[0]
    assert row[0] == pytest.approx(expected, rel=1e-12) and row[1] == ids
    lazy = pl.scan_parquet(files).select(pl.col("w0").cast(pl.Float64).sum(), pl.col("e0").cast(pl.Int64).sum()).collect()
    assert lazy["w0"][0] == pytest.approx(expected, rel=1e-12) and lazy["e0"][0] == ids


def test_size_per_decision_for_64_experts_top_8(tmp_path: Path) -> None:
    """At most 2.0 bytes with exact bfloat16 weights: Zipf tokens, token-dependent experts, as in storage.md."""
    layers = tuple(site(i, 64, 8) for i in range(4))
    rng = np.random.default_rng(0)
    n = 16_384
    part = make_part(layers, [n])
    tokens = np.minimum(rng.zipf(1.3, n), 4_000)
    routing = []
    for _ in layers:
        affinity = rng.normal(0, 1.5, (4_001, 64))
        logits = affinity[tokens] + rng.normal(0, 1, (n, 64)) + rng.normal(0, 0.7, 64)
        experts = np.argsort(-logits, 1)[:, :8].astype(np.int16)
        p = np.exp(np.take_along_axis(logits, experts.astype(int), 1) - logits.max(1, keepdims=True)).astype(np.float32)
        weights = ((p / p.sum(1, keepdims=True)).view(np.uint32) & 0xFFFF0000).view(np.float32)  # bfloat16 by truncation
        routing.append(SiteRouting(experts, weights, experts))
    part = Part(0, part.tokens, part.documents, tuple(routing), part.scores, part.probability_sums, part.first_rows)
    trace = stored(tmp_path / "run", layers, [part])
    assert np.array_equal(trace.weights(2), routing[2].weights)
    size = sum(p.stat().st_size for p in (tmp_path / "run" / "routing").iterdir())
    per_decision = size / (n * 8 * len(layers))
    print(f"{per_decision:.3f} bytes per decision")
    assert per_decision <= 2.0


def test_layout_is_one_row_group_per_site_with_checksums(tmp_path: Path) -> None:
    stored(tmp_path / "run", MANY)
    file = pq.ParquetFile(tmp_path / "run" / "routing" / "part-00000.parquet")
    assert file.num_row_groups == len(MANY)
    assert str(file.schema_arrow.field("e0").type) == "uint16"
    column = file.metadata.row_group(0).column(file.schema_arrow.names.index("w0"))
    assert "BYTE_STREAM_SPLIT" in column.encodings and column.compression == "ZSTD"


def test_killed_at_random_points_resumes_to_the_same_run(tmp_path: Path) -> None:
    """kill -9 at 20 points; after each, what is there is readable, and the resumed run equals an uninterrupted one."""
    write_run(tmp_path / "whole", 12)
    expected = open_run(tmp_path / "whole")
    rng, folder, kills = random.Random(7), tmp_path / "killed", 0
    command = [sys.executable, "-m", "tests.writer", str(folder), "12"]
    while kills < 20:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent)
        assert process.stdout is not None
        if process.stdout.readline() and rng.random() < 0.9:
            time.sleep(rng.random() * 0.05)
        process.kill()
        process.communicate()
        kills += 1
        if (folder / "run.json").exists():
            assert differences(expected, open_run(folder)) == [] and verify_run(folder) == ()
            delete_run(tmp_path, "killed")
        else:
            with pytest.raises(RunError, match="did not finish|no run.json"):
                open_run(folder)
    write_run(folder, 12) if not (folder / "run.json").exists() else None
    assert differences(expected, open_run(folder)) == []
    assert verify_run(folder) == ()


def test_resume_under_other_options_is_refused(tmp_path: Path) -> None:
    with RunWriter.open(tmp_path / "run", card(PLAIN), {"seed": 0}) as writer:
        writer.write(make_parts(PLAIN)[0])
    with pytest.raises(RunError, match="other options"):
        RunWriter.open(tmp_path / "run", card(PLAIN), {"seed": 1})
    with pytest.raises(RunError, match="other model"):
        RunWriter.open(tmp_path / "run", card(PLAIN, "another"), {"seed": 0})
    with RunWriter.open(tmp_path / "run", card(PLAIN), {"seed": 0}) as writer:
        assert (writer.parts, writer.documents) == (1, 3)
        with pytest.raises(RunError, match="being written"):
            RunWriter.open(tmp_path / "run", card(PLAIN), {"seed": 0})


def test_a_finished_run_is_never_written_over(tmp_path: Path) -> None:
    stored(tmp_path / "run")
    with pytest.raises(RunError, match="finished run"):
        RunWriter.open(tmp_path / "run", card(PLAIN), {"seed": 0})
    with pytest.raises(RunError, match="nothing was captured"), RunWriter.open(tmp_path / "new", card(PLAIN), {}) as writer:
        writer.commit()


def test_any_flipped_byte_is_found(tmp_path: Path) -> None:
    stored(tmp_path / "run")
    rng = random.Random(0)
    for path in sorted(p for p in (tmp_path / "run").rglob("*.parquet")):
        original = path.read_bytes()
        damaged = bytearray(original)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        assert any(path.name in problem for problem in verify_run(tmp_path / "run"))
        path.write_bytes(original[:-1])
        with pytest.raises(RunError, match=path.name):
            open_run(tmp_path / "run")
        path.write_bytes(original)
    (tmp_path / "run" / "extra.txt").write_text("x")
    assert verify_run(tmp_path / "run") == ("extra.txt: not part of the run",)


@pytest.mark.parametrize("content", ["", "{}", "[]", "[" * 99_999, '{"schema_version": 99}'])
def test_broken_manifest(tmp_path: Path, content: str) -> None:
    stored(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(content)
    with pytest.raises(RunError, match=r"damaged|schema version"):
        open_run(tmp_path / "run")


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "A", "a b", "con", "nul.txt", "a\n", "-x", "x" * 65, "é", "a\0"])
def test_names_that_are_no_run(name: str, tmp_path: Path) -> None:
    with pytest.raises(RunError):
        valid_run_name(name)
    with pytest.raises(RunError):
        delete_run(tmp_path, name)


def test_links_are_neither_listed_nor_deleted(tmp_path: Path) -> None:
    stored(tmp_path / "outside" / "run")
    root = tmp_path / "root"
    root.mkdir()
    (root / "link").symlink_to(tmp_path / "outside" / "run")
    assert list_runs(root) == ()
    with pytest.raises(RunError):
        delete_run(root, "link")
    linked = root / "linked"
    linked.mkdir()
    (linked / "run.json").symlink_to(tmp_path / "outside" / "run" / "run.json")
    with pytest.raises(RunError, match="cannot be opened"):
        open_run(linked)


def test_listing_and_deleting(tmp_path: Path) -> None:
    stored(tmp_path / "one")
    with RunWriter.open(tmp_path / "two", card(PLAIN), {}) as writer:
        writer.write(make_parts(PLAIN)[0])
    runs = {r.name: r for r in list_runs(tmp_path)}
    assert runs["one"].complete and not runs["two"].complete
    assert runs["one"].n_documents == 9 and runs["one"].n_tokens == open_run(tmp_path / "one").n_tokens()
    assert (tmp_path / "one").stat().st_mode & 0o77 == 0
    assert all(p.stat().st_mode & 0o77 == 0 for p in (tmp_path / "one").rglob("*.parquet"))
    for name in runs:
        delete_run(tmp_path, name)
    assert list_runs(tmp_path) == () and os.listdir(tmp_path) == []


def test_manifest_names_every_file(tmp_path: Path) -> None:
    stored(tmp_path / "run")
    manifest = json.loads((tmp_path / "run" / "run.json").read_text())
    listed = set(manifest["files"]) | {f for p in manifest["parts"] for f in p["files"]}
    there = {str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert there == listed | {"run.json"}
