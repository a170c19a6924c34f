"""What capacity drops and leaves idle, from the run's statistics by document: no decision is read.

How much overflows depends on the loads [batch, expert] alone, whoever is served first; and the loads of batches of whole documents are sums
of the documents' own. So the rows are those of ``capacity.shuffled_curves``, to the bit, without what depends on who is dropped: gate
weight, first choices, and tokens that lose all or some experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .capacity import curve_table, rule_of
from .capacity_keys import document_lengths
from .overflow import FACTORS, SiteLoads, chance_curve
from .slots import CapacityError, CapacityRule, batch_sizes, document_batches
from .trace import Trace, TraceError


def loads_tell(trace: Trace, scope: str) -> bool:
    """Whether batches of this scope are made of whole documents, and the run's statistics by document count what the router chose.

    They count what was executed: the same, unless the model has a native capacity. Then a run holds what was chosen apart.
    """
    return scope != "tokens" and all(x.native_capacity is None for x in trace.layers)


def load_curves(trace: Trace, shuffles: Sequence[int | None], factors: Sequence[float] | np.ndarray = FACTORS, scope: str = "documents", *,
                size: int | None = None, preset: str | CapacityRule = "megatron", layers: Sequence[int] | None = None) -> Iterator[tuple[int, pa.Table]]:  # fmt: skip
    """(site, its rows of ``capacity.shuffled_curves`` under any policy but "reroute" and "dropless", but for what loads do not tell).

    Raises CapacityError where ``loads_tell`` is False, and TraceError where documents and layers are counted differently.
    """
    _check(trace, scope)
    chances: dict[tuple[str, int, int, int, int | None], np.ndarray] = {}
    for i in range(len(trace.layers)) if layers is None else layers:
        layer, tables = trace.layers[i], []
        for mixed in shuffles:
            found, same = _site_loads(trace, i, scope, size, mixed), (layer.stream, layer.n_experts, layer.top_k, layer.n_special, mixed)
            if same not in chances:
                chances[same] = chance_curve(found.sizes, *same[1:3], factors, rule_of(preset), layer.n_special)
            table = curve_table(layer, found.curve(factors, rule_of(preset)), chances[same])
            tables.append(table.append_column("shuffle", pa.array([mixed] * len(table), pa.int32())))
        yield i, pa.concat_tables(tables).combine_chunks()


def _check(trace: Trace, scope: str) -> None:
    if not loads_tell(trace, scope):
        raise CapacityError(f"the loads of batches of {scope} are not told by this run's statistics by document: rank its decisions")


def site_loads(trace: Trace, site: int, scope: str = "documents", size: int | None = None, mixed: int | None = None) -> SiteLoads:
    """The loads of a site's batches (``slots.make_batches``). Raises as ``load_curves``."""
    _check(trace, scope)
    return _site_loads(trace, site, scope, size, mixed)


def _site_loads(trace: Trace, site: int, scope: str, size: int | None, mixed: int | None) -> SiteLoads:
    layer, lengths = trace.layers[site], document_lengths(trace, trace.layers[site].stream)
    served, first = document_batches(lengths, scope, size, mixed)
    unit = np.empty(len(served), np.int64)  # which batch each document is in; one before the first batch has no tokens
    unit[served] = np.maximum(np.searchsorted(first, np.arange(len(served)), "right") - 1, 0)
    numbers = trace.documents.filter(pc.equal(trace.documents["stack"], layer.stream))["document"].to_numpy()
    ascending = np.argsort(numbers)
    loads = trace.stats.document_load(site, numbers[ascending], unit[ascending])
    if not np.array_equal(loads.sum(0), trace.stats.load(site)):
        raise TraceError(f"run {trace.name!r}: the loads of the documents at {layer.title} do not add up to the layer's: verify the run")
    return SiteLoads(np.ascontiguousarray(loads[:, : layer.n_experts]), batch_sizes(lengths, scope, size, mixed), layer.top_k)
