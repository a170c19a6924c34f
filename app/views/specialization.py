"""Specialization: what does each expert do, and is it more than chance?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from threading import Event

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from analysis.glossary import GLOSSARY
from analysis.information import Information
from analysis.jackknife import DocumentInterval, label_information_and_interval, use_and_interval, vocabulary_interval
from analysis.pair_tests import coactivation_test, flow_test
from analysis.paths import saturation
from analysis.significance import ALPHA
from analysis.specialization import Preferences, by_label, by_position, seriation
from analysis.token_classes import by_class, class_codes
from analysis.token_use import TokenUse, leading_ids, top_tokens_of
from analysis.trace import Trace
from analysis.vocabulary import (
    PREDICTED_NEXT,
    VARIANTS,
    TokenCounts,
    VocabularySpecialization,
    context_independence,
    predicts,
    vocabulary_specialization,
    vocabulary_table,
)
from app import captions, charts, text
from app.downloads import computed_downloads
from app.every_layer import show_every_layer
from app.figures import show_figure
from app.layers import LONG, kept, layer_by_layer, one_layer
from app.repeats import show_repeats
from app.selection import choice, comparable_runs, current_trace, layer_picker, open_expert, recording_id, section, theme

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
TOKEN = {"input": "it reads", "next": "that follows", "predicted": "the model predicts next"}
SUBJECT = {
    "input": "the token's id",
    "next": "the id of the token that follows",
    "predicted": "the id of the token the model predicts next",
}
NO_RUNS = "No other run here is over the same tokens; record or open one to compare."
EQ_8 = "Mean of the largest share any expert has of an id's tokens (OLMoE eq. 8); by chance: assignments dealt again to the tokens."
SHOWN = 8  # tokens per expert


@st.cache_resource(max_entries=64, show_spinner="Testing every cell against shuffled labels …")
def label_preferences(_trace: Trace, run: str, site: int) -> Preferences:
    """Effects and tests of labels at one site, from statistics; ``run`` names the trace with its date."""
    return by_label(_trace, site)


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


@st.cache_resource(max_entries=2, show_spinner="Counting who serves which token …")
def counted(_trace: Trace, run: str, site: int, variant: str) -> TokenCounts:
    """Who serves which token id at one site, by the kind of token ``variant``; few are kept, as they are large."""
    return VARIANTS[variant](_trace, site)


@st.cache_resource(max_entries=32, show_spinner="Dealing every expert's assignments to the tokens again …")
def vocabulary(_trace: Trace, run: str, site: int, variant: str) -> tuple[Information, VocabularySpecialization]:
    """(context independence, eq. 8) of one site, by the kind of token ``variant``."""
    counts = counted(_trace, run, site, variant)
    with ThreadPoolExecutor() as pool:  # each spends most of its time without Python's lock
        alone, words = pool.submit(context_independence, counts), pool.submit(vocabulary_specialization, counts)
        return alone.result(), words.result()


@st.cache_resource(max_entries=32, show_spinner=False)
def by_lift(_trace: Trace, run: str, site: int, variant: str) -> tuple[tuple[TokenUse, ...], ...]:
    """Each expert's tokens by lift, from counts alone."""
    counts = counted(_trace, run, site, variant)
    return top_tokens_of(_trace, counts, range(counts.classes), most=SHOWN, draws=0)


def served(variant: str) -> tuple[tuple[tuple[TokenUse, ...], ...], DocumentInterval]:
    """(each expert's tokens by lift, interval of eq. 8) of the layer chosen: one pass over its decisions, told as it goes on."""

    def make(progress: Callable[[int, int], None]) -> tuple[tuple[tuple[TokenUse, ...], ...], DocumentInterval]:
        counts = counted(trace, run, site, variant)
        experts = range(counts.classes)
        use, interval = use_and_interval(trace, counts, leading_ids(counts, experts), progress)
        return top_tokens_of(trace, counts, experts, most=SHOWN, use=use), interval

    return one_layer(site, kept(run, ("tokens by expert", variant)), make)


