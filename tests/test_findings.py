import re
from dataclasses import replace

import numpy as np
import pytest

from analysis import findings
from analysis.findings import busiest, first_finding, leading_site, strongest_label, times, unused_experts
from analysis.stats import Statistics
from analysis.trace import SiteRouting, Trace

from .synthetic import PLAIN, make_part, make_trace


def test_random_routing_has_no_specialist() -> None:
    for seed in range(5):
        trace = make_trace(PLAIN, [make_part(PLAIN, [200] * 10, seed)])
        assert strongest_label(trace) is None
        finding = first_finding(trace)
        assert finding is not None and finding == busiest(trace) and leading_site(trace) == finding.site


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


def carried_by(documents: set[int]) -> np.ndarray:
    """Experts of ten documents of 200 tokens, a and b in turn: those named send every token to 5 and 6, others to 0 to 3."""
    owner = np.arange(2000) // 200
    plain = np.array([[0, 1], [2, 3]])[np.arange(2000) % 2]
    return np.where(np.isin(owner, list(documents))[:, None], [5, 6], plain).astype(np.int16)


def test_two_documents_do_not_speak_for_their_label() -> None:
    """Expert 5 takes 40 % of b and nothing of a either way; only where it is in every b text is it b's."""
    part = make_part(PLAIN, [200] * 10)

    def found(experts: np.ndarray) -> object:
        routing = SiteRouting(experts, part.routing[0].weights, experts)
        return strongest_label(make_trace(PLAIN, [replace(part, routing=(routing, routing))]))

    assert found(carried_by({1, 3})) is None
    spread = np.where(((np.arange(2000) // 200 % 2 == 1) & (np.arange(2000) % 5 < 2))[:, None], [5, 6], carried_by(set()))
    assert found(spread.astype(np.int16)) is not None


def test_the_claim_must_survive_all_comparisons() -> None:
    """With four documents of two labels no deal is rare enough: 2 of 6 look as strong."""
    part = make_part(PLAIN, [600] * 4)
    experts = np.where(np.array(part.tokens["label"].to_pylist())[:, None] == "b", [5, 6], [1, 2]).astype(np.int16)
    routing = SiteRouting(experts, part.routing[0].weights, experts)
    assert strongest_label(make_trace(PLAIN, [replace(part, routing=(routing, routing))])) is None


def routed(*sites: np.ndarray) -> Trace:
    """Ten documents of 200 tokens, a and b in turn, with the experts of each site."""
    part = make_part(PLAIN, [200] * 10)
    return make_trace(PLAIN, [replace(part, routing=tuple(SiteRouting(x, part.routing[0].weights, x) for x in sites))])


def test_the_site_to_begin_with_is_that_of_the_widest_gap_told_from_counts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Expert 5 gets 40 % of every b document, which passes the test, or all of two or three of five, which does not; of equal gaps, the first leads."""
    steady = np.where(((np.arange(2000) // 200 % 2 == 1) & (np.arange(2000) % 5 < 2))[:, None], [5, 6], carried_by(set())).astype(np.int16)
    for first, second, headline, leading in ((steady, carried_by({1, 3}), 0, 0), (carried_by({1, 3}), steady, 1, 0),
                                             (steady, carried_by({1, 3, 5}), 0, 1), (carried_by(set()), steady, 1, 1)):  # fmt: skip
        trace = routed(first, second)
        finding = strongest_label(trace)
        assert finding is not None and finding.site == headline
        with monkeypatch.context() as patch:
            patch.delattr(Statistics, "document_load")
            assert leading_site(trace) == leading


def test_without_a_candidate_nothing_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(findings, "permutation_test")
    trace = routed(carried_by(set()), np.where(np.arange(2000)[:, None] % 3 > 0, [5, 6], [0, 1]).astype(np.int16))
    assert first_finding(trace) == busiest(trace) and leading_site(trace) == 1
    nothing = np.full((2000, 2), -1, np.int16)
    assert leading_site(routed(nothing, nothing)) is None


def test_a_load_that_chance_explains_is_called_so() -> None:
    short = busiest(make_trace(PLAIN, [make_part(PLAIN, [1])]))
    assert short is not None and short.claim.endswith("no more than chance in so few tokens.")
    skewed = make_part(PLAIN, [2_000])
    routing = tuple(replace(r, experts=np.minimum(r.experts, 1), chosen=np.minimum(r.chosen, 1)) for r in skewed.routing)
    found = busiest(make_trace(PLAIN, [replace(skewed, routing=routing)]))
    assert found is not None and re.fullmatch(
        r"At layer [01], expert [01] carries 4\.\d\d times its even share\.|At layer [01], expert 1 carries \d\.\d\d times its even share\.",
        found.claim,
    )


def test_experts_are_called_dead_only_from_enough_documents() -> None:
    def told(documents: int, used: int = 6) -> str:
        part = make_part(PLAIN, [40] * documents)
        few = part.routing[0].experts % used
        return unused_experts(make_trace(PLAIN, [replace(part, routing=(SiteRouting(few, part.routing[0].weights, few), part.routing[1]))]))

    assert told(4) == ("2 of 16 experts are not used by these 4 documents (160 tokens): layer 0 experts 6, 7."
                       " So few documents cannot show that an expert is dead: that takes 30.")  # fmt: skip
    assert told(29, 7).startswith("1 of 16 experts is not used by these 29 documents")
    assert told(30, 7) == "1 of 16 experts is dead: layer 0 expert 7. Uniform routing of so many tokens would leave below 0.01."
    assert told(30, 8).startswith("No expert of 16 is dead.")


@pytest.mark.parametrize(
    ("ratio", "shown"),
    [(1, "1.00"), (1.53, "1.53"), (1.0051, "1.01"), (1.0032, "1.003"), (1.00004, "1.00004"), (0.9968, "0.997"), (float("nan"), "nan")],
)
def test_a_chance_that_is_close_to_an_even_share_is_told_from_it(ratio: float, shown: str) -> None:
    assert times(ratio) == shown
