"""Leaving out documents: against recounting without them, whatever the blocks; coverage of a known truth, beside bootstraps'."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from functools import partial
from math import nan
from types import SimpleNamespace

import numpy as np
import pytest

from analysis import jackknife
from analysis.information import plug_in, plug_in_without, table_information
from analysis.jackknife import FEWEST, MOST_BIAS, jackknife_interval, label_information_interval, vocabulary_interval
from analysis.reading import blocks
from analysis.significance import interval
from analysis.specialization import label_information, labelled_documents
from analysis.token_use import document_use
from analysis.trace import LayerInfo, Trace
from analysis.vocabulary import VARIANTS, vocabulary_specialization
from tests.synthetic import MANY, PLAIN, SPECIAL, TWO_STREAMS, make_part, make_trace
from tests.test_specialization import planted_trace, random_trace


def figure(trace: Trace, layer: LayerInfo, variant: str, left_out: set[int], least: int) -> float:
    """Eq. 8 over ids seen ``least`` times, counted by loops over the documents that are not left out; NaN for no ids."""
    rows = trace.stream_tokens(layer.stream).select(["document", "token_id", "predicted"]).to_pylist()
    seen, used = Counter[int](), defaultdict[int, Counter[int]](Counter)
    for at, (row, experts) in enumerate(zip(rows, trace.experts(layer.index).tolist(), strict=True)):
        following = rows[at + 1]["token_id"] if at + 1 < len(rows) and rows[at + 1]["document"] == row["document"] else None
        token = {"input": row["token_id"], "next": following, "predicted": row["predicted"]}[variant]
        if row["document"] not in left_out and token is not None:
            seen[token] += 1
            used[token].update(e for e in experts if e >= 0)
    return float(np.mean([max(used[t].values(), default=0) / n for t, n in seen.items() if n >= least] or [nan]))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layers", [PLAIN, MANY, SPECIAL, TWO_STREAMS], ids=["plain", "many", "special", "streams"])
@pytest.mark.parametrize(("rows", "units"), [(65_536, 400), (7, 400), (5, 4)], ids=["whole", "cut", "joined"])
def test_interval_is_that_of_counting_again_without_each_document(
    layers: tuple[LayerInfo, ...], variant: str, rows: int, units: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "__defaults__", (rows,))
    monkeypatch.setattr(jackknife, "MOST_UNITS", units)
    lengths = ([5, 3, 9], [6, 3, 9], [7, 3, 9])
    trace = make_trace(layers, [make_part(layers, x, 0, i, 3 * i, sum(map(sum, lengths[:i])), n_ids=6) for i, x in enumerate(lengths)])
    for layer in layers:
        documents = trace.stream_tokens(layer.stream)["document"].unique().to_pylist()
        groups = [{d for i, d in enumerate(documents) if i * min(units, 9) // 9 == g} for g in range(min(units, 9))]
        counts, told = VARIANTS[variant](trace, layer.index), []
        found = vocabulary_interval(trace, counts, 3, partial(lambda *x: x[0].append(x[1:]), told))
        low, high = jackknife_interval(found.value, np.array([figure(trace, layer, variant, g, 3) for g in groups]))
        assert (found.low, found.high) == (pytest.approx(max(low, 0)), pytest.approx(min(high, 1))) and low < high
        assert found.value == pytest.approx(figure(trace, layer, variant, set(), 3))
        assert found.value == pytest.approx(vocabulary_specialization(counts, 3).frequent) and found.missing == ""
        assert (found.documents, found.left_out) == (9, len(groups)) and found == vocabulary_interval(trace, counts, 3)
        assert told[-1] == (54, 54) and len(told) == -(-54 // rows)


def test_an_expert_that_there_is_not_is_refused() -> None:
    """A kernel would count it beyond its table."""
    trace = make_trace()
    counts = VARIANTS["input"](trace, 0)
    assert trace.source is not None
    beyond = SimpleNamespace(experts=lambda site, start, stop: np.full((stop - start, 2), 8, np.int16))
    for ask in (vocabulary_interval, document_use):
        with pytest.raises(ValueError, match="expert ids 8 to 8 at a site of 8 experts"):
            ask(replace(trace, source=beyond), counts)


def test_no_interval_without_documents_says_why() -> None:
    def missing(trace: Trace, least: int = 2) -> str:
        found = vocabulary_interval(trace, VARIANTS["input"](trace, 0), least)
        assert np.isnan([found.low, found.high]).all()
        return found.missing

    assert "statistics only" in missing(replace(make_trace(), source=None, load_tokens=None))
    for n in range(1, FEWEST):
        assert missing(make_trace(PLAIN, [make_part(PLAIN, [50] * n)])) == f"fewer than {FEWEST} documents"
    alone = np.repeat(np.arange(4), 50).astype(np.int32)
    alone[50:] = np.arange(150) + 10  # only the first document repeats an id
    one = make_trace(PLAIN, [make_part(PLAIN, [50] * 4, token_ids=alone)])
    assert missing(one) == missing(one, 1_000) == "no token id is seen so often when one of the documents is left out"


def test_the_jackknife_of_a_mean_is_students_interval() -> None:
    x = np.random.default_rng(0).normal(size=12)
    low, high = jackknife_interval(x.mean(), (x.sum() - x) / 11)
    assert (high - low) / 2 == pytest.approx(2.200985 * x.std(ddof=1) / 12**0.5, rel=1e-5) and (low + high) / 2 == pytest.approx(x.mean())
    for freedom, quantile in ((3, 3.182446), (4, 2.776445), (9, 2.262157), (399, 1.965927)):
        assert jackknife._student(1.959964, freedom) == pytest.approx(quantile, rel=2e-3)


# documents, tokens in each, experts, evenness of an id's experts, how alike documents route an id (0: just alike), how alike their texts are
WORLDS = {"independent": (40, 150, 8, 0.5, 0, 0), "bursts": (40, 150, 8, 0.5, 3, 200), "sharp": (40, 150, 8, 0.05, 5, 200),
          "random": (40, 150, 8, 50, 20, 200), "few": (4, 600, 8, 0.05, 5, 200)}  # fmt: skip


def collection(rng: np.random.Generator, world: tuple, kinds: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """float32 [ids x experts, documents]: top-1 counts of a collection of made-up documents."""
    documents, length, experts, _, alike, texts = world
    out = np.zeros((documents, len(ids), experts), np.float32)
    for d, n in enumerate(rng.poisson(length * rng.gamma(4, 0.25, documents)).clip(5)):
        seen = rng.multinomial(n, rng.dirichlet(ids * texts) if texts else ids)
        share = kinds if not alike else rng.standard_gamma(np.maximum(kinds * alike, 1e-3)) + 1e-30
        out[d] = rng.multinomial(seen, share / share.sum(1, keepdims=True))
    return np.ascontiguousarray(out.reshape(documents, -1).T)


def figures(counts: np.ndarray, experts: int, weights: np.ndarray, least: int = 10) -> np.ndarray:
    """Eq. 8 for every column of ``weights`` [documents, draws]."""
    drawn = (counts @ weights).reshape(-1, experts, weights.shape[1])
    n = drawn.sum(1)
    return (drawn.max(1) / np.maximum(n, 1) * (n >= least)).sum(0) / (n >= least).sum(0)


@pytest.mark.parametrize("name", WORLDS)
def test_leaving_out_documents_covers_where_drawing_them_again_does_not(name: str) -> None:
    """The truth: the figure's mean over collections of documents. 95 % intervals of each, over 120 of them."""
    world, rng = WORLDS[name], np.random.default_rng(1)
    documents, experts = world[0], world[2]
    ids = 1 / np.arange(1, 601)
    ids /= ids.sum()
    kinds, value, found = rng.dirichlet(np.full(experts, world[3]), 600), [], []
    for _ in range(120):
        counts = collection(rng, world, kinds, ids)
        value.append(figures(counts, experts, np.ones((documents, 1), np.float32))[0])
        drawn = rng.multinomial(documents, np.full(documents, 1 / documents), 200).T.astype(np.float32)
        again, t = figures(counts, experts, drawn), value[-1]
        low, high = interval(again)
        left = jackknife_interval(t, figures(counts, experts, 1 - np.eye(documents, dtype=np.float32)))
        found.append([left, (low, high), (2 * t - high, 2 * t - low), (low + t - again.mean(), high + t - again.mean())])
    ends = np.array(found)
    left_out, percentile, basic, moved = ((ends[..., 0] <= np.mean(value)) & (np.mean(value) <= ends[..., 1])).mean(0)
    wide = np.diff(ends[:, 0]).mean() / (2 * 1.96 * np.std(value))
    print(f"{name}: left out {left_out:.3f}, {wide:.2f} times as wide as needed; drawn again: percentile {percentile:.3f}, basic {basic:.3f},"
          f" moved {moved:.3f}")  # fmt: skip
    assert left_out >= 0.94 and percentile <= 0.9 and basic <= 0.75 and 1 <= wide <= 2.4
    assert moved < 0.9 or name != "few"


