"""Overview: what am I looking at, and what is the one thing to know about this run?"""

from __future__ import annotations

import numpy as np
import streamlit as st

from analysis.balance import relative_load
from analysis.findings import first_finding
from analysis.metrics import METRICS
from app import charts, text
from app.selection import run_picker, theme

header = st.container()
trace = run_picker()
finding = first_finding(trace)
stats, card = trace.stats, trace.model

with header:
    st.title("What does this router do?")
    st.markdown(
        "In a mixture-of-experts model, every layer has several small networks, the *experts*. For each token a **router** "
        "picks a few of them; only those compute. Below is what the router of one model chose, token by token, as executed."
    )
if finding is not None:
    text.show_heading(finding.claim)
    text.show_note(finding.evidence)

tokens = sum(trace.n_tokens(s) for s in dict.fromkeys(x.stream for x in trace.layers))
decisions = sum(stats.n_tokens(x.index) * x.top_k for x in trace.layers)
worst = METRICS["max_over_mean"](trace).to_pydict()
chance = METRICS["chance_max_over_mean"](trace).to_pydict()
dead = METRICS["dead"](trace).to_pydict()
at = int(np.nanargmax(worst["value"]))
columns = st.columns(4)
columns[0].metric("Tokens", f"{tokens:,}", help="Tokens recorded in this run, padding excluded.")
columns[1].metric("Routing decisions", f"{decisions:,}", help="Tokens x layers x experts per token (top-k).")
columns[2].metric(
    "Busiest expert",
    f"{worst['value'][at]:.2f} ×",
    help=f"Largest expert load over the mean load of its layer (site {at}); 1 is an even share."
    f" n = {worst['n'][at]:,} tokens; chance alone gives at most about {chance['value'][at]:.2f}.",
)
columns[3].metric(
    "Dead experts",
    f"{sum(dead['value']):.0f}",
    help="Experts, over all layers, that received no token of this run. By chance: none in a run of this length.",
)

rows = [x.title for x in trace.layers]
relative = [relative_load(stats.load(x.index)[: x.n_experts]) for x in trace.layers]
mark = (finding.site, finding.expert) if finding is not None else None
st.subheader("Who carries the load? Each cell is one expert of one layer.")
st.plotly_chart(
    charts.load_map(relative, rows, theme(), mark),
    config=charts.CONFIG,
    key="load_map",
    alt=f"Heatmap of {len(rows)} layers by {len(relative[0])} experts: load relative to an even share.",
)
st.caption(
    f"Load relative to an even share, n = {stats.n_tokens(0):,} tokens per layer. White is even, orange carries more, blue less; "
    f"by chance the busiest cell of the first layer would reach about {chance['value'][0]:.2f} ×. "
    "The framed cell is the finding above. Experts of different layers are unrelated, even with the same number."
)
st.subheader("Where to look next")
links = st.columns(3)
links[0].page_link("views/tokens.py", label="Which expert does each token go to?")
links[1].page_link("views/load.py", label="How uneven is each layer?")
links[2].page_link("views/runs.py", label="Record your own text")
st.subheader("The model")
layer = trace.layers[0]
text.show_text(
    f"{card.name} ({card.architecture}): {card.parameters / 1e6:,.1f} million parameters, {card.active_parameters / 1e6:,.1f} million "
    f"active per token; {len(trace.layers)} routed layers, {layer.n_experts} experts each at the first, top-{layer.top_k}, "
    f"{layer.scoring} scores, {card.dtype} weights."
)
for warning in card.warnings:
    text.show_note(warning)
