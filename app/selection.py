"""What is selected, and its place in the URL: the run in the header of every page, a layer, a document, a token."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal
from urllib.parse import urlencode

import streamlit as st

from analysis.findings import Finding, first_finding, leading_site
from analysis.paths import check_comparable
from analysis.store import RunError, RunSummary, open_run
from analysis.trace import Trace, TraceError

from .components.theme_probe import probed_theme, theme_probe
from .runs_folder import all_runs
from .text import counted, plain, show_error, show_note, show_warning

TYPED = 64  # characters of a search


@st.cache_resource(max_entries=8, show_spinner=False)
def _opened(folder: str, created: str) -> Trace:
    return open_run(folder)


def open_named(folder: Path, created: str) -> Trace:
    """The Trace of a listed run, opened once per server."""
    return _opened(str(folder), created)


def _complete() -> dict[str, RunSummary]:
    return {n: r for n, r in all_runs().items() if r.complete}


def choice(key: str, label: str, names: Mapping[str, str], default: str, *, width: int | Literal["content", "stretch"] = "content",
           draw: Any = None, absent: Mapping[str, str] = MappingProxyType({}), **options: Any) -> str:  # fmt: skip
    """A choice that stays over pages and stands in the URL as ``?key=``; ``names`` maps URL values to what is shown.

    ``draw`` is the widget: st.selectbox (default), st.segmented_control, st.select_slider or alike; ``options`` go to it. ``absent`` says why
    a value that a link may ask for is not to be had here.

    Streamlit's own ``bind`` puts what is shown into the URL, cannot follow a step made inside a component, and gives the
    browser's Back button nothing to go back to.
    """
    asked, kept = (st.session_state["_link"] or {}).get(key), st.session_state.setdefault("_choices", {})
    value = answered(key, names, default)
    # Set on every run: Streamlit forgets on a change of page what code put into a widget.
    kept[key] = st.session_state[key] = value
    widget: Any = draw or st.selectbox
    widget(label, list(names), format_func=names.__getitem__, key=key, width=width, on_change=_chose, args=(key,), **options)
    st.session_state["_chosen"][key] = value
    if asked is not None and asked not in names:
        show_error(
            absent.get(asked, f"The link asks for {label.lower()} {asked[:40]}, which is not here; {names[value]} is shown instead.")
        )
    return value


def answered(key: str, names: Mapping[str, str], default: str) -> str:
    """What ``choice`` will show: asked for by the link, chosen before, or the default."""
    known = (st.session_state["_link"] or {}).get(key), st.session_state.setdefault("_choices", {}).get(key), default
    return next(str(v) for v in known if v in names)


def set_choice(key: str, value: str) -> None:
    """Make a choice in place of its widget; for callbacks, before the page runs."""
    kept = st.session_state.setdefault("_choices", {})
    st.session_state.setdefault("_overtaken", {})[key] = kept.get(key)
    kept[key] = value


def _chose(key: str) -> None:
    """A person chose in the widget; a segmented control that was switched off keeps its choice."""
    acted()
    if st.session_state[key] is not None:
        st.session_state.setdefault("_picked", {})[key] = st.session_state[key]


def _take_picks(acts: int) -> None:
    """What was chosen in widgets becomes the choice, but for a widget that lags behind ``set_choice``.

    A browser that was not yet told of a choice made in place of its widget sends the one before along with the next act, such as
    two quick steps in the token strip; a person's hand on a widget is an act alone.
    """
    kept, overtaken = (st.session_state.setdefault(n, {}) for n in ("_choices", "_overtaken"))
    for key, value in st.session_state.pop("_picked", {}).items():
        if acts == 1 or value != overtaken.get(key):
            kept[key] = value


def typed(key: str, label: str) -> str:
    """What is typed into a search box, which stands in the URL as ``?key=`` and follows the Back button."""
    if st.session_state["_link"] is not None:
        st.session_state[key] = st.query_params.get(key, "")[:TYPED]
    found: str = st.text_input(label, key=key, on_change=acted, max_chars=TYPED)
    if found:
        st.session_state["_chosen"][key] = found
    return found


def section(key: str, label: str, expanded: bool = False) -> Any:
    """A part of the page that opens on a click: an expander whose ``open`` stands in the URL as ``?key=open``, Back included.

    Where the URL says neither ``open`` nor ``closed``, it is as ``expanded`` says. With another ``label`` it is another expander to the
    browser, which takes the keyboard's focus from what is in it.
    """
    if st.session_state["_link"] is not None:
        st.session_state[key] = {"open": True, "closed": False}.get(st.query_params.get(key, ""), expanded)
    part = st.expander(plain(label), key=key, on_change=acted)
    if part.open or expanded:
        st.session_state["_chosen"][key] = "open" if part.open else "closed"
    return part


def folded_choices(key: str, label: str, asked: Mapping[str, tuple[str, Mapping[str, str], str]], width: int = 240) -> None:
    """A section of choices (label, names, default by URL key), which stands open where a link or a person set one off its default."""
    link = st.session_state["_link"] or {}
    off = any(link.get(k, answered(k, names, default)) != default for k, (_, names, default) in asked.items())
    with section(key, label, off), st.container(horizontal=True):
        for name, (title, names, default) in asked.items():
            choice(name, title, names, default, width=width)


def acted() -> None:
    """Called where a run of the script answers a choice on the page, and not a link or the Back button."""
    st.session_state["_acted"] = st.session_state.get("_acted", 0) + 1


def _read_link() -> None:
    """What the URL asks for beyond what was published last; None after a choice on the page, since the URL then lags."""
    published = st.session_state.get("_published", {})
    asked = {k: v for k, v in st.query_params.items() if v != published.get(k)}
    acts = st.session_state.pop("_acted", 0)
    _take_picks(acts)
    st.session_state["_link"] = None if acts else asked


def publish(page: str) -> None:
    """At the end of every page, whose url_path is ``page``: its choices become the URL; probes the theme.

    A choice made on the page is a step of the browser's history. What a page fills in by itself replaces the address in
    place, or every page would cost two presses of Back.
    """
    chosen = st.session_state["_chosen"]
    stale, by_hand = dict(st.query_params) != chosen, st.session_state["_link"] is None
    if stale and by_hand:
        st.query_params.from_dict(chosen)
    theme_probe(theme(), page, urlencode(chosen) if stale and not by_hand else None, acted)
    st.session_state["_published"] = chosen


def header() -> None:
    """The line at the top of every page: the run (``?run=``) and the model behind it."""
    st.session_state["_chosen"] = {}
    _read_link()
    runs = st.session_state["_runs"] = _complete()  # listed once for the run of the script: each folder is walked through
    if not runs:
        return
    row = st.container(horizontal=True, vertical_alignment="bottom")
    with row:
        name = choice("run", "Run", {n: n for n in runs}, next(iter(runs)), width=280)
    try:
        trace = open_named(runs[name].folder, runs[name].created)
    except RunError:
        return  # the page says it, where its content would be
    shapes = {(x.n_experts, x.top_k) for x in trace.layers}
    shape = f"{next(iter(shapes))[0]} experts, top-{next(iter(shapes))[1]}" if len(shapes) == 1 else "of several shapes"
    with row.container(width="stretch"):
        show_note(f"{trace.model.name} · {counted(len(trace.layers), 'routed layer')} · {shape} · {counted(runs[name].n_tokens, 'token')}"
                         f" of {counted(runs[name].n_documents, 'document')}")  # fmt: skip


def current_trace() -> Trace:
    """The Trace of the header's run. Stops the page with a sentence where there is none."""
    runs = st.session_state["_runs"]
    if not runs:
        st.info("No run is recorded yet. Record your own text on the Runs page, or make the demo run with `make demo-run`.")
        st.page_link("views/runs.py", label="Record your own text →")
        st.stop()
    run = runs[st.session_state["_chosen"]["run"]]
    try:
        return open_named(run.folder, run.created)
    except RunError as error:
        show_error(str(error))
        st.markdown("Choose another run above. The Runs page can delete a run that cannot be read; record its text again there.")
        st.page_link("views/runs.py", label="To the Runs page →")
        st.stop()


