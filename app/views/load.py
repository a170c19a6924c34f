"""Load: who carries the load, is anyone dead, and how stable is it from batch to batch?"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import streamlit as st

from analysis.balance import relative_load, unlikely_max_over_mean
from analysis.findings import chance_in_words, times, unused_experts
from analysis.glossary import GLOSSARY
from analysis.metrics import METRICS, balance_table, load_table, percentile_table
from analysis.pooled import COLLAPSED, EVEN, PooledBalance, pooled_balance, transformers_auxiliary_loss
from analysis.stability import (
    document_balance,
    label_balance,
    late_positions,
    least_stable,
    maxvio_batches,
    maxvio_table,
    position_balance,
    read_ahead,
)
from analysis.trace import Trace
from app import charts, text
from app.devices import show_devices
from app.downloads import computed_downloads
from app.figures import show_figure
from app.selection import choice, current_trace, layer_picker, open_expert, recording_id, theme

SHOWN = ("max_over_mean", "chance_max_over_mean", "maxvio", "cv", "chance_cv", "gini", "effective_experts", "dead", "cold")
COUNTS = ("dead", "cold")
BATCHES = {"1": "each document", **{str(n): f"{n:,} tokens" for n in (512, 1_024, 2_048, 4_096, 8_192, 16_384, 65_536)}}
ORDERS = {"mixed": "documents shuffled (seed 0)", "recorded": "documents as recorded"}
BATCHED = {
    "batches": ("batches", "batches with an assignment"),
    "run": ("over the run", "MaxVio over the whole run"),
    "batch": ("in a batch", "MaxVio of a batch, mean over batches"),
    "p95": ("95th percentile", "19 of 20 batches are at most so uneven"),
    "most": ("least even batch", "the largest MaxVio of a batch"),
    "chance_batch": ("by chance, in a batch", "uniform routing of a batch's tokens stays below this on average"),
    "spread": ("standard deviation", "of MaxVio over batches: how unstable the layer is"),
    "chance_spread": ("by chance, deviation", "at most about so much, were the tokens dealt to batches at random and not by document"),
}
FEW = 5  # documents: a bar of fewer is faded
UNEVEN = 8  # documents named
PIECES = {"label": "by label", "position": "along the text"}


@st.cache_resource(max_entries=8, show_spinner="Measuring every layer …")
def measured(_trace: Trace, run: str) -> tuple[np.ndarray, PooledBalance | None, float, Future[tuple[pa.Table, pa.Table]]]:
    """(max / mean by chance at every site, pooled diagnostic, transformers' loss, what ``numbers`` waits for); ``run`` names the trace with its date."""

    def tables() -> tuple[pa.Table, pa.Table]:
        table = balance_table(_trace)
        return table, percentile_table(_trace, table)

    pool = ThreadPoolExecutor(2)  # read while the page's head is drawn, which shows neither: documents' loads, all token ids' counts
    pool.submit(read_ahead, _trace)
    found = pool.submit(tables)
    pool.shutdown(wait=False)
    chance = METRICS["chance_max_over_mean"](_trace)["value"].to_numpy()
    return chance, pooled_balance(_trace), transformers_auxiliary_loss(_trace), found


def numbers(found: Future[tuple[pa.Table, pa.Table]]) -> tuple[pa.Table, pa.Table]:
    """(every metric of every site, percentiles over sites); what fails is tried anew at the next view."""
    if not found.done():
        with st.spinner("Measuring every layer …"):
            wait([found])
    if found.exception():
        measured.clear()
    return found.result()


@st.cache_resource(max_entries=32, show_spinner="Cutting the run into batches …")
def batches(_trace: Trace, run: str, batch_tokens: int, mixed: int | None) -> pa.Table:
    """MaxVio of every site over the run and per batch."""
    return maxvio_table(_trace, batch_tokens, mixed)


@st.cache_resource(max_entries=32, show_spinner="Cutting the run into batches …")
def batch_series(_trace: Trace, run: str, site: int, batch_tokens: int, mixed: int | None) -> pa.Table:
    """MaxVio of one site, batch by batch."""
    return maxvio_batches(_trace, site, batch_tokens, mixed)


@st.cache_resource(max_entries=32, show_spinner="Measuring every document …")
def documents(_trace: Trace, run: str, site: int) -> pa.Table:
    """Balance of every document at one site."""
    return document_balance(_trace, site)


def show_map(relative: list[np.ndarray]) -> None:
    """Who carries the load: the least even layer in a sentence, every layer as a map, and the dead."""
    worst = int(np.nanargmax([r.max() for r in relative]))
    layer, n = trace.layers[worst], stats.n_tokens(worst)
    chance = by_chance[worst]
    text.show_heading(
        f"{layer.title.capitalize()} has the busiest expert of all: expert {int(relative[worst].argmax())} gets {relative[worst].max():.2f} times its share."
    )
    most = unlikely_max_over_mean(n, layer.n_classes, layer.top_k, len(trace.layers))
    text.show_note(f"n = {n:,} tokens. {chance_in_words(most, len(trace.layers))}")
    order = choice("order", "Experts in each layer", {"number": "by number", "load": "by load"}, "number", draw=st.segmented_control)
    ns = [stats.n_tokens(x.index) for x in trace.layers]
    clicked = show_figure(
        trace, charts.load_map(relative, [x.title for x in trace.layers], theme(), by_load=order == "load", clickable=True),
        f"load-map-by-{order}", key="load_map", on_select="rerun", selection_mode="points", alt="Heatmap of layers by experts: load relative to an even share, from one eighth to eight times.",
        definition="Load over the layer's mean load: orange carries more, blue less, a cross marks an expert without any token."
        f" Uniform random routing would give at most about {times(chance)} × at {layer.title}.",
        how="The scale is fixed, from ⅛× to 8×, neutral at an even share.",
        n=f"{min(ns):,} tokens per layer" if len(set(ns)) == 1 else f"{min(ns):,} to {max(ns):,} tokens per layer",
    )  # fmt: skip
    st.caption("Click a cell for its expert.")
    open_expert(trace, clicked)
    text.show_text(unused_experts(trace))


def show_pooled(pooled: PooledBalance | None, auxiliary: float) -> None:
    """Is it balanced when pooled over layers and collapsed within them? A warning where it is, one sentence where not."""
    loss = f" Transformers variant of the auxiliary loss, layers pooled: {auxiliary:.4f}; perfectly even gives k = {trace.layers[0].top_k}."
    loss = loss if np.isfinite(auxiliary) else ""
    if pooled is None:
        text.show_note("No sum over layers here: it takes two layers of equally many experts that saw tokens.", loss.strip())
        return
    worst = trace.layers[pooled.worst_site].title
    if pooled.hidden:
        text.show_heading(
            f"Balanced when pooled over layers, collapsed within them: {worst} gives one expert {pooled.worst:.2f} times its share."
        )
        text.show_text(
            "A balance loss summed over layers cannot see this: layers that favour different expert numbers cancel out in the sum."
        )
    else:
        text.show_text(
            f"A balance loss summed over layers would miss no collapsed layer here: the least even, {worst}, gives one expert"
            f" {pooled.worst:.2f} times its share, and {text.counted(pooled.dead, 'expert')} got no token."
        )
    text.show_note(
        f"With each expert number's load added up over {pooled.layers:,} layers, the busiest number has {pooled.pooled:.2f} times its share;"
        f" by chance {pooled.chance:.2f}.",
        "By chance: each layer's experts numbered at random"
        f" (p = {pooled.p:.3f} for a sum as even or more). A layer counts as collapsed from {COLLAPSED:g} times the share or with a dead expert, and as"
        f" missed where the sum is at most {EVEN:g} times. Expert numbers mean nothing across layers; the sum serves this check alone.{loss}",
    )


def show_batches() -> tuple[str, pa.Table]:
    """MaxVio of the run and of its batches at a size chosen on the page; returns the table for the downloads."""
    st.header("How stable is it from batch to batch?")
    with st.container(horizontal=True):
        size = choice("batch", "A batch is", BATCHES, "1024", width=180)
        order = choice("filled", "Filled with", ORDERS, "mixed", width=260)
    rows = batches(trace, run, int(size), 0 if order == "mixed" else None)
    what = "one row per layer: MaxVio over the run and per batch, with chance"
    if not any(rows["batches"].to_pylist()):
        text.show_note("This run has counts over all its text but no documents, so it cannot be cut into batches.")
        return what, rows
    value = {n: rows[n].to_numpy() for n in ("run", "batch", "least", "most", "chance_batch")}
    every = rows.to_pylist()
    first, worst = every[0], every[int(np.nanargmax(value["batch"]))]
    text.show_text(stability_in_words(rows))
    show_figure(
        trace, charts.maxvio_lines([x.title for x in trace.layers], *(value[n] for n in ("run", "batch", "least", "most", "chance_batch"))),
        f"maxvio-batch-{size}", key="maxvio", alt="MaxVio per layer: over the whole run, mean of its batches with their range, and by chance.",
        definition="MaxVio: how far the busiest expert lies above the mean load, as a share of it; 0 is even. Uniform routing would give at most about"
        f" {first['chance_batch']:.3f} in such a batch and {first['chance_run']:.3f} over the run.",
        how=f"(largest load - mean) / mean, arXiv 2408.15664. Batches are whole {ORDERS[order]}; in recorded order, sorted texts make batches of one kind,"
        " shuffled they are like the run; a rest too short for a batch goes to the last. Whiskers: most to least even batch.",
        n=f"{first['batches']:,} batches of {first['batch_n']:,.0f} tokens on average at the first layer",
    )  # fmt: skip
    text.show_text(
        f"{trace.layers[worst['site']].title.capitalize()} is the most uneven in a batch: MaxVio {worst['batch']:.2f} on average,"
        f" {worst['run']:.2f} over the whole run."
    )
    shown = rows.select(list(BATCHED)).to_pandas()
    shown.insert(0, "layer", [x.title for x in trace.layers])
    st.dataframe(shown, hide_index=True, column_config={
        n: st.column_config.NumberColumn(title, help=told, format="localized" if n == "batches" else "%.3f") for n, (title, told) in BATCHED.items()})  # fmt: skip
    return what, rows


def stability_in_words(rows: pa.Table) -> str:
    """Which layer varies most from batch to batch, and whether that is more than chance."""
    found = least_stable(rows)
    if found is None:
        return "One batch only: stability cannot be told. Choose smaller batches."
    most = rows.slice(found[0], 1).to_pylist()[0]
    name, n = trace.layers[most["site"]].title, f"{text.counted(most['batches'], 'batch', 'batches')}"
    chance = f"tokens dealt to batches at random would give at most about {most['chance_spread']:.2f}"
    if found[1]:
        return f"{name.capitalize()} varies most: the standard deviation of its MaxVio over {n} is {most['spread']:.2f}; {chance}."
    return (
        f"No layer varies more than chance: the most is {most['spread']:.2f}, the standard deviation of {name}'s MaxVio over {n}; {chance}."
    )


def show_batch_line() -> dict[str, tuple[str, pa.Table]]:
    """MaxVio of the layer chosen, batch after batch."""
    rows = batch_series(trace, run, site, int(size), 0 if order == "mixed" else None)
    if len(rows) < 2:
        return {}
    batch, maxvio, n, chance = (rows[c].to_numpy() for c in ("batch", "maxvio", "n", "chance"))
    show_figure(
        trace, charts.batch_line(batch, maxvio, n, chance, float(relative[site].max()) - 1),
        f"maxvio-over-batches-{size}-{trace.layers[site].title}", key="batch-line", alt="MaxVio of the layer over batch number, with what chance gives.",
        definition=f"MaxVio of {trace.layers[site].title} in each batch. The dotted line is what uniform routing of a batch's tokens stays below on average.",
        how=f"A batch is {BATCHES[size] if size == '1' else f'whole documents, at least {BATCHES[size]}'}; {ORDERS[order]}.",
        n=f"{int(n.sum()):,} tokens in {len(rows):,} batches",
    )  # fmt: skip
    return {"batches of the layer": ("one row per batch: MaxVio at the layer chosen, with n and chance", rows)}


def show_pieces(site: int, whole: float) -> dict[str, tuple[str, pa.Table]]:
    """Balance of one layer by label or along the text; returns the table for the downloads."""
    labels = label_balance(trace, site)
    offered = {k: v for k, v in PIECES.items() if k != "label" or len(labels)}
    piece = choice("pieces", "Its balance", offered, next(iter(offered)), draw=st.segmented_control)
    rows = labels if piece == "label" else position_balance(trace, site)
    plain_names = [text.visible_name(x) if x is not None else "no label" for x in rows["label"].to_pylist()] if piece == "label" else [
        f"{a:,}" if a == b else f"{a:,}-{b:,}" for a, b in zip(rows["first"].to_pylist(), rows["last"].to_pylist(), strict=True)]  # fmt: skip
    ratio, n, chance = (rows[c].to_numpy() for c in ("max_over_mean", "n", "chance_max_over_mean"))
    few = [d is not None and d < FEW for d in rows["documents"].to_pylist()]
    show_figure(
        trace, charts.piece_bars(text.axis_names(plain_names), ratio, n, chance, whole, few, "label" if piece == "label" else "position in the document"),
        f"balance-{piece}-{trace.layers[site].title}", key="pieces-chart", alt=f"Bars of max over mean load {PIECES[piece]}, with what chance gives.",
        definition=f"Largest load over mean load of {trace.layers[site].title} within each piece; the dark mark is what uniform routing of its tokens stays"
        f" below on average.{f' Faded: fewer than {FEW} documents.' if any(few) else ''}",
        how="Fewer tokens look less even by chance alone.",
        n=f"{int(n.sum()):,} tokens in {len(n):,} pieces",
    )  # fmt: skip
    if piece == "position" and (late := late_positions(trace, site)) is not None:
        whose = f", {late.share:.0%} {late.label} by tokens ({late.overall:.0%} of the whole run)" if late.label is not None else ""
        text.show_text(f"Positions from {late.first:,} on come from the longest {late.documents:,} of {late.of:,} documents alone{whose}:"
                       " what differs there may be the text, not the position.")  # fmt: skip
    figures = {"max / mean": ratio, "by chance, at most": chance} | {
        METRICS[m].title: rows[m].to_numpy() for m in ("cv", "chance_cv", "gini", "effective_experts", "cold", "dead")
    }
    st.dataframe(
        pd.DataFrame({piece: plain_names, "n (tokens)": n, "documents": rows["documents"].to_pylist(), **figures}),
        hide_index=True, height="content",
        column_config={**{c: st.column_config.NumberColumn(format="localized") for c in ("n (tokens)", "documents")},
                       **{c: st.column_config.NumberColumn(format="%.0f" if c in (METRICS["cold"].title, METRICS["dead"].title) else "%.2f") for c in figures}},
    )  # fmt: skip
    return {PIECES[piece]: (f"one row per {piece}: balance at the layer chosen, with n and chance", rows)}


def show_documents() -> dict[str, tuple[str, pa.Table]]:
    """Balance of each document at the layer chosen; the most uneven are named and lead to the Tokens page."""
    rows = documents(trace, run, site)
    if len(rows) < 2:
        return {}
    st.header("Is it even within each document?")
    ratio, n, chance = (rows[c].to_numpy() for c in ("max_over_mean", "n", "chance_max_over_mean"))
    equal, many = n.min() == n.max(), len(rows) > charts.DOTS  # one length: a scatter over lengths would be a line
    if equal:
        drawn = charts.document_histogram(ratio, int(n[0]), chance[0])
    elif many:
        drawn = charts.document_map(ratio, n, chance, theme())
    else:
        drawn = charts.document_scatter([text.axis_name(x or "") for x in rows["name"].to_pylist()], ratio, n, chance)
    show_figure(
        trace, drawn, f"documents-{trace.layers[site].title}", key="documents",
        alt="Max over mean load of every document" + (", by how many have it" if equal else " by its number of tokens") + ", with what chance stays below.",
        definition=f"Largest load over mean load of {trace.layers[site].title} within each document{'' if equal else ', by its length'}{': a cell counts its documents' if many and not equal else ''}; the line is what uniform"
        " routing of so many tokens stays below on average.",
        n=f"{int(n.sum()):,} tokens in {len(n):,} documents" + (f" of {n[0]:,} each" if equal else ""),
    )  # fmt: skip
    text.show_text(
        f"{int((ratio > chance).sum()):,} of {len(rows):,} documents lie above what uniform routing of so many tokens stays below on average at {trace.layers[site].title};"
        f" the busiest expert of the median document gets {np.median(ratio):.2f} times its share."
    )
    top = rows.slice(0, UNEVEN).to_pylist()
    links = [f"tokens?{urlencode({'run': trace.name, 'layer': trace.layers[site].title, 'doc': r['document'] + 1})}" for r in top]
    st.dataframe(
        pd.DataFrame([{"document": text.visible_name(r["name"]), "label": text.visible_name(r["label"] or ""), "n (tokens)": r["n"],
                       "max / mean": r["max_over_mean"], "by chance, at most": r["chance_max_over_mean"], "tokens": link}
                      for r, link in zip(top, links, strict=True)]),
        hide_index=True, column_config={**{c: st.column_config.NumberColumn(format="%.2f") for c in ("max / mean", "by chance, at most")},
                                        "n (tokens)": st.column_config.NumberColumn(format="localized"), "tokens": st.column_config.LinkColumn(display_text="where they go")},
    )  # fmt: skip
    text.show_note(
        f"The {len(top):,} documents of {len(rows):,} that lie furthest above chance for their length; the download has them all.",
        f"Max / mean is at most E / k = {trace.layers[site].n_experts / trace.layers[site].top_k:.1f}, where k experts take every token. A document on one"
        " subject may well use few experts: that is specialization, and what a batch of many documents evens out.",
    )
    text.show_definitions(trace.name, {n: GLOSSARY[n].title for n in ("document_balance", "max_over_mean", "chance_max_over_mean")})
    return {"documents": ("one row per document: balance at the layer chosen, with n and chance", rows)}


def column(name: str) -> Any:
    """A metric's column: its title, and the definition when pointed at."""
    m = METRICS[name]
    told = f"{m.definition}. By chance: {m.chance_here(trace)}. Source: {m.source}"
    return st.column_config.NumberColumn(m.title, help=told, format="%d" if name in COUNTS else "%.3f")


def show_numbers(table: pa.Table, over: pa.Table) -> None:
    """Every layer, and percentiles over layers."""
    st.header("Every layer in numbers")
    n = st.column_config.NumberColumn("n (tokens)", help="tokens that passed the layer", format="localized")
    st.dataframe(table.select(["layer", "stack", "n", *SHOWN]).to_pandas(), hide_index=True,
                 column_config={"n": n, **{m: column(m) for m in SHOWN}})  # fmt: skip
    st.caption("Point at a column's title for its definition, its source and what chance would give.")
    text.show_definitions(trace.name, {m: METRICS[m].title for m in SHOWN})
    st.header("Over layers")
    measures = {m for m in METRICS if METRICS[m].level is not None}  # chance values have a column, no rows
    shown = over.to_pandas().query("n > 0 and metric in @measures")
    shown["metric"] = [f"{METRICS[m].title} ({METRICS[m].unit})" for m in shown["metric"]]
    percentile = {c: st.column_config.NumberColumn(format="%.3f") for c in ("min", "p10", "median", "p90", "max")}
    chance = st.column_config.NumberColumn(
        "by chance", format="%.3f", help="what uniform random routing gives at the median layer; empty where too few tokens let it be told"
    )
    st.dataframe(shown[["metric", "n", "chance", *percentile]], hide_index=True, height="content",
                 column_config={"n": st.column_config.NumberColumn("n (layers)"), "chance": chance, **percentile})  # fmt: skip
    for m in sorted(measures - set(over.filter(pc.greater(over["n"], 0))["metric"].to_pylist())):
        text.show_note(f"{METRICS[m].title} is not defined here: it takes {METRICS[m].needs}.")
    st.caption("Percentiles over layers of each layer's own number. Experts of different layers are never pooled.")


st.title("Who carries the load, is anyone dead, and how stable is it?")
trace = current_trace()
stats, run = trace.stats, recording_id(trace)
relative = [relative_load(stats.load(x.index)[: x.n_experts]) for x in trace.layers]
by_chance, pooled, auxiliary, told = measured(trace, run)
show_map(relative)
show_pooled(pooled, auxiliary)
batched = show_batches()
size, order = (st.session_state["_chosen"][n] for n in ("batch", "filled"))
queues = show_devices(trace, int(size), 0 if order == "mixed" else None, ORDERS[order])

site = layer_picker(trace)
chosen = trace.layers[site]
text.show_heading(f"{chosen.title.capitalize()}: {chosen.n_experts} experts, top-{chosen.top_k}")
show_figure(
    trace, charts.sorted_load(relative[site], theme()), f"load-{chosen.title}", key="bars",
    alt=f"Bars of the loads of {chosen.title}, busiest expert first, with a line at an even share.",
    definition=f"Load of each expert of {chosen.title} over their mean load, busiest first; 1 is an even share. Uniform random routing would give at"
    f" most about {times(by_chance[site])} ×.",
    n=f"{stats.n_tokens(site):,} tokens, {int(stats.load(site).sum()):,} assignments",
)  # fmt: skip
if chosen.native_capacity is not None:
    lost = stats.dropped(site)
    text.show_text(
        f"This model has a native capacity of {chosen.native_capacity} tokens per expert and sequence: it dropped {lost:,} of"
        f" {lost + int(stats.load(site).sum()):,} assignments here."
    )
over_batches = show_batch_line()
pieces = show_pieces(site, float(relative[site].max())) | show_documents()
table, over = numbers(told)
show_numbers(table, over)
st.header("Take the numbers")
load = ("one row per layer and expert: assignments, share, load relative to an even share", load_table(trace))
tables = {"load": load, "balance": ("one row per layer: every balance metric", table), "batches": batched, **queues, **over_batches, **pieces,
          "percentiles": ("one row per metric: percentiles over layers", over)}  # fmt: skip
settings = {
    "layer": chosen.title,
    "batch_tokens": size,
    "batches_filled": order,
    "devices": st.session_state["_chosen"].get("devices"),
    "transformers_auxiliary_loss": auxiliary if np.isfinite(auxiliary) else None,
}
computed_downloads(trace, tables, settings)
