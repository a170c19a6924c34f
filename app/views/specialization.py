"""Specialization: what does each expert do, and is it more than chance?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from analysis.glossary import GLOSSARY
from analysis.information import Information
from analysis.jackknife import DocumentInterval, label_information_and_interval
from analysis.pair_tests import coactivation_test, flow_test
from analysis.paths import saturation
from analysis.specialization import Preferences, by_position, seriation
from analysis.token_classes import by_class, class_codes
from analysis.trace import Trace
from app import captions, charts, text
from app.downloads import computed_downloads
from app.every_layer import label_preferences, show_every_layer
from app.figures import show_figure
from app.layers import kept, one_layer
from app.repeats import show_repeats
from app.selection import choice, comparable_runs, current_trace, layer_picker, open_expert, recording_id, theme
from app.served_tokens import show_served_tokens

KINDS = {
    "label": "by label",
    "class": "by token class",
    "position": "by position",
    "token": "by token",
    "pairs": "together",
    "flow": "from layer to layer",
    "runs": "two runs",
}
_TESTED = ("log2_enrichment", "lift", "false_discovery_rate")
_WITHIN = ("log2_enrichment", "log2_enrichment_within", "lift", "false_discovery_rate")
MEANT = {"label": (*_TESTED, "label_information"), "class": _WITHIN, "position": _WITHIN, "pairs": ("co_activation",), "flow": ("flow", "repetition"),
         "token": ("token_information", "vocabulary_specialization", "predicted_next_token", "lift", "leaning_documents", "false_discovery_rate"),
         "runs": ("router_saturation",)}  # fmt: skip
NO_RUNS = "No other run here is over the same tokens; record or open one to compare."


def tested(kind: str) -> Callable[..., Preferences]:
    """What gives effects and tests of one site by reading its decisions, and may be told of as ``one_layer`` has it. The texts of a stream's
    tokens are read once for all sites asked for."""
    codes: dict[str, np.ndarray] = {}

    def of_classes(site: int, tell: Callable[..., None] | None = None) -> Preferences:
        stream = trace.layers[site].stream
        if stream not in codes:
            codes[stream] = class_codes(trace, stream, tell and partial(tell, what="the tokens' texts"))
        return by_class(trace, site, codes[stream], tell)

    return of_classes if kind == "class" else partial(by_position, trace)


@st.cache_resource(max_entries=8, show_spinner="Measuring every layer …")
def informations(_trace: Trace, run: str) -> list[tuple[Information, DocumentInterval]]:
    """I(expert; label) of every site, and what endless documents would give."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda x: label_information_and_interval(_trace, x.index), _trace.layers))


def show_preferences(found: Preferences, site: int, place: DeltaGenerator) -> None:
    """Headline in its ``place``, heatmap and definitions of one kind of groups."""
    layer = trace.layers[site]
    rows = trace.documents.filter(pc.equal(trace.documents["stack"], layer.stream))
    documents = pc.count(rows["label"]).as_py() if found.kind == "label" else len(rows)
    with place:
        text.show_heading(captions.preferences_headline(found, layer))
    if found.missing:
        st.page_link("views/runs.py", label="Record more text →")
    text.show_note(f"An expert's number means nothing without its layer: expert 3 of {layer.title} is unrelated to expert 3 of any other.",
                   captions.preferences_how(found, layer))  # fmt: skip
    groups, experts = (
        seriation(found.enrichment) if found.kind != "position" else (np.arange(len(found.groups)), np.arange(found.count.shape[1]))
    )
    names = text.axis_names([found.groups[g] for g in groups])
    event = show_figure(
        trace, charts.enrichment_map(found, names, groups, experts, theme()), f"enrichment-by-{found.kind}-{layer.title}",
        key=f"cells-{found.kind}", on_select="rerun", selection_mode="points",
        alt=f"Heatmap of {len(groups)} groups by {len(experts)} experts: log2 enrichment.",
        definition=captions.enrichment_definition(found, layer),
        n=f"{int(found.tokens.sum()):,} tokens of {documents:,} documents",
        how=f"{'' if found.kind == 'position' else 'Rows and columns are ordered so that structure shows. '}Experts used by fewer than {charts.LEAST_USES:,}"
        f" tokens have no colour. {captions.preferences_how(found, layer)}",
    )  # fmt: skip
    text.show_note(
        "Click a cell for its expert." if found.kind == "position" else "Click a cell for its expert, where what you clicked is marked."
    )
    open_expert(
        trace, event, layer.title, [f"{found.kind}-{found.groups[g]}" for g in groups for _ in experts] if found.kind != "position" else ()
    )


def show_layers() -> None:
    """How much label and expert tell about each other, layer by layer, beside what shuffled labels give."""
    found, endless = zip(*informations(trace, run), strict=True)
    st.header("In which layers do experts follow the labels?")
    definition, n, how = captions.information_caption(found, endless)
    show_figure(trace, charts.information_bars([x.title for x in trace.layers], found, endless), "label-information", key="information",
                alt="Bars of the mutual information of expert and label per layer.", definition=definition, n=n, how=how)  # fmt: skip


