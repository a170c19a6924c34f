"""Load: who carries the work, and how far is it from an even share?"""

from __future__ import annotations

import numpy as np
import streamlit as st

from analysis.balance import chance_max_over_mean, relative_load
from analysis.metrics import METRICS, balance_table
from app import charts, text
from app.downloads import downloads, figure_config
from app.selection import choice, current_trace, layer_picker, theme

SHOWN = ("max_over_mean", "chance_max_over_mean", "maxvio", "cv", "chance_cv", "gini", "effective_experts", "dead", "cold")
COUNTS = ("dead", "cold")

st.title("Who carries the work?")
trace = current_trace()
stats = trace.stats
relative = [relative_load(stats.load(x.index)[: x.n_experts]) for x in trace.layers]
peaks = [float(r.max()) for r in relative]
worst = int(np.nanargmax(peaks))
layer = trace.layers[worst]
chance = chance_max_over_mean(stats.n_tokens(worst), layer.n_experts, layer.top_k)
text.show_heading(
    f"{layer.title.capitalize()} is the least even: expert {int(relative[worst].argmax())} gets {peaks[worst]:.2f} times its share."
)
text.show_note(f"n = {stats.n_tokens(worst):,} tokens; uniform random routing would give at most about {chance:.2f} times.")
order = choice("order", "Experts in each layer", {"number": "by number", "load": "by load"}, "number", draw=st.segmented_control)
st.plotly_chart(
    charts.load_map(relative, [x.title for x in trace.layers], theme(), by_load=order == "load"),
    config=figure_config(trace, f"load-map-by-{order}"),
    key="load_map",
    alt="Heatmap of layers by experts: load relative to an even share, from one eighth to eight times.",
)
st.caption("Load over the layer's mean load, on a fixed scale from ⅛× to 8×. A cross marks a dead expert: no token at all.")

site = layer_picker(trace)
chosen = trace.layers[site]
text.show_heading(f"{chosen.title.capitalize()}: {chosen.n_experts} experts, top-{chosen.top_k}")
st.plotly_chart(charts.sorted_load(relative[site], theme()), config=figure_config(trace, f"load-{chosen.title}"), key="bars",
                alt=f"Bars of the loads of {chosen.title}, busiest expert first, with a line at an even share.")  # fmt: skip
text.show_note(f"n = {stats.n_tokens(site):,} tokens, {int(stats.load(site).sum()):,} assignments.")
if chosen.native_capacity is not None:
    lost = stats.dropped(site)
    text.show_text(
        f"This model has a native capacity of {chosen.native_capacity} tokens per expert and sequence: it dropped {lost:,} of"
        f" {lost + int(stats.load(site).sum()):,} assignments here."
    )

st.subheader("Every layer in numbers")
table = balance_table(trace).select(["layer", "stack", "n", *SHOWN]).to_pandas()
st.dataframe(
    table,
    hide_index=True,
    column_config={
        "n": st.column_config.NumberColumn("n (tokens)", help="tokens that passed the layer"),
        **{m: st.column_config.NumberColumn(METRICS[m].title, help=f"{METRICS[m].definition}. By chance: {METRICS[m].chance}."
                                            f" Source: {METRICS[m].source}", format="%d" if m in COUNTS else "%.3f") for m in SHOWN},
    },
)  # fmt: skip
st.caption("Point at a column's title for its definition, its source and what chance would give.")
st.subheader("Take the numbers")
downloads(trace, ("load", "balance"))
