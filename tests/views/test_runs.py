"""The Runs page."""

import json
from pathlib import Path

import pytest

from analysis import export
from analysis.store import open_run
from app import downloads
from app.text import plain
from tests.synthetic import PLAIN

from .pages import shown, store


def test_pasted_paragraphs_are_counted_where_they_are_texts_of_their_own(runs: Path) -> None:
    store(runs / "plain", PLAIN, [3])
    test = shown("runs", "plain")
    test.text_area(key="pasted").set_value("One.\n\nTwo.\nStill two.").run()
    assert not test.checkbox(key="paragraphs").value and not any("pasted" in c.value for c in test.caption)
    test.checkbox(key="paragraphs").check().run()
    assert any("2 paragraphs pasted" in c.value for c in test.caption)


def test_bad_prompts_get_a_sentence_and_stay(runs: Path) -> None:
    test = shown("runs", "demo-run")
    test.button(key="record").click().run()
    assert test.error[0].value.startswith(plain("Nothing was recorded: paste some text"))
    test.text_area(key="pasted").set_value("kept text").run()
    test.text_input(key="run_name").set_value("Bad Name!").run()
    test.button(key="record").click().run()
    assert "run name" in test.error[0].value and test.text_area(key="pasted").value == "kept text"


def test_headings_of_runs_keep_their_place_when_something_is_refused(runs: Path) -> None:
    """What moves is drawn twice or not at all until the script has ended."""
    test = shown("runs", "demo-run")
    before = {i: e.value for i, e in test.main.children.items() if e.type == "heading" or e.type == "markdown"}
    test.button(key="record").click().run()
    assert before == {i: e.value for i, e in test.main.children.items() if e.type == "heading" or e.type == "markdown"}
    assert "Nothing was recorded" in test.error[0].value and any(plain("Take the numbers of demo-run") in v for v in before.values())


def test_a_table_that_would_fill_the_memory_is_a_command(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(runs / "plain", PLAIN, [300, 40])
    trace = open_run(runs / "plain")
    for table in ("decisions", "tokens", "documents", "document-balance"):
        assert 0 < export.growing_rows(trace, table) == len(json.loads(export.export_bytes(trace, table, "json"))["rows"])
    assert export.growing_rows(trace, "load") == 0
    monkeypatch.setattr(export, "MOST_ROWS", 500)
    with pytest.raises(export.ExportError, match="680 rows would be made in memory"):
        export.export_bytes(trace, "decisions", "csv")
    monkeypatch.setattr(downloads, "MOST_ROWS", 500)
    test = shown("runs", "plain")
    assert not test.code and len(test.get("download_button")) == 3
    test.selectbox(key="table").set_value("decisions").run()
    assert "export RUN --table decisions" in test.code[0].value and not test.get("download_button") and "680 rows" in test.info[0].value
