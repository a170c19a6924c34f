"""Capacity over several shuffles: against each shuffle alone, against figures found by hand, and every sentence."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from analysis import open_run
from analysis.capacity import capacity_curves, pool_curves, rank_trace, shuffled_curves
from analysis.capacity_answer import (
    CHEAP,
    batches_in_words,
    drops_in_words,
    mean_curves,
    needs_in_words,
    percent,
    price_in_words,
    range_in_words,
    shuffle_shares,
    shuffles_for,
    tokens_in_words,
    typical_shuffle,
)
from analysis.capacity_keys import batches_of
from analysis.overflow import FACTORS
from analysis.slots import batch_sizes
from analysis.trace import SiteRouting, Trace
from tests.synthetic import TWO_STREAMS, make_part, make_trace, site

DEMO = Path(__file__).parent.parent / "data" / "demo-run"
TITLES = {0: "layer 0", 1: "layer 1"}


@pytest.fixture(scope="module")
def demo() -> Trace:
    return open_run(DEMO)


def at(table: pa.Table, factor: float) -> dict:
    return next(r for r in table.to_pylist() if r["factor"] == factor)


@pytest.mark.parametrize("policy", ["position", "random"])
def test_every_shuffle_is_that_shuffle_alone_and_the_mean_is_theirs(policy: str) -> None:
    trace, seeds = make_trace(TWO_STREAMS), (3, None, 8)
    options = {"size": 2, "preset": "tutel", "seed": 5}
    found = pa.concat_tables([t for _, t in shuffled_curves(trace, seeds, [0.0, 0.5, 1.5], policy, "documents", **options)])
    alone = [capacity_curves(trace, [0.0, 0.5, 1.5], policy, "documents", mixed=m, **options).to_pylist() for m in seeds]
    for seed, rows in zip(seeds, alone, strict=True):
        mine = [{k: v for k, v in r.items() if k != "shuffle"} for r in found.to_pylist() if r["shuffle"] == seed]
        assert repr(mine) == repr(rows)  # NaN gate mass where native drops hide it
    for i, row in enumerate(mean_curves(found).to_pylist()):
        assert (row["site"], row["factor"]) == (alone[0][i]["site"], alone[0][i]["factor"])
        for c in ("dropped", "slots", "top1_dropped", "chance_dropped", "dropped_share"):
            assert row[c] == pytest.approx(np.mean([rows[i][c] for rows in alone]), rel=1e-12)


def test_the_demo_runs_shuffles_are_as_each_alone_gives(demo: Trace) -> None:
    seeds = shuffles_for(demo, "documents", 16)
    found = pa.concat_tables([t for _, t in shuffled_curves(demo, seeds, FACTORS, "probability", "documents", size=16)])
    shares = shuffle_shares(found, 1.25)
    alone = [
        at(pool_curves(capacity_curves(demo, [1.25], "position", "documents", size=16, mixed=s)), 1.25)["dropped_share"] for s in seeds
    ]
    assert len(seeds) == 20 and list(shares.values()) == alone and list(shares) == list(seeds)
    means = mean_curves(found)
    now = at(pool_curves(means), 1.25)
    assert now["dropped_share"] == pytest.approx(np.mean(alone)) and min(alone) < now["dropped_share"] < max(alone)
    assert range_in_words(shares) == f"{percent(min(alone))} to {percent(max(alone))} over 20 shuffles"
    ones = list(shuffle_shares(found, 1.0).values())
    assert typical_shuffle(found) == int(np.argmin(np.abs(np.array(ones) - np.mean(ones))))
    assert pool_curves(means)["factor"].to_pylist() == list(FACTORS)  # in their order, whatever the order of Arrow's groups
    assert means["factor"].to_pylist() == list(FACTORS) * len(demo.layers)


def test_long_runs_are_shuffled_less(demo: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sum(demo.n_tokens(x.stream) * x.top_k for x in demo.layers) < CHEAP
    monkeypatch.setattr("analysis.capacity_answer.CHEAP", 1)
    assert len(shuffles_for(demo, "documents", 16)) == 5 and len(shuffles_for(demo, "documents", 2)) == 1


def two_layers() -> Trace:
    """One batch of 8 tokens; layer 0 sends 6 to expert 0 and 2 to expert 1, layer 1 sends 4 to each."""
    layers = (site(0, 2, 1), site(1, 2, 1))
    sent = [np.array([[0]] * n + [[1]] * (8 - n), np.int16) for n in (6, 4)]
    return make_trace(
        layers, [replace(make_part(layers, [8]), routing=tuple(SiteRouting(e, np.ones((8, 1), np.float32), e) for e in sent))]
    )


def test_the_answer_in_words() -> None:
    curves = capacity_curves(two_layers(), [1.0, 1.25, 1.5, 2.0])
    now = at(pool_curves(curves), 1.0)
    assert drops_in_words(now, 1, " over all layers") == "CF 1 drops 12.5% of assignments over all layers"
    assert drops_in_words(now, 1, chance=0.0002) == "CF 1 drops 12.5% of assignments; by chance below 0.1%"
    assert price_in_words(now) == "Lost with them: 12.5% of the gate weight."
    assert range_in_words({0: 0.1, 4: 0.15}) == "10% to 15% over 2 shuffles" and range_in_words({0: 0.125, 1: 0.125}) == ""
    told = {**now, "gate_mass_lost_share": math.nan, "assignments": 32, "top1_dropped_share": 0.25}
    assert price_in_words(told) == "Lost with them: 25% of first choices."
    assert price_in_words({**told, "gate_mass_lost_share": 0.1}) == "Lost with them: 10% of the gate weight and 25% of first choices."
    assert price_in_words({**told, "assignments": 16}) == ""  # the first choice is the only one
    assert tokens_in_words(now, 2) == "Tokens that lose all experts of a layer: 12.5% (mean of 2 layers)"
    assert tokens_in_words(now, 1) == "Tokens that lose all experts: 12.5%"


def test_the_factor_needed_is_told_for_all_layers_and_for_the_worst() -> None:
    curves = capacity_curves(two_layers(), [1.0, 1.25, 1.5, 2.0])
    assert needs_in_words(curves, TITLES, 0.07) == (
        "To drop 7% or less: CF 1.25 pooled over the layers, 25% of slots idle; at every layer: CF 1.5 (layer 0 needs most), 33.3% of slots idle"
    )
    alone = curves.filter(pc.equal(curves["site"], 0))
    assert needs_in_words(alone, {0: "layer 0"}) == "To drop 1% or less: CF 1.5, 33.3% of slots idle"
    few = capacity_curves(two_layers(), [1.0, 1.25])
    assert needs_in_words(few, TITLES) == "To drop 1% or less no factor up to 1.25 is enough"
    assert needs_in_words(few, TITLES, 0.07).endswith("no factor up to 1.25 is enough at every layer (layer 0)")


@pytest.mark.parametrize(
    ("lengths", "scope", "size", "said"),
    [
        ([3, 4, 5, 6, 7], "documents", 2, "3 batches of 2 documents, the last of 1"),
        ([3, 4, 5, 6], "documents", 2, "2 batches of 2 documents"),
        ([3, 4, 5, 6], "documents", 16, "1 batch, all 4 documents"),
        ([3], "documents", 16, "1 batch, one document"),
        ([3, 4, 5], "tokens", 5, "3 batches of 5 tokens, the last of 2"),
        ([3, 4], "tokens", 512, "1 batch, all 7 tokens"),
        ([3, 4], "document", None, "2 batches of one document"),
        ([3, 4], "run", None, "1 batch, the whole run"),
        ([3, 4], "tokens", 1, "7 batches of 1 token"),
    ],
)
def test_batches_are_told_as_they_are(lengths: list[int], scope: str, size: int | None, said: str) -> None:
    assert batches_in_words(batch_sizes(lengths, scope, size), len(lengths), scope, size) == said


def test_the_batches_of_a_stream_are_those_that_are_ranked(demo: Trace) -> None:
    ranked = rank_trace(demo, "position", "documents", size=16, mixed=4, layers=[0])
    assert np.array_equal(ranked.queues[0].batches.order, batches_of(demo, "decoder", "documents", 16, 4).order)


def test_small_shares_are_never_told_as_none() -> None:
    assert [percent(x) for x in (0.0, 0.0004, 0.0104, 0.9996, 1.0, math.nan)] == ["0%", "below 0.1%", "1%", "over 99.9%", "100%", "none"]
