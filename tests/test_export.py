"""Exports: every table in every format says what was recorded, and no cell of a CSV is a formula."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from analysis import __version__, export
from analysis.capacity import capacity_curves
from analysis.export import FORMATS, TABLES, ExportError, computed_bytes, csv_original, csv_text, describe, export_bytes, export_table
from analysis.metrics import METRICS, balance_table, load_table, percentile_table
from analysis.overflow import FACTORS
from analysis.stability import label_balance, maxvio_table
from analysis.trace import SCHEMA_VERSION, Trace
from tests.nasty import NASTY
from tests.synthetic import MANY, PLAIN, TWO_STREAMS, make_part, make_trace, site

ROOT = Path(__file__).parent.parent
FORMULAS = (
    "=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r", "\n", "\r\n", "'", "''=1", "\\", '"', '""', ",", ";", " ", "", "|cmd", "%x", "\0",
    "\u202e=1", "\ufeff=1", "\u200b=1", "＝1", "＠x", "中文", "é", "e\u0301", "😀", "\U000e0001", "<script>", "\u2028", "\x85", "\x1b[2J", "a,b\n=c",
)  # fmt: skip
FORMULA_STARTS = "=+-@\t\r\n|%＝＋－＠"
MIXED = (site(0, 4, 1), site(1, 8, 3))  # sites with different k
TRACES = {"plain": PLAIN, "two streams, dropping": TWO_STREAMS, "300 experts": MANY, "different k": MIXED}


def rows_of(trace: Trace, table: str, format: str, settings: dict | None = None) -> list[dict]:
    buffer = io.BytesIO()
    export_table(trace, table, format, buffer, settings or {})
    data = buffer.getvalue()
    if format == "csv":
        return list(csv.DictReader(io.StringIO(data.decode("utf-8"), newline=""), strict=True))
    return pq.read_table(io.BytesIO(data)).to_pylist() if format == "parquet" else json.loads(data)["rows"]


@pytest.fixture(scope="module")
def hostile() -> Trace:
    texts = (*FORMULAS, *NASTY)
    return make_trace(PLAIN, [make_part(PLAIN, [300, 40], texts=texts, labels=("=cmd", None, "a\nb"), n_ids=len(texts))], name="hostile")


@pytest.mark.parametrize("layers", TRACES.values(), ids=TRACES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("table", TABLES)
def test_every_table_in_every_format_has_every_row(table: str, format: str, layers) -> None:
    trace = make_trace(layers)
    expected = {
        "load": sum(x.n_classes for x in layers),
        "balance": len(layers),
        "decisions": sum(trace.n_tokens(x.stream) for x in layers),
        "tokens": sum(trace.n_tokens(s) for s in {x.stream for x in layers}),
        "documents": len(trace.documents),
        "labels": sum(len(trace.stats.label_load(x.index)[0]) for x in layers),
        "document-balance": sum(trace.documents["stack"].to_pylist().count(x.stream) for x in layers),
        "positions": sum(len(trace.stats.position_load(x.index)) for x in layers),
        "batches": len(layers),
        "capacity": len(layers) * len(FACTORS),
    }
    buffer, asked = io.BytesIO(), {"policy": "position"} if table == "capacity" else {}  # of native drops the weights are not known
    assert export_table(trace, table, format, buffer, asked) == expected[table] > 0
    rows = rows_of(trace, table, format, asked)
    assert len(rows) == expected[table]
    assert {re.sub(r"(?<=_)\d+$", "i", n) for n in rows[0]} - set(TABLES[table].columns) == set()  # not a column without a definition


@pytest.mark.parametrize("layers", TRACES.values(), ids=TRACES)
@pytest.mark.parametrize("format", FORMATS)
def test_decisions_are_those_recorded(format: str, layers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "BATCH", 7)  # pieces smaller than the trace
    trace = make_trace(layers)
    rows = pd.DataFrame(rows_of(trace, "decisions", format))
    for layer in layers:
        mine = rows[rows["site"].astype(int) == layer.index]
        routing, scores = trace.routing(layer.index), trace.scores(layer.index)
        numbers = mine.replace("", np.nan)
        for i in range(max(x.top_k for x in layers)):
            ids, weights = (pd.to_numeric(numbers[f"{kind}_{i}"]) for kind in ("expert", "weight"))
            if i >= layer.top_k:
                assert ids.isna().all() and weights.isna().all()
                continue
            assert ids.fillna(-1).astype(int).tolist() == routing.experts[:, i].tolist()
            assert weights.to_numpy(np.float32).tolist() == routing.weights[:, i].tolist()
            if layer.native_capacity is not None:
                assert pd.to_numeric(numbers[f"chosen_{i}"]).astype(int).tolist() == routing.chosen[:, i].tolist()
        for name in ("entropy", "margin", "logsumexp"):
            assert pd.to_numeric(numbers[name]).to_numpy(np.float32).tolist() == getattr(scores, name).tolist()
        ids = trace.stream_tokens(layer.stream)["token_id"].to_pylist()
        assert mine["token_id"].astype(int).tolist() == ids
        assert ("chosen_0" in rows) == any(x.native_capacity is not None for x in layers)


@pytest.mark.parametrize("table", ["tokens", "decisions"])
@pytest.mark.parametrize("format", ["parquet", "json"])
def test_parquet_and_json_keep_hostile_text_and_bytes(table: str, format: str, hostile: Trace) -> None:
    rows = rows_of(hostile, table, format)
    tokens = hostile.tokens
    for name in ("token", "token_bytes", "label"):
        mine = [r[name] for r in rows][: len(tokens)]
        if format == "json" and name == "token_bytes":
            mine = [base64.b64decode(x) for x in mine]
        assert mine == tokens[name].to_pylist()


@pytest.mark.parametrize("table", ["tokens", "decisions", "documents"])
def test_csv_of_hostile_text_has_no_formula_and_loses_nothing(table: str, hostile: Trace) -> None:
    rows = rows_of(hostile, table, "csv")
    source = hostile.documents if table == "documents" else hostile.tokens
    text = ("name", "label") if table == "documents" else ("token", "label")
    for name in text:
        cells = [r[name] for r in rows][: len(source)]
        assert [csv_original(c) for c in cells] == [x or "" for x in source[name].to_pylist()]
        assert not [c for c in cells if c.startswith(tuple(FORMULA_STARTS))]
    frame = pd.read_csv(io.BytesIO(export_bytes(hostile, table, "csv")), keep_default_na=False, dtype=str)
    assert frame.to_dict("records") == rows  # a second reader finds the same rows


@given(st.text())
@example("\ud83d")  # a lone surrogate, as a Python string may hold
def test_csv_text_is_one_visible_line_and_invertible(text: str) -> None:
    cell = csv_text(text)
    assert csv_original(cell) == text
    assert cell.isprintable() and not cell.startswith(tuple(FORMULA_STARTS))


def test_csv_text_over_all_of_unicode() -> None:
    codes = [*range(0xD800), *range(0xE000, 0x110000)]
    for start in range(0, len(codes), 1_024):
        text = "".join(map(chr, codes[start : start + 1_024]))
        assert csv_original(csv_text(text)) == text and csv_text(text).isprintable(), hex(codes[start])
    assigned = [c for c in map(chr, codes) if unicodedata.category(c) not in ("Cn", "Co")]
    assert len(assigned) > 140_000
    cells = [(c, csv_text(f"{c}=1")) for c in assigned]
    assert [c for c, cell in cells if csv_original(cell) != f"{c}=1"] == []
    # also signs that become plain ones when a spreadsheet normalises what it reads
    assert [c for c, cell in cells if unicodedata.normalize("NFKC", cell[0])[:1] in tuple(FORMULA_STARTS)] == []


def test_csv_text_over_the_demo_vocabulary() -> None:
    path = ROOT / "data/demo-model/tokenizer.json"
    pieces = list(json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"])
    assert len(pieces) > 4_000
    assert [p for p in pieces if csv_original(csv_text(p)) != p or csv_text(p)[0] in FORMULA_STARTS] == []


@pytest.mark.parametrize("table", TABLES)
def test_metadata_travels_with_the_table(table: str) -> None:
    trace = make_trace(PLAIN, name="named")
    about = describe(trace, table)
    assert (about["run"], about["model"], about["tokens"]) == ("named", "made up", {"decoder": trace.n_tokens()})
    assert (about["schema_version"], about["routerscope"], about["table"]) == (SCHEMA_VERSION, __version__, table)
    assert about["row"] == TABLES[table].definition and about["definitions"] == TABLES[table].columns
    usual = {"policy": "probability", "size": 16} if table == "capacity" else {}
    assert about.get("settings", {}) == {**TABLES[table].settings, **usual} and ("maxvio" in about["definitions"]) == (table == "balance")
    in_parquet = pq.read_schema(io.BytesIO(export_bytes(trace, table, "parquet"))).metadata[b"routerscope"]
    assert json.loads(in_parquet) == json.loads(export_bytes(trace, table, "json"))["about"] == about


def test_computed_tables_carry_the_definitions_of_their_metrics() -> None:
    trace = make_trace()
    table = balance_table(trace)
    for rows, names in ((table.select(["layer", "cv", "gini"]), ["layer", "cv", "gini"]), (percentile_table(trace, table), list(METRICS))):
        about = json.loads(computed_bytes(trace, rows, "one row per thing", {"batch": 7}, "json"))["about"]
        assert list(about["definitions"]) == names and about["settings"] == {"batch": 7} and about["row"] == "one row per thing"
        assert METRICS["cv"].definition in about["definitions"]["cv"] and METRICS["cv"].chance in about["definitions"]["cv"]


def test_a_page_s_table_is_defined_as_the_run_s_own() -> None:
    trace = make_trace()
    about = json.loads(computed_bytes(trace, load_table(trace), "", {}, "json"))["about"]
    assert list(about["definitions"]) == load_table(trace).column_names and "even" in about["definitions"]["relative"]
    other = json.loads(computed_bytes(trace, pa.table({"share": [0.5], "partner": [1]}), "", {}, "json"))["about"]
    assert other["definitions"] == {}  # another share than the load's, perhaps


def test_numbers_of_a_csv_are_bare_and_text_is_quoted(hostile: Trace) -> None:
    for table in ("load", "tokens"):
        lines = export_bytes(hostile, table, "csv").decode().splitlines()
        names = next(csv.reader(lines[:1]))
        for line, row in zip(lines[1:50], csv.DictReader(lines), strict=False):
            told = dict(zip(names, re.findall(r'("(?:[^"]|"")*"|[^,]*)(?:,|$)', line), strict=False))
            text = {n for n in row if told[n].startswith('"')}
            assert text <= {"stack", "token", "label", "phase"} and "stack" in text
    total = sum(float(line.split(",")[4]) for line in export_bytes(hostile, "load", "csv").decode().splitlines()[1:])
    assert total == sum(int(hostile.stats.load(x.index).sum()) for x in PLAIN)  # what awk -F, would add up


def test_what_a_table_depends_on_is_chosen_and_told() -> None:
    trace = make_trace(PLAIN, [make_part(PLAIN, [300, 40, 500])])
    chosen = {"scope": "documents", "size": 2, "preset": "switch", "policy": "position", "order": "recorded"}
    buffer = io.BytesIO()
    export_table(trace, "capacity", "parquet", buffer, chosen)
    table = pq.read_table(buffer)
    assert json.loads(table.schema.metadata[b"routerscope"])["settings"] == chosen
    asked = capacity_curves(trace, policy="position", scope="documents", size=2, preset="switch")
    assert (
        table.replace_schema_metadata() == asked
        and asked["dropped"] != capacity_curves(trace, scope="documents", size=16, mixed=0)["dropped"]
    )
    batches = pq.read_table(io.BytesIO(export_bytes(trace, "batches", "parquet")))
    assert batches["batch"].to_pylist() == maxvio_table(trace, 1_024, 0)["batch"].to_pylist()
    labels = pq.read_table(io.BytesIO(export_bytes(trace, "labels", "parquet"))).to_pylist()
    assert [r["cv"] for r in labels if r["site"] == 1] == label_balance(trace, 1)["cv"].to_pylist()


@pytest.mark.parametrize(("table", "settings", "said"), [
    ("load", {"policy": "position"}, "takes no policy"), ("batches", {"size": 3}, "it takes batch_tokens, order"),
    ("capacity", {"preset": "none"}, "none"), ("capacity", {"policy": "none"}, "no policy 'none'"), ("capacity", {"policy": "reroute"}, "reroute"),
])  # fmt: skip
def test_a_setting_without_meaning_is_an_error(table: str, settings: dict, said: str) -> None:
    with pytest.raises(ExportError, match=said):
        export_table(make_trace(PLAIN), table, "csv", io.BytesIO(), settings)


def test_missing_and_infinite_numbers() -> None:
    part = make_part(PLAIN, [3])
    odd = np.array([np.nan, np.inf, -np.inf], np.float32)
    trace = make_trace(PLAIN, [replace(part, scores=tuple(replace(s, margin=odd) for s in part.scores))])
    assert [r["margin"] for r in rows_of(trace, "decisions", "json")][:3] == [None, "inf", "-inf"]
    assert [r["margin"] for r in rows_of(trace, "decisions", "parquet")][:3] == [None, np.inf, -np.inf]
    assert [r["margin"] for r in rows_of(trace, "decisions", "csv")][:3] == ["", "inf", "-inf"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("table", ["load", "balance", "documents", "labels", "positions", "document-balance"])
def test_a_run_of_statistics_alone(table: str, format: str) -> None:
    bare = replace(make_trace(PLAIN), source=None, load_tokens=None)
    assert rows_of(bare, table, format) == rows_of(make_trace(PLAIN), table, format)
    for gone in ("tokens", "decisions", "capacity"):
        with pytest.raises(ExportError, match="statistics only"):
            export_bytes(bare, gone, format)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("table", ["tokens", "decisions"])
def test_a_stream_without_tokens_gives_a_header_and_no_rows(table: str, format: str) -> None:
    trace = make_trace(PLAIN)
    nothing = replace(trace, documents=trace.documents.slice(0, 0), load_tokens=lambda: trace_tokens.slice(0, 0))
    trace_tokens = trace.tokens
    assert rows_of(nothing, table, format) == []
    if format == "csv":
        assert export_bytes(nothing, table, format).startswith(b'"stack","document"')


@pytest.mark.parametrize(("table", "format"), [("loads", "csv"), ("load", "xlsx")])
def test_unknown_table_or_format(table: str, format: str) -> None:
    with pytest.raises(ExportError, match="tables are load, balance"):
        export_bytes(make_trace(PLAIN), table, format)


@pytest.mark.parametrize("format", FORMATS)
def test_path_is_written_whole_or_not_at_all(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / f"out.{format}"
    trace = make_trace(PLAIN)
    assert export_table(trace, "decisions", format, target) == 2 * trace.n_tokens()
    before = target.read_bytes()
    assert before == export_bytes(trace, "decisions", format)
    monkeypatch.setattr(export, "BATCH", 7)

    class Failing:
        def routings(self, sites: list[int], start: int, stop: int):
            if start:
                raise OSError(28, "No space left on device")
            return trace.source.routings(sites, start, stop)

        def scores(self, site: int, start: int, stop: int):
            return trace.source.scores(site, start, stop)

    with pytest.raises(OSError, match="No space"):
        export_table(replace(trace, source=Failing()), "decisions", format, target)
    assert target.read_bytes() == before and list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("format", FORMATS)
def test_an_open_file_stays_open(format: str) -> None:
    buffer = io.BytesIO()
    export_table(make_trace(PLAIN), "load", format, buffer)
    assert not buffer.closed


def test_memory_follows_the_piece_not_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading and writing alternate: no more than one piece is made before the one before it is written."""
    monkeypatch.setattr(export, "BATCH", 5)
    trace = make_trace(PLAIN)
    events: list[str] = []
    read = TABLES["decisions"].read

    def watched(t: Trace):
        for piece in read(t):
            events.append("read")
            yield piece

    class Sink(io.BytesIO):
        def write(self, data) -> int:
            events.append("write")
            return super().write(data)

    monkeypatch.setattr(export, "TABLES", {"decisions": replace(TABLES["decisions"], read=watched)})
    export_table(trace, "decisions", "csv", Sink())
    assert events.count("read") > 10
    assert "".join(e[0] for e in events).find("rrr") == -1


def test_schema_is_the_same_for_every_piece() -> None:
    pieces = list(TABLES["decisions"].read(make_trace(MIXED)))
    assert len({str(p.schema) for p in pieces}) == 1 and all(isinstance(p, pa.Table) for p in pieces)
