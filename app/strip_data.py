"""What a token strip shows, packed for its script: the same on a page and in a report. Knows nothing of Streamlit's session."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.findings import Finding
from analysis.trace import LayerInfo, Trace

from . import palette, text

FIRST_TOKENS = 160
HUES = (
    "Hues belong to the run's 8 busiest experts of each layer, green to another one shown alone; experts of different layers are unrelated."
)


@dataclass(frozen=True)
class StripText:
    """Tokens of one text through the layers of its stream: visible texts, line ends, experts and weights [n, k] (None: not stored), ``hues`` per layer."""

    texts: list[str]
    breaks: list[bool]
    experts: list[np.ndarray]
    weights: list[np.ndarray | None]
    layers: list[str]
    layer: int
    document: dict[str, Any]
    hues: list[list[int]]

    def strength(self, expert: int) -> str:
        """What the strength of a colour says while one expert is in the spotlight."""
        if any(w is None for w in self.weights):
            return f"coloured where expert {expert} is used"
        return f"the stronger the colour, the larger the gate weight of expert {expert}"


def hues(trace: Trace, layers: Sequence[LayerInfo]) -> list[list[int]]:
    """Per layer, the experts that have a hue wherever the run is shown: its busiest ones over the whole run."""
    return [palette.hued(trace.stats.load(x.index)) for x in layers]


def first_text(trace: Trace, finding: Finding) -> StripText:
    """The beginning of the text in which the finding's expert is used most, at the finding's layer."""
    site = trace.layers[finding.site]
    documents = [r for r in trace.documents.to_pylist() if r["stack"] == site.stream and finding.label in (None, r["label"])]
    used = trace.stats.document_load(site.index, np.array([r["document"] for r in documents]))[:, finding.expert]
    document = max(zip(used, documents, strict=True), key=lambda x: x[0] / max(x[1]["n_tokens"], 1))[1]
    start, stop = trace.document_range(document["document"], site.stream)
    stop = min(stop, start + FIRST_TOKENS)
    sites = [x for x in trace.layers if x.stream == site.stream]
    rows = trace.stream_tokens(site.stream, start, stop, ["token", "token_bytes"])
    read = trace.routings([x.index for x in sites], start, stop)
    tokens = rows["token"].to_pylist()
    return StripText(text.token_texts(tokens, rows["token_bytes"].to_pylist()), ["\n" in (t or "") for t in tokens],
                     [r.experts for r in read], [r.weights for r in read], [x.title for x in sites], sites.index(site), document, hues(trace, sites))  # fmt: skip


def strip_data(texts: Sequence[str], breaks: Sequence[bool], experts: Sequence[np.ndarray], weights: Sequence[np.ndarray | None],
               layers: Sequence[str], hues: Sequence[Sequence[int]], **state: Any) -> dict[str, Any]:  # fmt: skip
    """What strip.js reads. ``hues`` are experts per layer in the order of palette.EXPERTS; all others are grey. Ids are int16 and weights float16, in base64 (weights None: not stored); ``state`` is what the strip starts with."""
    plain = {"layer": 0, "token": -1, "spotlight": None, "compact": False, "lost": None, "tells": False}
    return plain | state | {
        "texts": list(texts),
        "breaks": [int(b) for b in breaks],
        "layers": [
            {"title": t, "k": e.shape[1], "hues": [int(x) for x in h], "experts": _packed(e.astype("<i2")),
             "weights": None if w is None else _packed(w.astype("<f2").view("<u2"))}
            for t, h, e, w in zip(layers, hues, experts, weights, strict=True)
        ],
        "colours": list(palette.EXPERTS),
        "other": palette.OTHER,
        "picked": palette.PICKED,
    }  # fmt: skip


def _packed(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
