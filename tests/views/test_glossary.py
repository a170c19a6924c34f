"""The Glossary page."""

from pathlib import Path

from analysis.glossary import TERMS
from analysis.metrics import METRICS
from app.text import plain

from .pages import shown


def test_glossary_explains_every_metric_and_every_term(runs: Path) -> None:
    test = shown("glossary", "demo-run")
    told = [m.value for m in [*test.markdown, *test.caption]]
    assert [m.name for m in METRICS.values() if not any(plain(m.definition[1:]) in t for t in told)] == []
    for entry in (*METRICS.values(), *TERMS):
        facts = (entry.name, entry.source, entry.chance, entry.range) if entry.range else (entry.source,)
        assert f"## {plain(entry.title)}" in told and any(all(plain(f) in t for f in facts) for t in told), entry.name


def test_glossary_search_stands_in_the_link(runs: Path) -> None:
    test = shown("glossary", "demo-run")
    test.query_params["term"] = "maxvio"
    test.run()
    headings = [m.value for m in test.markdown if m.value.startswith("## ")]
    assert headings == ["## MaxVio", "## MaxVio per document"] and test.text_input(key="term").value == "maxvio"
    nasty = "<img src=x> ![b](http://x)"
    test.text_input(key="term").set_value(nasty).run()
    assert test.query_params["term"] in (nasty, [nasty]) and not any(m.value.startswith("## ") for m in test.markdown)
    assert any(f"Nothing here speaks of {plain(nasty)}" in m.value for m in test.markdown)
