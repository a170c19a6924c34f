from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest

from analysis.trace import LayerInfo, SiteRouting, TraceError, check_part, check_site, id_dtype, token_digest

from .synthetic import MANY, PLAIN, TWO_STREAMS, make_part, make_trace, site


@pytest.mark.parametrize("layers", [PLAIN, MANY, TWO_STREAMS], ids=["plain", "many", "streams"])
def test_sound_parts_pass(layers: tuple[LayerInfo, ...]) -> None:
    check_part(make_part(layers, [4, 6]), layers)


def test_an_expert_twice_is_found_in_whichever_slots_it_stands() -> None:
    """Sets tell; several slots without an expert are none twice."""
    layer, found = site(0, 24, 4), []
    for ids in np.random.default_rng(0).integers(-1, 24, (200, 3, 4)).astype(np.int16):
        found.append(any(len(set(row[row >= 0])) < (row >= 0).sum() for row in ids))
        with pytest.raises(TraceError, match="one expert twice") if found[-1] else nullcontext():
            check_site(layer, SiteRouting(ids, np.ones(ids.shape, np.float32), ids), 3, "here")
    assert 50 < sum(found) < 150


@pytest.mark.parametrize(
    ("what", "value", "message"),
    [("experts", 8, "outside 0..7"), ("experts", -2, "outside"), ("weights", np.nan, "NaN"), ("twice", 0, "one expert twice")],
)
def test_contradictions_are_named(what: str, value: float, message: str) -> None:
    part = make_part(PLAIN, [4])
    site = part.routing[1]
    experts, weights = site.experts.copy(), site.weights.copy()
    if what == "twice":
        experts[2] = experts[2, 0]
    elif what == "weights":
        weights[2, 1] = value
    else:
        experts[2, 1] = value
    broken = SiteRouting(experts, weights, experts)
    with pytest.raises(TraceError, match=message):
        check_part(replace(part, routing=(part.routing[0], broken)), PLAIN)


def test_rows_and_sites_must_match() -> None:
    part = make_part(PLAIN, [4])
    with pytest.raises(TraceError, match="shape"):
        check_part(replace(part, routing=(part.routing[0], make_part(PLAIN, [5]).routing[0])), PLAIN)
    with pytest.raises(TraceError, match="1 sites recorded"):
        check_part(replace(part, routing=part.routing[:1]), PLAIN)


def test_arrays_align_with_their_stream() -> None:
    trace = make_trace(TWO_STREAMS)
    for layer in trace.layers:
        assert len(trace.experts(layer.index)) == len(trace.stream_tokens(layer.stream)) == trace.n_tokens(layer.stream)
        assert trace.chosen(layer.index) is not trace.experts(layer.index)
    start, stop = trace.document_range(4, "encoder")
    assert set(trace.stream_tokens("encoder")["document"].to_pylist()[start:stop]) == {4}
    with pytest.raises(TraceError, match="no document 99"):
        trace.document_range(99)
    with pytest.raises(TraceError, match="no site 3"):
        trace.experts(3)


def test_a_run_of_statistics_alone_says_so() -> None:
    trace = replace(make_trace(), source=None, load_tokens=None)
    assert trace.tokens is None and trace.stats.load(0).sum() > 0
    with pytest.raises(TraceError, match="statistics only"):
        trace.experts(0)


def test_id_width_follows_the_experts() -> None:
    assert id_dtype(300) == np.int16 and id_dtype(40_000) == np.int32
    assert token_digest([1, 2]) != token_digest([2, 1])
