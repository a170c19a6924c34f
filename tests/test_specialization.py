"""Preferences against loops over decisions, against noise, against planted experts, and against published figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis import within
from analysis.significance import benjamini_hochberg, permutation_test
from analysis.specialization import (
    by_group,
    by_label,
    by_position,
    effects,
    esft_experts,
    gate_score,
    label_information,
    labelled_documents,
    seriation,
    token_score,
)
from analysis.stats import BY_DOCUMENT, BY_TOKEN, CORE, Statistics
from analysis.store import open_run
from analysis.trace import DOCUMENTS, SiteRouting, Trace
from tests.counters import read_counters
from tests.published import ESFT_TOKEN
from tests.synthetic import MANY, PLAIN, TWO_STREAMS, card, make_part, make_trace, site

LABELS = ("a", "b", "c", "d")


def random_trace(seed: int, lengths: list[int] | None = None, labels: tuple = LABELS) -> Trace:
    return make_trace(PLAIN, [make_part(PLAIN, lengths or [60] * 24, seed, labels=labels)])


def planted_trace(seed: int = 0, expert: int = 5) -> Trace:
    """Random routing, but tokens of label b use ``expert`` at site 1 four times in five."""
    part = make_part(PLAIN, [60] * 24, seed, labels=LABELS)
    mine = np.array(part.tokens["label"].to_pylist()) == "b"
    experts = part.routing[1].experts.copy()
    chosen = mine & (np.random.default_rng(seed).random(len(mine)) < 0.8) & ~(experts == expert).any(1)
    experts[chosen, 0] = expert
    routing = (part.routing[0], SiteRouting(experts, part.routing[1].weights, experts))
    return make_trace(PLAIN, [replace(part, routing=routing)])


@pytest.mark.parametrize("layers", [PLAIN, MANY, TWO_STREAMS], ids=["plain", "many", "streams"])
def test_counts_are_those_of_the_decisions(layers: tuple) -> None:
    trace = make_trace(layers)
    for layer in layers:
        found = by_label(trace, layer.index, draws=99)
        experts = trace.experts(layer.index)
        label = np.array(trace.stream_tokens(layer.stream)["label"].to_pylist())
        assert found.groups == ("a", "b")
        for g, name in enumerate(found.groups):
            mine = label == name
            assert found.tokens[g] == mine.sum()
            assert found.documents[g] == len(set(trace.stream_tokens(layer.stream)["document"].to_numpy()[mine].tolist()))
            for e in range(layer.n_classes):
                uses = (experts == e).any(1)
                assert found.count[g, e] == uses[mine].sum()
                assert found.share[g, e] == pytest.approx(uses[mine].mean()) and found.elsewhere[g, e] == pytest.approx(uses[~mine].mean())
                if uses.any():
                    assert found.lift[g, e] == pytest.approx(uses[mine].mean() / uses.mean())


def test_the_table_has_one_row_per_cell() -> None:
    found = by_label(planted_trace(), 1)
    rows = found.table().to_pandas()
    assert rows.columns[:5].tolist() == ["site", "label", "expert", "n", "documents"] and len(rows) == 32
    row = rows[(rows.label == "b") & (rows.expert == 5)].iloc[0]
    assert (row["count"], row.n, row.documents) == (found.count[1, 5], 360, 6) and row.q == found.q[1, 5] and row.significant
    assert set(rows.site) == {1}


def test_random_routing_shows_nothing() -> None:
    """Labels, positions and kinds of tokens over 40 random runs: claims in about 5 % of them, 8 or more has odds of 1 : 1,000."""
    claims = {"label": 0, "position": 0, "kind": 0}
    for seed in range(40):
        trace = random_trace(seed, [60, 20] * 12)
        kind = np.random.default_rng(seed).integers(0, 3, 960)
        claims["label"] += bool(by_label(trace, 0, draws=999).significant.any())
        claims["position"] += bool(by_position(trace, 0).significant.any())
        claims["kind"] += bool(by_group(trace, 0, "kind", "xyz", kind, draws=999).significant.any())
    assert all(n < 8 for n in claims.values()), claims


def test_real_documents_with_labels_shuffled_show_nothing() -> None:
    """The demo run's documents differ a lot; labels dealt at random over them may claim something in 1 of 20 deals."""
    trace = open_run("data/demo-run")
    claims = 0
    for number in (0, len(trace.layers) - 1):
        units = labelled_documents(trace, number)
        for seed in range(20):
            codes = np.random.default_rng(seed).permutation(units.codes)
            test = permutation_test(units.counts, units.tokens, codes, draws=999, seed=seed)
            claims += bool((benjamini_hochberg(test.p) <= 0.05).any())
    assert claims < 8