def show_weights_note() -> None:
    """Says what the gate weights of the header's run have lost, where they have."""
    if note := current_trace().weights_note:
        show_warning(note)


def comparable_runs(trace: Trace) -> dict[str, Trace]:
    """The other runs over the very tokens of this one, at sites of the same shapes, by name."""
    rows = trace.documents.select(["document", "n_tokens"])
    size = sum(rows["n_tokens"].to_pylist()), len(set(rows["document"].to_pylist()))
    found = {}
    for name, run in st.session_state["_runs"].items():
        if name == trace.name or (run.n_tokens, run.n_documents) != size:
            continue
        try:
            check_comparable(trace, other := open_named(run.folder, run.created))
        except (RunError, TraceError):
            continue
        found[name] = other
    return found


def recording_id(trace: Trace) -> str:
    """A run's name and date: what caches and components know it by, since a run may be recorded anew under its name."""
    return f"{trace.name} {trace.options.get('created')}"


def theme() -> str:
    """ "light" or "dark", as the browser shows the page."""
    return probed_theme() or ("dark" if st.context.theme.type == "dark" else "light")


@st.cache_resource(max_entries=32, show_spinner="Looking for the one thing to know …")
def found_first(_trace: Trace, run: str) -> Finding | None:
    """What to say first; ``run`` names the trace with its date."""
    return first_finding(_trace)


