"""Statistics against slow loops over the recorded decisions, and against the figures of real models."""

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import balance
from analysis.stats import BINS, first_choices, following_sites, merge_statistics, part_statistics
from analysis.trace import LayerInfo, SiteRouting, SiteScores

from .synthetic import MANY, PLAIN, TWO_STREAMS, make_part, make_parts, make_trace, site

UNEVEN = (site(0, 6, 1), site(1, 9, 3))


@pytest.mark.parametrize("layers", [PLAIN, MANY, TWO_STREAMS, UNEVEN], ids=["plain", "many", "streams", "uneven"])
def test_counts_equal_a_loop_over_decisions(layers: tuple[LayerInfo, ...]) -> None:
    trace = make_trace(layers)
    following = following_sites(layers)
    for layer in layers:
        i, stats = layer.index, trace.stats
        tokens = trace.stream_tokens(layer.stream).to_pylist()
        experts = [[int(e) for e in row if e >= 0] for row in trace.experts(i)]
        weights = trace.weights(i)
        load, labels, position, pairs, repeats = Counter(), Counter(), Counter(), Counter(), [0, 0, 0]
        first = [int(x) for x in first_choices(trace.routing(i))]
        for t, row in enumerate(experts):
            for e in row:
                load[e] += 1
                labels[tokens[t]["label"], e] += 1
                position[(tokens[t]["position"] + 1).bit_length() - 1, e] += 1
                for other in row:
                    pairs[e, other] += e != other
            if t and tokens[t]["document"] == tokens[t - 1]["document"]:
                repeats[0] += 1
                repeats[1] += first[t] == first[t - 1] and first[t] >= 0
                repeats[2] += bool(set(row) & set(experts[t - 1]))
        n = layer.n_classes
        assert stats.load(i).tolist() == [load[e] for e in range(n)]
        assert stats.n_tokens(i) == len(tokens)
        names, table = stats.label_load(i)
        assert table.tolist() == [[labels[x, e] for e in range(n)] for x in names]
        places = stats.position_load(i)
        assert places.tolist() == [[position[b, e] for e in range(n)] for b in range(len(places))]
        assert stats.coactivation(i).tolist() == [[pairs[a, b] for b in range(n)] for a in range(n)]
        assert stats.repetition(i) == tuple(repeats)
        assert stats.first_choice_load(i).tolist() == [first.count(e) for e in range(n)]
        mass = [weights[trace.experts(i) == e].astype(float).sum() for e in range(n)]
        np.testing.assert_allclose(stats.gate_mass(i), mass, rtol=1e-12)
        assert stats.dropped(i) == (trace.chosen(i) != trace.experts(i)).sum()
        assert stats.chosen_load(i).sum() == (trace.chosen(i) >= 0).sum()
        margin = trace.scores(i).margin
        assert stats.histogram("margin", i).tolist() == [
            sum(min(int(x * BINS), BINS - 1) == b for x in margin.tolist()) for b in range(BINS)
        ]
        z = [float(x) ** 2 for x in trace.scores(i).logsumexp]
        assert stats.mean("z", i) == pytest.approx(sum(z) / len(z), rel=1e-9)
        for key, long in (("token_id", stats.by_token), ("document", stats.by_document)):
            sparse = Counter((tokens[t][key], e) for t, row in enumerate(experts) for e in row)
            mine = [r for r in long.to_pylist() if r["site"] == i]
            assert len(mine) == len(sparse) and {(r[key], r["expert"]): r["count"] for r in mine} == sparse
        entropy = trace.scores(i).entropy
        edges = np.linspace(0, np.log(n), BINS + 1)
        assert stats.histogram("entropy", i).tolist() == np.histogram(entropy.clip(0, edges[-1]), edges)[0].tolist()
        assert stats.mean("entropy", i) == pytest.approx(entropy.astype(float).mean(), rel=1e-9)
        if (after := following[i]) is not None:
            later = trace.experts(after)
            flow = Counter((e, int(f)) for t, row in enumerate(experts) for e in row for f in later[t] if f >= 0)
            width = layers[after].n_classes
            firsts = Counter(zip(first, (int(x) for x in first_choices(trace.routing(after))), strict=True))
            assert stats.flow(i, first=True).tolist() == [[firsts[a, b] for b in range(width)] for a in range(n)]
            assert stats.flow(i).tolist() == [[flow[a, b] for b in range(width)] for a in range(n)]


def test_losses_per_label() -> None:
    trace = make_trace()
    rows = trace.tokens.to_pylist()
    for label, (n, mean) in trace.stats.losses().items():
        mine = [r["loss"] for r in rows if r["label"] == label and r["loss"] is not None]
        assert n == len(mine) and mean == pytest.approx(np.mean(mine))


