import hashlib
import json
import math
import os
import random
import tempfile
from functools import partial
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis import verifying
from analysis.files import stamp
from analysis.layout import write_table
from analysis.longtables import LongTable
from analysis.metrics import METRICS
from analysis.store import RunError, delete_run, list_runs, open_run, valid_run_name
from analysis.trace import TOKENS, LayerInfo, Part, SiteRouting, Trace
from analysis.verifying import verify_run
from analysis.writing import RunWriter

from .synthetic import MANY, PLAIN, SPECIAL, TWO_STREAMS, card, differences, make_part, make_parts, make_trace, site

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
            for experts in (trace.experts(layer.index, start, stop), make_trace(layers).experts(layer.index, start, stop)):
                assert np.array_equal(experts, part.experts) and experts.dtype == part.experts.dtype


def test_every_reader_gives_equal_sums(tmp_path: Path) -> None:
    trace = stored(tmp_path / "run", MANY)
    files = str(tmp_path / "run" / "routing" / "*.parquet")
    expected = sum(float(trace.weights(x.index)[:, 0].astype(float).sum()) for x in trace.layers)
    ids = sum(int(trace.experts(x.index)[:, 0].astype(int).sum()) for x in trace.layers)
    by_pandas = pd.read_parquet(tmp_path / "run" / "routing")
    assert by_pandas["w0"].astype(float).sum() == pytest.approx(expected, rel=1e-12) and by_pandas["e0"].astype(int).sum() == ids
    row = duckdb.connect().execute(f"SELECT sum(w0::DOUBLE), sum(e0::BIGINT) FROM '{files}'").fetchall()[0]
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


def test_layout_is_row_groups_of_one_site_with_checksums(tmp_path: Path) -> None:
    stored(tmp_path / "run", MANY)
    file = pq.ParquetFile(tmp_path / "run" / "routing" / "part-00000.parquet")
    assert file.num_row_groups == len(MANY)
    assert str(file.schema_arrow.field("e0").type) == "uint16"
    for name, encoding in (("e0", "RLE_DICTIONARY"), ("w0", "BYTE_STREAM_SPLIT")):
        column = file.metadata.row_group(0).column(file.schema_arrow.names.index(name))
        assert encoding in column.encodings and column.compression == "ZSTD" and not column.is_stats_set
    assert "DELTA_BINARY_PACKED" in file.metadata.row_group(0).column(0).encodings


def test_columns_say_whether_they_can_hold_a_null(tmp_path: Path) -> None:
    """Ids can where a slot may have no expert; weights where a site has fewer than another; scores and keys never."""
    dropping = (site(0, 8, 2, capacity=3), site(1, 8, 2))
    for name, layers, null in (("plain", PLAIN, ""), ("special", SPECIAL, "ew"), ("dropping", dropping, "ec")):
        stored(tmp_path / name, layers)
        routing, scores = (pq.read_schema(tmp_path / name / kind / "part-00000.parquet") for kind in ("routing", "scores"))
        can = {f.name for f in routing if f.nullable}
        assert can == {n for n in routing.names if n[0] in null} and not any(f.nullable for f in scores)


def test_a_changed_page_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    """Reading a run with one changed byte gives the right values or a RunError, never other values, and never another error."""
    run = tmp_path / "run"
    whole = stored(run, TWO_STREAMS)
    expected = {x.index: (whole.routing(x.index), whole.scores(x.index)) for x in TWO_STREAMS}
    rng, refused = random.Random(1), 0
    for path in (run / "routing" / "part-00001.parquet", run / "scores" / "part-00001.parquet"):
        original = path.read_bytes()
        pages_end = len(original) - 8 - int.from_bytes(original[-8:-4], "little")
        for at in rng.sample(range(4, pages_end), 120):
            damaged = bytearray(original)
            damaged[at] ^= 1 << rng.randrange(8)
            path.write_bytes(damaged)
            trace = open_run(run)
            try:
                for i, (routing, scores) in expected.items():
                    r, s = trace.routing(i), trace.scores(i)
                    for a, b in ((r.experts, routing.experts), (r.weights, routing.weights), (s.entropy, scores.entropy)):
                        assert np.array_equal(a, b), f"byte {at} of {path.name} changed a value silently"
            except RunError as error:
                refused += 1
                assert path.name in str(error) and "restore it" in str(error)
        path.write_bytes(original)
    assert refused > 100


