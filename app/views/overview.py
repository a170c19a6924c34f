"""Overview: what am I looking at, and what is the one thing to know about this run?"""

from __future__ import annotations

from functools import partial

import numpy as np
import streamlit as st

from analysis.balance import relative_load
from analysis.findings import Finding, times, unused_experts
from analysis.metrics import METRICS
from analysis.stability import dead_experts
from analysis.trace import Trace
from app import charts, text, tour
from app.components.token_strip import token_strip
from app.figures import show_figure
from app.model_card import size_in_words
from app.report import report_bytes
from app.selection import current_trace, found_first, open_expert, recording_id, theme
from app.strip_data import HUES, first_text


def first_lines(trace: Trace, finding: Finding) -> None:
    """The beginning of a text that shows the finding, with its expert in the spotlight; a click opens the Tokens page."""
    first = first_text(trace, finding)
    told = token_strip(first.texts, first.breaks, first.experts, first.weights, first.layers, first.hues,
                       f"overview-{recording_id(trace)}", layer=first.layer, spotlight=finding.expert,
                       on_layer=lambda _: None)  # fmt: skip
    text.show_note(
        f"The first {len(first.texts):,} of {first.document['n_tokens']:,} tokens of {first.document['name']}; {first.strength(finding.expert)}."
        " Click a token to follow it through every layer.",
        f"Press its button for all experts. {HUES}",
    )
    if told.token is not None:
        here = {
            "run": trace.name,
            "doc": str(first.document["document"] + 1),
            "layer": first.layers[first.layer if told.layer is None else told.layer],
        }
        st.switch_page("views/tokens.py", query_params={**here, "token": str(told.token)})


trace = current_trace()
finding = found_first(trace, recording_id(trace))
stats, card, layers = trace.stats, trace.model, trace.layers

st.title("What does this router do?")
st.markdown(
    "In a mixture-of-experts model, every layer has several small networks, the *experts*. For each token a **router** "
    "picks a few of them; only those compute. Below is what the router of one model chose, token by token, as executed."
)
tour.start_link(trace)
if finding is not None:
    text.show_heading(finding.claim)
    text.show_note(finding.evidence)
    of_finding = {"run": trace.name, "layer": layers[finding.site].title, "expert": str(finding.expert)}
    with st.container(horizontal=True):
        st.page_link("views/expert.py", label="Everything about this expert →", query_params=of_finding, width="content")
        st.page_link("views/specialization.py", label="All experts of its layer, tested →", width="content",
                     query_params={k: v for k, v in of_finding.items() if k != "expert"})  # fmt: skip
    if trace.load_tokens is not None:
        first_lines(trace, finding)

tokens = sum(trace.n_tokens(s) for s in dict.fromkeys(x.stream for x in layers))
decisions = sum(stats.n_tokens(x.index) * x.top_k for x in layers)
worst = METRICS["max_over_mean"](trace).to_pydict()
chance = METRICS["chance_max_over_mean"](trace).to_pydict()
dead = dead_experts(trace)
at = int(np.nanargmax(worst["value"]))
numbers = st.container(horizontal=True, key="numbers")
numbers.metric("Tokens", f"{tokens:,}", border=True, help="Tokens recorded in this run, padding excluded.")
numbers.metric("Routing decisions", f"{decisions:,}", border=True, help="Tokens x layers x experts per token (top-k).")
busiest = int(np.argmax(stats.load(layers[at].index)[: layers[at].n_experts]))
numbers.metric(
    f"Busiest expert: L{layers[at].layer} E{busiest}",
    f"{worst['value'][at]:.2f} ×",
    border=True,
    help=f"Largest expert load over the mean load of its layer ({layers[at].title}, expert {busiest}); 1 is an even share."
    f" n = {worst['n'][at]:,} tokens; chance alone gives at most about {chance['value'][at]:.2f} at one layer on average.",
)
numbers.metric(
    "Experts not used" if dead.few else "Dead experts",
    f"{dead.dead:,}",
    border=True,
    help=f"Of {dead.experts:,} experts over all layers. {unused_experts(trace)}",
)

st.page_link("views/expert.py", label="What is the busiest expert for? →", width="content",
             query_params={"run": trace.name, "layer": layers[at].title, "expert": str(busiest)})  # fmt: skip

rows = [x.title for x in layers]
relative = [relative_load(stats.load(x.index)[: x.n_experts]) for x in layers]
counts = [stats.n_tokens(x.index) for x in layers]
each = f"{counts[0]:,}" if len(set(counts)) == 1 else f"{min(counts):,} to {max(counts):,}"
mark = (finding.site, finding.expert) if finding is not None else None
st.header("Who carries the load? Each cell is one expert of one layer.")
clicked = show_figure(
    trace, charts.load_map(relative, rows, theme(), mark, clickable=True), "load-map", key="load_map", on_select="rerun", selection_mode="points",
    alt=f"Heatmap of {len(rows)} layers by {len(relative[0])} experts: load relative to an even share.",
    definition="Load over the layer's mean load: orange carries more, blue less, a cross marks an expert without any token."
    f" By chance the busiest cell of the first layer would reach about {times(chance['value'][0])} ×.",
    how="The scale is fixed, from ⅛× to 8×, neutral at an even share. Experts of different layers are unrelated, even with the same number."
    + (f" Framed: {finding.claim}" if finding is not None else ""),
    n=f"{each} tokens per layer",
)  # fmt: skip
st.caption("Click a cell for its expert.")
open_expert(trace, clicked)
st.header("Where to look next")
links = st.columns(3)
links[0].page_link("views/tokens.py", label="Which expert does each token go to? →", query_params={"run": trace.name})
links[1].page_link("views/load.py", label="How uneven is each layer? →", query_params={"run": trace.name})
links[2].page_link("views/runs.py", label="Record your own text →")
st.download_button("Save this run as one HTML file", data=partial(report_bytes, trace), key="report", on_click="ignore", mime="text/html",
                   file_name=f"{charts.file_name(trace.name, 'report')}.html", icon=":material/download:",
                   help="The views above, balance, capacity and specialization: opens without a network, to keep or to send.")  # fmt: skip
st.header("The model")
layer = layers[0]
text.show_text(
    f"{card.name} ({card.architecture}): {size_in_words(card)}; {len(layers)} routed layers, {layer.n_experts} experts each at the first, top-{layer.top_k}, "
    f"{layer.scoring} scores, {card.dtype} weights."
)
for warning in card.warnings:
    text.show_note(warning)
