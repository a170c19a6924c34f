"""The token strip: text with each token coloured by its expert; layers are stepped through in the browser.

All layers travel once. Ids are int16 and weights float16 in base64 (weights on hover are good to three digits; the
table below the strip has them exact). The script sets text through textContent only.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st

from app.selection import acted
from app.strip_data import strip_data

_HERE = Path(__file__).parent
COLUMNS = 130  # characters in a line of a wide page
_strip = st.components.v2.component(
    "routerscope_token_strip",
    html='<div class="strip"></div>\n',
    css=(_HERE / "strip.css").read_text(encoding="utf-8"),
    js=(_HERE / "strip.js").read_text(encoding="utf-8"),
)


@dataclass(frozen=True)
class Stripped:
    """What the strip reports: the token clicked and the layer stepped to; None where nothing happened."""

    token: int | None
    layer: int | None


@dataclass(frozen=True)
class _Mounted:
    """A strip in the browser: where, which of the strips that stood there, and [layer, token] as given first, given last, told last.

    ``first`` must stay as it is while the strip lives: data that changes is sent again, all layers of it.
    """

    place: str
    life: str
    first: tuple[int, int | None]
    given: list[int | None]
    told: list[int | None]


def token_strip(texts: Sequence[str], breaks: Sequence[bool], experts: Sequence[np.ndarray], weights: Sequence[np.ndarray | None],
                layers: Sequence[str], hues: Sequence[Sequence[int]], place: str, *, layer: int, token: int | None = None, spotlight: int | None = None,
                lost: Sequence[int] | None = None, slot: str = "strip",
                compact: bool = False, on_layer: Callable[[int], None] | None = None) -> Stripped:  # fmt: skip
    """Draw the strip; returns what was clicked and stepped to.

    texts [n] visible text per token; breaks [n] True where the token holds a line end (shown as ⏎); experts and weights one
    [n, k] array per layer (weights None: not stored, experts by falling weight); ``hues`` the experts with a hue (strip_data.hues); ``place`` names the page and the text. The strip keeps its own ``layer`` and ``token``, and starts
    again where new ones are given that it did not tell itself. ``spotlight`` is the expert shown alone at first. ``lost`` [n] strikes tokens out:
    1 lost some of its experts, 2 all of them. ``slot`` tells several strips of a page apart; ``compact`` leaves out the controls.
    ``on_layer`` is called
    after a step to another layer.
    """
    given = [layer, token]
    key = f"{slot}-told"  # one for good: under another key a strip stands beside the one before until the script has ended
    known: _Mounted | None = st.session_state.get(f"_{slot}")
    follows = known is not None and known.place == place and key in st.session_state
    if known is None or not follows or any(g not in pair for g, *pair in zip(given, known.given, known.told, strict=True)):
        known = st.session_state[f"_{slot}"] = _Mounted(place, uuid.uuid4().hex, (layer, token), list(given), list(given))
    known.given[:] = given

    def tell(at: int, name: str, limit: int) -> None:
        acted()
        if (value := _within(st.session_state[key], name, limit, known.life)) is not None:
            known.given[at] = known.told[at]  # the page learns of a value after it has given the one before once more
            known.told[at] = value
            if name == "layer" and on_layer is not None:
                on_layer(value)

    data = strip_data(
        texts, breaks, experts, weights, layers, hues, id=known.life, layer=known.first[0],
        token=-1 if known.first[1] is None else known.first[1], spotlight=spotlight, compact=compact,
        lost=None if lost is None else [int(x) for x in lost], tells=on_layer is not None,
    )  # fmt: skip
    with st.container(key=f"{slot}-room-{_room(texts, breaks, compact)}"):
        result = _strip(data=data, key=key, on_token_change=lambda: tell(1, "token", len(texts)),
                        on_layer_change=lambda: tell(0, "layer", len(layers)))  # fmt: skip
    return Stripped(_within(result, "token", len(texts), known.life), _within(result, "layer", len(layers), known.life))


def _room(texts: Sequence[str], breaks: Sequence[bool], compact: bool) -> str:
    """Which room style.css keeps before the script of the strip has come: what a text of so many lines fills on a wide page, and no more."""
    lines = len("".join(texts)) // COLUMNS + sum(breaks)
    return ("passage" if lines >= 4 else "none") if compact else "strip" if lines >= 12 else "line"


def _within(result: Any, name: str, length: int, life: str) -> int | None:
    """A number the browser sent, checked as anything from outside is; None where a strip told it that stood here before."""
    told = result.get(name)
    if not (isinstance(told, list) and len(told) == 2 and told[0] == life):
        return None
    return told[1] if isinstance(told[1], int) and 0 <= told[1] < length else None