@pytest.mark.parametrize("seed", range(5))
def test_merging_in_any_order_gives_the_same_counts(seed: int) -> None:
    parts = [part_statistics(p, PLAIN) for p in make_parts(PLAIN, 6)]
    whole = merge_statistics(parts)
    shuffled = random.Random(seed).sample(parts, len(parts))
    halves = merge_statistics([merge_statistics(shuffled[:2]), merge_statistics(shuffled[2:])])
    for name in ("core", "by_token", "by_document"):
        a, b = getattr(whole, name), getattr(halves, name)
        counts = [c for c in a.column_names if c != "sum"]
        assert a.select(counts).equals(b.select(counts))
        if "sum" in a.column_names:
            np.testing.assert_allclose(a["sum"].to_numpy(), b["sum"].to_numpy(), rtol=1e-12)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=2, max_size=6),
    cut=st.integers(1, 5),
    experts=st.integers(1, 9),
    k=st.integers(1, 3),
    seed=st.integers(0, 999),
)
def test_statistics_of_the_halves_add_up_to_those_of_the_whole(lengths: list[int], cut: int, experts: int, k: int, seed: int) -> None:
    """One part cut between two documents: the statistics of both pieces merge to those of the uncut part."""
    layers = (site(0, experts, min(k, experts)), site(1, experts, 1))
    whole, documents = make_part(layers, lengths, seed), min(cut, len(lengths) - 1)
    rows = sum(lengths[:documents])
    pieces = []
    for mine in (slice(0, rows), slice(rows, None)):
        routing = tuple(SiteRouting(r.experts[mine], r.weights[mine], r.experts[mine]) for r in whole.routing)
        scores = tuple(SiteScores(s.entropy[mine], s.margin[mine], s.logsumexp[mine]) for s in whole.scores)
        sums = tuple(np.zeros(x.n_classes) for x in layers)
        pieces.append(replace(whole, tokens=whole.tokens[mine], routing=routing, scores=scores, probability_sums=sums))
    merged = merge_statistics([part_statistics(p, layers) for p in reversed(pieces)])
    uncut = part_statistics(replace(whole, probability_sums=sums), layers)
    for name in ("core", "by_token", "by_document"):
        a, b = getattr(merged, name), getattr(uncut, name)
        counted = [c for c in a.column_names if c != "sum"]
        assert a.select(counted).equals(b.select(counted))
    np.testing.assert_allclose(merged.core["sum"].to_numpy(), uncut.core["sum"].to_numpy(), rtol=1e-12, atol=1e-12)


def test_statistics_of_different_models_do_not_merge() -> None:
    with pytest.raises(ValueError, match="other sites"):
        merge_statistics([part_statistics(make_parts(x, 1)[0], x) for x in (PLAIN, MANY)])
    with pytest.raises(ValueError, match="no parts"):
        merge_statistics([])


def test_real_deepseek_v2_lite_equals_the_golden_figures(real: Path) -> None:
    """26 layers, 64 experts, top-6, 8,222 tokens: load, imbalance and repetition as recomputed elsewhere."""
    golden = json.loads((real / "golden.json").read_text())["deepseek-v2-lite"]["intent"]
    table = pq.read_table(real / "deepseek-v2-lite" / "routing.parquet").to_pandas()
    table = table[table["task"] == "intent"].sort_values(["layer", "seq", "pos", "slot"])
    numbers = [int(n) for n in golden["layers"]]
    layers = tuple(site(i, 64, 6) for i in range(len(numbers)))
    one = table[table["layer"] == numbers[0]].iloc[::6]
    lengths = one.groupby("seq", sort=False).size().tolist()
    blank = make_part(layers, lengths)
    routing = []
    for n in numbers:
        mine = table[table["layer"] == n]
        experts = mine["expert"].to_numpy().reshape(-1, 6).astype(np.int16)
        routing.append(SiteRouting(experts, mine["weight"].to_numpy().reshape(-1, 6).astype(np.float32), experts))
    stats = part_statistics(replace(blank, routing=tuple(routing)), layers)
    assert stats.n_tokens(0) == golden["tokens"]
    for i, n in enumerate(numbers):
        figures, load = golden["layers"][str(n)], stats.load(i)
        pairs, first, shared = stats.repetition(i)
        ours = {"cv": balance.cv(load), "maxvio": balance.maxvio(load), "entropy_nats": balance.entropy(load), "gini": balance.gini(load),
                "dead": balance.dead(load), "top_expert": int(load.argmax()), "repeat_any": shared / pairs}  # fmt: skip
        for name, value in ours.items():
            assert value == pytest.approx(figures[name], rel=5e-8), (n, name)
        assert first / pairs == pytest.approx(figures["repeat_first"], rel=5e-8), n
