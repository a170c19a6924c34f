"""What the Capacity page computes once and keeps while its choices change: a site ranked, curves, their averages, who loses."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import streamlit as st

from analysis.capacity import RankedTrace, pool_curves, rank_trace, shuffled_curves
from analysis.capacity_answer import mean_curves, shuffles_for, typical_shuffle
from analysis.overflow import FACTORS
from analysis.trace import Trace

from .layers import kept, layer_by_layer


@st.cache_resource(max_entries=6, show_spinner="Ranking every assignment once …")
def ranked(_trace: Trace, run: str, site: int, policy: str, scope: str, size: int | None, mixed: int | None) -> RankedTrace:
    """One site ranked; ``run`` names the trace with its date."""
    return rank_trace(_trace, policy, scope, size=size, mixed=mixed, layers=[site])


@st.cache_data(max_entries=64, show_spinner=False)
def seeds_for(_trace: Trace, run: str, scope: str, size: int | None) -> tuple[int, ...]:
    """The shuffles to average over; none where the order of documents plays no part."""
    return shuffles_for(_trace, scope, size) if size else ()


def curves(trace: Trace, run: str, policy: str, scope: str, size: int | None, shuffles: tuple[int | None, ...], preset: str) -> pa.Table:
    """The curve of every site and shuffle. Rerouting and dropless have none by thresholds: "position" drops as much as any other."""
    asked = "position" if policy in ("reroute", "dropless") else policy
    known = kept(run, ("capacity", asked, scope, size, shuffles, preset))
    return layer_by_layer(
        trace, known, lambda layers: shuffled_curves(trace, shuffles, FACTORS, asked, scope, size=size, preset=preset, layers=layers)
    )


@dataclass(frozen=True)
class Averages:
    """What stays while the slider moves: the curves of all sites and shuffles, those asked for, their means, these pooled over the
    sites; the site and the shuffle shown in detail."""

    every: pa.Table
    mine: pa.Table
    means: pa.Table
    pooled: pa.Table
    site: int
    shown: int | None


@st.cache_resource(max_entries=12, show_spinner=False)
def averages(_every: pa.Table, run: str, policy: str, scope: str, size: int | None, shuffles: tuple[int | None, ...], preset: str,
             one: int | None) -> Averages:  # fmt: skip
    """Of one site or of all; the site in detail is ``one``, else the one that drops most at CF 1."""
    mine = _every if one is None else _every.filter(pc.equal(_every["site"], one))
    worst = max(mean_curves(mine.filter(pc.equal(mine["factor"], 1.0))).to_pylist(), key=lambda row: row["dropped_share"])
    means = mean_curves(mine)
    return Averages(_every, mine, means, pool_curves(means), worst["site"], typical_shuffle(_every))


@st.cache_resource(max_entries=12, show_spinner="Asking who pays …")
def groups(
    _trace: Trace, run: str, site: int, policy: str, scope: str, size: int | None, mixed: int | None, preset: str, by: str
) -> pa.Table:
    """One site's losses by label or position at every factor."""
    return ranked(_trace, run, site, policy, scope, size, mixed).curves_by(by, FACTORS, preset)
