"""Capacity: what overflows at this capacity factor, and who pays for it?"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import streamlit as st

from analysis.capacity import AppliedCapacity, pool_curves, slot_costs
from analysis.capacity_answer import (
    CHEAP,
    FEW,
    SHUFFLES,
    batches_in_words,
    drops_in_words,
    needs_in_words,
    percent,
    price_in_words,
    range_in_words,
    shuffle_shares,
    tokens_in_words,
)
from analysis.overflow import FACTORS
from analysis.policies import POLICIES, MissingScores, rank_site
from analysis.slots import PRESETS, CapacityError, make_batches
from analysis.trace import Trace
from analysis.vocabulary import token_texts
from app import charts, text
from app.components.token_strip import token_strip
from app.downloads import computed_downloads
from app.figures import show_figure
from app.rankings import Averages, averages, by_expert, checked, compared, curves, loads, losses, ranked, seeds_for, sizes_of, told_by_loads
from app.selection import answered, choice, current_trace, document_picker, folded_choices, recording_id, section
from app.strip_data import HUES, hues

SCOPES = {"documents": "micro-batches of documents", "document": "each document alone", "tokens": "micro-batches of tokens",
          "run": "the whole run at once"}  # fmt: skip
SIZES = {"documents": (2, 4, 8, 16, 32, 64, 128), "tokens": (256, 512, 1_024, 2_048, 4_096, 8_192, 16_384, 65_536)}
WHO = {"label": "by label", "position": "by position", "token": "by token", "text": "in the text"}
LOST = {"assignments": ("assignments", "dropped"), "gate": ("gate weight", "gate_mass_lost"), "first": ("first choices", "top1_dropped")}
WHOLE = {"assignments": "assignments", "gate": "gate_mass", "first": "tokens"}
SHARES = {"dropped_share": "assignments dropped", "gate_mass_lost_share": "gate weight lost", "top1_dropped_share": "first choices lost",
          "fully_dropped_share": "tokens that lose all experts", "slot_use": "slots in use"}  # fmt: skip
SHOWN_TOKENS = 1_024
ALONE = "Lost gate weight, first choices and tokens are told of {} alone, below."
LONG = (f"The run has more than {CHEAP:,} assignments: what depends on the loads of experts alone comes from its statistics by document, of all"
        " layers; what depends on who is served first, from every decision of one. ")  # fmt: skip


def who_pays(trace: Trace, applied: Callable[[], AppliedCapacity], site: int, total: dict[str, float]) -> dict[str, tuple[str, pa.Table]]:
    """Charts and tables of the groups that lose, against the layer's share; returns the tables for the downloads."""
    labelled, layer = pc.count(trace.documents["label"]).as_py() > 0, trace.layers[site]
    with st.container(horizontal=True):
        asked = choice("who", "Who pays", {k: v for k, v in WHO.items() if labelled or k != "label"}, "label" if labelled else "position",
                       draw=st.segmented_control)  # fmt: skip
        measures = {k: v[0] for k, v in LOST.items() if k != "first" or layer.top_k > 1}  # else the first choice is the only one
        lost = choice("lost", "Share lost of", measures, "assignments", draw=st.segmented_control) if asked != "text" else "assignments"
    unit, part = LOST[lost]
    share = "dropped_share" if lost == "assignments" else f"{part}_share"
    if asked == "text":
        struck_text(trace, applied(), site)
        return {}
    if np.isnan(total[share]):
        whose = "single tokens" if trace.weights_kept == "none" else f"natively dropped assignments at {layer.title}"
        text.show_note(f"The {unit} of {whose} was not recorded: its loss cannot be told.")
        return {}
    if asked == "token":
        return {"by token": ("one row per token id", token_table(trace, applied().by_token(), total[share], lost))}
    by = "label" if asked == "label" else "first_position"
    if exact:
        rows = losses(trace, run, site, policy, scope, size, shown, preset, by)
        rows = rows.filter(pc.equal(rows["factor"], factor))
    else:
        rows = applied().by_label() if asked == "label" else applied().by_position()
    if asked == "label":
        rows = rows.sort_by([(share, "descending")])
    keys = rows[by].to_pylist()
    names = text.axis_names(["no label" if k is None else k for k in keys]) if asked == "label" else [f"{k:,}" for k in keys]
    whole = rows[WHOLE[lost]].to_numpy()
    show_figure(
        trace, charts.share_bars(names, rows[share].to_numpy(), whole, total[share],
                                 "label" if asked == "label" else "position in the document, first of each bin", unit),
        f"lost-{lost}-{WHO[asked]}-{layer.title}-cf-{factor:g}", key="who-chart", alt=f"Bars of the share of {unit} lost {WHO[asked]}.",
        definition=f"Share of each group's {unit} at {layer.title} lost at capacity factor {factor:g}; the line is the whole layer's"
        f" {percent(total[share])}.",
        n=f"{float(whole.sum()):,.0f} {'of ' if lost == 'gate' else ''}{unit} in {text.counted(len(rows), 'group')}{of_shuffle}", how=f"{setting} {which}".strip(),
    )  # fmt: skip
    return {WHO[asked]: (f"one row per {asked}", rows)}


