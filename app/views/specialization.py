"""Specialization: what does each expert do, and is it more than chance?"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import streamlit as st

from analysis.information import Information
from analysis.paths import PairCounts, coactivation, flow, repetition
from analysis.specialization import Preferences, by_label, by_position, label_information, seriation
from analysis.trace import Trace
from analysis.vocabulary import by_class, context_independence, input_tokens, top_tokens, vocabulary_specialization
from app import charts, text
from app.downloads import computed_downloads
from app.figures import show_figure
from app.selection import choice, current_trace, layer_picker, recording_id, theme

KINDS = {
    "label": "by label",
    "class": "by token class",
    "position": "by position",
    "token": "by token",
    "pairs": "together",
    "flow": "from layer to layer",
}
CLEAR = 1.5  # lift from which a significant preference is called one in the headline


@st.cache_resource(max_entries=64, show_spinner="Testing every cell against shuffled labels …")
def preferences(_trace: Trace, run: str, site: int, kind: str) -> Preferences:
    """Effects and tests of one site; ``run`` names the trace with its date."""
    return {"label": by_label, "class": by_class, "position": by_position}[kind](_trace, site)


@st.cache_resource(max_entries=8, show_spinner="Measuring every layer …")
def informations(_trace: Trace, run: str) -> list[Information]:
    """I(expert; label) of every site."""
    return [label_information(_trace, x.index) for x in _trace.layers]


def show_preferences(found: Preferences, site: int) -> None:
    """Headline, heatmap and definitions of one kind of groups."""
    layer = trace.layers[site]
    rows = trace.documents.filter(pc.equal(trace.documents["stack"], layer.stream))
    documents = pc.count(rows["label"]).as_py() if found.kind == "label" else len(rows)
    named = int((found.significant & (found.lift >= CLEAR)).any(0).sum())
    chance = layer.top_k / layer.n_classes
    text.show_heading(f"{named} of {layer.n_classes} experts of {layer.title} prefer at least one {found.kind} beyond chance.")
    text.show_note(
        f"n = {int(found.tokens.sum()):,} tokens of {documents:,} documents. Beyond chance: used at least {CLEAR:g} times as"
        f" often as overall, and significant after correction for all {found.count.size:,} cells (false discovery rate 5 %). Uniform routing"
        f" would use each expert for {chance:.1%} of every {found.kind}. Test: {found.method}."
    )
    groups, experts = (
        seriation(found.enrichment) if found.kind != "position" else (np.arange(len(found.groups)), np.arange(found.count.shape[1]))
    )
    names = [text.axis_name(found.groups[g]) for g in groups]
    event = show_figure(
        trace, charts.enrichment_map(found, names, groups, experts, theme()), f"enrichment-by-{found.kind}-{layer.title}",
        key=f"cells-{found.kind}", on_select="rerun", selection_mode="points",
        alt=f"Heatmap of {len(groups)} groups by {len(experts)} experts: log2 enrichment.",
        definition=f"Experts of {layer.title}. Colour: log2 of the share of the group's tokens that use the expert over the share of all other tokens;"
        f" orange more, blue less. A small cross marks a cell that is no more than chance after correction (false discovery rate 5 %; {found.method});"
        f" experts used by fewer than {charts.LEAST_USES:,} tokens have no colour. Rows and columns are ordered so that structure shows.",
        n=f"{int(found.tokens.sum()):,} tokens of {documents:,} documents",
    )  # fmt: skip
    st.caption("Click a cell for its expert.")
    open_expert(event)


def open_expert(event: object) -> None:
    """A click on a cell leads to the page of its expert."""
    points = getattr(getattr(event, "selection", None), "points", [])
    if points:
        st.switch_page(
            "views/expert.py",
            query_params={"run": trace.name, "layer": trace.layers[site].title, "expert": str(int(points[0]["customdata"]["0"]))},
        )


def show_layers() -> None:
    """How much label and expert tell about each other, layer by layer, beside what shuffled labels give."""
    found = informations(trace, run)
    st.subheader("In which layers do experts follow the labels?")
    show_figure(
        trace, charts.information_bars([x.title for x in trace.layers], np.array([i.corrected for i in found]), np.array([i.floor for i in found])),
        "label-information", key="information", alt="Bars of the mutual information of expert and label per layer.",
        definition="Mutual information of expert and label in bits, bias-corrected; 0 = the label says nothing about the expert, at most"
        f" {found[0].entropy_y:.2f} here. Grey: what remains when labels are moved between whole documents.",
        n=f"{found[0].n:,} assignments per layer",
    )  # fmt: skip


def show_vocabulary() -> pa.Table:
    """How far the token id alone decides, and the tokens each expert is used for most."""
    counts = input_tokens(trace, site)
    alone, words = context_independence(counts), vocabulary_specialization(counts)
    share = alone.share_of(alone.entropy_y)
    text.show_heading(f"At {trace.layers[site].title}, the token alone explains {share:.0%} of which expert is used.")
    text.show_note(
        f"I(expert; token id) = {alone.plug_in:.2f} of {alone.entropy_y:.2f} bits; dealt at random to the tokens, the same assignments give"
        f" {alone.floor:.2f}. n = {alone.n:,} assignments of {words.n_ids:,} ids. Vocabulary specialization (OLMoE eq. 8) over ids seen at least"
        f" {words.least} times: {words.frequent:.2f}, by chance {words.chance_frequent:.2f}."
    )
    found = {e: top_tokens(trace, counts, e, most=8) for e in range(counts.classes)}
    table = pa.Table.from_pylist([{"expert": e, **vars(t)} for e, uses in found.items() for t in uses])
    by_expert = {e: [f"{text.visible_token(t.text or '?')} {t.lift:.1f}x" for t in uses] for e, uses in found.items()}
    st.dataframe(
        pd.DataFrame([{"expert": e, "tokens it is used for most, by lift": "   ".join(t)} for e, t in by_expert.items()]), hide_index=True
    )
    st.caption(
        "Lift: share of the token's occurrences that use the expert, over the expert's share of all tokens. Ids seen too rarely are left out."
    )
    return table


def show_pairs(pairs: PairCounts, kind: str) -> pa.Table:
    """Lift of pairs of experts, in one layer or from one to the next."""
    rows, columns = pairs.observed.shape
    here = trace.layers[site].title
    if not columns:
        text.show_note(f"{here} is the last routed layer of its stream: no layer follows.")
        return pa.table({"row": pa.array([], pa.int64())})
    lift = np.where(np.isfinite(pairs.lift), pairs.lift, np.nan)
    best = np.unravel_index(np.nanargmax(np.where(pairs.observed >= 50, lift, -1)), lift.shape) if (pairs.observed >= 50).any() else None
    if best is not None:
        a, b = int(best[0]), int(best[1])
        said = f"Experts {a} and {b} of {here} work together" if kind == "pairs" else f"Tokens of expert {a} at {here} go on to expert {b}"
        text.show_heading(f"{said} {lift[best]:.1f} times as often as their loads alone would give.")
    text.show_note(f"n = {pairs.n:,} pairs. Uniform routing would give each partner {pairs.chance_share:.1%}. Pairs are not tested one by one:"
                   " tokens of one document are not independent.")  # fmt: skip
    show_figure(
        trace, charts.lift_map(lift, "expert" if kind == "pairs" else f"expert at {here}", "expert" if kind == "pairs" else "expert at the next layer", theme()),
        f"{kind}-{here}", key=f"lift-{kind}", alt="Heatmap of observed over expected pairs of experts.",
        definition=("Pairs of experts that a token uses together" if kind == "pairs" else "Experts that a token uses, here and at the next layer")
        + f", {here}. Colour: log2 of observed over expected pairs; 1× is what the experts' loads alone would give, on a fixed scale from ⅛× to 8×.",
        n=f"{pairs.n:,} pairs",
    )  # fmt: skip
    e, f = np.divmod(np.arange(rows * columns), columns)
    return pa.table({"expert": e, "other": f, "observed": pairs.observed.ravel(), "expected": pairs.expected.ravel(), "lift": lift.ravel()})


st.title("What does each expert do, and is it more than chance?")
trace = current_trace()
run = recording_id(trace)
labelled, tokens = bool(trace.stats.label_load(0)[0]), trace.load_tokens is not None
offered = {k: v for k, v in KINDS.items() if (k != "label" or labelled) and (k not in ("class", "token") or tokens)}
with st.container(horizontal=True, vertical_alignment="bottom"):
    site = layer_picker(trace)
    kind = choice("by", "Look", offered, next(iter(offered)), draw=st.segmented_control)
tables: dict[str, tuple[str, pa.Table]] = {}
if kind in ("label", "class", "position"):
    found = preferences(trace, run, site, kind)
    show_preferences(found, site)
    tables[KINDS[kind]] = f"one row per {kind} and expert", found.table()
    if kind == "label":
        show_layers()
elif kind == "token":
    tables["tokens by expert"] = "one row per expert and token", show_vocabulary()
elif kind == "pairs":
    tables["co-activation"] = "one row per pair of experts", show_pairs(coactivation(trace, site), kind)
else:
    tables["flow"] = "one row per pair of experts", show_pairs(flow(trace, site), kind)
    repeats = [repetition(trace, x.index) for x in trace.layers]
    st.subheader("Do neighbouring tokens share an expert?")
    st.dataframe(
        pd.DataFrame([{"layer": trace.layers[r.site].title, "same first choice": r.first, "by chance": r.chance_first,
                       "by chance at these loads": r.chance_first_given_load, "any in common": r.shared, "by chance ": r.chance_shared,
                       "n (neighbours)": r.pairs} for r in repeats]),
        hide_index=True, column_config={c: st.column_config.NumberColumn(format="percent") for c in (
            "same first choice", "by chance", "by chance at these loads", "any in common", "by chance ")},
    )  # fmt: skip
st.subheader("Take the numbers")
computed_downloads(trace, tables, {"layer": trace.layers[site].title, "kind": kind})
