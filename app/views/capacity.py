"""Capacity: what overflows at this capacity factor, and who pays for it?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import streamlit as st

from analysis.capacity import AppliedCapacity, RankedTrace, compare_policies, in_words, percent, pool_curves, rank_trace, site_curves
from analysis.overflow import FACTORS, POLICIES, MissingScores, rank_site
from analysis.slots import PRESETS, CapacityError, make_batches
from analysis.trace import Trace
from analysis.vocabulary import token_texts
from app import charts, text
from app.components.token_strip import token_strip
from app.downloads import computed_downloads
from app.figures import show_figure
from app.layers import kept, layer_by_layer
from app.selection import choice, current_trace, document_picker, recording_id, section

SCOPES = {"documents": "micro-batches of documents", "document": "each document alone", "tokens": "micro-batches of tokens",
          "run": "the whole run at once"}  # fmt: skip
SIZES = {"documents": (2, 4, 8, 16, 32, 64, 128), "tokens": (256, 512, 1_024, 2_048, 4_096, 8_192, 16_384, 65_536)}
ORDERS = {"mixed": "documents shuffled (seed 0)", "recorded": "documents as recorded"}
WHO = {"label": "by label", "position": "by position", "token": "by token", "text": "in the text"}
SHOWN_TOKENS = 1_024


@st.cache_resource(max_entries=6, show_spinner="Ranking every assignment once …")
def ranked(_trace: Trace, run: str, site: int, policy: str, scope: str, size: int | None, mixed: int | None) -> RankedTrace:
    """One site ranked; ``run`` names the trace with its date."""
    return rank_trace(_trace, policy, scope, size=size, mixed=mixed, layers=[site])


def curves(trace: Trace, run: str, policy: str, scope: str, size: int | None, mixed: int | None, preset: str) -> pa.Table:
    """The curve of every site. Rerouting and dropless have none by thresholds: "position" drops as much as any other."""
    asked = "position" if policy in ("reroute", "dropless") else policy
    known = kept(run, ("capacity", asked, scope, size, mixed, preset))
    return layer_by_layer(
        trace, known, lambda layers: site_curves(trace, FACTORS, asked, scope, size=size, mixed=mixed, preset=preset, layers=layers)
    )


@st.cache_resource(max_entries=12, show_spinner="Asking who pays …")
def groups(
    _trace: Trace, run: str, site: int, policy: str, scope: str, size: int | None, mixed: int | None, preset: str, by: str
) -> pa.Table:
    """One site's losses by label or position at every factor."""
    return ranked(_trace, run, site, policy, scope, size, mixed).curves_by(by, FACTORS, preset)


def who_pays(trace: Trace, applied: AppliedCapacity, site: int, mean: float) -> dict[str, tuple[str, pa.Table]]:
    """Charts and tables of the groups that lose, against the ``mean`` share; returns the tables for the downloads."""
    labelled = pc.count(trace.documents["label"]).as_py() > 0
    asked = choice("who", "Who pays", {k: v for k, v in WHO.items() if labelled or k != "label"}, "label" if labelled else "position",
                   draw=st.segmented_control)  # fmt: skip
    if asked == "text":
        struck_text(trace, applied, site)
        return {}
    if asked == "token":
        rows = applied.by_token()
        return {"by token": ("one row per token id", token_table(trace, rows, mean))}
    by = "label" if asked == "label" else "first_position"
    if exact:
        rows = groups(trace, run, site, policy, scope, size, mixed, preset, by)
        rows = rows.filter(pc.equal(rows["factor"], factor))
    else:
        rows = applied.by_label() if asked == "label" else applied.by_position()
    keys = rows[by].to_pylist()
    names = [text.axis_name(k or "no label") if asked == "label" else f"{k:,}" for k in keys]
    show_figure(
        trace, charts.share_bars(names, rows["dropped_share"].to_numpy(), rows["assignments"].to_numpy(), mean,
                                 "label" if asked == "label" else "position in the document, first of each bin"),
        f"dropped-{WHO[asked]}-{trace.layers[site].title}-cf-{factor:g}", key="who-chart", alt=f"Bars of the dropped share {WHO[asked]}.",
        definition=f"Share of the group's assignments at {trace.layers[site].title} that are dropped at capacity factor {factor:g}; the line is the"
        f" share of all assignments of the layer. {setting}",
        n=f"{int(rows['assignments'].to_numpy().sum()):,} assignments in {len(rows):,} groups",
    )  # fmt: skip
    return {WHO[asked]: (f"one row per {asked}", rows)}