def test_label_information_is_counted_again_without_each_document() -> None:
    trace = planted_trace(3)
    units, found = labelled_documents(trace, 1), label_information_interval(trace, 1)
    kept = np.arange(len(units.codes))[:, None] != np.arange(len(units.codes))
    without = [
        table_information(np.stack([units.counts[k & (units.codes == x)].sum(0) for x in range(len(units.labels))]))[0] for k in kept
    ]
    measured, parts = label_information(trace, 1).plug_in, len(kept)
    value = parts * measured - (parts - 1) * np.mean(without)
    assert (found.value, found.low, found.high) == pytest.approx((value, *jackknife_interval(value, np.array(without))))
    assert (found.documents, found.left_out, found.missing) == (parts, parts, "") and found.low > 0
    random = label_information_interval(random_trace(3), 0)
    assert random.low < 0 < random.high and random.value < label_information(random_trace(3), 0).plug_in


def test_no_interval_of_label_information_says_why() -> None:
    for trace in (random_trace(0, labels=("a",)), random_trace(0, [30] * 3, labels=("a", "b", "b"))):
        found = label_information_interval(trace, 0)
        assert np.isnan(found.low) and found.missing == "two labels of two documents each are needed"
    few = label_information_interval(random_trace(0, [4] * 4, labels=("a", "b")), 0)
    assert np.isnan(few.low) and "would have to be taken off" in few.missing


