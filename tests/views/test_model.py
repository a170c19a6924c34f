"""The Model page."""

from pathlib import Path

from .pages import shown


def test_what_if_answers_from_the_example_and_starts_again_with_another(runs: Path) -> None:
    test = shown("model", "demo-run")
    assert [m.value for m in test.metric][-3:] == ["1.76 T", "440.0 B", "25.0%"]
    test.selectbox(key="experts").set_value("16").run()
    assert test.metric[-1].value == "12.5%" and any("no longer those of the example" in c.value for c in test.caption)
    test.selectbox(key="example").set_value("64x16b").run()
    assert [m.value for m in test.metric][-3:] == ["1.02 T", "128.0 B", "12.5%"]


def test_a_model_without_capacity_says_none_in_words(runs: Path) -> None:
    assert shown("model", "demo-run").dataframe[0].value["native capacity"].tolist() == ["none"]
