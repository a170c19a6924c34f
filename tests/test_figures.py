"""Figures as files, without a browser: no page draws one that cannot be taken, and what goes out is what is drawn."""

from __future__ import annotations

import ast
import io
import json
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pyarrow.parquet as pq
import pytest
from streamlit.testing.v1 import AppTest

from analysis import __version__
from analysis.writing import RunWriter
from app import charts, figures, palette
from app.figures import SIZES, Shown

from .synthetic import PLAIN, card, make_part, make_trace

ROOT = Path(__file__).parent.parent
PAGES = sorted(p.stem for p in (ROOT / "app" / "views").glob("*.py") if p.stem != "__init__")
HOSTILE = '</title><script>window.__pwn=1</script>\0\u202e"'


@pytest.mark.parametrize("path", sorted((ROOT / "app").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_figures_are_drawn_in_one_place(path: Path) -> None:
    calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Attribute) and n.attr == "plotly_chart"]
    assert len(calls) == (path.name == "figures.py")


@pytest.mark.parametrize("page", PAGES)
def test_every_figure_of_a_page_can_be_taken(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROUTERSCOPE_RUNS", str(tmp_path))
    monkeypatch.chdir(ROOT)
    with RunWriter.open(tmp_path / "mine", card(PLAIN), {"created": "2026-01-02"}) as writer:
        writer.write(make_part(PLAIN, [30, 700], labels=["a", "b"]))
        writer.commit()
    test = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=180)
    test.query_params["run"] = "mine"
    test.run()
    test.switch_page(f"views/{page}.py").run()
    shown = test.session_state["_figures"]
    assert not test.exception and len(test.get("plotly_chart")) == len(shown) == len({s.name for s in shown})
    assert bool(shown) == (page in ("overview", "tokens", "load", "capacity", "specialization", "expert"))
    assert all(s.definition.endswith(".") and any(c.isdigit() for c in s.n) and len(charts.rows(s.figure)) for s in shown)
    assert [e.label for e in test.expander if e.label == "Take the figures"] == ["Take the figures"] * bool(shown)
    assert not [s for s in test.selectbox if s.key == "take-figure"]  # nothing is sent before it is asked for


def shown(figure: go.Figure | None = None, run: str = "mine") -> Shown:
    drawn = charts.load_map([np.array([2.0, 0.0, 1.0])], ["layer 0"], "dark") if figure is None else figure
    return Shown(make_trace(PLAIN, name=run), charts.file_name(run, "load-map"), "load_map", drawn, f"Load of {run}.", "7 tokens")


def test_what_goes_to_the_browser_says_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures.st, "session_state", {"_chosen": {"run": HOSTILE, "layer": "layer 2"}})
    order = figures._order(shown(run=HOSTILE), "single", True, {"layer": "layer 2"})
    about = json.loads(order["about"])
    assert (about["run"], about["n"], about["definition"], about["routerscope"]) == (
        HOSTILE,
        "7 tokens",
        f"Load of {HOSTILE}.",
        __version__,
    )
    assert about["settings"] == {"layer": "layer 2"} and (order["width"], order["height"], order["dpi"]) == (
        pytest.approx(316.8),
        None,
        300,
    )
    assert order["caption"].isprintable() and f"Routerscope {__version__}" in order["caption"] and "n = 7 tokens" in order["caption"]
    assert order["name"].isascii() and "<" not in order["name"] and "%3Cscript%3E" in order["query"]
    heat = json.loads(order["figure"])["data"][0]
    assert heat["colorscale"][3][1] == palette.LOAD["light"][3] and SIZES["double"][1] == 648


def test_numbers_go_out_with_definition_run_and_n() -> None:
    data = figures._rows(shown(), "one row per mark. Load of mine.", {"n": "7 tokens"}, "parquet")
    table = pq.read_table(io.BytesIO(data))
    about = json.loads(table.schema.metadata[b"routerscope"])
    assert about["run"] == "mine" and about["row"].endswith("Load of mine.") and about["settings"] == {"n": "7 tokens"}
    assert table.to_pydict() == {"layer": ["layer 0"] * 3, "relative_load": [2, 0, 1], "expert": [0, 1, 2]}
    assert len(figures._rows(shown(), "", {}, "csv").splitlines()) == 4
