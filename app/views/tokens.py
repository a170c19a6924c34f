"""Tokens: which expert does each token go to, at every layer?"""

from __future__ import annotations

import numpy as np
import pandas as pd
import streamlit as st

from analysis.balance import chance_cv, relative_load
from analysis.stats import first_choices
from analysis.trace import SiteRouting, SiteScores
from app import charts, text
from app.components.token_strip import token_strip
from app.figures import show_figure
from app.selection import (
    choice,
    choose_token,
    chosen_token,
    current_trace,
    document_picker,
    layer_picker,
    open_expert,
    recording_id,
    set_choice,
    theme,
)
from app.strip_data import HUES, hues

WINDOW = 4_096
MAPS = {
    "expert": f"Each cell is the expert with the largest gate weight, in the strip's colours. {HUES} Empty: no expert.",
    "router entropy": "Entropy of the router's distribution over all experts in nats: 0 is certain, ln E undecided.",
    "margin": "Selection score of the last chosen expert less that of the best rejected one; near 0 means the choice was close.",
}  # fmt: skip

st.title("Which expert does each token go to?")
trace = current_trace()
if trace.load_tokens is None:
    st.info("This run holds statistics only. The Load page shows them; capture the text again to see tokens.")
    st.page_link("views/load.py", label="To the Load page →", query_params={"run": trace.name})
    st.stop()
pickers = st.container(horizontal=True)
with pickers:
    site = layer_picker(trace)
    document = document_picker(trace, trace.layers[site].stream)

stream = trace.layers[site].stream
start, stop = trace.document_range(document, stream)
length, first = stop - start, 0
token = chosen_token(length)
if length > WINDOW:
    windows = {str(i): f"{i:,} to {min(length, i + WINDOW) - 1:,}" for i in range(0, length, WINDOW)}
    with pickers:
        first = int(choice("first", f"Tokens shown, of {length:,}", windows, str((token or 0) // WINDOW * WINDOW), width=200))
    start, stop = start + first, min(stop, start + first + WINDOW)
sites = [x for x in trace.layers if x.stream == stream]
rows = trace.stream_tokens(stream, start, stop)


@st.cache_resource(max_entries=32, show_spinner=False)
def decisions(run: str, stream: str, start: int, stop: int) -> list[tuple[SiteRouting, SiteScores]]:
    """Decisions and scores of every layer for a range of rows; ``run`` names the trace with its date."""
    routed = trace.routings([x.index for x in sites], start, stop)
    return [(r, trace.scores(x.index, start, stop)) for r, x in zip(routed, sites, strict=True)]


read, hued = decisions(recording_id(trace), stream, start, stop), hues(trace, sites)
shown = text.token_texts(rows["token"].to_pylist(), rows["token_bytes"].to_pylist())
breaks = ["\n" in (t or "") for t in rows["token"].to_pylist()]
titles = [x.title for x in sites]
here = [x.index for x in sites].index(site)
text.show_note(
    f"{text.counted(len(shown), 'token')}. Colour: the expert with the largest gate weight at the layer shown. {HUES}"
    " · is a space, ⏎ a line end; (1/2) marks a character that several tokens share. Arrow keys: ← → tokens, ↓ next layer, ↑ previous."
)


def follow(at: int) -> None:
    """The strip stepped to another layer: the picker and the URL follow."""
    set_choice("layer", titles[at])


chosen = token - first if token is not None and first <= token < first + len(shown) else None
told = token_strip(shown, breaks, [r.experts for r, _ in read], [r.weights for r, _ in read], titles, hued,
                   f"tokens-{recording_id(trace)}-{stream}-{document}-{first}",
                   layer=here, token=chosen, on_layer=follow)  # fmt: skip
if told.token is not None and told.token != chosen:
    chosen = told.token
    choose_token(first + chosen)
if chosen is not None:
    row = rows.slice(chosen, 1).to_pylist()[0]
    text.show_heading(f"Token {row['position']}: {shown[chosen]}")
    loss, vocabulary = row["loss"], trace.model.vocab_size
    facts = f"token id {row['token_id']}, {row['phase']}"
    facts += f"; loss of the next token {loss:.3f} nats" if loss is not None and loss == loss else "; no next token to predict"
    if loss == loss and loss is not None and vocabulary:
        facts += f" (guessing among all {vocabulary:,} tokens loses {np.log(vocabulary):.3f})"
    text.show_note(facts)
    table = []
    for layer, (routing, scores) in zip(sites, read, strict=True):
        ids, weights = routing.experts[chosen].tolist(), routing.weights
        if weights is None:  # ids stand by falling weight
            heading, used = "experts, largest gate weight first", [f"{e}" for e in ids if e >= 0]
        else:
            order = np.argsort(-weights[chosen], kind="stable")
            heading, used = "expert (gate weight)", [f"{ids[s]} ({weights[chosen, s]:.3f})" for s in order if ids[s] >= 0]
        table.append(
            {
                "layer": layer.title,
                heading: ", ".join(used) or "none (dropped)",
                "entropy": float(scores.entropy[chosen]),
                "undecided": float(np.log(layer.n_classes)),
                "margin": float(scores.margin[chosen]),
            }
        )
    meant = {"entropy": "Of the router's distribution over all experts, in nats: 0 is certain.", "undecided": "The entropy of a router without"
             " any preference: ln of the number of experts, in nats.", "margin": "Selection score of the last chosen expert less that of the best"
             " rejected one; near 0 means the choice was close."}  # fmt: skip
    st.dataframe(
        pd.DataFrame(table),
        hide_index=True,
        column_config={c: st.column_config.NumberColumn(help=h, format="%.3f") for c, h in meant.items()},
    )

st.header("The same document, all layers at once")
kind = choice(
    "map", "Show", {k: k for k in ("expert", "router entropy", "margin")}, "expert", draw=st.segmented_control, label_visibility="collapsed"
)
values = {
    "expert": lambda r, s: first_choices(r),
    "router entropy": lambda r, s: s.entropy,
    "margin": lambda r, s: s.margin,
}[kind]
matrix = np.stack([values(r, s) for r, s in read])
labels = [text.axis_label(t) for t in shown]
show_figure(
    trace, charts.token_map(matrix, labels, titles, kind, theme(), hued if kind == "expert" else None), f"{kind}-document-{document + 1}", key="token_map",
    alt=f"Heatmap of {len(titles)} layers by {len(shown)} tokens showing the {kind}.", definition=MAPS[kind], n=f"{len(shown):,} tokens",
)  # fmt: skip

st.header("How this document loads the experts")
loads = [np.bincount(r.experts[r.experts >= 0], minlength=x.n_classes)[: x.n_experts] for x, (r, _) in zip(sites, read, strict=True)]
clicked = show_figure(
    trace, charts.load_map([relative_load(n) for n in loads], titles, theme(), clickable=True), f"load-document-{document + 1}",
    key="document_load", on_select="rerun", selection_mode="points",
    alt="Heatmap of layers by experts: load of this document relative to an even share.",
    definition="Load of the tokens shown over the layer's mean load, on a fixed scale from ⅛× to 8×; a cross marks an expert that none of them"
    " uses. One document is a small sample: by chance alone its loads vary by about"
    f" ±{chance_cv(len(shown), sites[0].n_experts, sites[0].top_k):.0%} (one standard deviation).",
    n=f"{len(shown):,} tokens",
)  # fmt: skip
st.caption("Click a cell for its expert.")
open_expert(trace, clicked)
