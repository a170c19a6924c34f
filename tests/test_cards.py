"""One expert's card: it says what was planted, nothing about noise, and what it cannot know."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from analysis import cards, reading
from analysis.cards import NONE, describe, expert_card, neighbours, site_evidence, with_use
from analysis.pair_tests import coactivation_test, flow_test
from analysis.passages import passages
from analysis.specialization import effects
from analysis.store import open_run
from analysis.trace import SiteRouting, Trace, TraceError
from tests.synthetic import MANY, PLAIN, TWO_STREAMS, make_part, make_trace
from tests.test_pair_tests import planted

TEXTS = [" the", "ing", "\n", "7", ";"]


def built(only_newlines: bool, seed: int = 0) -> Trace:
    """Expert 6 of site 1 serves b: its newlines only, or all of it. Everything else is random."""
    part = make_part(PLAIN, [100] * 24, seed, labels=("a", "b", "c"), texts=TEXTS)
    label, text = (np.array(part.tokens[c].to_pylist()) for c in ("label", "token"))
    mine = (label == "b") & ((text == "\n") | (not only_newlines))
    experts = part.routing[1].experts.copy()
    experts[experts == 6] = -1
    experts[:, 0] = np.where(mine, 6, experts[:, 0])
    weights = np.where(experts < 0, 0, part.routing[1].weights)
    return make_trace(PLAIN, [replace(part, routing=(part.routing[0], SiteRouting(experts, weights, experts)))])


def test_the_line_says_what_was_planted() -> None:
    trace = built(only_newlines=False)
    assert expert_card(trace, 1, 6).description == "b. 100% of these 800 tokens use it, 0% of all others."
    narrow = built(only_newlines=True)
    newlines = int(
        sum(t == "\n" and x == "b" for t, x in zip(narrow.tokens["token"].to_pylist(), narrow.tokens["label"].to_pylist(), strict=True))
    )
    assert expert_card(narrow, 1, 6).description == f"b newlines. 100% of these {newlines} tokens use it, 0% of all others."


@pytest.mark.parametrize("label, text, named", [("c", "7", "c digits"), ("b", ";", "b punctuation"), ("a", "ing", "a word parts")])
def test_the_line_names_the_right_label_and_class(label: str, text: str, named: str) -> None:
    part = make_part(PLAIN, [100] * 24, 1, labels=("a", "b", "c"), texts=TEXTS)
    mine = np.array(
        [x == label and t == text for x, t in zip(part.tokens["label"].to_pylist(), part.tokens["token"].to_pylist(), strict=True)]
    )
    experts = np.where(mine[:, None], [6, 7], np.random.default_rng(0).random((2400, 6)).argsort(1)[:, :2]).astype(np.int16)
    routing = SiteRouting(experts, part.routing[0].weights, experts)
    card = expert_card(make_trace(PLAIN, [replace(part, routing=(routing, routing))]), 0, 6)
    assert card.description == f"{named}. 100% of these {mine.sum()} tokens use it, 0% of all others."


def test_the_groups_with_most_excess_tokens_are_named_first() -> None:
    """Of 300, 1,000 and 1,000 tokens 300, 700 and 0 use the expert: 170 and 265 more than at the base rate of 10 / 23."""
    found = effects(0, "label", ("a", "b", "c"), np.array([300, 1000, 1000]), np.array([[300], [700], [0]]))
    sure = replace(found, significant=np.ones((3, 1), bool))
    assert cards._leading(sure, 0) == [1, 0] and cards._leading(found, 0) == [] == cards._leading(None, 0)
    assert cards._leading(replace(sure, significant=np.array([[True], [False], [True]])), 0) == [0]


def test_random_experts_are_described_as_nothing() -> None:
    """10 random runs of 8 experts: the tests allow a false claim in about one run in twenty, twice (labels and classes)."""
    told = 0
    for seed in range(10):
        part = make_part(PLAIN, [100] * 24, seed, labels=("a", "b", "c"), texts=TEXTS)
        trace = make_trace(PLAIN, [part])
        evidence = site_evidence(trace, 0)
        lines = [describe(evidence, e) for e in range(8)]
        told += any(not line.startswith(NONE) for line in lines)
        assert f"{NONE} among 3 labels and 5 token classes of 24 documents" in lines
    assert told <= 3


def test_too_few_documents_are_no_negative_result() -> None:
    small = make_trace(PLAIN, [make_part(PLAIN, [100] * 4, labels=("a", "b"), texts=TEXTS)])
    assert describe(site_evidence(small, 0), 0).startswith("Too few documents to tell: with 2 and 2 the smallest possible p is 0.33.")
    more = make_trace(PLAIN, [make_part(PLAIN, [100] * 6, 1, labels=("a", "b"), texts=TEXTS)])
    evidence = site_evidence(more, 0)
    assert evidence.labels.missing and evidence.classes is not None and not evidence.classes.missing
    assert f"{NONE} among 5 token classes of 6 documents" in {describe(evidence, e) for e in range(8)}


def test_numbers_on_the_card() -> None:
    trace = built(only_newlines=False)
    card, routing = expert_card(trace, 1, 6), trace.routing(1)
    here = routing.experts == 6
    assert (card.n, card.assignments, card.share, card.even_share) == (2400, 800, pytest.approx(1 / 3), 0.25)
    assert card.relative_load == pytest.approx(800 * 8 / (routing.experts >= 0).sum())
    assert card.mean_gate == pytest.approx(routing.weights[here].mean(dtype=float))
    assert [u.group for u in card.labels][0] == "b" and card.labels[0].significant and card.labels[0].share == 1
    assert [u.lift for u in card.classes] == sorted((u.lift for u in card.classes), reverse=True) and not any(
        u.significant for u in card.classes
    )
    other = [int(((routing.experts == e).any(1) & here.any(1)).sum()) for e in range(8)]
    assert {p.expert: p.count for p in card.partners} == {e: n for e, n in enumerate(other) if e != 6}
    before = trace.experts(0)[here.any(1)]
    assert {s.expert: s.count for s in card.sources} == {e: int((before == e).sum()) for e in range(8)}
    assert all(s.share == s.count / 800 for s in (*card.sources, *card.partners)) and card.targets == ()
    assert card.missing == ("where its tokens go to: this is the last routed layer",)
    assert card.title == "layer 1, expert 6" and all(t.tokens >= 10 for t in card.tokens)


def test_neighbours_are_those_of_the_tests_and_what_chance_gives_comes_after() -> None:
    """Planted: 1 and 2 in one token, 3 followed by 5."""
    trace = planted()
    tests = {"partners": coactivation_test(trace, 0), "targets": flow_test(trace, 0)}
    for name, expert, other in (("partners", 1, 2), ("targets", 3, 5)):
        rows, found = getattr(expert_card(trace, 0, expert), name), tests[name]
        assert rows[0].expert == other and rows[0].direction == 1 and rows[0].low > 1
        for x in rows:
            at = expert, x.expert
            assert x.count == found.counts.observed[at] and x.share == x.count / trace.stats.load(0)[expert]
            assert (x.lift, x.low, x.high, x.p, x.q, x.significant) == tuple(
                m[at] for m in (found.counts.lift, found.low, found.high, found.p, found.q, found.significant)
            )
        assert [(-x.direction, -x.lift if x.direction else -x.count) for x in rows] == sorted(
            (-x.direction, -x.lift if x.direction else -x.count) for x in rows
        )
    assert expert_card(trace, 1, 5).sources[0].expert == 3
    assert {x.direction for e in range(6) for x in neighbours(tests["targets"], e, 10)} == {1, 0, -1}
    assert [x.expert for x in neighbours(tests["partners"], 1, 10)].count(1) == 0 and neighbours(tests["partners"], 1, 0) == ()
    assert len(neighbours(tests["targets"], 3, 10)) == 6
    bare = expert_card(trace, 0, 1, site_evidence(trace, 0, pairs=False))
    assert bare.partners == bare.sources == bare.targets == () and bare.description == expert_card(trace, 0, 1).description


def test_evidence_reads_each_decision_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the pairs; in blocks that cut documents it finds the same."""
    trace, read = built(only_newlines=True), Trace.experts
    whole, asked = site_evidence(trace, 1, pairs=False), []

    def counted(self: Trace, layer: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        asked.append((layer, start, stop))
        return read(self, layer, start, stop)

    monkeypatch.setattr(Trace, "experts", counted)
    monkeypatch.setattr(reading.blocks, "__defaults__", (970,))
    cut = site_evidence(trace, 1, pairs=False)
    assert asked == [(1, 0, 970), (1, 970, 1940), (1, 1940, 2400)]
    assert whole.classes is not None and whole.crossed is not None and whole.token_use is not None
    later = with_use(trace, site_evidence(trace, 1, pairs=False, use=False))
    assert len(asked) == 9 and later.token_use is not None and repr(later.token_use) == repr(whole.token_use)
    assert repr(expert_card(trace, 1, 6, later)) == repr(expert_card(trace, 1, 6, whole)) and with_use(trace, later) is later
    assert cut.classes is not None and cut.crossed is not None and cut.token_use is not None
    assert cut.classes.p.tolist() == whole.classes.p.tolist() and cut.crossed.count.tolist() == whole.crossed.count.tolist()
    assert cut.token_use.leaning.tolist() == whole.token_use.leaning.tolist() and whole.crossed.count[:, 6].any()


def test_evidence_may_be_kept() -> None:
    trace = built(only_newlines=True)
    evidence = site_evidence(trace, 1)
    assert repr(expert_card(trace, 1, 6, evidence)) == repr(expert_card(trace, 1, 6))
    with pytest.raises(IndexError, match="0 to 7"):
        expert_card(trace, 1, 8, evidence)


@pytest.mark.parametrize("layers", [PLAIN, MANY, TWO_STREAMS], ids=["plain", "many", "streams"])
def test_any_trace_has_cards(layers: tuple) -> None:
    trace = make_trace(layers)
    for layer in layers:
        evidence = site_evidence(trace, layer.index)
        for expert in (0, layer.n_classes - 1):
            card = expert_card(trace, layer.index, expert, evidence)
            assert card.assignments == (trace.experts(layer.index) == expert).sum() and card.description


def test_statistics_alone_say_what_is_missing() -> None:
    whole = built(only_newlines=False)
    card = expert_card(replace(whole, source=None, load_tokens=None), 0, 1)
    assert card.labels and card.classes == () and any("statistics only" in x for x in card.missing)
    assert [t.text for t in card.tokens] == [None] * len(card.tokens)
    dropped = expert_card(replace(whole, source=None, load_tokens=None), 1, 6)
    assert dropped.description.startswith("b. ") and dropped.tokens == () and any("dropped" in x for x in dropped.missing)


def test_a_dead_expert_and_a_single_token() -> None:
    trace = built(only_newlines=False)
    part = make_part(PLAIN, [1])
    one = make_trace(PLAIN, [part])
    unused = next(e for e in range(8) if e not in part.routing[0].experts)
    card = expert_card(one, 0, unused)
    assert card.assignments == 0 and np.isnan(card.mean_gate) and card.partners == ()
    assert card.description.startswith("Nothing to compare") and not any(u.tested for u in (*card.labels, *card.classes))
    assert passages(one, 0, unused) == () and len(passages(trace, 1, 6, most=99)) == 8  # documents of b


def test_passages_are_the_heaviest_stretches() -> None:
    trace = built(only_newlines=True)
    found = passages(trace, 1, 6, most=4, width=20)
    routing = trace.routing(1)
    weight = np.where(routing.experts == 6, routing.weights, 0).sum(1).astype(float)
    best = sorted(
        (-weight[s : s + 20].sum(), s)
        for d in range(24)
        for s in [d * 100 + int(weight[d * 100 : d * 100 + 100].reshape(5, 20).sum(1).argmax()) * 20]
    )
    assert [(p.start, p.stop) for p in found] == [(s, s + 20) for _, s in best[:4]]
    for p in found:
        assert p.label == "b" and p.document == p.start // 100 and p.position == p.start % 100 and p.name == f"doc {p.document}"
        np.testing.assert_allclose(p.weights, weight[p.start : p.stop], rtol=1e-6)
        assert p.texts == tuple(trace.tokens["token"][p.start : p.stop].to_pylist()) and p.used == (weight[p.start : p.stop] > 0).sum()
        assert p.mass == pytest.approx(sum(p.weights))


def test_passages_of_one_label_short_documents_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = make_trace()
    whole = passages(trace, 0, 3, most=9, width=4)
    assert {p.label for p in passages(trace, 0, 3, label="a")} == {"a"} and max(p.stop - p.start for p in whole) == 4
    monkeypatch.setattr("analysis.passages.ROWS", 4)
    assert passages(trace, 0, 3, most=9, width=4) == whole and len(whole) > 5
    with pytest.raises(TraceError, match="statistics only"):
        passages(replace(trace, source=None, load_tokens=None), 0, 3)


def test_the_demo_run_speaks_of_its_languages() -> None:
    """At the last layer experts serve labels: several lines name one, and none of the numbers exceed the run."""
    trace = open_run("data/demo-run")
    evidence = site_evidence(trace, len(trace.layers) - 1)
    lines = [describe(evidence, e) for e in range(16)]
    assert sum("of all others" in x for x in lines) >= 8 and sum(any(label in x for label in trace.labels) for x in lines) >= 4
