"""The Load page's section on expert parallelism: how long the longest queue of a device is (``?devices=``)."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import streamlit as st

from analysis.devices import device_counts, queue_table
from analysis.glossary import GLOSSARY
from analysis.trace import Trace

from . import charts, text
from .figures import show_figure
from .selection import choice, recording_id

COLUMNS = {
    "batches": ("batches", "batches with an assignment"),
    "least": ("shortest", "the least of the batches' longest queues, over the mean queue"),
    "median": ("median", "half of the batches have a longest queue of at most so many times the mean"),
    "p95": ("95th percentile", "19 of 20 batches have a longest queue of at most so many times the mean"),
    "most": ("longest", "the worst batch"),
    "chance": ("by chance, at most", "uniform routing of a batch's tokens stays below this on average"),
    "experts": ("single expert", "the busiest expert over the mean expert, median over batches: as many devices as experts"),
    "balancedness": ("balancedness", "mean over batches of mean / longest queue, as EPLB has it; 1 is even"),
}


@st.cache_resource(max_entries=32, show_spinner="Placing experts on devices …")
def _queues(_trace: Trace, run: str, devices: int, batch_tokens: int, mixed: int | None) -> pa.Table:
    return queue_table(_trace, devices, batch_tokens, mixed)


def show_devices(trace: Trace, batch_tokens: int, mixed: int | None, filled: str) -> dict[str, tuple[str, pa.Table]]:
    """Longest device queue at every layer, in the batches chosen above; returns the table for the downloads. Nothing without batches."""
    offered, first = device_counts(trace)
    if not offered or not len(trace.documents):
        return {}
    st.header("How long is the longest queue of a device?")
    devices = int(choice("devices", "Devices", {str(d): f"{d:,}" for d in offered}, str(first), width=120))
    rows = _queues(trace, recording_id(trace), devices, batch_tokens, mixed)
    value = {c: rows[c].to_numpy() for c in rows.column_names}
    if not value["batches"].any():
        text.show_note("No layer that this number of devices divides has a batch with an assignment.")
        return {}
    layers = [trace.layers[s] for s in value["site"].tolist()]
    at = int(np.nanargmax(value["median"]))
    worst, name = rows.slice(at, 1).to_pylist()[0], layers[at].title
    text.show_text(
        f"With {devices:,} devices, the longest queue of {name} is {worst['least']:.2f} to {worst['most']:.2f} times the mean (median"
        f" {worst['median']:.2f} over {text.counted(worst['batches'], 'batch', 'batches')}); uniform routing: at most about {worst['chance']:.2f}."
    )
    left = (
        f" {text.counted(len(trace.layers) - len(layers), 'layer')} whose experts {devices:,} does not divide left out."
        if len(layers) < len(trace.layers)
        else ""
    )
    each = {f"{x.n_experts // devices:,}" for x in layers}
    show_figure(
        trace, charts.queue_lines([x.title for x in layers], *(value[c] for c in ("median", "least", "most", "experts", "chance"))),
        f"devices-{devices}", key="devices-chart", alt="Longest device queue over the mean per layer: median of the batches with their range, beside single experts and chance.",
        definition=f"Load of the busiest of {devices:,} devices over their mean, per batch: all others wait for it. Uniform routing would give at most about"
        f" {value['chance'][at]:.2f} at {name}, the longest in the median.{left}",
        how=f"Expert parallelism: experts in order of their number, {' or '.join(sorted(each))} on each device, the default of vLLM, DeepSpeed and Megatron; no replicas, and"
        " experts that every token passes are not counted. Whiskers: least to most uneven batch. A single expert is the busiest expert over the mean expert. The inverse is the"
        f" balancedness of EPLB. Batches as chosen above, {filled}.",
        n=f"{worst['batches']:,} batches of {worst['batch_n']:,.0f} tokens on average at {name}",
    )  # fmt: skip
    shown = rows.select(list(COLUMNS)).to_pandas()
    shown.insert(0, "layer", [x.title for x in layers])
    st.dataframe(shown, hide_index=True, column_config={
        c: st.column_config.NumberColumn(title, help=told, format="localized" if c == "batches" else "%.2f") for c, (title, told) in COLUMNS.items()})  # fmt: skip
    text.show_definitions(trace.name, {n: GLOSSARY[n].title for n in ("device_queue", "balancedness")})
    return {"devices": ("one row per layer: longest device queue over the mean, over batches, with chance and single experts", rows)}
