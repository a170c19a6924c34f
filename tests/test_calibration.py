"""How often is something claimed where there is nothing? Runs made under honest nulls, counted by whether they claim any cell.

Where nothing is true every claim is false, and the false discovery rate is the share of runs with any: at q <= 5% at most 5% of
them, give or take what so few runs tell. ``pytest -s`` prints the table; ROUTERSCOPE_LONG=1 simulates 400 runs of each world.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from itertools import combinations
from math import comb

import numpy as np
import pytest

from analysis.pair_tests import coactivation_test, flow_test
from analysis.specialization import Preferences, by_group, by_label
from analysis.token_use import document_use, leading_ids, top_tokens_of
from analysis.trace import SiteRouting, Trace
from analysis.vocabulary import input_tokens
from tests.synthetic import make_part, make_trace, site

RUNS = 400 if os.environ.get("ROUTERSCOPE_LONG") else 16
EXPERTS = 16
pytestmark = pytest.mark.timeout(3600 if RUNS == 400 else 300)


def most_runs(runs: int, rate: float = 0.05, odds: float = 0.001) -> int:
    """The most of ``runs`` that claim something at ``rate``, but for one case in 1 / ``odds``."""
    tail = 1.0
    for n in range(runs + 1):
        tail -= comb(runs, n) * rate**n * (1 - rate) ** (runs - n)
        if tail < odds:
            return n
    return runs


@dataclass(frozen=True)
class World:
    """Documents whose tokens' experts, kinds and ids are drawn without regard to each other within the document.

    skew     standard deviation of the experts' log odds, over the run; ``differ``: of a document's from these, and of its kinds' alike.
    groups   share of the tokens of each kind.  few  documents that hold the last kind (0: all).
    topics   2: every other document has odds of its own for experts and for kinds, as code and prose do.
    burst    mean length of stretches over which a token's experts are those of the one before, and of others over which its kind is.
    """

    documents: int
    length: int = 100
    skew: float = 1.0
    differ: float = 0.5
    groups: tuple[float, ...] = (0.6, 0.3, 0.1)
    few: int = 0
    topics: int = 1
    burst: float = 1.0
    k: int = 2


WORLDS = {
    "random routing": World(20, skew=0, differ=0),
    "documents differ": World(20, differ=1),
    "6 documents": World(6),
    "40 documents": World(40),
    "rare experts": World(40, 50, skew=3),
    "rare experts, rare kinds": World(40, 50, skew=3, groups=(0.9, 0.08, 0.02)),
    "rare experts, rare kinds, 12 documents": World(12, 50, skew=3, groups=(0.9, 0.08, 0.02)),
    "a kind in few documents": World(40, 60, skew=2, groups=(0.7, 0.29, 0.01), few=7),
    "short documents": World(100, 8, skew=2),
    "two topics, documents joined": World(820, 10, topics=2),
    "bursts": World(30, 100, burst=6),
    "bursts of rare experts and kinds": World(30, 100, skew=2, groups=(0.85, 0.1, 0.05), burst=6),
}


def drawn(rng: np.random.Generator, odds: np.ndarray, k: int) -> np.ndarray:
    """int16 [tokens, k]: k of the columns of ``odds`` [tokens, n] without return."""
    return np.argsort(-(odds + rng.gumbel(size=odds.shape)), 1)[:, :k].astype(np.int16)


def run_of(world: World, seed: int, labels: str = "ab", by_length: bool = False) -> tuple[Trace, np.ndarray]:
    """(a run of one site, kinds int [tokens]); documents are labelled with ``labels`` in turn, which mean nothing; or the shortest first."""
    rng = np.random.default_rng(seed)
    lengths = np.maximum(rng.poisson(world.length * rng.gamma(4, 0.25, world.documents)), 2)
    lengths = np.sort(lengths) if by_length else lengths
    topic = np.arange(world.documents) % world.topics

    def odds(centre: np.ndarray) -> np.ndarray:
        there = centre + (rng.normal(size=(world.topics, len(centre))) * 1.5 if world.topics > 1 else 0)
        return np.broadcast_to(there, (world.topics, len(centre)))[topic] + world.differ * rng.normal(size=(world.documents, len(centre)))

    kinds = odds(np.log(world.groups))
    if world.few:
        kinds[world.few :, -1] = -np.inf
    owner = np.repeat(np.arange(world.documents), lengths)
    first = np.append(True, owner[1:] != owner[:-1])

    def held(values: np.ndarray) -> np.ndarray:
        return values[np.maximum.accumulate(np.where(first | (rng.random(len(owner)) * world.burst < 1), np.arange(len(owner)), 0))]

    experts = held(drawn(rng, odds(world.skew * rng.normal(size=EXPERTS))[owner], world.k))
    layers = (site(0, EXPERTS, world.k),)
    ids = held(drawn(rng, odds(-1.1 * np.log(np.arange(1, 81)))[owner], 1)[:, 0]).astype(np.int32)
    part = make_part(layers, lengths.tolist(), seed, labels=labels, token_ids=ids)
    routing = SiteRouting(experts, np.full(experts.shape, 0.5, np.float32), experts)
    return make_trace(layers, [replace(part, routing=(routing,))]), held(drawn(rng, kinds[owner], 1)[:, 0].astype(int))


def preferences(world: World, seed: int) -> Preferences:
    trace, kinds = run_of(world, seed)
    return by_group(trace, 0, "kind", [str(i) for i in range(len(world.groups))], kinds)


@pytest.mark.parametrize("name", WORLDS)
def test_kinds_of_token_that_say_nothing_within_documents(name: str) -> None:
    world, runs, cells = WORLDS[name], 0, 0
    for seed in range(RUNS):
        found = preferences(world, seed)
        runs += bool(found.significant.any())
        cells += int(found.significant.sum())
    print(f"kinds, {name}: {runs} of {RUNS} runs claim something, {cells} cells in all")
    assert runs <= most_runs(RUNS)


LABELLED = {
    "random routing": (World(20, skew=0, differ=0), "ab", False),
    "documents differ": (World(20, differ=1), "abcd", False),
    "8 documents": (World(8), "ab", False),
    "rare experts": (World(40, 50, skew=3), "abcd", False),
    "a label of 3 of 40 documents": (World(40, 50, skew=2), "aaab" * 3 + "a" * 28, False),
    "a label of the 5 shortest": (World(40, 50, skew=2), "a" * 5 + "b" * 35, True),
    "a label of the 5 longest": (World(40, 50, skew=2), "a" * 35 + "b" * 5, True),
    "bursts": (World(30, 100, skew=2, burst=6), "abc", False),
}  # fmt: skip


@pytest.mark.parametrize("name", LABELLED)
def test_labels_that_say_nothing(name: str) -> None:
    world, labels, by_length = LABELLED[name]
    found = [by_label(run_of(world, seed, labels, by_length)[0], 0).significant.sum() for seed in range(RUNS)]
    runs = int(np.count_nonzero(found))
    print(f"labels, {name}: {runs} of {RUNS} runs claim something, {sum(found)} cells in all")
    assert runs <= most_runs(RUNS)


@pytest.mark.parametrize("name", WORLDS)
def test_token_ids_that_say_nothing_within_documents(name: str) -> None:
    """All top tokens of all experts of a layer, as its page shows them."""
    cells = []
    for seed in range(RUNS):
        trace = run_of(WORLDS[name], seed)[0]
        counts = input_tokens(trace, 0)
        use = document_use(trace, counts, leading_ids(counts, range(EXPERTS), most=8))
        cells.append(sum(t.q <= 0.05 for uses in top_tokens_of(trace, counts, range(EXPERTS), most=8, use=use) for t in uses))
    runs = int(np.count_nonzero(cells))
    print(f"token ids, {name}: {runs} of {RUNS} runs claim something, {sum(cells)} cells in all")
    assert runs <= most_runs(RUNS)


@dataclass(frozen=True)
class Paths:
    """Documents whose tokens draw ``k`` of ``classes`` experts at each of two sites, at fixed odds without return; see World."""

    documents: int
    length: int
    skew: float = 1.0
    differ: float = 0.3
    topics: int = 1
    classes: int = 8
    k: int = 2


PATHS = {
    "random routing": Paths(20, 50, skew=0, differ=0),
    "documents differ": Paths(40, 60, differ=1),
    "rare experts": Paths(40, 60, skew=3),
    "two topics, documents joined": Paths(900, 12, topics=2),
    "two topics, documents joined, 4 of 10 experts": Paths(900, 12, topics=2, classes=10, k=4),
    "many experts, documents joined": Paths(900, 10, skew=2, classes=24),
    "tiny documents": Paths(900, 5, skew=1.5),
}


def paths_of(world: Paths, seed: int) -> Trace:
    rng, every = np.random.default_rng(seed), np.array(list(combinations(range(world.classes), world.k)))
    lengths = np.maximum(rng.poisson(world.length, world.documents), 2)
    owner, topic, sites = np.repeat(np.arange(world.documents), lengths), np.arange(world.documents) % world.topics, []
    for _ in range(2):
        odds = world.skew * rng.normal(size=world.classes) + (world.topics > 1) * 1.5 * rng.normal(size=(world.topics, world.classes))
        odds = odds[topic] + world.differ * rng.normal(size=(world.documents, world.classes))
        weight = np.exp(odds[:, every].sum(2)).cumsum(1)
        places = (rng.random(len(owner)) * weight[owner, -1])[:, None] > weight[owner]
        sites.append(every[places.sum(1)].astype(np.int16))
    layers = tuple(site(i, world.classes, world.k) for i in range(2))
    part = make_part(layers, lengths.tolist(), seed)
    return make_trace(layers, [replace(part, routing=tuple(SiteRouting(x, np.full(x.shape, 0.5, np.float32), x) for x in sites))])


@pytest.mark.parametrize("name", PATHS)
def test_pairs_of_experts_that_meet_by_chance_within_documents(name: str) -> None:
    for kind, test in (("together", coactivation_test), ("flow", flow_test)):
        found = [test(paths_of(PATHS[name], seed), 0).claimed for seed in range(RUNS)]
        runs = int(np.count_nonzero(found))
        print(f"pairs {kind}, {name}: {runs} of {RUNS} runs claim something, {sum(found)} cells in all")
        assert runs <= most_runs(RUNS), kind
