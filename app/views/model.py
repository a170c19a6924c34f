"""Model: what is inside it, what does it weigh, and how much of that does one token use?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd
import streamlit as st

from analysis.whatif import EXAMPLES, Mixture, card_bytes, card_expert, weigh
from app import text
from app.model_card import router_rows
from app.selection import choice, current_trace, set_choice

EXPERTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
CHOSEN = (1, 2, 4, 6, 8, 10, 16, 32)


def what_if() -> None:
    """A calculator: experts, k and size of an expert in; total, active and memory out."""
    names = {n: f"{e.title} ({e.status.split(':')[0].split(' ')[0].lower()})" for n, e in EXAMPLES.items()}
    chosen = choice("example", "Start from", names, next(iter(names)), width=420)
    example = EXAMPLES[chosen]
    start = example.mixture
    if st.session_state.get("_example", chosen) != chosen:
        set_choice("experts", str(start.experts))
        set_choice("k", str(start.top_k))
    st.session_state["_example"] = chosen
    with st.container(horizontal=True):
        experts = int(choice("experts", "Experts per layer", options(EXPERTS, start.experts), str(start.experts), width=160))
        k = int(choice("k", "Used by a token (top-k)", options([n for n in CHOSEN if n <= experts], min(start.top_k, experts)),
                       str(min(start.top_k, experts)), width=180))  # fmt: skip
    mixture: Mixture = replace(start, experts=experts, top_k=k)
    weight = weigh(mixture)
    numbers = st.container(horizontal=True, key="numbers-in-memory")
    numbers.metric("Parameters held", in_words(weight.total), border=True, help="All of them must be in memory to serve the model.")
    numbers.metric("Used by one token", in_words(weight.active), border=True, help="Shared parts and top-k experts of every layer.")
    numbers.metric(
        "Share used", f"{weight.active / weight.total:.1%}", border=True, help="Computation follows this share, memory does not."
    )
    st.dataframe(
        pd.DataFrame([{"weights in": n, "memory (GB)": b / 1e9} for n, b in weight.bytes.items()]),
        hide_index=True, width=360, column_config={"memory (GB)": st.column_config.NumberColumn(format="%,.1f")},
    )  # fmt: skip
    changed = " Experts or top-k are changed here, so the figures are no longer those of the example." if mixture != start else ""
    text.show_note(f"{example.title}: {example.status}.{changed}", example.note)


def in_words(parameters: int) -> str:
    """A count of parameters with its unit: 46.7 B, 1.76 T."""
    return f"{parameters / 1e12:,.2f} T" if parameters >= 1e12 else f"{parameters / 1e9:,.1f} B"


def options(values: Any, own: int) -> dict[str, str]:
    return {str(n): f"{n:,}" for n in sorted({*values, own})}


st.title("What is inside this model, and how much of it does one token use?")
trace = current_trace()
card = trace.model
size, expert = card_bytes(card), card_expert(card)
numbers = st.container(horizontal=True, key="numbers")
numbers.metric(
    "Parameters", f"{card.parameters / 1e6:,.1f} M", border=True, help="All weights of the model, input and output embedding included."
)
numbers.metric("Active per token", f"{card.active_parameters / 1e6:,.1f} M", border=True,
               help="Parameters less the routed experts that a token does not visit; embeddings included, as most publishers count.")  # fmt: skip
numbers.metric("Share active", f"{card.active_parameters / card.parameters:.1%}", border=True, help="Active over all parameters.")
numbers.metric(
    "Routed layers", f"{len(trace.layers):,} of {card.n_layers:,}", border=True, help="Blocks with a router, of the model's layers."
)
text.show_text(
    f"{card.name}: {card.architecture}, of family {card.family}; weights in {card.dtype}, {card.vocab_size:,} tokens in its vocabulary."
)
if size is not None:
    one = f"; one expert has {expert:,} parameters, {round(size * expert / card.parameters):,} bytes" if expert is not None else ""
    text.show_text(f"The weights take {size:,} bytes in {card.dtype}{one}.")
st.header("Its routers")
st.dataframe(pd.DataFrame(router_rows(trace.layers)), hide_index=True)
text.show_note(
    "Scores make router logits comparable; the rule under chosen by picks the top-k from them.",
    "Weights on: where the gate weight multiplies. Experts without weights are classes that compute nothing (zero-compute, skip).",
)
for note in dict.fromkeys(x.note for x in trace.layers if x.note):
    text.show_note(note)
for warning in card.warnings:
    text.show_note(warning)
st.header("What if? Experts and top-k of a model")
what_if()
st.caption("`python -m analysis params CONFIG` counts any model from its config alone, before a weight is downloaded.")