def token_table(trace: Trace, rows: pa.Table, mean: float) -> pa.Table:
    """The tokens that lose most assignments, with their texts."""
    stream = trace.layers[int(rows["site"][0].as_py())].stream
    rows = rows.sort_by([("dropped", "descending")])
    rows = rows.append_column("token", pa.array(token_texts(trace, rows["token_id"].to_numpy(), stream), pa.string()))
    top = rows.slice(0, 25)
    st.dataframe(
        pd.DataFrame({"token": [text.visible_token(t) for t in top["token"].to_pylist()], "token id": top["token_id"].to_pylist(),
                      "assignments": top["assignments"].to_pylist(), "dropped": top["dropped"].to_pylist(),
                      "dropped share": top["dropped_share"].to_pylist()}),
        hide_index=True, column_config={"dropped share": st.column_config.ProgressColumn(format="percent", min_value=0, max_value=1)},
    )  # fmt: skip
    st.caption(f"The 25 token ids of {len(rows):,} that lose most assignments. All assignments lose {mean:.1%}; the download has every id.")
    return rows


def struck_text(trace: Trace, applied: AppliedCapacity, site: int) -> None:
    """One document as a strip with its dropped tokens struck out."""
    layer = trace.layers[site]
    document = document_picker(trace, layer.stream)
    start, end = trace.document_range(document, layer.stream)
    stop = min(end, start + SHOWN_TOKENS)
    rows, routing = trace.stream_tokens(layer.stream, start, stop, ["token", "token_bytes"]), trace.routing(site, start, stop)
    dropped, there = applied.dropped(site)[start:stop], routing.chosen >= 0
    lost = np.where(~dropped.any(1), 0, np.where((dropped == there).all(1), 2, 1))
    shown = text.token_texts(rows["token"].to_pylist(), rows["token_bytes"].to_pylist())
    settings = "-".join(f"{k}={v}" for k, v in st.session_state["_chosen"].items() if k != "token")
    token_strip(shown, ["\n" in (t or "") for t in rows["token"].to_pylist()], [routing.chosen], [routing.weights], [layer.title],
                f"capacity-{settings}-{recording_id(trace)}", layer=0, lost=lost.tolist())  # fmt: skip
    st.caption(
        f"The first {stop - start:,} of {end - start:,} tokens. Struck out: dropped by all of its experts ({int((lost == 2).sum()):,}); "
        f"dotted: by some ({int((lost == 1).sum()):,}). Whether a token is dropped depends on the texts it shares a batch with."
    )


def explain() -> None:
    """Figure 3 of the Switch Transformer (arXiv 2101.03961), answered by the same engine as the rest of the page."""
    names, experts = ("The", "cat", "sat", "on", "the", "mat"), np.array([[0], [1], [0], [2], [0], [1]], np.int16)
    chosen = float(choice("six", "Factor in this lesson", {f: f for f in ("0.5", "1", "1.5", "2")}, "1", draw=st.segmented_control))
    queues = rank_site(experts, np.ones((6, 1), np.float32), 3, make_batches([6], "run"))
    total = queues.at(chosen).total()
    show_figure(
        trace, charts.slot_grid(names, experts[:, 0], queues.ranks[:, 0], total["largest_capacity"], 3), f"six-tokens-cf-{chosen:g}",
        key="six-chart", alt="Six tokens in the slots of three experts.",
        definition=f"A made-up example, not this run: six tokens in the slots of three experts at capacity factor {chosen:g}; first come, first"
        " served (figure 3 of arXiv 2101.03961).",
        n="6 tokens, one expert each",
    )  # fmt: skip
    st.markdown(
        f"Six tokens, three experts, one expert per token: an even share is 6 / 3 = 2 tokens. Times the factor {chosen:.1f}, rounded up, "
        f"each expert gets **{total['largest_capacity']:,} slots**. **{total['dropped']:,} of 6 tokens** find their expert full and skip it; "
        f"**{total['idle']:,} of {total['slots']:,} slots** stay empty and are computed all the same. A larger factor drops less and wastes more."
    )