@pytest.mark.parametrize("name", ["stats.parquet", "token_stats.parquet", "document_stats.parquet"])
def test_changed_statistics_are_an_error_that_names_the_file(tmp_path: Path, name: str) -> None:
    """They are read when asked for. Any one byte of a page changed: the right counts or a RunError, never other counts."""
    run = tmp_path / "run"
    stored(run, UNEVEN)
    documents, rng, refused = np.arange(9), random.Random(2), 0
    original = (run / name).read_bytes()

    def answers() -> list[np.ndarray]:
        stats, sites = open_run(run).stats, range(len(UNEVEN))
        core = [
            x for s in sites for x in (stats.load(s), stats.coactivation(s), stats.flow(s), stats.position_load(s), stats.label_load(s)[1])
        ]
        return [*core, *(stats.document_load(s, documents) for s in sites), *(x for s in sites for x in stats.token_load_by_id(s))]

    expected = answers()
    for at in rng.sample(range(4, len(original) - 8 - int.from_bytes(original[-8:-4], "little")), 100):
        damaged = bytearray(original)
        damaged[at] ^= 1 << rng.randrange(8)
        (run / name).write_bytes(damaged)
        try:
            found = answers()
            assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True)), f"byte {at} changed a count silently"
        except RunError as error:
            refused += 1
            assert name in str(error) and "restore it" in str(error)
    assert refused > 20  # of pairs of experts, the counts alone are read