def test_a_planted_expert_is_found() -> None:
    for seed in range(5):
        found = by_label(planted_trace(seed), 1)
        assert found.significant[1, 5] and found.p[1, 5] == found.p.min()
        assert found.low[1, 5] > 1 and found.enrichment[1, 5] == found.enrichment.max()
        assert found.low[1, 5] < found.enrichment[1, 5] < found.high[1, 5]
        assert not by_label(planted_trace(seed), 0).significant.any()


def test_a_planted_kind_of_token_is_found_within_documents() -> None:
    part = make_part(PLAIN, [60] * 12)
    kind = np.arange(720) % 4
    experts = part.routing[0].experts.copy()
    fits = (kind == 2) & ~(experts == 7).any(1)
    experts[fits, 1] = 7
    trace = make_trace(PLAIN, [replace(part, routing=(SiteRouting(experts, part.routing[0].weights, experts), part.routing[1]))])
    found = by_group(trace, 0, "kind", ("w", "x", "y", "z"), kind)
    assert (
        found.share[2, 7] == 1
        and found.significant[2, 7]
        and found.within[2, 7] > 1.9
        and found.documents.tolist() == [12] * 4
        and found.tokens.tolist() == [180] * 4
    )
    assert not by_group(trace, 1, "kind", ("w", "x", "y", "z"), kind).significant.any()
    left_out = by_group(trace, 0, "kind", ("y",), np.where(kind == 2, 0, -1))
    assert left_out.count[0].tolist() == found.count[2].tolist() and np.isnan(left_out.elsewhere).all()


