"""Capacity curves from statistics by document, against those from the decisions; and where statistics cannot tell."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from analysis.capacity import rank_trace, shuffled_curves
from analysis.capacity_loads import load_curves, loads_tell, site_loads
from analysis.overflow import FACTORS
from analysis.slots import PRESETS, CapacityError, batch_loads, capacity_rule, make_batches
from analysis.store import open_run
from analysis.trace import SiteRouting, Trace, TraceError
from analysis.writing import RunWriter
from tests.synthetic import MANY, PLAIN, SPECIAL, TWO_STREAMS, card, make_part, make_parts, make_trace
from tests.test_policies import ORDERED

DEMO = Path(__file__).parent.parent / "data" / "demo-run"
STREAMS = tuple(replace(x, native_capacity=None) for x in TWO_STREAMS)
TRACES = {"plain": PLAIN, "300 experts": MANY, "classes without slots": SPECIAL, "two streams": STREAMS}
SCOPES = [("documents", 2), ("documents", 4), ("documents", 100), ("document", None), ("run", None)]


def holed(layers: tuple) -> Trace:
    """Nine documents, one of a single token, with slots that hold no expert."""
    parts = make_parts(layers)
    rng = np.random.default_rng(5)
    for i, part in enumerate(parts):
        routing = []
        for r in part.routing:
            ids = np.where(rng.random(r.experts.shape) < 0.1, -1, r.experts).astype(r.experts.dtype)
            routing.append(SiteRouting(ids, r.weights, ids))
        parts[i] = replace(part, routing=tuple(routing))
    return make_trace(layers, parts)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("policy", ORDERED)
@pytest.mark.parametrize("layers", TRACES.values(), ids=TRACES)
def test_every_policy_preset_and_scope_has_the_same_rows(layers: tuple, policy: str, preset: str) -> None:
    trace, factors = holed(layers), [0.0, 0.5, 1.0, 1.25, 3.0]
    for scope, size in SCOPES:
        shuffles = (None, 3, 8) if size else (None,)
        ranked = dict(shuffled_curves(trace, shuffles, factors, policy, scope, size=size, preset=preset))
        found = dict(load_curves(trace, shuffles, factors, scope, size=size, preset=preset))
        assert list(found) == list(ranked) == [x.index for x in trace.layers]
        for i, table in found.items():
            assert {"dropped", "kept", "slots", "idle", "chance_dropped", "chance_dropped_share", "slot_use"} < set(table.column_names)
            assert repr(table.to_pylist()) == repr(ranked[i].select(table.column_names).to_pylist()), (scope, size, i)


@pytest.mark.parametrize("mixed", [None, 0, 7])
def test_the_demo_run_to_the_bit(mixed: int | None) -> None:
    trace = open_run(DEMO)
    for scope, size in (("documents", 16), ("document", None), ("run", None)):
        ranked = pa.concat_tables([t for _, t in shuffled_curves(trace, (mixed,), FACTORS, "probability", scope, size=size)])
        found = pa.concat_tables([t for _, t in load_curves(trace, (mixed,), FACTORS, scope, size=size, layers=range(len(trace.layers)))])
        assert found.equals(ranked.select(found.column_names)) and found["dropped"].to_numpy().any()


def test_the_loads_of_a_stored_runs_batches_are_those_of_its_decisions(tmp_path: Path) -> None:
    part = make_part(PLAIN, [5, 0, 3, 9, 1, 0, 4])  # documents without a token, also first in a batch
    with RunWriter.open(tmp_path / "run", card(PLAIN), {}) as writer:
        writer.write(part)
        writer.commit()
    for trace in (make_trace(PLAIN, [part]), open_run(tmp_path / "run")):
        for scope, size in (("documents", 1), ("documents", 2), ("documents", 3), ("document", None), ("run", None)):
            for mixed in (None, *range(6)):
                batches = make_batches(trace.documents["n_tokens"].to_numpy(), scope, size, mixed)
                found = site_loads(trace, 1, scope, size, mixed)
                assert np.array_equal(found.loads, batch_loads(trace.experts(1), trace.layers[1].n_experts, batches))
                assert np.array_equal(found.sizes, batches.sizes)


def test_slots_at_a_factor_are_those_of_the_ranked_layer() -> None:
    trace, rule = open_run(DEMO), capacity_rule("gshard")
    over = rank_trace(trace, "choice", "documents", size=16, mixed=2, layers=[3]).at(0.75, rule).sites[3]
    found = site_loads(trace, 3, "documents", 16, 2).at(0.75, rule)
    for name in ("capacity", "loads", "kept_load", "dropped_load", "idle", "slots"):
        assert np.array_equal(getattr(found, name), getattr(over, name)), name
    assert found.capacity_range == over.capacity_range and found.dropped_load.any()


def test_what_loads_cannot_tell_is_refused() -> None:
    plain, native = make_trace(PLAIN), make_trace(TWO_STREAMS)
    assert loads_tell(plain, "documents") and not loads_tell(plain, "tokens")
    assert not any(loads_tell(native, s) for s in ("document", "documents", "run"))  # they count what was executed
    for trace, scope in ((plain, "tokens"), (native, "run")):
        with pytest.raises(CapacityError, match="rank its decisions"):
            site_loads(trace, 0, scope, 16)
        with pytest.raises(CapacityError, match="rank its decisions"):
            next(load_curves(trace, (None,), FACTORS, scope, size=16))


def test_documents_that_do_not_add_up_to_the_layer_are_an_error() -> None:
    trace = make_trace(PLAIN)
    less = replace(trace.stats, document_rows=trace.stats.by_document.slice(1))
    with pytest.raises(TraceError, match="do not add up to the layer's: verify the run"):
        site_loads(replace(trace, stats=less), 0, "run")
