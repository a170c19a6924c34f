import html

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.text import axis_label, axis_name, axis_names, plain, token_texts, visible_token


@pytest.mark.parametrize(
    ("token", "shown"),
    [(" a", "·a"), ("\n\n", "⏎⏎"), ("\t", "⇥"), ("\u202e", "⟨U+202E⟩"), ("\0", "⟨U+0000⟩"), ("\u200b", "⟨U+200B⟩"), ("", "⟨empty⟩"),
     ("<s>", "<s>"), ("选", "选"), ("سلام", "سلام"), ("\u00a0", "⟨U+00A0⟩"), ("\\xe9", "\\xe9")],
)  # fmt: skip
def test_tokens_are_shown_unmistakably(token: str, shown: str) -> None:
    assert visible_token(token) == shown


def test_a_character_split_over_tokens_names_its_parts() -> None:
    raw = [b"a", *[bytes([b]) for b in "选".encode()], b"\xff", " é".encode()]
    texts = [r.decode(errors="backslashreplace") for r in raw]
    assert token_texts(texts, raw) == ["a", "选(1/3)", "选(2/3)", "选(3/3)", "\\xff", "·é"]
    assert token_texts(["x"], [None]) == ["x"]


@given(st.text(st.characters(codec="utf-8"), max_size=60))
def test_axis_label_leaves_no_markup(text: str) -> None:
    label = axis_label(text, 100)
    assert "<" not in label and ">" not in label and '"' not in label
    assert html.unescape(label) == visible_token(text) or len(visible_token(text)) > 100


@pytest.mark.parametrize(
    "text", ["![b](http://x)", "[a](javascript:x)", "<img src=x>", "$x$", ":material/home:", ":red[x]", "# h", "**b**", "`c`", "http://a.b"]
)
def test_plain_leaves_no_markdown(text: str) -> None:
    shown = plain(text)
    for i, c in enumerate(shown):
        if c in "![]()<>$#*`:/":
            assert shown[i - 1] == "\\"
    assert ":material/" not in shown.replace("\\", "") and ":red" not in shown
    assert plain("Layer 2: 16") == "Layer 2\\: 16"


def test_axis_names_keep_spaces_and_no_markup() -> None:
    assert axis_name('two words "<b>"\n') == "two words &#34;&lt;b&gt;&#34;⏎" and axis_name("") == "⟨empty⟩"


@given(st.lists(st.text(st.sampled_from("ab<(2) …"), max_size=26)))
def test_names_of_an_axis_differ_also_where_shortened(texts: list[str]) -> None:
    names = axis_names(texts)
    assert len(set(names)) == len(texts) and all(len(html.unescape(n)) <= 26 for n in names)


def test_a_number_tells_shortened_names_apart() -> None:
    assert axis_names(["a", "a very long label: one", "a very long label: one and more", "a very long label: one and less"]) == [
        "a", "a very long label: one", "a very long label: on…", "a very long label… (2)"]  # fmt: skip
