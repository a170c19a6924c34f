"""The Runs page."""

from pathlib import Path

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