def token_table(trace: Trace, rows: pa.Table, mean: float, lost: str) -> pa.Table:
    """The tokens that lose most of what ``lost`` names, with their texts."""
    stream = trace.layers[int(rows["site"][0].as_py())].stream
    unit, part = LOST[lost]
    rows = rows.sort_by([(part, "descending")])
    rows = rows.append_column("token", pa.array(token_texts(trace, rows["token_id"].to_numpy(), stream), pa.string()))
    top = rows.slice(0, 25)
    st.dataframe(
        pd.DataFrame({"token": [text.visible_token(t) for t in top["token"].to_pylist()], "token id": top["token_id"].to_pylist(),
                      unit: top[WHOLE[lost]].to_pylist(), "lost": top[part].to_pylist(),
                      "share lost": top["dropped_share" if lost == "assignments" else f"{part}_share"].to_pylist()}),
        hide_index=True, column_config={"share lost": st.column_config.ProgressColumn(format="percent", min_value=0, max_value=1)} | (
            {c: st.column_config.NumberColumn(format="%.1f") for c in (unit, "lost")} if lost == "gate" else {}),
    )  # fmt: skip
    text.show_note(f"The {min(25, len(rows)):,} token ids of {len(rows):,} that lose most {unit}; the whole layer loses {percent(mean)}. The"
                   " download has every id.", f"{setting} {which}".strip())  # fmt: skip
    return rows


