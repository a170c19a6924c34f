from dataclasses import replace

import numpy as np

from analysis.findings import busiest, first_finding, strongest_label
from analysis.trace import SiteRouting

from .synthetic import PLAIN, make_part, make_trace


def test_random_routing_has_no_specialist() -> None:
    for seed in range(5):
        trace = make_trace(PLAIN, [make_part(PLAIN, [200] * 10, seed)])
        assert strongest_label(trace) is None
        assert first_finding(trace) == busiest(trace)


def test_a_planted_specialist_is_found_with_its_share() -> None:
    part = make_part(PLAIN, [200] * 10)
    labels = np.array(part.tokens["label"].to_pylist())
    experts = part.routing[1].experts.copy()
    planted = (labels == "b") & (np.arange(2000) % 10 < 7)
    experts[planted] = [5, 6]
    experts[~planted] = np.array([[0, 1], [2, 3], [4, 7]], experts.dtype)[np.arange((~planted).sum()) % 3]
    trace = make_trace(PLAIN, [replace(part, routing=(part.routing[0], SiteRouting(experts, part.routing[1].weights, experts)))])
    found = strongest_label(trace)
    assert found is not None and (found.site, found.expert) == (1, 5)
    assert "70% of the b tokens and 0% of all others" in found.claim and "n = 1,000 b tokens" in found.evidence


def test_one_document_is_not_enough() -> None:
    part = make_part(PLAIN, [600, 600])
    experts = np.where(np.array(part.tokens["label"].to_pylist())[:, None] == "b", [5, 6], [1, 2]).astype(np.int16)
    site = SiteRouting(experts, part.routing[0].weights, experts)
    assert strongest_label(make_trace(PLAIN, [replace(part, routing=(site, site))])) is None