def test_a_footer_that_hides_rows_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the footer says of a row group carries no checksum: rows it keeps from being read are missed in the sum."""
    stored(tmp_path / "run")
    trace = open_run(tmp_path / "run")
    stats = trace.stats
    each = stats.token_load_by_id(1)[3], stats.document_load(1, np.arange(9))
    assert stats.load(1).sum() == each[0].sum() == each[1].sum() == 2 * stats.n_tokens(1) > 0
    monkeypatch.setattr(LongTable, "_extents", lambda self, column: [(7, 7)] * self._footer.num_row_groups)
    with pytest.raises(RunError, match="token_stats.parquet is damaged"):
        stats.token_load_by_id(1)
    with pytest.raises(RunError, match="document_stats.parquet is damaged"):
        stats.document_load(1, np.arange(9))
    monkeypatch.setattr(
        LongTable, "_extents", lambda self, column: [(1, 1)] * self._footer.num_row_groups
    )  # then the site is not even read
    for ask in (
        stats.token_load_by_id,
        lambda site: stats.document_load(site, np.arange(9)),
        partial(METRICS["token_information"].function, trace),
    ):
        with pytest.raises(RunError, match="_stats.parquet is damaged"):
            ask(1)


def test_opening_reads_no_statistics(tmp_path: Path) -> None:
    """They are read when asked for: until then files of the right size need not even be Parquet."""
    stored(tmp_path / "run")
    for name in ("stats.parquet", "token_stats.parquet", "document_stats.parquet"):
        path = tmp_path / "run" / name
        path.write_bytes(bytes(path.stat().st_size))
    stats = open_run(tmp_path / "run").stats
    for read in (lambda: stats.load(0), lambda: stats.core):
        with pytest.raises(RunError, match="/stats.parquet is damaged"):
            read()
    for name in ("by_token", "by_document"):
        with pytest.raises(RunError, match=f"{name[3:]}_stats.parquet is damaged"):
            getattr(stats, name)


def test_a_part_that_vanishes_is_named(tmp_path: Path) -> None:
    stored(tmp_path / "run")
    trace = open_run(tmp_path / "run")
    for kind, read in (("routing", lambda: trace.routing(0)), ("scores", lambda: trace.scores(0)), ("tokens", lambda: trace.tokens)):
        (tmp_path / "run" / kind / "part-00001.parquet").unlink()
        with pytest.raises(RunError, match=f"{kind}/part-00001.parquet is missing"):
            read()


def test_tokens_of_another_schema_are_named(tmp_path: Path) -> None:
    """As a changed byte of a footer gives; concatenating is where it shows."""
    stored(tmp_path / "run")
    trace, path = open_run(tmp_path / "run"), tmp_path / "run" / "tokens/part-00001.parquet"
    rows = pq.read_table(path)
    pq.write_table(rows.set_column(2, "position", rows["position"].cast(pa.int64())), path)
    for read in (lambda: trace.tokens, lambda: trace.stream_tokens("decoder")):
        with pytest.raises(RunError, match="run/tokens.* is damaged"):
            read()


def older(folder: Path) -> None:
    """Make a stored run one of version 1: tokens without `predicted`."""
    path = folder / "run.json"
    manifest = json.loads(path.read_text()) | {"schema_version": 1}
    for part in manifest["parts"]:
        name = f"tokens/part-{part['index']:05d}.parquet"
        write_table(pq.read_table(folder / name).drop_columns("predicted"), folder / name)
        part["files"][name] = stamp(folder / name)
    path.write_text(json.dumps(manifest))


def test_a_run_of_version_1_opens_without_predictions(tmp_path: Path) -> None:
    stored(tmp_path / "run")
    older(tmp_path / "run")
    trace = open_run(tmp_path / "run")
    assert (
        differences(make_trace(), trace) == ["tokens.predicted"] and verify_run(tmp_path / "run") == () and list_runs(tmp_path)[0].complete
    )
    assert trace.tokens.schema.equals(TOKENS) and trace.tokens["predicted"].null_count == len(trace.tokens)


def test_a_run_of_today_without_predictions_is_damaged(tmp_path: Path) -> None:
    stored(tmp_path / "run")
    older(tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    with pytest.raises(RunError, match="tokens/part-00000.parquet is damaged"):
        open_run(tmp_path / "run").tokens  # noqa: B018


def test_verify_counts_in_scratch_that_a_killed_one_does_not_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """files.scratch deletes what a killed process left; a plain temporary folder would stay."""
    stored(tmp_path / "run")
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    seen: list[str] = []
    counted = verifying.counted_again
    monkeypatch.setattr(verifying, "counted_again", lambda *given: [seen.extend(os.listdir(tmp_path / "scratch")), *counted(*given)][1:])
    assert verify_run(tmp_path / "run") == () and [s.startswith("routerscope-scratch-") for s in seen] == [True]
    assert not os.listdir(tmp_path / "scratch")


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
        path.unlink()
        assert f"{path.relative_to(tmp_path / 'run')}: missing" in verify_run(tmp_path / "run")
        path.write_bytes(original)
    (tmp_path / "run" / "extra.txt").write_text("x")
    assert verify_run(tmp_path / "run") == ("extra.txt: not part of the run",)
    (tmp_path / "run" / "extra.txt").rename(tmp_path / "run" / os.fsdecode(b"\xff"))  # a name that is no text
    assert verify_run(tmp_path / "run") == ("\udcff: not part of the run",) and open_run(tmp_path / "run").name == "run"


@pytest.mark.parametrize("content", ["", "{}", "[]", "[" * 99_999, '{"schema_version": 99}'])
def test_broken_manifest(tmp_path: Path, content: str) -> None:
    stored(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(content)
    with pytest.raises(RunError, match=r"damaged|schema version"):
        open_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"index": 1', '"index": "x"'),
        ('"index": 1', '"index": 7'),
        ('"first_rows": {\n    "decoder": 17', '"first_rows": {\n    "decoder": 16'),  # a row that two parts have
        ('"first_document": 3', '"first_document": 4'),
        ('"rows"', '"rowz"'),
        ('"parts": [', '"parts": [3,'),
        ('"bytes"', '"b"'),
        ('"created"', '"c"'),
        *[('"seconds": ', f'"seconds": {s}, "s": ') for s in ('"long"', "NaN", "-1", "1e300")],
        ('"name": "made up"', '"name": 5'),
        ('"tokens/part-00001.parquet"', '"../../../outside"'),
        ('"stats.parquet"', '"/etc/hostname"'),
        ('"options": {', '"options": "", "o": {'),
        ('"n_experts": 8', '"n_experts": 1000000000'),  # not believed: arrays of that size would take the machine's memory
        ('"n_experts": 8', '"n_experts": -8'),
        ('"top_k": 2', '"top_k": 9'),
        ('"stream": "decoder"', '"stream": "side"'),
    ],
)
def test_a_manifest_that_says_nonsense_is_damaged_everywhere(tmp_path: Path, old: str, new: str) -> None:
    """open, verify and list all say so, and one damaged run does not hide the others."""
    stored(tmp_path / "run")
    stored(tmp_path / "sound")
    path = tmp_path / "run" / "run.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    with pytest.raises(RunError, match="damaged"):
        open_run(tmp_path / "run")
    assert "damaged" in verify_run(tmp_path / "run")[0]
    assert {r.name: r.complete for r in list_runs(tmp_path)} == {"run": False, "sound": True}


def test_verify_finds_statistics_that_are_not_of_these_decisions(tmp_path: Path) -> None:
    """Digests put right after the change, so that only counting again can tell; probability sums are not derivable."""
    stored(tmp_path / "run")
    path, manifest_path = tmp_path / "run" / "stats.parquet", tmp_path / "run" / "run.json"
    manifest = json.loads(manifest_path.read_text())
    original = pq.read_table(path)
    for statistic, column, found in (("load", "count", True), ("load", "sum", True), ("probability", "sum", False)):
        row = original["statistic"].to_pylist().index(statistic)
        frame = original.to_pandas(types_mapper=pd.ArrowDtype)
        frame.loc[row, column] += 1
        pq.write_table(pa.Table.from_pandas(frame, schema=original.schema, preserve_index=False), path)
        data = path.read_bytes()
        manifest["files"]["stats.parquet"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest_path.write_text(json.dumps(manifest))
        problems = verify_run(tmp_path / "run")
        assert bool(problems) is found and all("stats.parquet" in p for p in problems)


def test_verify_finds_documents_that_are_numbered_with_a_gap(tmp_path: Path) -> None:
    stored(tmp_path / "run")
    path, manifest_path = tmp_path / "run" / "documents.parquet", tmp_path / "run" / "run.json"
    manifest, original = json.loads(manifest_path.read_text()), pq.read_table(path)
    for column in ("document", "first_row"):
        moved = pa.array([x + (i > 3) for i, x in enumerate(original[column].to_pylist())], original.schema.field(column).type)
        pq.write_table(original.set_column(original.column_names.index(column), original.schema.field(column), moved), path)
        data = path.read_bytes()
        manifest["files"]["documents.parquet"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        manifest_path.write_text(json.dumps(manifest))
        assert "does not number the documents or rows" in verify_run(tmp_path / "run")[0]


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


def test_a_run_says_how_long_its_capture_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its begin to its end, over an interruption; not known where the clock was put back, or the capture was begun by an earlier version."""
    now = [1_000.0]
    monkeypatch.setattr("analysis.writing.time.time", lambda: now[0])
    cases = (("sound", {}, 1_100.0), ("back", {}, 900.0), ("older", {"begun": None}, 1_100.0), ("odd", {"begun": "x"}, 1_100.0), ("never", {"begun": -math.inf}, 0.0))  # fmt: skip
    for name, changed, end in cases:
        now[0], parts = 1_000.0, make_parts(PLAIN)
        with RunWriter.open(tmp_path / name, card(PLAIN), {}) as writer:
            writer.write(parts[0])
        record = tmp_path / name / "progress" / "capture.json"
        record.write_text(json.dumps({k: v for k, v in (json.loads(record.read_text()) | changed).items() if v is not None}))
        with RunWriter.open(tmp_path / name, card(PLAIN), {}) as writer:
            for part in parts[1:]:
                writer.write(part)
            now[0] = end
            writer.commit()
    assert {r.name: r.seconds for r in list_runs(tmp_path)} == {"sound": 100.0} | dict.fromkeys(("back", "older", "odd", "never"))
    assert open_run(tmp_path / "older").n_tokens() == open_run(tmp_path / "sound").n_tokens()


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
