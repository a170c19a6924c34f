"""Work on the layers of a run that takes seconds: told on screen as it goes on, and kept layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from time import monotonic
from typing import Any, TypeVar

import pyarrow as pa
import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from analysis.trace import Trace

EVERY = 0.1  # seconds: a block takes a tenth of that
LONG = 1 << 20  # assignments of a layer, from which on to read them takes longer than a look
_Found = TypeVar("_Found")


@st.cache_resource(max_entries=16, show_spinner=False)
def kept(run: str, what: tuple[object, ...]) -> dict[int, Any]:
    """What is known so far of each site; ``run`` is the run with its date, ``what`` names the question and its settings."""
    return {}


def layer_by_layer(trace: Trace, known: dict[int, pa.Table], make: Callable[[Sequence[int]], Iterable[tuple[int, pa.Table]]]) -> pa.Table:
    """The tables of all sites, one below the other; as ``each_layer``."""
    return pa.concat_tables(each_layer(trace, known, make))


def each_layer(trace: Trace, known: dict[int, _Found], make: Callable[[Sequence[int]], Iterable[tuple[int, _Found]]]) -> list[_Found]:
    """What was found of every site. ``make`` yields (site, found) of the sites that are not ``known`` yet.

    A person who leaves in the middle loses no layer: the next view goes on from there.
    """
    missing = [x.index for x in trace.layers if x.index not in known]
    if missing:
        bar = st.progress(0.0, text=f"Layer by layer: 0 of {len(missing):,} …")
        try:
            for done, (site, found) in enumerate(make(missing), 1):
                known[site] = found
                bar.progress(done / len(missing), text=f"Layer by layer: {done:,} of {len(missing):,} …")
        finally:
            bar.empty()
    return [known[x.index] for x in trace.layers]


def one_layer(
    site: int, known: dict[int, _Found], make: Callable[[Callable[..., None]], _Found], place: DeltaGenerator | None = None
) -> _Found:
    """What was found of one site, which ``make`` makes if it is not ``known`` yet, telling (tokens read, tokens in all) as it goes on, and
    ``what`` of them is read if it is not the decisions.

    A person who leaves in the middle stops it at the next telling. It is told EVERY so often, and not of what is done before,
    in the ``place`` of what comes, such as its headline, so that nothing below moves.
    """
    if site not in known:
        place, last = st.empty() if place is None else place, monotonic()

        def tell(done: int, total: int, what: str = "the layer's decisions") -> None:
            nonlocal last
            if done < total and monotonic() >= last + EVERY:
                place.progress(done / total, text=f"Reading {what}: {done:,} of {total:,} tokens …")
                last = monotonic()

        try:
            known[site] = make(tell)
        finally:
            place.empty()
    return known[site]
