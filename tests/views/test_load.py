"""The Load page."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from analysis.store import open_run
from analysis.trace import SiteRouting
from analysis.writing import RunWriter
from app.text import plain
from tests.synthetic import PLAIN, card, make_part, site

from .pages import ROOT, shown, store


def test_load_shows_what_it_can_where_the_counts_of_token_ids_cannot_be_read_and_heals(runs: Path) -> None:
    store(runs / "torn", PLAIN, [60] * 4)
    path = runs / "torn" / "token_stats.parquet"
    sound = path.read_bytes()
    path.write_bytes(bytes(len(sound)))
    test = shown("load", "torn")
    assert not test.exception and plain("torn/token_stats.parquet is damaged") in test.error[0].value
    titles = [h.value for h in test.header]
    assert "How stable is it from batch to batch?" in titles and "Over layers" not in titles
    path.write_bytes(sound)
    test.run()
    assert not test.exception and not test.error and "Over layers" in [h.value for h in test.header]


def test_load_names_layers_that_hide_behind_the_sum(runs: Path) -> None:
    layers = tuple(site(i, 8, 1) for i in range(8))
    part = make_part(layers, [410])
    loads = np.full((8, 8), 10) + 330 * np.eye(8, dtype=int)
    chosen = [np.repeat(np.arange(8), row)[:, None].astype(np.int16) for row in loads]
    routing = tuple(SiteRouting(e, r.weights, e) for e, r in zip(chosen, part.routing, strict=True))
    for name, mine in (("hidden", routing), ("even", part.routing)):
        with RunWriter.open(runs / name, card(layers), {}) as writer:
            writer.write(replace(part, routing=mine))
            writer.commit()
    said = {name: [m.value for m in shown("load", name).markdown] for name in ("hidden", "even")}
    assert any("collapsed within them" in m and "6\\.63 times" in m for m in said["hidden"])
    assert not any("collapsed within" in m for m in said["even"]) and any("would miss no collapsed layer here" in m for m in said["even"])


@pytest.mark.parametrize("pieces", ["label", "position"])
@pytest.mark.parametrize("batch", ["1", "4096"])
@pytest.mark.parametrize("filled", ["mixed", "recorded"])
def test_load_reads_batch_and_pieces_from_the_link(runs: Path, batch: str, pieces: str, filled: str) -> None:
    from analysis.stability import maxvio_table

    test = shown("load", "demo-run")
    test.query_params.update({"batch": batch, "pieces": pieces, "filled": filled})
    test.run()
    rows = maxvio_table(open_run(ROOT / "data" / "demo-run"), int(batch), 0 if filled == "mixed" else None).to_pylist()
    first, worst, loose = rows[0], max(rows, key=lambda r: r["batch"]), max(rows, key=lambda r: r["spread"])
    assert any(plain(f"most uneven in a batch: MaxVio {worst['batch']:.2f} on average") in m.value for m in test.markdown)
    said = (
        f"Layer {loose['site']} varies most: the standard deviation of its MaxVio over {loose['batches']} batches is {loose['spread']:.2f};"
    )
    assert any(plain(said) in m.value for m in test.markdown)
    assert any(plain(f"n = {first['batches']:,} batches of {first['batch_n']:,.0f} tokens") in c.value for c in test.caption)
    assert any(plain(f"in {9 if pieces == 'label' else 11} pieces") in c.value for c in test.caption) and not test.exception


@pytest.mark.parametrize("asked", [None, "2", "16"])
def test_load_tells_the_longest_queue_of_the_devices_of_the_link(runs: Path, asked: str | None) -> None:
    from analysis.devices import queue_table

    test = shown("load", "demo-run")
    if asked is not None:
        test.query_params["devices"] = asked
        test.run()
    rows = queue_table(open_run(ROOT / "data" / "demo-run"), int(asked or 8), 1_024, 0).to_pylist()
    worst = max(rows, key=lambda r: r["median"])
    said = (
        f"With {asked or 8} devices, the longest queue of layer {worst['site']} is {worst['least']:.2f} to {worst['most']:.2f} times the mean"
        f" (median {worst['median']:.2f} over {worst['batches']} batches); uniform routing: at most about {worst['chance']:.2f}."
    )
    assert any(m.value == plain(said) for m in test.markdown) and test.selectbox(key="devices").options == ["2", "4", "8", "16"]
    [told] = [d.value for d in test.dataframe if "balancedness" in d.value]
    assert told["median"].tolist() == [r["median"] for r in rows] and not test.exception


def test_layers_that_the_devices_do_not_divide_are_left_out_and_counted(runs: Path) -> None:
    store(runs / "shapes", (site(0, 6, 2), site(1, 8, 2), site(2, 16, 2)), [300] * 8)
    test = shown("load", "shapes")
    assert test.selectbox(key="devices").options == ["2", "3", "4", "6", "8", "16"] and test.selectbox(key="devices").value == "8"
    assert any(plain("1 layer whose experts 8 does not divide left out.") in c.value for c in test.caption) and not test.exception


def test_load_of_one_batch_tells_no_stability(runs: Path) -> None:
    store(runs / "short", PLAIN, [9, 9])
    test = shown("load", "short")
    said = [m.value for m in test.markdown]
    assert any(m.startswith(plain("One batch only: stability cannot be told.")) for m in said) and not any("varies" in m for m in said)
    test.query_params["batch"] = "1"
    test.run()
    assert any("No layer varies more than chance" in m.value for m in test.markdown) and not test.exception


def test_load_of_counts_without_documents_says_so(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from analysis import stability

    store(runs / "counts-alone", PLAIN, [9, 9])
    table = stability.maxvio_table
    monkeypatch.setattr(
        stability, "maxvio_table", lambda trace, n, mixed: table(replace(trace, documents=trace.documents.slice(0, 0)), n, mixed)
    )
    test = shown("load", "counts-alone")
    assert not test.exception and any("cannot be cut into batches" in c.value for c in test.caption)
