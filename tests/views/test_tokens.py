"""The Tokens page."""

from pathlib import Path

from streamlit.testing.v1 import AppTest

from analysis.writing import RunWriter
from app.text import plain
from tests.synthetic import PLAIN, card, make_parts

from .pages import ROOT


def test_a_document_is_shown_where_the_tokens_of_the_other_parts_cannot_be_read(runs: Path) -> None:
    """And one of theirs is an error that names the file."""
    with RunWriter.open(runs / "two", card(PLAIN), {}) as writer:
        for part in make_parts(PLAIN):
            writer.write(part)
        writer.commit()
    for path in sorted((runs / "two" / "tokens").iterdir())[1:]:
        path.write_bytes(bytes(path.stat().st_size))
    test = AppTest.from_file(str(ROOT / "app" / "main.py"), default_timeout=180)
    for key, value in {"doc": "1", "run": "two"}.items():
        test.query_params[key] = value
    test.switch_page("views/tokens.py")
    test.run()
    assert not test.exception and not test.error and test.title[0].value == "Which expert does each token go to?"
    test.query_params["doc"] = "4"
    test.run()
    assert not test.exception and plain("two/tokens/part-00001.parquet is damaged") in test.error[0].value
