"""Expert: everything about one expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
import pyarrow as pa
import streamlit as st

from analysis.cards import (
    GroupUse,
    Neighbour,
    SiteEvidence,
    company,
    expert_card,
    expert_load,
    group_uses,
    known_tokens,
    neighbours,
    site_before,
    site_evidence,
    with_use,
)
from analysis.checkpoints import weights_digest
from analysis.glossary import GLOSSARY
from analysis.neighbours import Similarities, WeightsError, expert_similarities
from analysis.pair_tests import PairTest, pair_tests
from analysis.passages import Passage, passages
from analysis.significance import ALPHA
from analysis.specialization import Preferences
from analysis.token_use import DRAWS, TokenUse, top_tokens
from analysis.trace import LayerInfo, Trace
from app import captions, charts, text
from app.components.token_strip import token_strip
from app.downloads import computed_downloads
from app.every_layer import label_preferences
from app.figures import show_figure
from app.layers import kept, one_layer
from app.runs_folder import model_folder
from app.selection import answered, choice, current_trace, expert_search, layer_picker, recording_id
from app.strip_data import hues

LARGE = 4  # layers whose tokens are kept with the documents that use them, 100 MB each
SHOWN, WIDE = 8, 362  # other experts in a table; pixels of one of three tables side by side, or of a telephone
VERDICT = {1: "more", -1: "less"}


def evidence(trace: Trace, site: int) -> SiteEvidence:
    """What the layer's experts serve, tested, without the tokens and the pairs, which come further down."""
    make = partial(site_evidence, trace, site, False, False, labels=texts)
    return one_layer(site, kept(run, ("evidence",)), lambda tell: replace(make(tell), tokens=None))


def token_evidence() -> SiteEvidence:
    """``known`` with what is known of the layer's tokens; few are kept, as they are large."""
    layers = kept(run, ("tokens and documents",))
    found = one_layer(site, layers, lambda tell: with_use(trace, replace(known, tokens=known_tokens(trace, site)), tell))
    for other in list(layers)[:-LARGE]:
        layers.pop(other, None)
    return found


def token_uses() -> tuple[TokenUse, ...]:
    """The expert's tokens by lift; none where they cannot be known."""
    experts = kept(run, ("top tokens",)).setdefault(site, {})
    if expert not in experts:
        whole = token_evidence()
        with st.spinner("Dealing this expert's assignments to the tokens again …"):
            experts[expert] = () if whole.tokens is None else top_tokens(trace, whole.tokens, expert, use=whole.token_use)
    return cast(tuple[TokenUse, ...], experts[expert])


@st.cache_resource(max_entries=64, show_spinner="Looking for passages …")
def examples(_trace: Trace, run: str, site: int, expert: int, label: str | None) -> tuple[Passage, ...]:
    """The stretches of text with most gate weight on the expert; of one label alone, or of all texts."""
    return passages(_trace, site, expert, label=label)


def uses(rows: Sequence[GroupUse], what: str, found: Preferences | None, of: str) -> None:
    """Groups by lift, with interval and whether they are more than chance; the one that is looked at, ``of``, is marked."""
    if missing := found.missing if found is not None else "":
        text.show_note(missing)
    show_figure(
        trace, charts.enrichment_bars(text.axis_names([u.group for u in rows]), rows, of[len(what) + 1 :] if of.startswith(f"{what}-") else None), f"{trace.layers[site].title}-expert-{expert}-by-{what}",
        key=f"uses-{what}", alt=f"Bars of log2 enrichment by {what}, with intervals.",
        definition=f"Expert {expert} of {trace.layers[site].title}: the share of the {what}'s tokens that use it over that of all others;"
        f" 1× is no preference. {'No bar can be tested.' if missing else 'Faded: not distinguishable from chance at a false discovery rate of 5%.'}",
        n=f"{load.n:,} tokens in {len(rows):,} groups",
        how="Intervals (95%, over documents) are for one bar alone, not corrected; a bar may clear 1× and still be faded."
        + (f" Test: {found.method}; corrected for the cells of this layer and this look only." if found is not None and not missing else ""),
    )  # fmt: skip


def tested_pairs() -> dict[str, PairTest]:
    """The pairs of the layer, and of it with its neighbours, tested once for all of its experts; the page Specialization keeps them at the same place."""
    asked = company(trace, site)
    missing = [(kind, at) for kind, at in asked.values() if at not in kept(run, ("pair tests", kind))]
    for (kind, at), test in zip(missing, one_layer(site, {}, partial(pair_tests, trace, missing)) if missing else (), strict=True):
        kept(run, ("pair tests", kind))[at] = test
    return {name: kept(run, ("pair tests", kind))[at] for name, (kind, at) in asked.items()}