@st.cache_resource(max_entries=32, show_spinner=False)
def _site_first(_trace: Trace, run: str) -> int | None:
    return leading_site(_trace)


def layer_picker(trace: Trace) -> int:
    """Choose a site (``?layer=``), at first the headline's as counts alone tell it; returns LayerInfo.index."""
    titles = [x.title for x in trace.layers]
    known = {st.session_state.get("_choices", {}).get("layer"), (st.session_state["_link"] or {}).get("layer")}
    site = None if known & set(titles) else _site_first(trace, recording_id(trace))
    first = titles[-1 if site is None else site]
    return titles.index(choice("layer", "Layer", {t: t for t in titles}, first, width=160))


def expert_search(trace: Trace) -> None:
    """Type ``L3 E5`` and press Enter: that layer and expert are chosen; what names none is said."""

    def jump() -> None:
        acted()
        asked = st.session_state["jump"].strip()
        named = re.fullmatch(r"\D*(\d{1,6})\D+(\d{1,6})\D*", asked)
        sites = [x for x in trace.layers if named and x.layer == int(named[1]) and int(named[2]) < x.n_classes]
        st.session_state["_no_expert"] = asked if asked and len(sites) != 1 else ""
        if named and len(sites) == 1:
            set_choice("layer", sites[0].title)
            set_choice("expert", str(int(named[2])))
        st.session_state["jump"] = ""

    st.text_input("Go to", key="jump", placeholder="L3 E5", on_change=jump, max_chars=TYPED, width=120)
    if lost := st.session_state.pop("_no_expert", ""):
        show_error(
            f"{lost} names no single expert of this run: type a layer and an expert, such as L{trace.layers[-1].layer} E0, or choose them."
        )


def document_picker(trace: Trace, stream: str) -> int:
    """Choose a document (``?doc=``, counted from 1), shown with its name and label; returns the document id."""
    rows = [r for r in trace.documents.to_pylist() if r["stack"] == stream]
    labels = {r["document"]: f" · {r['label']}" if r["label"] and r["label"] not in r["name"] else "" for r in rows}
    names = {f"{r['document'] + 1}": f"{r['document'] + 1} · {r['name']}{labels[r['document']]}" for r in rows}
    return int(choice("doc", "Document", names, next(iter(names)), width=320)) - 1


def chosen_token(length: int) -> int | None:
    """The token of ``?token=``, a position in the document shown; None where there is none, or it was another document's."""
    chosen = st.session_state["_chosen"]
    place = chosen["run"], chosen["doc"]
    if st.session_state["_link"] is not None:
        st.session_state["_token"] = *place, st.query_params.get("token", "")
    run, doc, asked = st.session_state.get("_token", (*place, ""))
    if (run, doc) != place or not (asked.isascii() and asked.isdigit() and int(asked) < length):
        return None
    chosen["token"] = asked
    return int(asked)


def choose_token(position: int) -> None:
    """Keep a token of the document shown, and put it into the URL."""
    chosen = st.session_state["_chosen"]
    chosen["token"] = str(position)
    st.session_state["_token"] = chosen["run"], chosen["doc"], chosen["token"]


def open_expert(trace: Trace, event: object, layer: str | None = None, cells: Sequence[str] = ()) -> None:
    """A click on an expert's cell leads to its page; without ``layer``, the cell's row names it. ``cells``: what each cell stands for, row by row (``?of=``)."""
    points = getattr(getattr(event, "selection", None), "points", [])
    if points:
        expert = str(int(points[0]["customdata"]["0"]))
        of = {"of": cells[int(points[0]["point_index"])]} if cells else {}
        st.switch_page("views/expert.py", query_params={"run": trace.name, "layer": layer or str(points[0]["y"]), "expert": expert, **of})
