"""A run that stores no gate weights: what was counted from them stays exact, and what would need them says so, in words."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from streamlit.testing.v1 import AppTest

from analysis.__main__ import main
from analysis.capacity import apply_capacity, compare_policies
from analysis.capture import capture, capture_parts
from analysis.cards import expert_card
from analysis.copying import copy_run
from analysis.export import describe, export_table
from analysis.files import stamp
from analysis.memory import kept_routing
from analysis.models import model_card
from analysis.passages import passages
from analysis.places import Place
from analysis.policies import MissingScores
from analysis.rounding import NOT_STORED, by_falling_weight
from analysis.stats import first_choices, part_statistics
from analysis.store import RunError, open_run, read_manifest
from analysis.trace import TraceError
from analysis.verifying import same_counts, stored_part, verify_run
from analysis.writing import RunWriter
from app.model_card import origin
from app.report import report_html
from app.strip_data import strip_data
from app.text import plain

from . import tiny
from .synthetic import differences
from .test_rounding import LARGEST, altered

ROOT = Path(__file__).parent.parent
TEXTS = ["def f(x): return x", "Il pleut.", "now and then and now"]
LABELS = ["a", "b", "a"]
GIVEN = {"labels": LABELS, "part_tokens": 20}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "unweighted"
    capture(tiny.build("olmoe"), tiny.tokenizer(), TEXTS, out=folder, weights="none", **GIVEN)
    return folder


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "exact"
    capture(tiny.build("olmoe"), tiny.tokenizer(), TEXTS, out=folder, **GIVEN)
    return folder


@given(st.lists(st.lists(st.tuples(st.booleans(), st.floats(-LARGEST, LARGEST, width=32)), min_size=3, max_size=3), min_size=1))
def test_slots_fall_and_the_first_is_the_first_choice(rows: list[list[tuple[bool, float]]]) -> None:
    experts = np.array([[i if there else -1 for i, (there, _) in enumerate(r)] for r in rows], np.int16)
    weights = np.array([[w for _, w in r] for r in rows], np.float32)
    order = by_falling_weight(experts, weights)
    ids, falling = (np.take_along_axis(x, order, 1) for x in (experts, weights))
    for mine, w in zip(ids, falling, strict=True):
        n = int((mine >= 0).sum())
        assert (mine[:n] >= 0).all() and (mine[n:] < 0).all() and (np.diff(w[:n].astype(float)) <= 0).all()
        assert (np.diff(mine[:n])[np.diff(w[:n].astype(float)) == 0] > 0).all()  # the earlier of equals first


def test_counts_and_sums_are_those_of_the_exact_run(run: Path, exact: Path) -> None:
    for file in ("stats.parquet", "token_stats.parquet", "document_stats.parquet"):
        assert (run / file).read_bytes() == (exact / file).read_bytes()
    mine, other = open_run(run), open_run(exact)
    for layer in mine.layers:
        a, b = mine.routing(layer.index), other.routing(layer.index)
        assert np.array_equal(np.sort(a.experts), np.sort(b.experts)) and np.array_equal(first_choices(a), first_choices(b))
        assert np.array_equal(a.experts[:, 0], first_choices(b)) and a.weights is None
        assert mine.stats.gate_mass(layer.index).sum() > 0
    names = pq.read_schema(run / "routing" / "part-00000.parquet").names
    assert "e0" in names and not any(n[0] == "w" for n in names)
    memory = capture(tiny.build("olmoe"), tiny.tokenizer(), TEXTS, weights="none", **GIVEN)
    assert differences(memory, mine) == [] and memory.routing(0, 3, 9).weights is None
    assert memory.weights_note == mine.weights_note == NOT_STORED and not other.weights_note


def test_weights_are_refused_by_name(run: Path) -> None:
    trace = open_run(run)
    with pytest.raises(TraceError, match="run 'unweighted' stored no gate weights .* capture it again with exact or 8-bit ones"):
        trace.weights(0)
    with pytest.raises(TraceError, match="stored no gate weights"):
        passages(trace, 0, int(trace.stats.load(0).argmax()))
    assert expert_card(trace, 0, int(trace.stats.load(0).argmax())).mean_gate > 0


def test_capacity_answers_what_order_and_counts_say(run: Path, exact: Path) -> None:
    mine, other = open_run(run), open_run(exact)
    for policy in ("position", "choice", "random", "dropless"):
        a, b = (apply_capacity(t, 1.0, policy, "run") for t in (mine, other))
        lost = [c for c in a.by_layer().column_names if "gate" in c]
        assert len(lost) == 3 and all(np.isnan(a.by_layer()[c].to_numpy()).all() for c in lost)
        # a random order is drawn per slot, so only its counts of assignments are the same; the rest is the same token by token
        drops = [np.where(x.dropped(0), t.routing(0).chosen, -1) for x, t in ((a, mine), (b, other))]
        if policy == "random":
            assert a.by_layer()["dropped"].equals(b.by_layer()["dropped"])
        else:
            assert a.by_layer().drop_columns(lost).equals(b.by_layer().drop_columns(lost))
            assert np.array_equal(np.sort(drops[0]), np.sort(drops[1])) and a.by_token().drop_columns(lost).equals(
                b.by_token().drop_columns(lost)
            )
    for policy in ("probability", "batch_priority"):
        with pytest.raises(MissingScores, match="which this run did not store"):
            apply_capacity(mine, 1.0, policy, "run")
    told = {r["policy"]: r["unanswered"] for r in compare_policies(mine, 1.0, "run").to_pylist()}
    assert [p for p, why in told.items() if why] == ["probability", "batch_priority", "reroute"]


def test_it_is_verified_and_counted_again(run: Path, exact: Path, tmp_path: Path) -> None:
    assert verify_run(run) == ()
    trace = open_run(run)
    again = part_statistics(stored_part(Place.of(run), trace, read_manifest(run)["parts"][0]), trace.layers)
    assert again.gate_mass(0).sum() == 0 and again.first_choice_load(0).sum() == again.n_tokens(0)

    def swapped(copy: Path, manifest: dict) -> None:  # another order of slots is other first choices
        name = "routing/part-00000.parquet"
        table = pq.read_table(copy / name)
        names = ["e1" if n == "e0" else "e0" if n == "e1" else n for n in table.column_names]
        pq.write_table(table.rename_columns(names).select(table.column_names), copy / name, row_group_size=len(table) // len(trace.layers))
        manifest["parts"][0]["files"][name] = stamp(copy / name)

    assert "counts differ" in verify_run(altered(run, tmp_path, swapped))[0]
    a, b = (replace(open_run(exact).stats) for _ in range(2))
    rows = b.core.to_pandas()
    rows.loc[rows["statistic"] == "load", "sum"] += 1
    b = replace(b, core_rows=type(b.core).from_pandas(rows, schema=b.core.schema, preserve_index=False))
    assert not same_counts(a, b) and same_counts(a, b, "none")


def test_a_manifest_that_says_otherwise_is_refused(run: Path, tmp_path: Path) -> None:
    wrong = altered(run, tmp_path, lambda _, manifest: manifest["options"].update(weights="exact"))
    with pytest.raises(RunError, match="part-00000.parquet is damaged"):
        open_run(wrong).weights(0)


def test_a_resumed_and_a_copied_run_are_the_same(run: Path, tmp_path: Path) -> None:
    model, tokenizer = tiny.build("olmoe"), tiny.tokenizer()
    card, kept = model_card(model, tokenizer), {"part_tokens": 20, "weights": "none"}
    with RunWriter.open(tmp_path / "again", card, kept) as writer:
        writer.write(next(iter(capture_parts(model, tokenizer, TEXTS, labels=LABELS, **kept))))
    with pytest.raises(RunError, match="used other options"):
        capture(model, tokenizer, TEXTS, out=tmp_path / "again", **GIVEN)
    resumed = capture(model, tokenizer, TEXTS, out=tmp_path / "again", weights="none", **GIVEN)
    for path in run.glob("*/*.parquet"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(run)).read_bytes()
    copy_run(str(run), str(tmp_path / "copy"))
    assert verify_run(tmp_path / "copy") == () and resumed.weights_kept == "none"
    part = stored_part(Place.of(run), open_run(run), read_manifest(run)["parts"][0])
    assert kept_routing(part, 0) is part.routing[0]  # once dropped, nothing is left to sort by


def test_files_the_command_line_and_comparisons(run: Path, exact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = open_run(run)
    for format in ("parquet", "csv", "json"):
        export_table(trace, "decisions", format, tmp_path / f"d.{format}")
    table = pq.read_table(tmp_path / "d.parquet")
    about = json.loads(table.schema.metadata[b"routerscope"])
    assert (
        not [c for c in table.column_names if "weight" in c]
        and "weight_i" not in about["definitions"]
        and about["gate_weights"] == NOT_STORED
    )
    assert "weight_i" in describe(open_run(exact), "decisions")["definitions"]
    assert "weight" not in (tmp_path / "d.csv").read_text().splitlines()[0]
    assert "Gate weights not stored" in origin(trace) and "not stored" in report_html(trace)
    assert "the larger the gate weight" not in report_html(trace) and "the larger the gate weight" in report_html(open_run(exact))
    assert main(["stats", str(run)]) == 0 and NOT_STORED in capsys.readouterr().out
    assert main(["compare", str(run), str(exact)]) == 0 and "1.000" in capsys.readouterr().out
    assert (
        main(["export", str(run), "--table", "capacity", "--policy", "probability", "--format", "csv", "-o", str(tmp_path / "c.csv")]) == 2
    )
    assert "which this run did not store: give another policy" in capsys.readouterr().err


def test_a_strip_has_experts_without_weights(run: Path) -> None:
    trace = open_run(run)
    routing = trace.routing(0)
    data = strip_data(
        ["x"] * len(routing.experts), [False] * len(routing.experts), [routing.experts], [routing.weights], ["layer 0"], [[0]]
    )
    assert data["layers"][0]["weights"] is None and data["layers"][0]["experts"]


PAGES = ["overview", "tokens", "load", "capacity", "specialization", "expert", "model", "glossary", "runs"]
CHOICES = [("tokens", {"token": "2"}), ("capacity", {"policy": "probability"}), ("capacity", {"lost": "gate"}), ("capacity", {"who": "text"}),
           ("capacity", {"who": "token", "lost": "first"}), ("capacity", {"policy": "choice", "compare": "open"})]  # fmt: skip


@pytest.mark.parametrize(("page", "chosen"), [*((p, {}) for p in PAGES), *CHOICES])
def test_every_page_says_what_is_missing(run: Path, page: str, chosen: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROUTERSCOPE_RUNS", str(run.parent))
    monkeypatch.chdir(ROOT)
    test = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=180)
    for key, value in {"run": run.name, **chosen}.items():
        test.query_params[key] = value
    if page != "overview":
        test.switch_page(f"views/{page}.py")
    test.run()
    assert not test.exception
    if page not in ("glossary", "runs"):
        assert plain(NOT_STORED) in [w.value for w in test.warning]
    said = " ".join(x.value for x in (*test.caption, *test.error))
    assert "nan" not in said.lower().split()
    wanted = {"probability": "which this run did not store", "gate": "single tokens was not recorded"}
    for value in chosen.values():
        assert wanted.get(value, "") in said
    if page == "expert":
        assert "passages are chosen by the gate weights of single tokens" in said
    if (page, chosen) == CHOICES[0]:
        assert any("experts, largest gate weight first" in f.value.columns for f in test.dataframe)