# labels, documents of each, experts, how far labels differ, how alike documents of a label are
@pytest.mark.parametrize("world", [(2, 3, 8, 0, 60), (2, 10, 64, 0.5, 20), (5, 40, 64, 0, 300), (5, 40, 64, 0.5, 60), (9, 9, 16, 0.5, 20), (2, 8, 256, 0.5, 300)])  # fmt: skip
def test_the_interval_of_label_information_covers_that_of_endless_documents(world: tuple[int, int, int, float, int]) -> None:
    """Where the bias is within MOST_BIAS; the plug-in value itself lies outside the interval around it nearly always where labels are alike."""
    labels, documents, experts, differ, alike = world
    rng = np.random.default_rng(1)
    kinds = rng.dirichlet(np.full(experts, 3)) * np.exp(differ * rng.standard_normal((labels, experts)))
    kinds /= kinds.sum(1, keepdims=True)
    truth, codes, held, biases = table_information(kinds / labels)[0], np.repeat(np.arange(labels), documents), [], []
    for _ in range(200):
        counts = np.stack([rng.multinomial(400, rng.dirichlet(kinds[x] * alike)) for x in codes]).astype(float)
        table = counts.reshape(labels, documents, experts).sum(1)
        measured, without = plug_in(table[None])[0], plug_in_without(table, counts, codes)
        biases.append((len(codes) - 1) * (without.mean() - measured))
        low, high = jackknife_interval(measured - biases[-1], without)
        held.append(low <= truth <= high)
    assert np.mean(biases) < MOST_BIAS and np.mean(held) >= 0.87, np.mean(held)
