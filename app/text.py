"""The only way data text reaches the screen: tokens, labels, names, anything from a model, a prompt or a file.

``visible_token`` makes every token readable and unmistakable; ``axis_label`` is for Plotly, which reads HTML;
``plain`` is for Streamlit's Markdown. The ``show_`` functions take data text and escape it themselves.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Mapping, Sequence
from urllib.parse import urlencode

import streamlit as st

_MARKS = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}
_MARKDOWN = re.compile(r"([!-/:-@\[-`{-~])")


def visible_token(text: str) -> str:
    """A token as shown: space ·, newline ⏎, tab ⇥; controls, bidi marks and zero-width characters as ⟨U+202E⟩."""
    return "".join(_MARKS.get(c) or (c if _shows(c) else f"⟨U+{ord(c):04X}⟩") for c in text) or "⟨empty⟩"


def _shows(c: str) -> bool:
    category = unicodedata.category(c)
    # Zero-width joiners and variation selectors belong to emoji and scripts that need them; alone they are marked.
    return category[0] not in "CZ" or (category == "Zs" and c == "\u3000")


def token_texts(texts: Sequence[str], raw: Sequence[bytes | None]) -> list[str]:
    """Visible text per token. A character split over several tokens appears on each as ``文(1/3)``."""
    out = [visible_token(t) for t in texts]
    i = 0
    while i < len(raw):
        stop = i + 1
        if (piece := raw[i]) is not None and not _decodes(piece):
            whole = piece
            while stop < len(raw) and stop - i < 8 and not _decodes(whole) and (more := raw[stop]) is not None:
                whole += more
                stop += 1
            if _decodes(whole):
                character = visible_token(whole.decode())
                for part in range(i, stop):
                    out[part] = f"{character}({part - i + 1}/{stop - i})"
            else:
                stop = i + 1
        i = stop
    return out


def _decodes(piece: bytes) -> bool:
    try:
        piece.decode()
    except UnicodeDecodeError:
        return False
    return True


def axis_label(text: str, limit: int = 14) -> str:
    """Text for a Plotly tick, title or hover: HTML-escaped; longer than ``limit`` ends in an ellipsis."""
    return _for_plotly(visible_token(text), limit)


def axis_name(text: str, limit: int = 22) -> str:
    """As ``axis_label`` for names and labels: plain spaces stay plain."""
    return _for_plotly(visible_name(text) or "⟨empty⟩", limit)


def axis_names(texts: Sequence[str]) -> list[str]:
    """``axis_name`` of each place of one axis. Plotly would draw places of equal names as one, so that what shortening made equal is numbered."""
    names: dict[str, None] = {}
    for whole in texts:
        name, n = axis_name(whole), 1
        while name in names:
            n += 1
            name = f"{axis_name(whole, 18)} ({n})"
        names[name] = None
    return list(names)


def _for_plotly(shown: str, limit: int) -> str:
    """A double quote goes by its number: Plotly knows few names, and would show the letters &quot;."""
    return html.escape(shown if len(shown) <= limit else shown[: limit - 1] + "…").replace("&quot;", "&#34;")


def plain(text: str) -> str:
    """Text for Streamlit's Markdown with nothing left to interpret: punctuation escaped, controls made visible.

    A word joiner after a colon before a word stops shortcodes such as icons and emoji, which are replaced after parsing.
    """
    return _MARKDOWN.sub(r"\\\1", re.sub(r":(?=\w)", ":\u2060", visible_name(text)))


def visible_name(text: str) -> str:
    """A name or a sentence as it is shown where nothing is interpreted: spaces stay plain, controls are visible."""
    return "".join(c if c == " " or _shows(c) else visible_token(c) for c in text)


def markup(text: str) -> str:
    """Text for an HTML file, as content or as an attribute's value in quotes: nothing in it is markup, controls are visible."""
    return html.escape(visible_name(text))


def show_heading(text: str) -> None:
    """A heading made of data text."""
    st.markdown("## " + plain(text))


def show_text(text: str) -> None:
    """A paragraph made of data text."""
    st.markdown(plain(text))


def show_note(text: str, how: str = "") -> None:
    """A caption made of data text; ``how`` is shown where one points at its question mark."""
    st.caption(plain(text), help=plain(how) or None)


def show_definitions(run: str, terms: Mapping[str, str]) -> None:
    """A caption that leads to entries of the glossary: ``terms`` maps an entry's name to its title."""
    links = (f"[{plain(title)}](glossary?{urlencode({'run': run, 'term': name})})" for name, title in terms.items())
    st.caption("What is meant: " + " · ".join(links))


def show_error(text: str) -> None:
    """An error sentence, which may name data."""
    st.error(plain(text))


def show_warning(text: str) -> None:
    """A sentence that must not be overlooked."""
    st.warning(plain(text))


def counted(n: int, one: str, many: str | None = None) -> str:
    """A number with its noun: 1 token, 2,300 tokens."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"