def show_policies(rows: pa.Table) -> None:
    """What each policy costs, side by side; those that this run cannot answer in a sentence each."""
    told = rows.filter(pc.is_null(rows["unanswered"]))
    shares = [c for c in SHARES if c in told.column_names and not np.isnan(told[c].to_numpy()).all()]
    st.dataframe(
        pd.DataFrame({"served first": [p.replace("_", " ") for p in told["policy"].to_pylist()],
                      **{SHARES[c]: told[c].to_pylist() for c in shares}}),
        hide_index=True, column_config={SHARES[c]: st.column_config.NumberColumn(format="percent") for c in shares},
    )  # fmt: skip
    text.show_note(
        f"{layer.title.capitalize()} at capacity factor {factor:g}{of_shuffle and ','}{of_shuffle.replace('of', 'for')}.",
        f"{setting.replace(served, '')} {which}".strip(),
    )
    for row in rows.filter(pc.is_valid(rows["unanswered"])).to_pylist():
        text.show_note(f"{row['unanswered'][:1].upper()}{row['unanswered'][1:]}.")


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
    token_strip(shown, ["\n" in (t or "") for t in rows["token"].to_pylist()], [routing.chosen], [routing.weights], [layer.title], hues(trace, [layer]),
                f"capacity-{settings}-{recording_id(trace)}", layer=0, lost=lost.tolist())  # fmt: skip
    text.show_note(
        f"The first {stop - start:,} of {end - start:,} tokens. Struck out: dropped by all of its experts ({int((lost == 2).sum()):,}); "
        f"dotted: by some ({int((lost == 1).sum()):,}). Whether a token is dropped depends on the texts it shares a batch with.",
        HUES,
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
text.show_note(
    "Each expert gets the even share of a batch times the capacity factor (CF) as slots; what overflows is dropped.",
    "That number of slots is the expert capacity, which training and serving fix so that sizes do not change. What overflows is not processed by"
    " this layer; slots left empty are computed for nothing. A what-if on the recorded choices: the model itself ran without a limit unless it"
    " says so below.",
)
run, titles = recording_id(trace), {x.title: x.title for x in trace.layers}
with st.container(horizontal=True):
    shown_layer = choice("at", "Layer", {"all": "all layers", **titles}, "all", width=150)
    factor = float(choice("cf", "Capacity factor", {f"{f:g}": f"{f:g}" for f in FACTORS}, "1.25", draw=st.select_slider, width="stretch"))
asked: dict[str, tuple[str, dict[str, str], str]] = {}


def assumed(key: str, label: str, names: dict[str, str], default: str) -> str:
    """The answer to one of the assumptions, whose widget is drawn below the headline."""
    asked[key] = label, names, default
    return answered(key, names, default)


preset = assumed("preset", "Capacity as in", {n: r.title for n, r in PRESETS.items()}, "megatron")
policies = {"preset": f"as there: {PRESETS[preset].policy}", **{p: p.replace("_", " ") for p in POLICIES}}
policy = assumed("policy", "Who is served first", policies, "preset")
scope = assumed("scope", "Routed together", SCOPES, "documents")
size = None
if scope in SIZES:
    size = int(assumed(scope, f"{scope.capitalize()} per batch", {str(n): f"{n:,}" for n in SIZES[scope]},
                       "16" if scope == "documents" else "4096"))  # fmt: skip
seeds = seeds_for(trace, run, scope, size)
again = f"documents shuffled, {len(seeds)} times" if len(seeds) > 1 else "documents shuffled (seed 0)"
others = {str(i): f"documents shuffled (seed {i})" for i in range(0 if len(seeds) > 1 else 1, SHUFFLES)}
orders = {"mixed": again, **others, "recorded": "documents as recorded"}
order = assumed("mix", "In the order", orders, "mixed") if size else ""

policy = PRESETS[preset].policy if policy == "preset" else policy
shuffles: tuple[int | None, ...] = {"mixed": seeds, "recorded": (None,), "": (None,)}.get(order) or (int(order),)


by_loads = told_by_loads(trace, run, scope)


def answer(policy: str) -> Averages:
    """What does not change while the slider moves, under a policy that this run can answer."""
    one = None if shown_layer == "all" else next(x.index for x in trace.layers if x.title == shown_layer)
    known = averages(curves(trace, run, policy, scope, size, shuffles, preset, by_loads), run, policy, scope, size, shuffles, preset, one)
    checked(trace, run, known.site, policy)
    return known


try:
    known = answer(policy)
except MissingScores as error:
    text.show_error(f"{str(error)[:1].upper()}{str(error)[1:]}. First come, first served (position) is shown instead.")
    policy = "position"
    known = answer(policy)
every, mine, means, pooled, site, shown = known.every, known.mine, known.means, known.pooled, known.site, known.shown
now = pooled.filter(pc.equal(pooled["factor"], factor)).to_pylist()[0]
exact = policy not in ("reroute", "dropless")
layer, whole = trace.layers[site], shown_layer == "all" and len(trace.layers) > 1


@cache
def applied() -> AppliedCapacity:
    """The layer shown, assignment by assignment; asked for only where loads do not tell."""
    return ranked(trace, run, site, policy, scope, size, shown).at(factor, preset)


at_hand = pc.and_(pc.equal(every["site"], site), pc.equal(every["factor"], factor))
if shown is not None:
    at_hand = pc.and_(at_hand, pc.equal(every["shuffle"], shown))
total = (every.filter(at_hand) if exact else applied().by_layer()).to_pylist()[0]
batches, documents = (
    sizes_of(trace, run, layer.stream, scope, size, shown),
    pc.sum(pc.equal(trace.documents["stack"], layer.stream)).as_py(),
)
below = by_loads and exact  # what depends on who is served first is told of one layer
served = f"served first: {policy.replace('_', ' ')}; "
formed = batches_in_words(batches, documents, scope, size)
setting = f"Capacity as in {PRESETS[preset].title}; {served}{formed}."
which = f"Shuffle {shown} of {len(shuffles)}, the one nearest to their mean at CF 1." if len(shuffles) > 1 else (
    f"Documents shuffled with seed {shown}." if shown is not None else "")  # fmt: skip
of_shuffle = f" of shuffle {shown}" if len(shuffles) > 1 else ""
where = " over all layers" if whole and exact else f" at {layer.title}"
named = {x.index: x.title for x in trace.layers if whole or x.index == site}
told = now if exact else total
text.show_heading(drops_in_words(told, factor, where, now["chance_dropped_share"] if exact else None) + ".")
if exact:
    text.show_text(f"{needs_in_words(means, named)}.")
n = [f"n = {told['assignments']:,.0f} assignments", range_in_words(shuffle_shares(mine, factor)) if exact else "",
     "one shuffle, since the run is long and its batches are many" if order == "mixed" and len(shuffles) == 1 else "",
     f"only {text.counted(len(batches), 'batch', 'batches')}, so another text can differ much"
     if len(batches) < FEW else ""]  # fmt: skip
text.show_note(
    f"{ALONE.format(layer.title) if below else price_in_words(told)} {'; '.join(filter(None, n))}.".strip(),
    ("By chance: what uniform routing in the same batches would drop. " if exact else "")
    + (LONG if below else f"{tokens_in_words(now, len(named))}. " if exact else "")
    + f"{trace.n_tokens(layer.stream):,} tokens in {formed}. Capacity: {PRESETS[preset].source}."
    + (" Every figure is the mean over the shuffles." if len(shuffles) > 1 and exact else ""),
)
if not exact:
    text.show_note(f"The curves below are those of first come, first served: {policy} has no threshold per assignment.")
batch = f"{size:,} {scope} per batch" if size else SCOPES[scope]
shuffled = f", {f'mean of {len(shuffles)} shuffles' if len(shuffles) > 1 else orders[order]}" if size else ""
text.show_note(f"Assumptions: {PRESETS[preset].title}, served by {policy.replace('_', ' ')}, {batch}{shuffled}.")
folded_choices("assumptions", "Change the assumptions", asked)

st.header("Drops against idle slots")
spread = "shuffle" if len(named) == 1 and len(shuffles) > 1 else "layer"
banded = mine if spread == "shuffle" else means
grid = [
    banded.filter(pc.equal(banded[by], key))
    for by in ["shuffle" if spread == "shuffle" else "site"]
    for key in banded[by].unique().to_pylist()
]
band = f"Line: {'all layers together' if whole else layer.title}; band: range over the {len(grid)} {spread}s." if len(grid) > 1 else ""
show_figure(
    trace, charts.overflow_curves(np.array(FACTORS), np.stack([g["dropped_share"].to_numpy() for g in grid]),
                                  1 - np.stack([g["slot_use"].to_numpy() for g in grid]),
                                  np.stack([pooled["dropped_share"].to_numpy(), 1 - pooled["slot_use"].to_numpy(),
                                            pooled["chance_dropped_share"].to_numpy()]), factor, spread),
    f"capacity-curves-{shown_layer}-{policy}", key="curves", alt="Shares of dropped assignments and idle slots over the capacity factor.",
    definition=f"{band} Dropped: share of assignments; idle: share of slots; dotted: what uniform routing would drop.".strip(),
    n=f"{now['assignments']:,.0f} assignments in {text.counted(len(named), 'layer')}",
    how=(setting if exact else "Drawn for first come, first served.") + (
        f" Each point is the mean over {len(shuffles)} shuffles of the documents." if len(shuffles) > 1 and spread == "layer" else ""),
)  # fmt: skip

lesson = section("lesson", "How it works: six tokens and three experts")
if lesson.open:
    with lesson:
        explain()
text.show_heading(f"Expert by expert at {layer.title}" + (", the layer that drops most at CF 1" if whole else ""))
over = loads(trace, run, site, scope, size, shown).at(factor, PRESETS[preset]) if below else applied().sites[site]
least, largest = over.capacity_range
show_figure(
    trace, charts.slot_bars(over.kept_load, over.dropped_load, over.idle, over.slots), f"slots-{layer.title}-{policy}-cf-{factor:g}",
    key="slots", alt=f"Bars per expert of {layer.title}: processed, dropped and idle.",
    definition=f"Assignments and slots of {layer.title} at capacity factor {factor:g}, with"
    f" {f'{least:,} to {largest:,}' if least < largest else f'{largest:,}'} slots per expert and batch. An expert can drop in one batch and"
    " idle in another.",
    n=f"{total['assignments']:,} assignments in {text.counted(len(batches), 'batch', 'batches')}{of_shuffle}", how=f"{setting} {which}".strip(),
)  # fmt: skip
text.show_heading(f"Who pays at {layer.title}?")
here = means.filter(pc.equal(means["factor"], factor)) if exact else applied().by_layer()
without, alone = " (without what depends on who is served first)" if below else "", {}
if below:
    rows = pool_curves(losses(trace, run, site, policy, scope, size, shown, preset, "label"))
    total |= rows.filter(pc.equal(rows["factor"], factor)).to_pylist()[0]
    alone = {"layer shown": ("one row per capacity factor, of the layer shown", rows)}
    said = f"{drops_in_words(total, factor, f' at {layer.title}' + of_shuffle.replace(' of', ' in'))}. {price_in_words(total)}"
    text.show_note(f"{said.strip()} {tokens_in_words(total, 1)}.", f"{setting} {which}".strip())
tables: dict[str, tuple[str, pa.Table | Callable[[], pa.Table]]] = {
    "curves": (f"one row per layer, shuffle and capacity factor{without}", every), "by layer": (f"one row per layer{without}", here), **alone,
    "by expert": ("one row per expert of the layer shown", partial(by_expert, trace, site, policy, scope, size, shown, factor, preset)),
    **who_pays(trace, applied, site, total)}  # fmt: skip

compare = section("compare", "The same capacity under other policies: those that drop, drop as much, but not the same tokens")
if compare.open:
    with compare:
        rows = compared(trace, run, site, factor, scope, size, shown, preset)
        tables["policies"] = "one row per drop policy at the layer shown", rows
        show_policies(rows)
cost = section("cost", "What the slots cost")
if cost.open:
    with cost:
        try:
            costs = slot_costs(trace, {site: over}, devices=8)
            tables["cost"] = "one row per layer: slots, FLOPs and all-to-all bytes, and the part of each that is padding", costs
            row = costs.to_pylist()[0]
            text.show_text(
                f"At {layer.title}, over {text.counted(len(batches), 'batch', 'batches')}{of_shuffle}: {row['slots']:,} slots are computed for"
                f" {total['kept']:,} assignments. {row['padding_flops'] / 1e9:,.3f} of {row['flops'] / 1e9:,.3f} GFLOP and, spread over 8 devices,"
                f" {row['padding_bytes'] / 1e6:,.3f} of {row['all_to_all_bytes'] / 1e6:,.3f} MB of all-to-all are padding."
            )
        except CapacityError as error:
            text.show_note(str(error))
st.header("Take the numbers")
computed_downloads(trace, tables, {"factor": factor, "preset": preset, "policy": policy, "scope": scope, "size": size, "order": order,
                                  "shuffles": list(shuffles), "shuffle shown": shown})  # fmt: skip