def show_vocabulary() -> dict[str, tuple[str, pa.Table]]:
    """How far the token id alone decides, and the tokens each expert is used for most; by the token read, that follows, or is predicted."""
    here = trace.layers[site]
    variants = {k: v for k, v in TOKEN.items() if k != "predicted" or predicts(trace, here.stream)}
    asked = choice("token_is", "The token", variants, "input", draw=st.segmented_control)
    alone, words = vocabulary(trace, run, site, asked)
    if np.isfinite(alone.share):
        text.show_heading(f"At {here.title}, {SUBJECT[asked]} accounts for {alone.share:.0%} of what it could.")
    else:
        text.show_heading(f"At {here.title}, chance alone reaches all that a token's id could tell: there are too few tokens.")
    text.show_note(
        f"{alone.plug_in:.2f} of at most {alone.ceiling:.2f} bits; {alone.floor:.2f} when assignments are dealt at random. n = {alone.n:,} assignments"
        f" of {words.n_ids:,} ids.",
        "I(expert; token id) over assignments. At most: a token's experts all differ, so even who knows its id cannot tell which of them an assignment is:"
        " min(H(token id), H(expert) - log2 k) where every token has k experts. The share is (measured - by chance) / (at most - by chance). Dealt at random, a token may get one expert twice: with few tokens, chance can exceed what is possible."
        f" By chance: {alone.null}.",
    )
    table, about = st.container(key="uses").empty(), st.empty()
    if words.n_frequent and trace.source is not None and alone.n >= LONG and site not in kept(run, ("tokens by expert", asked)):
        show_uses(table, {"by lift; what documents say of them is being counted …": by_lift(trace, run, site, asked)})
        with about:
            text.show_note(f"The {SHOWN} tokens each expert is used for most, by lift, from counts alone. Which are beyond chance is told once every decision is"
                           " read; of tokens with one lift, those in most documents then take these places.")  # fmt: skip
    found, interval = served(asked)
    if words.n_frequent:
        show_uses(table, {title: [tuple(t for t in uses if claimed(t) == beyond) for uses in found]
                          for title, beyond in ((f"beyond chance (q up to {ALPHA:.0%})", True), ("cannot be told from chance", False))})  # fmt: skip
        with about:
            text.show_note(
                f"The {SHOWN} tokens it is used for most, by lift; in brackets: in how many of the documents that hold the token it uses the expert more often than"
                " the rest of the document does, and q. By chance a token uses an expert as often as the rest of its document; few documents tell little.",
                f"q: the false discovery rate at which the token is still claimed, corrected for every id seen {words.least:,} times at every expert of this layer"
                " (Benjamini and Hochberg). Its unit is the document: each that holds the token gives the share of its occurrences there that use the expert, expected"
                " to be the document's own rate (Hoeffding's bound, one-sided). The file has q, this p, and a p that takes each occurrence for independent."
                f" Lift: share of the token's occurrences that use the expert, over the expert's share of all tokens; ids seen fewer than {words.least:,} times"
                " are left out. Where an expert takes every occurrence, all lifts tie at the highest. A token of one document may be that document's habit.",
            )
    show_interval(interval, words)
    if "predicted" not in variants:
        text.show_note(PREDICTED_NEXT)
    tokens = pa.Table.from_pylist([{"expert": e, "token_is": asked, **vars(t)} for e, uses in enumerate(found) for t in uses])
    tables = {
        "tokens by expert": (
            "one row per expert and token; p takes each occurrence for independent, p_documents and q the document",
            tokens,
        )
    }
    told_of = pa.Table.from_pylist([{"site": site, "token_is": asked, **asdict(interval)}])
    tables["interval"] = "one row: vocabulary specialization of the layer with its interval over documents", told_of
    follow = section("follow", "Which token do the layers follow? Reads every decision of the run")
    if follow.open:
        with follow:
            tables["vocabulary specialization"] = "one row per layer and kind of token", show_followed(variants, words.least)
    return tables


def show_interval(found: DocumentInterval, words: VocabularySpecialization) -> None:
    """The layer's vocabulary specialization, and between which values it lies, or why that is not known."""
    if not words.n_frequent:
        text.show_note(f"No token id occurs {words.least} times: nothing can be told token by token.")
        return
    value = f"Vocabulary specialization of the n = {words.n_frequent:,} ids seen {words.least} times or more: {found.value:.3f}"
    if found.missing:
        text.show_note(f"{value}, by chance {words.chance_frequent:.3f}; there is no interval here: {found.missing}.", EQ_8)
        return
    each = text.counted(found.documents, "document") if found.left_out == found.documents else (
        f"{found.left_out:,} runs of documents ({found.documents:,} in all)")  # fmt: skip
    text.show_note(
        f"{value}, 95% interval {found.low:.3f} to {found.high:.3f}, by chance {words.chance_frequent:.3f}.",
        f"{EQ_8} The interval is for its mean over other collections of as many documents like these. Each of {each} is left out in turn (jackknife):"
        " documents drawn again (bootstrap) bring no other text, which raises this figure, and their interval misses. It errs on the wide side; what rare"
        " ids add is in the chance too.",
    )