def verdict(row: Neighbour) -> str:
    """Whether the two experts meet more, or less, often than chance gives, or why that is not said."""
    if not np.isfinite(row.p):
        return "not tested"
    return VERDICT.get(row.direction, "unclear" if not row.q <= ALPHA else "mixed")


def show_neighbours(said: str, test: PairTest, rows: Sequence[Neighbour]) -> None:
    """The experts that meet this one, those first that do so more than chance gives."""
    often, rarely = (sum(x.direction == d for x in rows) for d in (1, -1))
    text.show_text(
        f"{said}: {test.missing or f'of {len(rows):,} experts, {often:,} more often than chance gives and {rarely:,} less often.'}"
    )
    met = [x for x in rows if x.count][:SHOWN]
    if not met:
        return
    column, number = st.column_config.Column, st.column_config.NumberColumn
    st.dataframe(
        pd.DataFrame([{"expert": x.expert, "lift": x.lift, "95% interval": f"{x.low:.2f} to {x.high:.2f}" if np.isfinite(x.low) else "not known",
                       "tokens": x.count, "than chance": verdict(x)} for x in met]),
        hide_index=True,
        column_config={"expert": column(width=55), "lift": number(width=55, format="%.2f"), "95% interval": column(width=100),
                       "tokens": number(width=65, format="localized"), "than chance": column(width=95)},
    )  # fmt: skip


def show_company() -> dict[str, tuple[str, pa.Table]]:
    """Whom the expert works with: before, beside and after it. Every pair of the layer is tested, so this comes last; returns the tables."""
    before, after, used = site_before(trace, site), trace.stats.following[site], int(trace.stats.load(site)[expert])
    titles = {"into": ("sources", f"Before, at {'' if before is None else trace.layers[before].title}"), "partners": ("partners", "For the same tokens"),
              "onward": ("targets", f"After, at {'' if after is None else trace.layers[after].title}")}  # fmt: skip
    tables, rests, documents, tests = {}, dict[str, list[str]](), 0, tested_pairs()
    with st.container(horizontal=True):
        for place, test in tests.items():
            name, said = titles[place]
            with st.container(width=WIDE):
                rows = neighbours(test, expert, used, name == "sources")
                show_neighbours(said, test, rows)
            documents = max(documents, test.documents)
            if rows:
                what = "count: tokens that use both; share: of this expert's tokens; lift over what the loads alone give, with its 95% interval, p and q"
                tables[name] = f"one row of {name} of this expert; {what}", pa.Table.from_pylist([vars(x) for x in rows])
            if not test.missing:
                rests.setdefault(captions.pairs_test(test), []).append(said)
    tested = " ".join(f"{', '.join(names)}. {how}" for how, names in rests.items())
    text.show_note(
        "Lift: how often a token uses both, over what the loads of the two alone would give; 1 by chance."
        f" n = {used:,} tokens{f' of {documents:,} documents in the run' if documents else ''}.",
        f"At most {SHOWN} rows each: those more than chance by lift, then those unclear by count, then those less than chance; all of them, with q and"
        " the share of its tokens, are below. Intervals are over documents, for one row alone. More, less: q at most 5%; unclear: above, not distinguishable from"
        " chance. Mixed: so it is within documents, but the"
        " other way round than the lift of all of them."
        f" {tested}",
    )  # fmt: skip
    return tables


@st.cache_resource(max_entries=16, show_spinner="Comparing the model's files with the run's …")
def digest_of(folder: Path, files: tuple[tuple[str, int, int], ...]) -> str:
    """The digest of a model's folder; ``files`` are names, sizes and times of what it covers."""
    return weights_digest(folder)


@st.cache_resource(max_entries=16, show_spinner="Reading the weights of the layer's experts …")
def similarities(folder: Path, digest: str, layer: LayerInfo) -> Similarities | str:
    """Similarities of a site's experts, or why there are none."""
    try:
        return expert_similarities(folder, layer)
    except WeightsError as error:
        return str(error)


