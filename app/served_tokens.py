"""The Specialization page by token: which tokens is each expert used for, and how far does a token's id alone decide?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from threading import Event

import numpy as np
import pandas as pd
import pyarrow as pa
import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from analysis.information import Information
from analysis.jackknife import DocumentInterval, use_and_interval, vocabulary_interval
from analysis.significance import ALPHA
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

from . import captions, charts, text
from .figures import show_figure
from .layers import LONG, kept, layer_by_layer, one_layer
from .selection import choice, section

TOKEN = {"input": "it reads", "next": "that follows", "predicted": "the model predicts next"}
SUBJECT = {
    "input": "the token's id",
    "next": "the id of the token that follows",
    "predicted": "the id of the token the model predicts next",
}
EQ_8 = "Mean of the largest share any expert has of an id's tokens (OLMoE eq. 8); by chance: assignments dealt again to the tokens."
SHOWN = 8  # tokens per expert


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


def served(trace: Trace, run: str, site: int, variant: str) -> tuple[tuple[tuple[TokenUse, ...], ...], DocumentInterval]:
    """(each expert's tokens by lift, interval of eq. 8) of one site: one pass over its decisions, told as it goes on."""

    def make(progress: Callable[[int, int], None]) -> tuple[tuple[tuple[TokenUse, ...], ...], DocumentInterval]:
        counts = counted(trace, run, site, variant)
        experts = range(counts.classes)
        use, interval = use_and_interval(trace, counts, leading_ids(counts, experts), progress)
        return top_tokens_of(trace, counts, experts, most=SHOWN, use=use), interval

    return one_layer(site, kept(run, ("tokens by expert", variant)), make)


def show_served_tokens(trace: Trace, run: str, site: int) -> dict[str, tuple[str, pa.Table]]:
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
    found, interval = served(trace, run, site, asked)
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
            tables["vocabulary specialization"] = "one row per layer and kind of token", show_followed(trace, run, variants, words.least)
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


def show_followed(trace: Trace, run: str, variants: Mapping[str, str], least: int) -> pa.Table:
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
