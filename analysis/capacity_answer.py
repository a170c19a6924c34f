"""What a capacity factor drops, over several shuffles of the documents, in words.

Which documents share a batch is luck: with few batches, one shuffle says little. The rows of ``capacity.shuffled_curves`` are averaged
(every count, so that all shares of a row belong together), and the range of the dropped share over the shuffles stands beside the mean.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .capacity import ADDITIVE, pool_curves, with_shares
from .capacity_keys import document_lengths
from .slots import batch_sizes, least_factor
from .trace import Trace

SHUFFLES, FEWER = 20, 5
CHEAP = 5_000_000  # assignments of all sites up to which SHUFFLES passes take about two seconds
FEW = 20  # below so many batches, one shuffle says little
KEYS = ("site", "layer", "stack", "factor")


def shuffles_for(trace: Trace, scope: str, size: int | None) -> tuple[int, ...]:
    """The seeds to average over: SHUFFLES; in a run of more than CHEAP assignments FEWER where batches are few, else one."""
    if not is_long(trace):
        return tuple(range(SHUFFLES))
    least = min(len(batch_sizes(document_lengths(trace, stream), scope, size)) for stream in {x.stream for x in trace.layers})
    return tuple(range(FEWER if least < FEW else 1))


def is_long(trace: Trace) -> bool:
    """Whether the run has more than CHEAP assignments: then not all is asked of all layers."""
    return sum(trace.n_tokens(x.stream) * x.top_k for x in trace.layers) > CHEAP


def mean_curves(curves: pa.Table) -> pa.Table:
    """``capacity.shuffled_curves`` averaged over the shuffles: one row per site and factor, counts float64, shares of the means."""
    columns = [c for c in ADDITIVE if c in curves.column_names]
    out = curves.group_by(list(KEYS), use_threads=False).aggregate([(c, "mean") for c in columns])
    out = out.sort_by([("site", "ascending"), ("factor", "ascending")])  # Arrow's groups come in the order of its hash table
    return with_shares(out.rename_columns([c.removesuffix("_mean") for c in out.column_names]))


def shuffle_shares(curves: pa.Table, factor: float) -> dict[int | None, float]:
    """Shuffle -> dropped share of all sites in ``curves`` together at ``factor``."""
    rows = pool_curves(curves.filter(pc.equal(curves["factor"], factor)), "shuffle")
    return dict(zip(rows["shuffle"].to_pylist(), rows["dropped_share"].to_pylist(), strict=True))


def typical_shuffle(curves: pa.Table, factor: float = 1.0) -> int | None:
    """The shuffle whose dropped share at ``factor`` is nearest to the mean of all."""
    shares = shuffle_shares(curves, factor)
    mean = np.mean(list(shares.values()))
    return min(shares, key=lambda s: abs(shares[s] - mean))


def drops_in_words(now: Mapping[str, float], factor: float, where: str = "", chance: float | None = None) -> str:
    """What ``factor`` drops: ``now`` has the shares, ``where`` follows "assignments", ``chance`` is what uniform routing drops."""
    said = f"CF {factor:g} drops {percent(now['dropped_share'])} of assignments{where}"
    return said if chance is None else f"{said}; by chance {percent(chance)}"


def price_in_words(now: Mapping[str, float]) -> str:
    """What is lost with the assignments, as a sentence; empty where it was not recorded."""
    lost = [] if np.isnan(now["gate_mass_lost_share"]) else [f"{percent(now['gate_mass_lost_share'])} of the gate weight"]
    if not np.isnan(now["top1_dropped_share"]) and now["tokens"] < now["assignments"]:  # else the first choice is the only one
        lost.append(f"{percent(now['top1_dropped_share'])} of first choices")
    return f"Lost with them: {' and '.join(lost)}." if lost else ""


def range_in_words(shares: Mapping[int | None, float]) -> str:
    """The dropped share over the shuffles; empty where it is the same in all, as for one batch. ``shares`` is ``shuffle_shares``."""
    low, high = min(shares.values()), max(shares.values())
    return f"{percent(low)} to {percent(high)} over {len(shares)} shuffles" if low < high else ""


def tokens_in_words(now: Mapping[str, float], layers: int) -> str:
    """How many tokens lose all their experts: of one layer, or of ``layers`` pooled, where a token counts once at each."""
    said = f"Tokens that lose all experts{'' if layers == 1 else ' of a layer'}: {percent(now['fully_dropped_share'])}"
    return said if layers == 1 else f"{said} (mean of {layers:,} layers)"


def needs_in_words(curves: pa.Table, titles: Mapping[int, str], target: float = 0.01) -> str:
    """The factor from which on at most ``target`` is dropped: of the sites of ``curves`` together, and at the site that needs most.

    curves    one row per site and factor, as ``mean_curves`` and ``capacity.capacity_curves`` give.
    """
    pooled = pool_curves(curves)
    factors, goal = pooled["factor"].to_numpy(), f"To drop {percent(target)} or less"
    least = least_factor(factors, pooled["dropped_share"].to_numpy(), target)
    if np.isnan(least):
        return f"{goal} no factor up to {factors.max():g} is enough"
    said = f"{goal}: CF {least:g}" + (" pooled over the layers" if len(titles) > 1 else "") + _idle(pooled, least)
    if len(titles) == 1:
        return said
    sites = {i: curves.filter(pc.equal(curves["site"], i)) for i in titles}
    needs = {i: least_factor(factors, rows["dropped_share"].to_numpy(), target) for i, rows in sites.items()}
    never = [titles[i] for i, need in needs.items() if np.isnan(need)]
    if never:
        return f"{said}; no factor up to {factors.max():g} is enough at every layer ({never[0]})"
    worst = max(needs, key=lambda i: needs[i])
    return f"{said}; at every layer: CF {needs[worst]:g} ({titles[worst]} needs most){_idle(pooled, needs[worst])}"


def batches_in_words(sizes: np.ndarray, documents: int, scope: str, size: int | None) -> str:
    """How many batches there are (``sizes`` [batches] tokens), and of what: "5 batches of 16 documents, the last of 11"."""
    n = len(sizes)
    if n < 2:
        what = {"documents": f"all {documents:,} documents", "tokens": f"all {sizes.sum():,} tokens"}.get(scope, "the whole run")
        return f"{n} batch, {what if documents != 1 else 'one document'}"
    if size is None:
        return f"{n:,} batches of one document"
    last = documents - (n - 1) * size if scope == "documents" else int(sizes[-1])
    return f"{n:,} batches of {size:,} {scope if size > 1 else scope[:-1]}" + (f", the last of {last:,}" if last != size else "")


def percent(share: float) -> str:
    """Two digits, but never "0%" or "100%" for what is not: 0.004% is "below 0.1%"."""
    if np.isnan(share):
        return "none"
    if 0 < share < 0.001 or 0.999 < share < 1:
        return "below 0.1%" if share < 0.5 else "over 99.9%"
    return f"{100 * share:.1f}%".replace(".0%", "%")


def _idle(pooled: pa.Table, factor: float) -> str:
    use = pooled["slot_use"].to_numpy()[pooled["factor"].to_numpy() == factor][0]
    return f", {percent(1 - use)} of slots idle"
