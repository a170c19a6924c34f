"""Is a stored run what its capture recorded? Digests, stray files, invariants, and every statistic counted again from the decisions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .files import scratch
from .longtables import where
from .places import Place
from .rounding import rounded
from .stats import CORE, NAMES, Statistics, merge_statistics, occurring, part_statistics
from .store import MANIFEST, STATISTICS, RunError, StoredRouting, listed_files, naming, open_run, read_manifest
from .trace import SCHEMA_VERSION, Part, Trace, TraceError, check_part


def verify_run(run: str | Path) -> tuple[str, ...]:
    """Problems found, in words; empty where the run is sound: digests, no stray files, invariants, statistics."""
    try:
        place = Place.of(run)
        manifest = read_manifest(place)
        listed, there = listed_files(manifest), place.sizes()
        problems = [f"{n}: missing" if n not in there else f"{n}: its sha256 differs from the manifest" for n, s in listed.items()
                    if n not in there or place.digest(n) != s["sha256"]]  # fmt: skip
        problems += [f"{n}: not part of the run" for n in sorted(there.keys() - {MANIFEST, *listed})]
        if problems:
            return tuple(problems)
        trace = open_run(run)
        with scratch() as sums:  # which goes with the next one where this process is killed
            again = merge_statistics(counted_again(place, trace, manifest["parts"]), sums)
            differing = _other_counts(trace.stats, again, trace.weights_kept)
            problems += [f"{n}: counts differ from those of the recorded decisions" for n in differing]
    except (RunError, TraceError, pa.ArrowException, OSError) as error:
        return (str(error),)
    return tuple(problems)


def counted_again(place: Place, trace: Trace, parts: Sequence[Mapping[str, Any]]) -> Iterator[Statistics]:
    """Statistics of each part, checked and counted again from the stored decisions; what only the capture knew is 0: probability sums, and
    gate mass where weights are not stored.

    Raises TraceError for a part that breaks an invariant, or parts that together are not the documents' tokens.
    """
    for stream in {x.stream for x in trace.layers}:
        rows = sum(record["rows"].get(stream, 0) for record in parts)
        if rows != trace.n_tokens(stream):
            raise TraceError(f"{place.name}: {rows} tokens in the parts of stream {stream}, {trace.n_tokens(stream)} in documents.parquet")
        number, first, n = (trace.documents_in(stream)[c].to_numpy() for c in ("document", "first_row", "n_tokens"))
        if not (np.array_equal(number, np.arange(len(n))) and np.array_equal(first, np.cumsum(n) - n)):
            raise TraceError(
                f"{place.name}: documents.parquet does not number the documents or rows of stream {stream} one after the other"
            )
    for record in parts:
        yield count_part(place, trace, record)  # in a function, so that no part is held while the next is read


def count_part(place: Place, trace: Trace, record: Mapping[str, Any]) -> Statistics:
    """The statistics of the part that a manifest's ``record`` lists, checked and counted from its decisions. Raises TraceError, RunError."""
    part = stored_part(place, trace, record)
    check_part(part, trace.layers)
    if trace.weights_kept == "8-bit" and not all(np.array_equal(rounded(w), w) for r in part.routing if (w := r.weights) is not None):
        raise TraceError(
            f"{place.name}: routing/part-{part.index:05d}.parquet has gate weights that are not rounded, as run.json says they are"
        )
    return part_statistics(part, trace.layers)


def stored_part(place: Place, trace: Trace, record: Mapping[str, Any]) -> Part:
    """The part that a manifest's ``record`` lists, read again; its probability sums are 0, its documents are all of the run's."""
    name = f"tokens/part-{record['index']:05d}.parquet"
    with naming(place, name):
        tokens = pq.read_table(place.file(name), page_checksum_verification=True)
    own = {"parts": [record], "schema_version": SCHEMA_VERSION, "options": trace.options}  # so that footers, a MB each, go with the part
    trace = replace(trace, source=StoredRouting(place, trace.layers, own))
    ranges = [(record["first_rows"][x.stream], record["rows"][x.stream]) for x in trace.layers]
    routing = tuple(trace.routing(i, a, a + n) for i, (a, n) in enumerate(ranges))
    scores = tuple(trace.scores(i, a, a + n) for i, (a, n) in enumerate(ranges))
    zeros = tuple(np.zeros(x.n_classes) for x in trace.layers)
    return Part(record["index"], tokens, trace.documents, routing, scores, zeros, record["first_rows"], trace.weights_kept)


def same_counts(a: Statistics, b: Statistics, weights: str = "exact") -> bool:
    """Whether two statistics agree in every key, count and sum, but for what only the capture knew: the probability sums, and the gate mass
    of a run that keeps its weights as "none"."""
    return not list(_other_counts(a, b, weights))


def _other_counts(stored: Statistics, counted: Statistics, weights: str) -> Iterator[str]:
    """The files whose rows are not those counted again: compared statistic by statistic or site by site, whose order is free in long tables."""
    pairs = zip(STATISTICS, (stored.core_rows, stored.token_rows, stored.document_rows),
                (counted.core_rows, counted.token_rows, counted.document_rows), strict=True)  # fmt: skip
    for (name, schema), a, b in pairs:
        by = [("statistic", n) for n in sorted(NAMES)] if schema is CORE else [("site", i) for i in range(len(stored.classes))]
        tables = ((where(a, *key), where(b, *key)) for key in by)
        same = [len(x) if _same_counts(x, y, ("probability", *(("load",) if weights == "none" else ()))) else -1 for x, y in tables]
        if min(same) < 0 or sum(same) != a.num_rows:
            yield name


def _same_counts(a: pa.Table, b: pa.Table, unknown: Sequence[str]) -> bool:
    """Equal keys and counts, and sums within 1e-9, but for those of the statistics ``unknown``."""
    if "statistic" in a.column_names:
        a, b = occurring(a), occurring(b)
    columns = [n for n in a.column_names if n != "sum"]
    if not a.select(columns).combine_chunks().equals(b.select(columns).combine_chunks()):
        return False
    if "sum" not in a.column_names:
        return True
    derivable = pc.invert(pc.is_in(a["statistic"], pa.array(unknown)))
    mine, other = (t["sum"].filter(derivable).to_numpy() for t in (a, b))
    return bool(np.allclose(mine, other, rtol=1e-9, atol=1e-9))
