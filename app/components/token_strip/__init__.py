"""The token strip: text with each token coloured by its expert; layers are stepped through in the browser.

All layers travel once. Ids are int16 and weights float16 in base64 (weights on hover are good to three digits; the
table below the strip has them exact). The script sets text through textContent only.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import streamlit as st

from app import palette

_HERE = Path(__file__).parent
_strip = st.components.v2.component(
    "routerscope_token_strip",
    html='<div class="strip"></div>\n',
    css=(_HERE / "strip.css").read_text(encoding="utf-8"),
    js=(_HERE / "strip.js").read_text(encoding="utf-8"),
)


def token_strip(texts: Sequence[str], breaks: Sequence[bool], experts: Sequence[np.ndarray], weights: Sequence[np.ndarray],
                layers: Sequence[str], start: int, key: str) -> int | None:  # fmt: skip
    """Draw the strip; returns the index of the token clicked, or None.

    texts [n] visible text per token; breaks [n] True where the token holds a line end (shown as ⏎); experts and weights one
    [n, k] array per layer; ``start`` is the layer shown first.
    """
    data: dict[str, Any] = {
        "texts": list(texts),
        "breaks": [int(b) for b in breaks],
        "layers": [
            {"title": t, "k": e.shape[1], "experts": _packed(e.astype("<i2")), "weights": _packed(w.astype("<f2").view("<u2"))}
            for t, e, w in zip(layers, experts, weights, strict=True)
        ],
        "start": start,
        "colours": list(palette.EXPERTS),
        "other": palette.OTHER,
    }
    result = _strip(data=data, key=key, on_token_change=lambda: None)
    token = getattr(result, "token", None)
    return int(token) if token is not None and 0 <= int(token) < len(texts) else None


def _packed(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
