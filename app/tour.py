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
from analysis.token_classes import prose_example
from analysis.trace import Trace

from . import text
from .selection import acted, current_trace, found_first, recording_id

BATCH, FACTOR, PRESET = 1_024, 1.25, "megatron"  # what step 4 speaks of and sets on its page


@dataclass(frozen=True)
class Step:
    """``page`` is the page's url_path, ``title`` its question, ``told`` makes the sentences, ``choices`` what its link selects."""

    page: str
    title: str
    told: Callable[[Trace], str]
    choices: Callable[[Trace], dict[str, str]] = lambda _: {}


@st.cache_resource(max_entries=32, show_spinner="Looking for a sentence …")
def example(_trace: Trace, run: str) -> tuple[int, int]:
    """Document and position of the word that the first step speaks of; ``run`` names the trace with its date."""
    return prose_example(_trace, _trace.layers[-1].stream)


def _shows_text(trace: Trace) -> bool:
    return trace.load_tokens is not None and bool(trace.n_tokens(trace.layers[-1].stream))


def _router(trace: Trace) -> str:
    layer = trace.layers[-1]
    alike = {(x.n_experts, x.top_k) for x in trace.layers if x.stream == layer.stream}
    where = text.counted(sum(x.stream == layer.stream for x in trace.layers), "layer") if len(alike) == 1 else ""
    said = (f"A token is a word or a piece of one. {f'At each of {where}' if where else f'At {layer.title}'} the router scores"
            f" {layer.n_experts:,} small networks (experts) for it and sends it to {layer.top_k:,} of them.")  # fmt: skip
    if not _shows_text(trace):
        return f"{said} This run holds counts alone, so there is no text to show it on."
    document, position = example(trace, recording_id(trace))
    at = trace.document_range(document, layer.stream)[0] + position
    token, routing = trace.stream_tokens(layer.stream, at, at + 1, ["token"])["token"][0].as_py(), trace.routing(layer.index, at, at + 1)
    shown = text.visible_name(token or "") or "⟨empty⟩"
    weights = np.zeros_like(routing.experts[0], float) if routing.weights is None else routing.weights[0]
    pairs = [(float(weights[s]), int(routing.experts[0, s])) for s in np.argsort(-weights, kind="stable") if routing.experts[0, s] >= 0]
    went = " and ".join(f"expert {e}" for _, e in pairs) or "no expert"
    parts = abs(sum(w for w, _ in pairs) - 1) < 0.01  # not every router's weights add up to one
    count = " and ".join(f"{w:.0%}" if parts else f"{w:.2f}" for w, _ in pairs)
    counted = ("", f", which counts {count} (gate weight)", f", which count {count} (gate weights)")[
        0 if routing.weights is None else min(len(pairs), 2)
    ]
    return f"{said} At {layer.title} “{shown}” went to {went}{counted}. Click another token to follow it; the arrows beside the layer's name step through the layers."


def _its_word(trace: Trace) -> dict[str, str]:
    if not _shows_text(trace):
        return {"layer": trace.layers[-1].title}
    document, position = example(trace, recording_id(trace))
    return {"doc": str(document + 1), "layer": trace.layers[-1].title, "token": str(position)}


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


def _batch(trace: Trace) -> int:
    """The batch that the step speaks of; a shorter run is one batch."""
    return min(BATCH, trace.n_tokens(trace.layers[-1].stream))


def _capacity(trace: Trace) -> str:
    layer, batch = trace.layers[-1], _batch(trace)
    even, slots = (
        expert_capacity(tokens=batch, n_experts=layer.n_experts, top_k=layer.top_k, factor=f, preset=PRESET) for f in (1.0, FACTOR)
    )
    return (
        f"Hardware likes fixed sizes, so an expert may get a fixed number of slots; what comes after they are full is dropped. The six tokens below"
        f" show how. In batches of {batch:,} tokens, as chosen below, an even share at {layer.title} is {even:,} slots and a capacity factor of"
        f" {FACTOR:g} gives {slots:,}. Move the factor and watch drops turn into idle slots."
    )


def _its_batches(trace: Trace) -> dict[str, str]:
    return {"lesson": "open", "at": trace.layers[-1].title, "scope": "tokens", "tokens": str(BATCH), "cf": f"{FACTOR:g}",
            "preset": PRESET, "policy": "preset"}  # fmt: skip


def _own(trace: Trace) -> str:
    said = f"All this was read off {text.counted(sum(trace.n_tokens(s) for s in dict.fromkeys(x.stream for x in trace.layers)), 'token')}"
    return (f"{said} of {text.counted(len(trace.documents), 'document')}. Now yours: paste a few paragraphs of different kinds, an empty line between"
            " them, press Record, and open the run on the Tokens page. A short text is a small sample: every page says what chance alone would give.")  # fmt: skip


STEPS = (
    Step("tokens", "What does a router do with a sentence?", _router, _its_word),
    Step("load", "Who carries the load?", _load),
    Step("expert", "What is an expert for, and is that more than chance?", _expert, _its_expert),
    Step("capacity", "What overflows?", _capacity, _its_batches),
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
    if st.session_state.pop("_tour_next", False):
        st.switch_page(_page(step + 1), query_params=_query(trace, step + 1))
    with st.container(border=True, key="tour"):
        text.show_note(f"Tour, {step} of {len(STEPS)}: {told.title}")
        text.show_text(told.told(trace))
        with st.container(horizontal=True, vertical_alignment="center"):
            if step < len(STEPS):
                st.button("Next →", key="tour-next", type="primary", on_click=_next)
            if step > 1:
                st.page_link(_page(step - 1), label="← Back", query_params=_query(trace, step - 1), width="content")
            st.button("Close the tour", key="close-tour", type="tertiary", on_click=_close)


def _page(step: int) -> str:
    return f"views/{STEPS[step - 1].page}.py"


def _query(trace: Trace, step: int) -> dict[str, str]:
    return {"run": trace.name, "tour": str(step), **STEPS[step - 1].choices(trace)}


def start_link(trace: Trace) -> None:
    """The way in: a link to the first step, drawn as the page's main act (style.css)."""
    with st.container(key="start-tour"):
        st.page_link(_page(1), label="New here? Take the tour: five steps →", query_params=_query(trace, 1), width="content")


def _next() -> None:
    """A callback runs whatever else reruns the page at that moment; a clicked button's value may be lost."""
    st.session_state["_tour_next"] = True


def _close() -> None:
    acted()
    st.session_state.pop("_tour", None)
