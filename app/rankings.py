"""What the Capacity page computes once and keeps while its choices change: curves, their averages, a site ranked, who loses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import streamlit as st

from analysis.capacity import RankedTrace, check_policy, compare_policies, pool_curves, rank_trace, shuffled_curves
from analysis.capacity_answer import is_long, mean_curves, shuffles_for, typical_shuffle
from analysis.capacity_keys import document_lengths
from analysis.capacity_loads import load_curves, loads_tell, site_loads
from analysis.overflow import FACTORS, SiteLoads
from analysis.slots import batch_sizes
from analysis.trace import Trace

from .layers import kept, layer_by_layer, one_layer


@st.cache_resource(max_entries=1, show_spinner=False)
def _room(run: str, site: int, policy: str, scope: str, size: int | None, mixed: int | None) -> dict[int, RankedTrace]:
    """Where the site ranked last is kept: 11 bytes and more per assignment; a short one is ranked anew in milliseconds."""
    return {}


def ranked(trace: Trace, run: str, site: int, policy: str, scope: str, size: int | None, mixed: int | None) -> RankedTrace:
    """One site ranked; ``run`` names the trace with its date. Says how far it is, and stops where a person moves on."""
    known = _room(run, site, policy, scope, size, mixed)
    return one_layer(site, known, lambda tell: rank_trace(trace, policy, scope, size=size, mixed=mixed, layers=[site], tell=tell))


@st.cache_data(max_entries=64, show_spinner=False)
def seeds_for(_trace: Trace, run: str, scope: str, size: int | None) -> tuple[int, ...]:
    """The shuffles to average over; none where the order of documents plays no part."""
    return shuffles_for(_trace, scope, size) if size else ()


def curves(trace: Trace, run: str, policy: str, scope: str, size: int | None, shuffles: tuple[int | None, ...], preset: str,
           by_loads: bool) -> pa.Table:  # fmt: skip
    """The curve of every site and shuffle; ``by_loads``, from statistics by document, without what depends on who is served first.

    Rerouting and dropless have none by thresholds: "position" drops as much as any other.
    """
    asked = "position" if policy in ("reroute", "dropless") else policy
    known = kept(run, ("capacity", "loads" if by_loads else asked, scope, size, shuffles, preset))
    if by_loads:
        return layer_by_layer(
            trace, known, lambda layers: load_curves(trace, shuffles, FACTORS, scope, size=size, preset=preset, layers=layers)
        )
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


@st.cache_data(max_entries=64, show_spinner=False)
def sizes_of(_trace: Trace, run: str, stream: str, scope: str, size: int | None, mixed: int | None) -> np.ndarray:
    """int64 [batches]: tokens of each batch of a stream."""
    return batch_sizes(document_lengths(_trace, stream), scope, size, mixed)


@st.cache_data(max_entries=64, show_spinner=False)
def told_by_loads(_trace: Trace, run: str, scope: str) -> bool:
    """Whether the curves come from statistics by document: of long runs, which would be ranked layer by layer for seconds, where they can."""
    return is_long(_trace) and loads_tell(_trace, scope)


@st.cache_data(max_entries=64, show_spinner=False)
def checked(_trace: Trace, run: str, site: int, policy: str) -> None:
    """Raises MissingScores where the run did not record what the policy orders by."""
    check_policy(_trace, site, policy)


@st.cache_resource(max_entries=6, show_spinner=False)
def loads(_trace: Trace, run: str, site: int, scope: str, size: int | None, mixed: int | None) -> SiteLoads:
    """The loads of one site's batches, from statistics by document."""
    return site_loads(_trace, site, scope, size, mixed)


@st.cache_resource(max_entries=12, show_spinner="Comparing policies …")
def compared(_trace: Trace, run: str, site: int, factor: float, scope: str, size: int | None, mixed: int | None, preset: str) -> pa.Table:
    """What every policy would drop at one site and factor."""
    return compare_policies(_trace, factor, scope, size=size, mixed=mixed, preset=preset, layers=[site])


def by_expert(
    trace: Trace, site: int, policy: str, scope: str, size: int | None, mixed: int | None, factor: float, preset: str
) -> pa.Table:
    """One site at one factor, expert by expert with gate weights: ranked on the click that asks for it, and not kept."""
    return rank_trace(trace, policy, scope, size=size, mixed=mixed, layers=[site]).at(factor, preset).by_expert()


@st.cache_resource(max_entries=12, show_spinner=False)
def _losses(run: str, site: int, policy: str, scope: str, size: int | None, mixed: int | None, preset: str) -> dict[str, pa.Table]:
    return {}


def losses(trace: Trace, run: str, site: int, policy: str, scope: str, size: int | None, mixed: int | None, preset: str,
           by: str) -> pa.Table:  # fmt: skip
    """One site's losses by "label" or "first_position" at every factor."""
    known = _losses(run, site, policy, scope, size, mixed, preset)
    if by not in known:
        queues = ranked(trace, run, site, policy, scope, size, mixed)
        with st.spinner("Asking who pays …"):
            known[by] = queues.curves_by(by, FACTORS, preset)
    return known[by]