def known_digest(folder: Path) -> str:
    """The digest of a folder, taken again only where a file changed."""
    files = sorted(p for p in folder.iterdir() if p.suffix == ".safetensors" or p.name == "config.json")
    return digest_of(folder, tuple((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files))


def show_weights() -> pa.Table | None:
    """Which experts of the layer have weights like this one's; only where the very model of the run is on this machine."""
    st.header("Which experts have weights like its own?")
    folder = model_folder(trace.model, known_digest)
    if folder is None:
        text.show_note(f"Not known: {trace.model.name}, as it was recorded, is not among the models of this machine (ROUTERSCOPE_MODELS).")
        return None
    found = similarities(folder, trace.model.digest, layer)
    if isinstance(found, str):
        text.show_note(f"Not known: {found}.")
        return None
    if expert >= layer.n_experts:
        text.show_note("Not known: this class has no weights.")
        return None
    others = [int(e) for e in np.argsort(-np.nan_to_num(found.whole[expert], nan=-2.0), kind="stable") if e != expert]
    if not others:
        text.show_note("Not known: the layer has no other expert.")
        return None
    nearest, most = found.whole[expert, others[0]], found.most_by_chance
    verdict = f"{'above' if nearest > most else 'below'} {most:.4f}, which no pair of experts reaches in 19 of 20 layers of random weights"
    text.show_text(f"The nearest is expert {others[0]}, with a cosine similarity of {nearest:.4f}: {verdict}.")
    table = pa.Table.from_pylist([{"expert": e, "cosine": found.whole[expert, e], **{m: found.each[i, expert, e] for i, m in enumerate(found.matrices)},
                                   "parameters": sum(found.parameters), "chance_sd": found.chance, "layer_mean": found.mean} for e in others])  # fmt: skip
    shown = table.slice(0, SHOWN).select(["expert", "cosine", *found.matrices]).to_pandas()
    st.dataframe(shown.rename(columns={"cosine": "all its weights"}), hide_index=True, column_config={
        c: st.column_config.NumberColumn(format="%.4f") for c in ("all its weights", *found.matrices)})  # fmt: skip
    text.show_note(
        f"Cosine similarity of the weights, the {len(shown):,} nearest of {len(others):,}; mean over all pairs of {layer.title}: {found.mean:.4f}."
        f" n = {sum(found.parameters):,} numbers per expert. It says little of what experts do.",
        f"Of {', '.join(found.matrices)}. Independent random weights give 0 with standard deviation 1 / sqrt n = {found.chance:.4f}. The neurons of an"
        " expert can stand in any order, so two experts that compute the same may show 0; high values tell of a common origin, such as experts copied"
        " from one dense layer before training.",
    )
    return table


def show_passages() -> None:
    """Passages with the expert's tokens marked by gate weight."""
    layer = trace.layers[site]
    if trace.weights_kept == "none":
        text.show_note("Not known: passages are chosen by the gate weights of single tokens, which this run did not store (captured with weights"
                       " none). Capture it again with exact or 8-bit weights to see them.")  # fmt: skip
        return
    label = of.removeprefix("label-") if of.startswith("label-") else None
    found = examples(trace, run, site, expert, label)
    for i, p in enumerate(found):
        weights = np.array(p.weights, np.float32)[:, None]
        token_strip(text.token_texts([t or "" for t in p.texts], p.raw), ["\n" in (t or "") for t in p.texts], [np.where(weights > 0, expert, -1)], [weights], [layer.title], hues(trace, [layer]),
                    f"passage-{run}-{site}-{expert}-{i}", layer=0, spotlight=expert, slot=f"passage-{i}", compact=True)  # fmt: skip
        with st.container(horizontal=True, vertical_alignment="center"):
            with st.container(width="content"):
                text.show_note(
                    f"{p.name}{f', {p.label}' if p.label else ''}: {p.used} of {len(p.texts)} tokens use it, gate weights sum to {p.mass:.1f}"
                )
            st.page_link("views/tokens.py", label="See it on the Tokens page →", query_params={
                "run": trace.name, "layer": layer.title, "doc": str(p.document + 1), "token": str(p.position)})  # fmt: skip
    if not found:
        text.show_note(f"No token of {'these texts' if label is not None else 'this run'} uses it.")
    text.show_note(
        f"The {len(found):,} documents{'' if label is None else f' of {label}'} where it weighs most, 24 tokens of each: its strongest moments, not its usual ones."
    )


trace = current_trace()
run = recording_id(trace)
st.title("What is this expert for?")
with st.container(horizontal=True):
    site = layer_picker(trace)
    layer = trace.layers[site]
    names = {str(e): f"expert {e}" + (" (no weights)" if e >= layer.n_experts else "") for e in range(layer.n_classes)}
    busiest = int(np.argmax(trace.stats.load(site)[: layer.n_experts]))
    expert = int(choice("expert", "Expert", names, str(busiest), width=160))
    expert_search(trace)
    asking = st.empty()
load = expert_load(trace, site, expert)
title, counted = f"{load.title[:1].upper()}{load.title[1:]}", site in kept(run, ("evidence",))
answer = st.container(key="answer").empty()  # which keeps room for what is to come
if not counted:
    with answer:
        text.show_heading(f"{title}: counting what kinds of text and token use it …")
numbers = st.container(horizontal=True, key="numbers")
numbers.metric(
    "Share of tokens", f"{load.share:.1%}", border=True, help=f"Of the layer's {load.n:,} tokens; an even share is {load.even_share:.1%}."
)
numbers.metric("Load", f"{load.relative_load:.2f} ×", border=True, help="Over the mean load of its layer; 1 is an even share.")
numbers.metric(
    "First choice",
    f"{load.first_choices:,}",
    border=True,
    help=f"Tokens whose largest gate weight it has, of {load.assignments:,} that use it.",
)
numbers.metric("Mean gate weight", f"{load.mean_gate:.2f}" if load.assignments else "–", border=True, help="Where it is used; as executed.")
if not counted:
    asking.selectbox("Looking at", ["counting …"], key="counting", disabled=True, width=180)
texts = label_preferences(trace, run, site)
if load.assignments and texts.groups:  # from counts alone: it stands while decisions are read
    st.header("Which texts use it?")
    uses(group_uses(texts, expert), "label", texts, answered("of", {"all": "", **{f"label-{g}": g for g in texts.groups}}, "all"))
about_kinds = st.empty()
if load.assignments and trace.load_tokens is not None:
    with about_kinds:
        st.header("Which kinds of token?")
known = evidence(trace, site)
with asking.container():
    kinds = {f"{p.kind}-{g}": text.visible_name(g) for p in (known.labels, known.classes) if p is not None for g in p.groups}
    of = choice("of", "Looking at", {"all": "all tokens", **kinds}, "all", width=180) if kinds else "all"
card = expert_card(trace, site, expert, known)
with answer:
    text.show_heading(f"{title}: {card.description}")

if not card.assignments:
    st.info("No token of this run uses this expert: there is nothing to tell. Choose another one, or a longer run.")
    st.stop()
if card.classes:
    uses(card.classes, "class", known.classes, of)
else:
    about_kinds.empty()
tokens = token_uses()
if tokens:
    st.header("Which tokens, most of all?")
    st.dataframe(
        pd.DataFrame([{"token": text.visible_token(t.text or "?"), "uses it": t.count, "of its occurrences": t.tokens, "share": t.share,
                       "lift": t.lift, "leaning documents": t.leaning, "of documents": t.documents, "q (by document)": t.q} for t in tokens]),
        hide_index=True, column_config={"share": st.column_config.ProgressColumn(format="percent", min_value=0, max_value=1),
                                        "lift": st.column_config.NumberColumn(format="%.1f"), "q (by document)": st.column_config.NumberColumn(format="%.2g")},
    )  # fmt: skip
    text.show_note(
        f"By lift, then by documents: the token's share over the expert's share of all n = {card.n:,} tokens. q above 5%: cannot be told from chance by its documents.",
        "Leaning documents: those that hold the token and in which it uses the expert more often than the document's tokens do. q: the false discovery rate at which"
        " the token is still claimed, corrected for every frequent id at every expert of the layer. Its unit is the document: each gives the share of the token's"
        " occurrences there that use the expert, expected to be the document's own rate (Hoeffding's bound, one-sided). The file also has p, which takes repeats within"
        f" one text for independent: {DRAWS:,} deals of all assignments.",
    )
if trace.load_tokens is not None:
    st.header("Where in the text?")
    show_passages()
st.header("Whom does it work with?")
company_tables = show_company()
weights = show_weights()
for sentence in card.missing:
    text.show_note(f"Not known: {sentence}.")
text.show_definitions(trace.name, {n: GLOSSARY[n].title for n in (
    "expert_load", "gate_weight", "log2_enrichment", "lift", "leaning_documents", "co_activation", "flow", "weight_similarity")})  # fmt: skip
tables = {
    name: (f"one row of {name} of this expert", pa.Table.from_pylist([dict(vars(u)) for u in uses_]))
    for name, uses_ in (("labels", card.labels), ("token classes", card.classes), ("tokens", tokens))
    if uses_
}
tables |= company_tables
if weights is not None:
    tables["weights"] = "one row per other expert of the layer: cosine similarity of weights", weights
if tables:
    st.header("Take the numbers")
    computed_downloads(trace, tables, {"layer": layer.title, "expert": expert})