def test_a_kind_that_only_marks_documents_is_no_preference_within_them() -> None:
    """Documents of kind 0 use other experts, but no document holds both kinds: nothing can be told within documents."""
    part = make_part(PLAIN, [60] * 12)
    kind = (np.arange(720) // 60) % 2
    experts = np.where(kind[:, None] == 0, [0, 1], [2, 3]).astype(np.int16)
    routing = SiteRouting(experts, part.routing[0].weights, experts)
    found = by_group(make_trace(PLAIN, [replace(part, routing=(routing, routing))]), 0, "kind", "xy", kind)
    assert not found.significant.any() and np.isnan(found.p).all() and found.lift[0, 0] == 2


def test_documents_that_differ_are_not_tokens_that_differ() -> None:
    """Kind x uses expert 1 more often overall, for its documents do; inside every document kind y does. No claim about x."""
    part = make_part(PLAIN, [100] * 20)
    heavy = np.arange(2000) // 100 % 2 == 0
    place = np.arange(2000) % 100
    kind = np.where(heavy, place >= 80, place >= 20).astype(int)
    within = np.where(heavy, np.where(kind == 0, place < 48, place < 96), (kind == 1) & (place % 10 == 0))
    experts = np.where(within[:, None], [1, 2], [3, 4]).astype(np.int16)
    routing = SiteRouting(experts, part.routing[0].weights, experts)
    found = by_group(make_trace(PLAIN, [replace(part, routing=(routing, routing))]), 0, "kind", "xy", kind)
    assert found.share[0, 1] > 1.9 * found.share[1, 1] and found.q[0, 1] < 0.05
    assert not found.significant[:, 1].any() and found.within[0, 1] < -0.5 < 0.5 < found.enrichment[0, 1]


def test_positions_are_doubling_stretches() -> None:
    trace = random_trace(0, [20, 5])
    found = by_position(trace, 0)
    assert found.groups == ("0", "1-2", "3-6", "7-14", "15-30")
    assert found.tokens.tolist() == [2, 4, 6, 8, 5]
    assert np.array_equal(found.count, trace.stats.position_load(0))
    alone = by_position(replace(trace, source=None, load_tokens=None), 0)
    assert alone.groups == found.groups and np.array_equal(alone.lift, found.lift) and alone.tokens.tolist() == found.tokens.tolist()
    assert alone.method.startswith("no test") and np.isnan(alone.p).all() and not alone.significant.any()


def test_many_documents_are_joined_within_their_label() -> None:
    trace = random_trace(0, [5, 9, 2, 7] * 30, labels=("a", "a", "b"))
    whole, joined = labelled_documents(trace, 0), labelled_documents(trace, 0, most=15)
    assert len(whole.codes) == 120 and len(joined.codes) == 15
    for g in (0, 1):
        assert joined.counts[joined.codes == g].sum(0).tolist() == whole.counts[whole.codes == g].sum(0).tolist()
        assert joined.tokens[joined.codes == g].sum() == whole.tokens[whole.codes == g].sum()
        assert joined.documents[joined.codes == g].sum() == (whole.codes == g).sum()
    assert joined.documents.max() == 8 and np.bincount(joined.codes).tolist() == [10, 5]


def test_joining_of_documents_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = random_trace(0, [5, 9, 2, 7] * 30, labels=("a", "a", "b"))
    assert by_label(trace, 0).method.startswith("labels moved between whole documents")
    monkeypatch.setattr("analysis.specialization.labelled_documents", lambda t, s: labelled_documents(t, s, most=15))
    assert by_label(trace, 0).method.startswith("labels moved between 15 groups of whole documents (120 in all)")


def test_documents_of_one_token_count_and_empty_ones_do_not() -> None:
    trace = random_trace(0, [1, 4, 1, 4])
    assert labelled_documents(trace, 0).tokens.tolist() == [1, 4, 1, 4]
    empty = {**trace.documents.to_pylist()[0], "document": 4, "label": "z", "n_tokens": 0, "first_row": 10}
    more = pa.concat_tables([trace.documents, pa.Table.from_pylist([empty], schema=DOCUMENTS)])
    assert labelled_documents(replace(trace, documents=more), 0).labels == LABELS


def test_joined_documents_are_shared_out_evenly() -> None:
    trace = random_trace(0, [4] * 50, labels=("a", "b", "b", "a", "b"))
    joined = labelled_documents(trace, 0, most=7)
    sizes = [joined.documents[joined.codes == g].tolist() for g in (0, 1)]
    assert [sorted(x) for x in sizes] == [[10, 10], [7, 7, 8, 8]]


def test_what_cannot_be_tested_is_said() -> None:
    one = by_label(random_trace(0, labels=("a",)), 0)
    assert np.isnan(one.p).all() and not one.significant.any() and one.method.startswith("no test")
    none = by_label(random_trace(0, labels=(None,)), 0)
    assert none.groups == () and none.count.shape == (0, 8)
    single = by_label(random_trace(0, [50, 60], labels=("a", "b")), 0)
    assert np.isnan(single.low).all() and single.p.min() == 1  # two documents can be dealt in one way only


def test_too_few_documents_are_said_with_how_many_could_tell() -> None:
    few = by_label(random_trace(0, [60] * 6, labels=("a", "b")), 0)
    assert few.missing == (
        "Too few documents to tell: with 3 and 3 the smallest possible p is 0.10. Effects are shown, none can be tested; record at least 4 per label."
    )
    assert few.p.min() >= 0.1 and np.isfinite(few.lift).all()
    assert by_label(random_trace(0, [60] * 8, labels=("a", "b")), 0).missing == "" == by_label(planted_trace(), 1).missing
    assert "record at least 3 per label" in by_label(random_trace(0, [60] * 3, labels=("a", "b", "c")), 0).missing
    assert (
        "of another" in by_label(random_trace(0, labels=("a",)), 0).missing
        and "of another" in by_label(random_trace(0, labels=(None,)), 0).missing
    )
    for n, p in ((1, "1 document the smallest possible p is 1.00"), (5, "5 documents the smallest possible p is 0.06"), (6, "")):
        trace = random_trace(0, [60] * n)
        found = by_group(trace, 0, "kind", "xy", np.arange(60 * n) % 2).missing
        assert p in found and bool(p) == bool(found) and (not p or "at least 6 in which it occurs" in found)
    assert "counts without documents" in by_position(replace(trace, source=None, load_tokens=None), 0).missing


def test_p_corrected_for_the_family_is_kept_for_the_file() -> None:
    found = by_label(planted_trace(), 1)
    units = labelled_documents(planted_trace(), 1)
    moved = permutation_test(units.counts, units.tokens, units.codes).family
    assert (found.family_p >= moved).all() and found.family_p[1, 5] == moved[1, 5] == 0.001
    assert (found.family_p >= found.p).all() and found.table()["family_p"].to_numpy().tolist() == found.family_p.ravel().tolist()


def test_joined_documents_are_named_for_kinds_of_token_too(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = random_trace(0, [5, 9] * 20)
    assert by_position(trace, 0).method.startswith("signs of whole documents flipped")
    monkeypatch.setattr(within, "MOST_UNITS", 15)
    assert by_position(trace, 0).method.startswith("signs of 15 groups of whole documents (40 in all) flipped")


def test_unlabelled_documents_are_left_out() -> None:
    found = by_label(random_trace(0, labels=("a", None, "b")), 0, draws=99)
    assert found.groups == ("a", "b") and found.tokens.tolist() == [480, 480] and found.documents.tolist() == [8, 8]


def test_label_information_of_random_and_planted_routing() -> None:
    random, planted = label_information(random_trace(3), 0), label_information(planted_trace(3), 1)
    assert random.p > 0.05 and abs(random.above_floor) < 0.01
    assert random.low <= random.plug_in <= random.high and random.low < random.floor < random.high < planted.low + 0.05 < planted.plug_in
    assert planted.p == 0.005 and planted.above_floor > 0.05 and planted.n == 24 * 60 * 2
    assert planted.entropy_x == pytest.approx(2) and planted.ceiling == min(2, planted.entropy_y - 1) == planted.entropy_y - 1 < 2
    assert np.isnan(label_information(random_trace(0, labels=("a",)), 0).p)
    two = label_information(random_trace(3, labels=("a", "b")), 0)
    assert 0.005 <= two.p <= 1 and two.floor > 0 and two.entropy_x == 1
    exact = label_information(random_trace(3, [30] * 4, labels=("a", "b")), 0)
    assert exact.p in (2 / 6, 4 / 6, 1) and "6 times" in exact.null  # each deal has the same information as its mirror


def test_effects_of_empty_groups_are_unknown() -> None:
    found = effects(0, "label", ("a", "b"), np.array([0, 10]), np.array([[0, 0], [4, 6]]))
    assert np.isnan(found.share[0]).all() and np.isnan(found.enrichment).all() and found.share[1].tolist() == [0.4, 0.6]


def test_seriation_puts_blocks_on_the_diagonal() -> None:
    enriched = np.full((3, 7), -1.0)
    for group, expert, value in ((2, 0, 3), (2, 4, 2), (2, 6, 1), (0, 1, 5), (0, 2, 1), (1, 3, 2), (1, 5, 1)):
        enriched[group, expert] = value
    groups, experts = seriation(enriched)
    assert groups.tolist() == [2, 0, 1] and experts.tolist() == [0, 4, 6, 1, 2, 3, 5]
    given = seriation(enriched, groups[::-1])
    assert given[0].tolist() == groups[::-1].tolist() and sorted(given[1].tolist()) == sorted(experts.tolist()) != given[1].tolist()
    assert (np.diff(np.argsort(groups[::-1])[enriched[:, given[1]].argmax(0)]) >= 0).all()  # along the diagonal of these rows
    assert [x.tolist() for x in seriation(np.full((2, 3), np.nan))] == [[0, 1], [0, 1, 2]]
    assert [len(x) for x in seriation(np.zeros((0, 4)))] == [0, 4]


def test_seriation_follows_the_data_not_the_numbers() -> None:
    rng = np.random.default_rng(0)
    enriched = rng.normal(size=(5, 12))
    rows, columns = rng.permutation(5), rng.permutation(12)
    first, second = seriation(enriched), seriation(enriched[rows][:, columns])
    np.testing.assert_array_equal(enriched[first[0]][:, first[1]], enriched[rows][:, columns][second[0]][:, second[1]])


def test_esft_selection_by_hand() -> None:
    score = np.array([0.1, 0.4, 0.1, 0.25, 0.15])
    assert esft_experts(score, 0.4) == (1,) and esft_experts(score, 0.41) == (1, 3) and esft_experts(score, 0.85) == (1, 3, 4, 0)
    assert esft_experts(score, 1) == (1, 3, 4, 0, 2)
    for p in (0, 1.1, -1):
        with pytest.raises(ValueError, match="top_p"):
            esft_experts(score, p)
    assert token_score(np.array([3, 1]), 2, 2).tolist() == [0.75, 0.25] and gate_score(np.array([1.5, 0.5]), 2).tolist() == [0.75, 0.25]
    assert np.isnan(token_score(np.array([0]), 0, 2)).all() and np.isnan(gate_score(np.array([0.0]), 0)).all()


@pytest.mark.parametrize("task", ESFT_TOKEN)
def test_the_experts_esft_trained_in_deepseek_v2_lite(task: str, real: Path) -> None:
    """All 26 published layers; ESFT rounds its scores to four places before it sorts them."""
    table = pq.read_table(real / "deepseek-v2-lite" / "routing.parquet", columns=["task", "layer", "expert"]).to_pandas()
    table = table[table["task"] == task]
    for layer, published in enumerate(ESFT_TOKEN[task], start=1):
        mine = table.loc[table["layer"] == layer, "expert"].to_numpy()
        score = token_score(np.bincount(mine, minlength=64), len(mine) // 6, 6)
        assert score.sum() == pytest.approx(1)
        assert esft_experts(score.round(4), 0.2) == published, layer


def counted(folder: Path, sites: tuple[int, ...], n_experts: int, top_k: int, tokens: int) -> Trace:
    """A run of statistics alone: OLMoE's released counts by domain."""
    rows = []
    for domain in ("c4", "github", "wikipedia"):
        for number, counts in enumerate(read_counters(folder / f"expert_counts_{domain}.pkl")):
            rows.append(("label_tokens", number, domain, None, None, tokens, 0.0))
            rows += [("label", number, domain, e, None, n, 0.0) for e, n in counts.items()]
    core = pa.table(dict(zip(CORE.names, zip(*rows, strict=True), strict=True)), schema=CORE)
    layers = tuple(site(i, n_experts, top_k) for i in range(len(sites)))
    stats = Statistics(core, BY_TOKEN.empty_table(), BY_DOCUMENT.empty_table(), (n_experts,) * len(sites), (None,) * len(sites))
    return Trace(card(layers), DOCUMENTS.empty_table(), stats, None, None)


@pytest.mark.parametrize("model, n_experts, top_k", [("olmoe", 64, 8), ("mixtral", 8, 2)])
def test_domain_specialization_of_olmoe_and_mixtral(model: str, n_experts: int, top_k: int, real: Path) -> None:
    golden = json.loads((real / "golden.json").read_text())[model]
    sites = (0, 7, 15)
    trace = counted(real / "olmoe" / model, sites, n_experts, top_k, golden["c4/L0"]["tokens"])
    for number, layer in enumerate(sites):
        found = by_label(trace, number)
        assert found.groups == ("c4", "github", "wikipedia") and found.method.startswith("no test")
        for g, domain in enumerate(found.groups):
            figures = golden[f"{domain}/L{layer}"]
            assert found.tokens[g] == figures["tokens"] and found.share[g].sum() == pytest.approx(top_k)
            assert 100 * found.share[g].max() == pytest.approx(figures["max_domain_specialization_pct"], abs=5e-7)
            assert found.share[g].argmax() == figures["argmax"]
