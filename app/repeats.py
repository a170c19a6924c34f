"""The Specialization page's section on neighbouring tokens: do they share an expert?"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import streamlit as st

from analysis.repetition import MIXTRAL, repetition, repetition_test
from analysis.trace import Trace

from . import charts, text
from .captions import spread
from .figures import show_figure
from .layers import kept, layer_by_layer
from .selection import section

KINDS = {"first": "the same first choice", "shared": "any in common"}


def show_repeats(trace: Trace, run: str) -> dict[str, tuple[str, pa.Table]]:
    """From statistics at once; on request tested against each document's own tokens, whose table it returns for the page's downloads."""
    st.header("Do neighbouring tokens share an expert?")
    rows = [repetition(trace, x.index) for x in trace.layers]
    shares = {"first": "same first choice", "chance_first": "by chance", "chance_first_given_load": "by chance at these loads",
              "shared": "any in common", "chance_shared": "by chance, any"}  # fmt: skip
    st.dataframe(
        pd.DataFrame([{"layer": trace.layers[r.site].title, **{title: getattr(r, n) for n, title in shares.items()}, "n (neighbours)": r.pairs} for r in rows]),
        hide_index=True,
        column_config={c: st.column_config.NumberColumn(format="percent") for c in shares.values()}
        | {"n (neighbours)": st.column_config.NumberColumn(format="localized")},
    )  # fmt: skip
    text.show_note(f"By chance: uniform routing. {published()}",
                   "Mixtral of Experts (arXiv 2401.04088), Table 5: the range over its six English texts. At these loads: two tokens drawn independently at the layer's"
                   " recorded loads of first choices; uneven loads repeat by themselves.")  # fmt: skip
    part = section("repeats", "Is it more than the document's subject? Reads every decision of the run")
    if not part.open:
        return {}
    if trace.source is None or not any(r.pairs for r in rows):
        lacks = "statistics only, no order of tokens" if trace.source is None else "no document of two tokens"
        with part:
            text.show_note(f"Not known: the run holds {lacks}. Record more.")
        return {}
    with part:
        table = layer_by_layer(trace, kept(run, ("repetition",)), lambda sites: ((i, repetition_test(trace, i)) for i in sites))
        value = {c: table[c].to_numpy() for c in table.column_names}
        lines = [(title, value[n], np.stack([value[f"{n}_low"], value[f"{n}_high"]])) for n, title in KINDS.items()]
        dealt = [(f"{title}, by chance: tokens in any order", value[f"{n}_shuffled"], None) for n, title in KINDS.items()]
        show_figure(
            trace, charts.layer_lines([x.title for x in trace.layers], [*lines, *dealt], "neighbouring tokens"), "repetition", key="repetition",
            alt="Share of neighbouring tokens with the same first choice and with any expert in common per layer, with intervals and chance.",
            definition="Share of neighbouring tokens of a document that go to the same experts. Grey: the document's own tokens in an order dealt at random."
            " What lies above it follows the order of the text, not its subject.",
            n=f"{spread(value['pairs'])} pairs of neighbours per layer, {text.counted(int(value['documents'].max()), 'document')}",
            how=f"Bars: 95% interval over documents drawn again. Each document's tokens were dealt {spread(value['draws'])} times; so much or more came of it with p = "
            f"{np.nanmax(value['first_p']):.3f} (first choice) and {np.nanmax(value['shared_p']):.3f} (any) at most over the layers, not corrected for their number.",
        )  # fmt: skip
    return {"repetition": ("one row per layer: neighbours alike, with intervals, and in an order dealt at random", table)}


def published() -> str:
    """Mixtral's figures in a sentence, the range over its texts at its first, middle and last layer."""
    table = np.array(list(MIXTRAL.values()))  # [texts, layers, kinds]
    first, shared = (
        ", ".join(f"{low:.0f} to {high:.0f}%" for low, high in zip(table.min(0)[:, i], table.max(0)[:, i], strict=True)) for i in (0, 1)
    )
    return (f"For comparison, Mixtral 8x7B (8 experts, top-2) at its first, middle and last layer: same first choice {first} (by chance 12.5%), any in"
            f" common {shared} (by chance 46%).")  # fmt: skip