st.title("What overflows at this capacity factor, and who pays?")
trace = current_trace()
if trace.load_tokens is None:
    st.info("This run holds statistics only: without tokens no batch can be formed. Capture the text again to use this page.")
    st.stop()
st.markdown(
    "Training and serving give each expert a fixed number of slots per batch: its **expert capacity**, the even share of the batch "
    "times a **capacity factor** (CF). What overflows is not processed by this layer; slots left empty are computed for nothing. "
    "This is a what-if on the recorded choices: the model itself ran without a limit unless it says so below."
)
lesson = section("lesson", "How it works: six tokens and three experts")
if lesson.open:
    with lesson:
        explain()
titles = {x.title: x.title for x in trace.layers}
with st.container(horizontal=True):
    shown_layer = choice("at", "Layer", {"all": "all layers", **titles}, "all", width=150)
    preset = choice("preset", "Capacity as in", {n: r.title for n, r in PRESETS.items()}, "megatron", width=200)
    policies = {"preset": f"as there: {PRESETS[preset].policy}", **{p: p.replace("_", " ") for p in POLICIES}}
    policy = choice("policy", "Who is served first", policies, "preset", width=200)
with st.container(horizontal=True):
    scope = choice("scope", "Routed together", SCOPES, "documents", width=240)
    size = None
    if scope in SIZES:
        size = int(choice(scope, f"{scope.capitalize()} per batch", {str(n): f"{n:,}" for n in SIZES[scope]},
                          "16" if scope == "documents" else "4096", width=150))  # fmt: skip
    order = choice("mix", "In the order", ORDERS, "mixed", width=240) if scope in SIZES else "recorded"
factor = float(choice("cf", "Capacity factor", {f"{f:g}": f"{f:g}" for f in FACTORS}, "1.25", draw=st.select_slider, width="stretch"))

policy = PRESETS[preset].policy if policy == "preset" else policy
mixed, run = 0 if order == "mixed" else None, recording_id(trace)


def answer(policy: str) -> tuple[pa.Table, list[dict[str, Any]], int, AppliedCapacity]:
    """(curves of all layers, their rows at this factor, the site shown, capacity applied there) under a policy."""
    every = curves(trace, run, policy, scope, size, mixed, preset)
    here = every.filter(pc.equal(every["factor"], factor)).to_pylist()
    # By the drops at one factor, so that the page stays at one layer while the slider moves.
    worst = max(every.filter(pc.equal(every["factor"], 1.0)).to_pylist(), key=lambda row: row["dropped_share"])
    site = worst["site"] if shown_layer == "all" else next(x.index for x in trace.layers if x.title == shown_layer)
    return every, here, site, ranked(trace, run, site, policy, scope, size, mixed).at(factor, preset)


try:
    every, here, site, applied = answer(policy)
except MissingScores as error:
    text.show_error(f"{str(error)[:1].upper()}{str(error)[1:]}. First come, first served (position) is shown instead.")
    policy = "position"
    every, here, site, applied = answer(policy)
mine = every if shown_layer == "all" else every.filter(pc.equal(every["site"], site))
pooled = pool_curves(mine)
now = pooled.filter(pc.equal(pooled["factor"], factor)).to_pylist()[0]
exact = policy not in ("reroute", "dropless")
over, layer = applied.sites[site], trace.layers[site]
total = next(row for row in here if row["site"] == site) if exact else applied.by_layer().to_pylist()[0]
batches, (least, largest) = len(over.capacity), over.capacity_range
setting = (f"Capacity as in {PRESETS[preset].title}; served first: {policy.replace('_', ' ')}; {SCOPES[scope]}"
           + (f", {size:,} per batch, {ORDERS[order]}" if size else "") + ".")  # fmt: skip
text.show_heading(in_words(now if exact and shown_layer == "all" else total, pooled, factor).replace("assignments", (
    "assignments over all layers" if exact and shown_layer == "all" else f"assignments at {trace.layers[site].title}"), 1) + ".")  # fmt: skip