def show_pairs(kind: str) -> pa.Table:
    """Lift of pairs of experts, in one layer or from one to the next, with the pairs that chance alone could give crossed out."""
    test, place = coactivation_test if kind == "pairs" else flow_test, st.container(key="answer").empty()
    found = one_layer(site, kept(run, ("pair tests", kind)), lambda tell: test(trace, site, tell), place)
    pairs, here, weak = found.counts, trace.layers[site].title, np.isfinite(found.counts.lift) & ~found.significant
    if not pairs.observed.shape[1]:
        with place:
            text.show_heading(f"{here.capitalize()} is the last routed layer: choose an earlier one to see where its tokens go on.")
        return pa.table({"row": pa.array([], pa.int64())})
    with place:
        text.show_heading(captions.pairs_headline(found, here))
    show_figure(
        trace, charts.lift_map(pairs.lift, "expert" if kind == "pairs" else f"expert at {here}", "expert" if kind == "pairs" else "expert at the next layer",
                               theme(), None if found.missing else weak),
        f"{kind}-{here}", key=f"lift-{kind}", alt="Heatmap of observed over expected pairs of experts.",
        definition=("Pairs of experts that a token uses together" if kind == "pairs" else "Experts that a token uses, here and at the next layer")
        + f", {here}: how often over what their loads alone would give, log2. {'No pair can be tested.' if found.missing else captions.weak_cells(weak)}",
        n=f"{pairs.n:,} pairs of {text.counted(found.documents, 'document')}" if found.documents else f"{pairs.n:,} pairs",
        how=captions.pairs_how(found),
    )  # fmt: skip
    return found.table()


@st.cache_resource(max_entries=16, show_spinner="Comparing the two runs token by token …")
def agreement(_a: Trace, _b: Trace, runs: tuple[str, str]) -> pa.Table:
    """Router saturation of every site; ``runs`` names the traces with their dates."""
    return saturation(_a, _b)


def show_agreement(others: Mapping[str, Trace]) -> pa.Table:
    """Do two runs over the same tokens, such as two checkpoints of one model, choose the same experts?"""
    name = choice("vs", "Compare with", {n: n for n in others}, next(iter(others)), width=280)
    table, titles = agreement(trace, others[name], (run, recording_id(others[name]))), [x.title for x in trace.layers]
    value = {c: table[c].to_numpy() for c in table.column_names}
    worst = int(np.nanargmin(value["saturation"]))
    row = {c: v[worst] for c, v in value.items()}
    text.show_heading(
        f"{trace.name} and {name} agree least at {titles[worst]}: of the experts a token is sent to, {row['saturation']:.0%} are the same."
    )
    text.show_note(
        f"n = {row['n']:,} tokens, those of both runs. Uniform routing in both would give {row['chance']:.1%}; with the tokens of {name} turned round"
        f" within each document, {row['draws']:,} times, {row['shuffled']:.1%} (p = {row['p']:.3f} for as much)."
    )
    show_figure(
        trace, charts.layer_lines(titles, [("the same experts", value["saturation"], np.stack([value["low"], value["high"]])),
                                           ("by chance, tokens turned within documents", value["shuffled"], None),
                                           ("by chance, uniform routing", value["chance"], None)], "same experts"),
        f"saturation-vs-{name}", key="saturation", alt="Router saturation per layer between two runs, with intervals and two kinds of chance.",
        definition=f"Router saturation (OLMoE eq. 5) with {name}: the share of a token's k experts that both runs chose, mean over tokens; bars: 95%"
        " interval over documents. Turning the tokens keeps what a document's topic does to routing, so what lies above that line is agreement on"
        " single tokens. Expert numbers are compared as they are: two models trained apart agree by chance alone.",
        n=f"{row['n']:,} tokens of both runs",
    )  # fmt: skip
    return table


st.title("What does each expert do, and is it more than chance?")
trace = current_trace()
run = recording_id(trace)
others = comparable_runs(trace)
labelled, tokens = bool(trace.stats.label_load(0)[0]), trace.load_tokens is not None
offered = {
    k: v for k, v in KINDS.items() if (k != "label" or labelled) and (k not in ("class", "token") or tokens) and (k != "runs" or others)
}
with st.container(horizontal=True, vertical_alignment="bottom"):
    site = layer_picker(trace)
    kind = choice("by", "Look", offered, next(iter(offered)), draw=st.segmented_control, absent={"runs": NO_RUNS})
tables: dict[str, tuple[str, pa.Table]] = {}
if kind in ("label", "class", "position"):
    test = partial(label_preferences, trace, run) if kind == "label" else tested(kind)
    place = st.container(key="answer").empty()
    if kind == "label":
        with place, st.spinner("Testing every cell against shuffled labels …"):
            found = label_preferences(trace, run, site)
    else:
        found = one_layer(site, kept(run, ("preferences", kind)), partial(test, site), place)
    show_preferences(found, site, place)
    tables[KINDS[kind]] = f"one row per {kind} and expert", found.table()
    tables |= show_every_layer(trace, run, found, test)
    if kind == "label":
        show_layers()
elif kind == "token":
    tables |= show_served_tokens(trace, run, site)
elif kind == "runs":
    tables["saturation"] = "one row per layer: agreement of the two runs", show_agreement(others)
elif kind == "pairs":
    tables["co-activation"] = "one row per pair of experts: counts, lift with its 95% interval, p and q", show_pairs(kind)
else:
    tables["flow"] = "one row per pair of experts: counts, lift with its 95% interval, p and q", show_pairs(kind)
    tables |= show_repeats(trace, run)
text.show_definitions(trace.name, {n: GLOSSARY[n].title for n in MEANT[kind]})
st.header("Take the numbers")
chosen = st.session_state["_chosen"]
computed_downloads(trace, tables, {"layer": trace.layers[site].title, **{k: chosen[k] for k in ("by", "token_is", "vs") if k in chosen}})