def show_followed(variants: Mapping[str, str], least: int) -> pa.Table:
    """Vocabulary specialization of every layer by each kind of token of ``variants``, with intervals over documents."""
    left = Event()

    def tell(_done: int, _total: int) -> None:
        if left.is_set():
            raise InterruptedError("the view was left")

    def beside(counts: TokenCounts) -> dict[str, object]:
        found = asdict(vocabulary_interval(trace, counts, least, tell))
        return {k: found[k] for k in ("low", "high", "documents", "left_out", "missing")}

    def tables(layers: Sequence[int]) -> Iterator[tuple[int, pa.Table]]:
        with ThreadPoolExecutor(2) as pool:  # a layer spends most of its time without Python's lock
            try:
                yield from zip(layers, pool.map(lambda i: vocabulary_table(trace, layers=[i], beside=beside), layers), strict=True)
            finally:  # a person who leaves stops those under way, inside a layer
                left.set()
                pool.shutdown(wait=False, cancel_futures=True)

    table = layer_by_layer(trace, kept(run, ("vocabulary",)), tables)
    titles = [x.title for x in trace.layers]
    frame = table.to_pandas()
    value = {v: frame[frame.token == v].set_index("site").reindex(range(len(titles))) for v in variants}
    lines = [(TOKEN[v], x["frequent"].to_numpy(), np.stack([x["low"], x["high"]])) for v, x in value.items()]
    missing = "; ".join(sorted(set(frame.missing) - {""}))
    chance = frame[frame.token == "input"].set_index("site")["chance_frequent"].reindex(range(len(titles))).to_numpy()
    show_figure(
        trace, charts.layer_lines(titles, [*lines, ("by chance (input token)", chance, None)], "vocabulary specialization"),
        "vocabulary-specialization", key="vocabulary", alt="Vocabulary specialization per layer by input, next and predicted next token, with chance.",
        definition=f"Mean over ids seen at least {least:,} times of the largest share any expert has of the id's tokens (OLMoE eq. 8), with its 95% interval"
        " over documents. Grey: by chance, the same assignments dealt again to the tokens.",
        n=", ".join([*(f"{captions.spread(frame[frame.token == v].n_frequent.to_numpy())} ids ({TOKEN[v]})" for v in variants),
                     text.counted(int(frame.documents.max()), "document")]),
        how="Lines are over different ids: do not compare their heights closely. Each interval is for one layer and one kind of token: where its mean over other"
        " collections of as many documents like these lies, made by leaving out each document, or each of 400 runs of them, in turn (jackknife); it errs"
        f" on the wide side.{f' Without interval: {missing}.' if missing else ''}",
    )  # fmt: skip
    return table


def show_uses(place: DeltaGenerator, columns: Mapping[str, Sequence[Sequence[TokenUse]]]) -> None:
    """A row of tokens per expert, in each of the columns."""
    rows = {title: ["   ".join(map(told, uses)) for uses in experts] for title, experts in columns.items()}
    with place:
        st.dataframe(pd.DataFrame(rows, index=pd.Index(range(len(next(iter(rows.values())))), name="expert")))


def told(use: TokenUse) -> str:
    """A token with its lift, and by document where that is known."""
    if use.documents is None:
        return f"{text.visible_token(shown(use))} {use.lift:.1f}x"
    q = "" if use.q is None else f", q {use.q:.1g}" if use.q >= 0.001 else ", q < 0.001"
    return f"{text.visible_token(shown(use))} {use.lift:.1f}x ({use.leaning} of {use.documents}{q})"


def claimed(use: TokenUse) -> bool:
    """Whether the token's use of the expert is more than chance."""
    return use.q is not None and use.q <= ALPHA


def shown(use: TokenUse) -> str:
    """A token's text, or its id where only the model's predictions hold it: the run has no text for it."""
    return f"id {use.token_id}" if use.text is None else use.text


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
    found = test(site) if kind == "label" else one_layer(site, kept(run, ("preferences", kind)), partial(test, site), place)
    show_preferences(found, site, place)
    tables[KINDS[kind]] = f"one row per {kind} and expert", found.table()
    tables |= show_every_layer(trace, run, found, test)
    if kind == "label":
        show_layers()
elif kind == "token":
    tables |= show_vocabulary()
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