text.show_note(
    f"n = {now['assignments']:,} assignments of {trace.n_tokens(layer.stream):,} tokens, in {batches:,} batches. By chance, uniform"
    f" routing in the same batches would drop {percent(now['chance_dropped_share'])}. Capacity: {PRESETS[preset].source}."
)
if not exact:
    text.show_note(f"The curves below are those of first come, first served: {policy} has no threshold per assignment.")

st.header("Drops against idle slots")
grid = [mine.filter(pc.equal(mine["site"], s)) for s in dict.fromkeys(mine["site"].to_pylist())]
show_figure(
    trace, charts.overflow_curves(np.array(FACTORS), np.stack([g["dropped_share"].to_numpy() for g in grid]),
                                  1 - np.stack([g["slot_use"].to_numpy() for g in grid]), pooled["chance_dropped_share"].to_numpy(), factor),
    f"capacity-curves-{shown_layer}-{policy}", key="curves", alt="Shares of dropped assignments and idle slots over the capacity factor.",
    definition="Line: median over the layers shown; band: their range. Dropped: share of assignments; idle: share of slots. Dotted: what uniform"
    f" routing would drop. {setting if exact else 'Drawn for first come, first served.'}",
    n=f"{now['assignments']:,} assignments in {len(grid):,} layers",
)  # fmt: skip

text.show_heading(f"Expert by expert at {layer.title}" + (", the layer that drops most at CF 1" if shown_layer == "all" else ""))
show_figure(
    trace, charts.slot_bars(over.kept_load, over.dropped_load, over.idle, over.slots), f"slots-{layer.title}-{policy}-cf-{factor:g}",
    key="slots", alt=f"Bars per expert of {layer.title}: processed, dropped and idle.",
    definition=f"Assignments and slots of {layer.title} at capacity factor {factor:g}, summed over {batches:,} batches of"
    f" {least:,} to {largest:,} slots per expert. An expert can drop in one batch and idle in another, so both"
    f" may stand on one bar. {setting}",
    n=f"{total['assignments']:,} assignments",
)  # fmt: skip
text.show_heading(f"Who pays at {layer.title}?")
tables: dict[str, tuple[str, pa.Table | Callable[[], pa.Table]]] = {"curves": ("one row per layer and capacity factor", every), "by layer": ("one row per layer", pa.Table.from_pylist(here)),
          "by expert": ("one row per expert of the layer shown", applied.by_expert), **who_pays(trace, applied, site, total["dropped_share"])}  # fmt: skip

compare = section("compare", "The same capacity under other policies: those that drop, drop as much, but not the same tokens")
if compare.open:
    with compare:
        rows = compare_policies(trace, factor, scope, size=size, mixed=mixed, preset=preset, layers=[site])
        tables["policies"] = "one row per drop policy at the layer shown", rows
        columns = ["policy", "dropped_share", "fully_dropped_share", "top1_dropped_share", "gate_mass_lost_share", "slot_use", "unanswered"]
        st.dataframe(
            rows.select([c for c in columns if c in rows.column_names]).to_pandas(),
            hide_index=True,
            column_config={c: st.column_config.NumberColumn(c.replace("_", " "), format="percent") for c in columns[1:-1]},
        )
cost = section("cost", "What the slots cost")
if cost.open:
    with cost:
        try:
            costs = applied.cost(devices=8)
            tables["cost"] = "one row per layer: slots, FLOPs and all-to-all bytes, and the part of each that is padding", costs
            row = costs.to_pylist()[0]
            st.markdown(
                f"{row['slots']:,} slots are computed for {total['kept']:,} assignments: **{row['padding_flops'] / 1e9:,.3f} of "
                f"{row['flops'] / 1e9:,.3f} GFLOP** and, spread over 8 devices, **{row['padding_bytes'] / 1e6:,.3f} of "
                f"{row['all_to_all_bytes'] / 1e6:,.3f} MB** of all-to-all are padding."
            )
        except CapacityError as error:
            text.show_note(str(error))
st.header("Take the numbers")
computed_downloads(trace, tables, {"factor": factor, "preset": preset, "policy": policy, "scope": scope, "size": size, "order": order})
