"""The newcomer's tour: five steps over the real pages, told in this run's own figures; ``?tour=1`` to ``?tour=5``.

A step is one entry of STEPS. Who does not ask for the tour sees nothing of it but its link on the Overview.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import streamlit as st

from analysis.metrics import METRICS
from analysis.slots import expert_capacity
from analysis.trace import Trace

from . import text
from .selection import acted, current_trace, found_first, recording_id

BATCH, FACTOR = 1_024, 1.25  # the batch step 4 speaks of


@dataclass(frozen=True)
class Step:
    """``page`` is the page's url_path, ``title`` its question, ``told`` makes the sentences, ``choices`` what its link selects."""

    page: str
    title: str
    told: Callable[[Trace], str]
    choices: Callable[[Trace], dict[str, str]] = lambda _: {}


def _router(trace: Trace) -> str:
    layer = trace.layers[-1]
    said = f"At {layer.title} a small network, the router, scores {layer.n_experts:,} experts for every token and sends it to {layer.top_k:,} of them."
    if trace.load_tokens is None or not trace.n_tokens(layer.stream):
        return f"{said} This run holds counts alone, so there is no text to show it on."
    row, routing = trace.stream_tokens(layer.stream, 0, 1, ["token", "token_bytes"]), trace.routing(layer.index, 0, 1)
    [shown] = text.token_texts(row["token"].to_pylist(), row["token_bytes"].to_pylist())
    pairs = sorted(zip(routing.weights[0].tolist(), routing.experts[0].tolist(), strict=True), reverse=True)
    went = " and ".join(f"expert {e} (gate weight {w:.2f})" for w, e in pairs if e >= 0) or "no expert"
    return f"{said} The first token below, “{shown}”, went to {went}. Click a token to follow it; the arrows beside the layer's name step through the layers."


def _load(trace: Trace) -> str:
    worst, chance = METRICS["max_over_mean"](trace).to_pydict(), METRICS["chance_max_over_mean"](trace).to_pydict()
    at = int(np.nanargmax(worst["value"]))
    return (
        f"Were the work shared evenly, every expert would get 1.00 times its share. The busiest expert of {trace.layers[at].title} gets"
        f" {worst['value'][at]:.2f} times; n = {text.counted(worst['n'][at], 'token')}, and uniform random routing would reach about"
        f" {chance['value'][at]:.2f}. Orange cells carry more than their share, blue ones less."
    )


def _expert(trace: Trace) -> str:
    found = found_first(trace, recording_id(trace))
    return f"{found.claim} {found.evidence} Faded bars below are no more than chance." if found else "This run has no token to tell by."


def _its_expert(trace: Trace) -> dict[str, str]:
    found = found_first(trace, recording_id(trace))
    return {"layer": trace.layers[found.site].title, "expert": str(found.expert)} if found else {}


def _capacity(trace: Trace) -> str:
    layer = trace.layers[-1]
    even, slots = (expert_capacity(tokens=BATCH, n_experts=layer.n_experts, top_k=layer.top_k, factor=f) for f in (1.0, FACTOR))
    return (
        f"Hardware likes fixed sizes, so an expert may get a fixed number of slots. In a batch of {BATCH:,} tokens an even share at {layer.title}"
        f" is {even:,} slots; a capacity factor of {FACTOR:g} gives {slots:,}. What comes after they are full is dropped. Move the capacity"
        " factor and watch drops turn into idle slots; the headline has both for this run, beside what chance would drop."
    )


def _own(trace: Trace) -> str:
    said = f"All this was read off {text.counted(sum(trace.n_tokens(s) for s in dict.fromkeys(x.stream for x in trace.layers)), 'token')}"
    return (f"{said} of {text.counted(len(trace.documents), 'document')}. Now yours: paste a few sentences of different kinds, press Record, and open"
            " the run on the Tokens page. A short text is a small sample: every page says what chance alone would give.")  # fmt: skip


STEPS = (
    Step("tokens", "What does a router do with a sentence?", _router, lambda t: {"doc": "1", "layer": t.layers[-1].title}),
    Step("load", "Who carries the load?", _load),
    Step("expert", "What is an expert for, and is that more than chance?", _expert, _its_expert),
    Step("capacity", "What overflows?", _capacity),
    Step("runs", "What does it do with your own text?", _own),
)


def show(page: str) -> None:
    """The step that the URL asks for, above the page it belongs to; on any other page the tour is over."""
    link = st.session_state["_link"]
    asked = st.session_state.get("_tour") if link is None or "tour" not in link else link["tour"]
    step = int(asked) if asked in {str(i) for i in range(1, len(STEPS) + 1)} else 0
    if not step or STEPS[step - 1].page != page or "run" not in st.session_state["_chosen"]:
        st.session_state.pop("_tour", None)
        return
    st.session_state["_tour"] = st.session_state["_chosen"]["tour"] = str(step)
    trace, told = current_trace(), STEPS[step - 1]
    with st.container(border=True, key="tour"):
        text.show_text(f"Tour, {step} of {len(STEPS)}: {told.title}")
        text.show_note(told.told(trace))
        with st.container(horizontal=True):
            if step > 1:
                _link(trace, step - 1, back=True)
            if step < len(STEPS):
                _link(trace, step + 1)
            st.button("Close the tour", key="close-tour", on_click=_close)


def _query(trace: Trace, step: int) -> dict[str, str]:
    return {"run": trace.name, "tour": str(step), **STEPS[step - 1].choices(trace)}


def _link(trace: Trace, step: int, back: bool = False) -> None:
    target, query = f"views/{STEPS[step - 1].page}.py", _query(trace, step)
    if back:
        st.page_link(target, label="← Back", query_params=query, width="content")
    else:
        st.page_link(target, label="Next →", query_params=query, width="content")


def start_link(trace: Trace) -> None:
    """The way in: a link to the first step, drawn as the page's main act (style.css)."""
    with st.container(key="start-tour"):
        st.page_link(
            f"views/{STEPS[0].page}.py", label="New here? Take the tour: five steps →", query_params=_query(trace, 1), width="content"
        )


def _close() -> None:
    acted()
    st.session_state.pop("_tour", None)
